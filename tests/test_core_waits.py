"""Waits for a core."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from memserve import core_waits
from memserve.core_waits import longest_wait, read_waits


def test_every_thread_of_this_process_is_read() -> None:
    waits = read_waits()
    if not waits:
        pytest.skip("this kernel does not count waits")
    assert str(threading.get_native_id()) in waits
    assert all(ms >= 0 for ms in waits.values())


def test_a_kernel_that_does_not_count(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(core_waits, "_TASKS", tmp_path / "absent")
    assert read_waits() == {}
    (tmp_path / "7").mkdir()
    (tmp_path / "7" / "schedstat").write_text("12 3500000 2\n")
    (tmp_path / "8").mkdir()
    monkeypatch.setattr(core_waits, "_TASKS", tmp_path)
    assert read_waits() == {"7": 3.5}


def test_the_longest_wait_between_two_readings() -> None:
    assert longest_wait({"1": 5.0, "2": 1.0}, {"1": 6.0, "2": 4.0}) == 3.0
    assert longest_wait({"1": 5.0}, {"1": 5.5, "2": 9.0}) == 0.5  # a thread that is new waited for no one
    assert longest_wait({}, {}) == 0.0
