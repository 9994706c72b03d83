"""The check of a GPU, where there is none."""

from __future__ import annotations

import re
import sys
from pathlib import Path

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


def test_parts_that_there_are_not_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--only", "16"])
    with pytest.raises(SystemExit, match="2"):
        gpu_check.main()


def test_steps_and_attention_are_held_against_their_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = {
        "gpu_engine.py": {
            "matmul_flop_per_s": 7e14,
            "rows": [
                {"name": "decode, batch 1", "ours_ms": 4.0, "share": 0.81, "floor": 0.8},
                {"name": "prefill of 8192", "ours_ms": 300.0, "share": 0.54, "floor": 0.55},
            ],
        },
        "kernels.py": {"results": [{"ms": 0.3, "fraction": 0.8}]},
    }
    monkeypatch.setattr(gpu_check, "_measured", lambda script, *options: measured[script])
    lines = {line.what: line.passed for line in gpu_check.measure_engine()}
    assert lines == {
        "matrix product, bfloat16": True,
        "decode, batch 1": True,
        "prefill of 8192": False,
        "decode attention 64 x 4k": True,
    }


def test_a_benchmark_that_fails_is_told_with_what_it_said() -> None:
    with pytest.raises(RuntimeError, match=r"gpu_engine.py failed: .*no GPU here"):
        gpu_check._measured("gpu_engine.py", "--no-reference")


@pytest.mark.parametrize(("rate", "passed"), [(7e11, True), (6.9e11, False), (float("nan"), False)])
def test_a_share_of_the_ceiling_passes_or_not(rate: float, passed: bool) -> None:
    assert gpu_check._share("a pull", rate, 1e12, 0.7).passed is passed


def test_each_test_of_kernels_is_in_one_process() -> None:
    """With whatever plugins there are: the options of this project's own need one that a GPU machine may
    lack.
    """
    found: list[str] = []
    for _, choice in gpu_check.KERNEL_TESTS:
        names = [name for name in KERNEL_TESTS if _is_chosen(choice, name)]
        assert names, choice
        found += names
    assert sorted(found) == sorted(KERNEL_TESTS)


def _is_chosen(choice: str, name: str) -> bool:
    """As `-k` has it, of words, `and` and `not`."""
    return all(
        (word.removeprefix("not ") in name) is not word.startswith("not ") for word in choice.split(" and ")
    )


def _kernel_tests() -> list[str]:
    """The names as pytest knows them, of attention with its windows."""
    text = (gpu_check.REPOSITORY / "tests/gpu/test_kernels.py").read_text()
    names = []
    for part in text.split("\n\n\n"):
        windows = re.findall(r'"window", \[None, (\d+)\]', part)
        for name in re.findall(r"^def (test_\w+)", part, re.M):
            names += [f"{name}[{window}]" for window in ("None", *windows)] if windows else [name]
    return names


KERNEL_TESTS = _kernel_tests()


@pytest.mark.parametrize(("body", "passed"), [("pass", True), ("assert False", False)])
def test_a_run_of_tests_is_a_line(tmp_path: Path, body: str, passed: bool) -> None:
    """Also where what it runs warns: on another machine that says nothing of the GPU."""
    warns = "import pytest, warnings\n\n@pytest.mark.gpu\ndef test_it():\n    warnings.warn('old')\n    "
    path = tmp_path / "test_it.py"
    path.write_text(warns + body + "\n")
    line = gpu_check._tests_line("it", gpu_check._start_tests(str(path), ""))
    assert line.passed is passed and ("1 passed" if passed else "1 failed") in line.found
