"""Nameless shared memory: the memfds under arenas, generation tables and weights. Does not import torch.

Life cycle: the supervisor creates a memfd (`create_memfd`: sparse, its size sealed), hands its owner the
descriptor and everybody else a read-only reopening of it (`reopen_readonly`); each side maps what it was
given (`map_bytes`). Nothing here has a name, so nothing can outlive its last descriptor and mapping, or hit
a small /dev/shm.

The size never changes, because a shrink would kill readers with SIGBUS: memory is taken by `fallocate` or
by first touch, and given back by `punch_hole`. What lies where is left to arena.py and the models.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from memserve.errors import MemoryError_

_FALLOC_FL_KEEP_SIZE = 0x01
_FALLOC_FL_PUNCH_HOLE = 0x02
_MADV_POPULATE_READ = 22  # Linux 5.14; not in Python's mmap module
_MADV_POPULATE_WRITE = 23
_PIECE_BYTES = 32 << 20  # of a long allocation or population: between pieces it can be stopped

# Python's own mmap.madvise keeps the GIL for the whole call; a ctypes call lets it go.
_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


def create_memfd(name: str, num_bytes: int) -> int:
    """A new memfd of `num_bytes` zeros, sealed against growing and shrinking; the caller owns the descriptor.

    It is sparse (takes no memory yet) and close-on-exec; `name` only shows up in /proc. Raises MemoryError_
    if the kernel refuses.
    """
    assert num_bytes > 0, num_bytes
    try:
        fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    except OSError as error:
        raise MemoryError_(f"cannot create shared memory for {name}: {error.strerror}") from error
    try:
        os.ftruncate(fd, num_bytes)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    except OSError as error:
        os.close(fd)
        raise MemoryError_(f"cannot size shared memory for {name}: {error.strerror}") from error
    return fd


def reopen_readonly(fd: int) -> int:
    """A second descriptor of the same memfd that can only be read from; the caller owns it."""
    return os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)


def fallocate(fd: int, offset: int, num_bytes: int) -> None:
    """Back `[offset, offset + num_bytes)` with real memory now, keeping what is there.

    Raises MemoryError_ if that memory is not there. A memfd has no quota of its own and the kernel
    overcommits, so what the machine has available is checked first; limits of a container are the planner's
    concern.
    """
    check_available(num_bytes)
    end = offset + num_bytes
    for start in range(offset, end, _PIECE_BYTES):
        try:
            os.posix_fallocate(fd, start, min(_PIECE_BYTES, end - start))
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.ENOMEM):
                raise
            raise MemoryError_(
                f"{num_bytes} bytes of shared memory do not fit: {end - start} bytes are missing"
            ) from error


def check_available(num_bytes: int) -> None:
    """Raises MemoryError_ unless the machine has so much memory left."""
    missing = num_bytes - available_bytes()
    if missing > 0:
        raise MemoryError_(f"{num_bytes} bytes of shared memory do not fit: {missing} bytes are missing")


def punch_hole(fd: int, offset: int, num_bytes: int) -> None:
    """Give the memory of `[offset, offset + num_bytes)` back to the machine; whole pages read as zeros from
    now on.

    Pages that the range covers in part are zeroed there, not freed. Mappings stay valid.
    """
    if _libc.fallocate(fd, _FALLOC_FL_PUNCH_HOLE | _FALLOC_FL_KEEP_SIZE, offset, num_bytes) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def release(mapped: NDArray[np.uint8]) -> None:
    """`punch_hole` through a writable mapping: part of an array from `map_bytes`. Pages that it covers in
    part stay as they are.
    """
    start = -(-mapped.ctypes.data // mmap.PAGESIZE) * mmap.PAGESIZE
    stop = (mapped.ctypes.data + mapped.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if start < stop and _libc.madvise(start, stop - start, mmap.MADV_REMOVE) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def resident_bytes(fd: int) -> int:
    """Memory that the memfd takes now (holes take none)."""
    return os.fstat(fd).st_blocks * 512


def map_bytes(fd: int, num_bytes: int, *, writable: bool) -> NDArray[np.uint8]:
    """The first `num_bytes` of a memfd as a shared uint8 array; read-only memory unless `writable`.

    The array owns the mapping: it is unmapped when the last view of it (a tensor counts) is gone, so no
    view can ever dangle. `fd` stays the caller's and may be closed. Raises MemoryError_ if the memfd is
    smaller than that (a read past its end would be a SIGBUS) or cannot be mapped, PermissionError for a
    writable mapping of a read-only descriptor.
    """
    if os.fstat(fd).st_size < num_bytes:
        raise MemoryError_(f"shared memory of {os.fstat(fd).st_size} bytes is mapped as {num_bytes}")
    prot = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
    try:
        return np.frombuffer(mmap.mmap(fd, num_bytes, flags=mmap.MAP_SHARED, prot=prot), dtype=np.uint8)
    except OSError as error:
        if error.errno != errno.ENOMEM:
            raise
        raise MemoryError_(f"cannot map {num_bytes} bytes of shared memory: {error.strerror}") from error


def populate(
    mapped: NDArray[np.uint8],
    stop: threading.Event | None = None,
    progress: Callable[[float], None] | None = None,
) -> bool:
    """Touch every page of an array from `map_bytes`, so that later accesses do not fault; False if stopped
    midway.

    Contents are not changed, also not those being written meanwhile. A first touch is several times slower
    than a copy, hence this; the GIL is free meanwhile. Holes are filled with memory. `progress` is told the
    fraction that is done. Raises MemoryError_ if there is not enough memory.
    """
    advice = _MADV_POPULATE_WRITE if mapped.flags.writeable else _MADV_POPULATE_READ
    for start in range(0, len(mapped), _PIECE_BYTES):
        if stop is not None and stop.is_set():
            return False
        if progress is not None:
            progress(start / len(mapped))
        piece = mapped[start : start + _PIECE_BYTES]
        if _libc.madvise(piece.ctypes.data, piece.nbytes, advice) == 0:
            continue
        number = ctypes.get_errno()
        if number != errno.EINVAL:
            raise MemoryError_(f"cannot populate shared memory: {os.strerror(number)}")
        # A kernel before 5.14. Reading backs the hole with a page too and, unlike writing, cannot undo a
        # store of another thread.
        int(piece[:: mmap.PAGESIZE].max())
    return True


def available_bytes() -> int:
    """Memory that the machine has left, by its own account."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    raise MemoryError_("/proc/meminfo does not say how much memory is available")
