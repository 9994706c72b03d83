"""Tests of one kind in a process: those marked `gpu`, where they are asked for, or all the others, which see
no GPU whatever the machine has. Triton's kernels then run under its interpreter; that must be said before its
import.
"""

from __future__ import annotations

import os

import pytest


def pytest_configure(config: pytest.Config) -> None:
    marks = config.option.markexpr.split()
    if not ("gpu" in marks and "not" not in marks) and not all("tests/gpu" in each for each in config.args):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""

    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")
