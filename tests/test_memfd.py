"""Memfds: sealed, shared for real, read-only where they should be, and given back."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

import memserve
from memserve import memfd
from memserve.errors import MemoryError_

MIB = 1 << 20


@pytest.fixture
def fd():
    fd = memfd.create_memfd("test", 4 * MIB)
    yield fd
    os.close(fd)


def test_a_new_memfd_is_sparse_zero_sealed_and_not_inherited(fd: int) -> None:
    assert os.fstat(fd).st_size == 4 * MIB
    assert memfd.resident_bytes(fd) == 0
    assert not os.get_inheritable(fd)
    for size in (MIB, 8 * MIB):
        with pytest.raises(PermissionError):
            os.ftruncate(fd, size)
    assert not memfd.map_bytes(fd, 4 * MIB, writable=False).any()


def test_mappings_of_one_memfd_share_their_memory(fd: int) -> None:
    readonly = memfd.reopen_readonly(fd)
    ours = memfd.map_bytes(fd, 4 * MIB, writable=True)
    theirs = memfd.map_bytes(readonly, 4 * MIB, writable=False)
    os.close(readonly)
    ours[MIB] = 77
    assert theirs[MIB] == 77


def test_what_is_mapped_readonly_cannot_be_written(fd: int) -> None:
    readonly = memfd.reopen_readonly(fd)
    mapped = memfd.map_bytes(readonly, MIB, writable=False)
    with pytest.raises(ValueError, match="read-only"):
        mapped[0] = 1
    with pytest.raises(PermissionError):
        memfd.map_bytes(readonly, MIB, writable=True)
    with pytest.raises(OSError):
        os.write(readonly, b"x")
    os.close(readonly)


def test_a_mapping_past_the_end_is_refused(fd: int) -> None:
    with pytest.raises(MemoryError_, match="4194304 bytes is mapped as 4194305"):
        memfd.map_bytes(fd, 4 * MIB + 1, writable=False)


def test_fallocate_takes_memory_and_keeps_contents(fd: int) -> None:
    mapped = memfd.map_bytes(fd, 4 * MIB, writable=True)
    mapped[0] = 9
    memfd.fallocate(fd, 0, 2 * MIB)
    assert memfd.resident_bytes(fd) == 2 * MIB
    assert mapped[0] == 9


def test_fallocate_says_how_much_is_missing() -> None:
    fd = memfd.create_memfd("huge", 1 << 50)
    try:
        with pytest.raises(MemoryError_, match=r"1125899906842624 bytes .* \d+ bytes are missing"):
            memfd.fallocate(fd, 0, 1 << 50)
        assert memfd.resident_bytes(fd) == 0
    finally:
        os.close(fd)


def test_punch_hole_gives_memory_back_under_a_mapping(fd: int) -> None:
    mapped = memfd.map_bytes(fd, 4 * MIB, writable=True)
    mapped[:] = 5
    memfd.punch_hole(fd, MIB, 2 * MIB)
    assert memfd.resident_bytes(fd) == 2 * MIB
    assert mapped[0] == 5 and mapped[3 * MIB] == 5
    assert not mapped[MIB : 3 * MIB].any()
    with pytest.raises(OSError):
        memfd.punch_hole(-1, 0, MIB)


@pytest.mark.parametrize("writable", [True, False])
@pytest.mark.parametrize("old_kernel", [True, False])
def test_populate_backs_every_page_and_keeps_contents(
    fd: int, writable: bool, old_kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if old_kernel:
        monkeypatch.setattr(memfd, "_MADV_POPULATE_READ", 9999)
        monkeypatch.setattr(memfd, "_MADV_POPULATE_WRITE", 9999)
    memfd.map_bytes(fd, 4 * MIB, writable=True)[3] = 8
    mapped = memfd.map_bytes(fd, 4 * MIB, writable=writable)
    assert memfd.populate(mapped)
    assert memfd.resident_bytes(fd) == 4 * MIB
    assert mapped[3] == 8 and mapped[:3].sum() == 0


def test_populate_can_be_stopped(fd: int) -> None:
    stop = threading.Event()
    stop.set()
    assert not memfd.populate(memfd.map_bytes(fd, 4 * MIB, writable=True), stop)
    assert memfd.resident_bytes(fd) == 0


def test_the_mapping_lives_as_long_as_its_last_view() -> None:
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    fd = memfd.create_memfd("memserve-view-test", MIB)
    view = memfd.map_bytes(fd, MIB, writable=True)[10:20].view(np.uint16)
    os.close(fd)
    view[:] = 3
    assert view.sum() == 15
    assert "memserve-view-test" in open_maps()
    del view
    assert "memserve-view-test" not in open_maps()
    assert len(os.listdir("/proc/self/fd")) == before


def test_no_torch_is_needed() -> None:
    code = "import memserve.memfd, memserve.pool.allocator, sys; sys.exit('torch' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(Path(memserve.__file__).parents[1])}
    assert subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode == 0


def open_maps() -> str:
    with open("/proc/self/maps") as maps:
        return maps.read()
