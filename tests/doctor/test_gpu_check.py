"""The check of a GPU, where there is none."""

from __future__ import annotations

import sys

import pytest
import torch

from benchmarks import gpu_check


def test_without_a_gpu_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu_check.py"])
    assert gpu_check.main() == 2
    assert "torch finds no GPU on this machine" in capsys.readouterr().err


@pytest.mark.parametrize(("rate", "passed"), [(7e11, True), (6.9e11, False), (float("nan"), False)])
def test_a_share_of_the_ceiling_passes_or_not(rate: float, passed: bool) -> None:
    assert gpu_check._share("a pull", rate, 1e12, 0.7).passed is passed
