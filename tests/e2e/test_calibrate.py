"""`memserve calibrate` on the bundled model, with real workers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from memserve.router.calibration.command import KindReport, Report
from tests.e2e.server_process import REPOSITORY


def calibrate(folder: Path, *options: str) -> KindReport:
    """The report on the one kind of worker that there is."""
    command = [sys.executable, "-m", "memserve", "calibrate", "--quick", "--json", "--device", "cpu"]
    done = subprocess.run(
        [*command, "--calibration", str(folder), "--max-model-len", "128", *options],
        cwd=REPOSITORY,
        capture_output=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    (kind,) = msgspec.json.decode(done.stdout, type=Report).kinds
    return kind


def test_a_second_run_uses_the_file(tmp_path: Path) -> None:
    # 1. The first measures, predicts, and keeps what it found.
    workers = ("--prefill", "1", "--decode", "1", "--threads", "1")
    first = calibrate(tmp_path / "cache", *workers)
    assert first.source == "measured" and first.instances == ("prefill-0", "decode-0")
    assert first.held_out_steps is not None and first.prefills_error is not None
    assert {point.num_tokens for point in first.prefills} == {50, 111}
    assert max(point.num_cached for point in first.prefills) > 64
    assert all(point.predicted_ms > 0 and point.measured_ms > 0 for point in first.prefills)
    assert first.model.links.from_device.bytes_per_ms != first.model.links.swap_in.bytes_per_ms
    (file,) = (tmp_path / "cache").iterdir()
    content = file.read_bytes()

    # 2. The second finds that, also for other instances of the kind, and leaves it as it is.
    second = calibrate(tmp_path / "cache", "--colocated", "1", "--threads", "1", "--reuse")
    assert second.source == "file" and second.instances == ("colocated-0",)
    assert second.model == first.model and file.read_bytes() == content


def test_a_plot_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot = tmp_path / "plot.png"
    options = ("--colocated", "1", "--threads", "1", "--plot", str(plot))
    assert calibrate(Path("off"), *options).source == "guess"
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("name", "said"), [("plot.json", "is none of .png"), ("gone/plot.png", "no folder")])
def test_a_plot_that_cannot_be_drawn_is_told_before_the_work(tmp_path: Path, name: str, said: str) -> None:
    pytest.importorskip("matplotlib")
    command = [sys.executable, "-m", "memserve", "calibrate", "--quick", "--calibration", "off", "--plot"]
    done = subprocess.run(
        [*command, str(tmp_path / name)], cwd=REPOSITORY, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("memserve: --plot: ") and said in done.stderr
