"""Host memory that a GPU copies at full speed and beside everything else: pinned, in chunks of whole blocks.

Only the part of the arena that is in use is pinned, as a pin fills holes with memory. A chunk is pinned as
a whole or not at all, so no copy may cross from one into the next, and memory under a pin must not be given
back: the GPU would go on with pages that are no longer the arena's.
"""

from __future__ import annotations

import logging
import math
import mmap
import threading
from collections.abc import Iterator
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from memserve.cuda.driver import CudaDriver
from memserve.errors import MemserveError
from memserve.pool.allocator import BlockIds

logger = logging.getLogger(__name__)

_CHUNK_BYTES = 64 << 20


class Pins(Protocol):
    """How memory is pinned: CUDA's, or a test's. Both raise CudaError or MemoryError_ if that fails; from any
    thread.
    """

    def pin(self, address: int, num_bytes: int) -> None: ...
    def unpin(self, address: int) -> None: ...


class CudaPins:
    """The `Pins` of a GPU, by the driver: a pin that fails in CUDA's runtime, whose calls torch has too,
    leaves an error there that torch takes for one of the next kernel it launches.
    """

    def __init__(self, driver: CudaDriver, ordinal: int) -> None:
        self._driver = driver
        self._ordinal = ordinal

    def pin(self, address: int, num_bytes: int) -> None:
        """See `Pins`, here and below."""
        self._driver.pin(self._ordinal, address, num_bytes)

    def unpin(self, address: int) -> None:
        self._driver.unpin(self._ordinal, address)


class PinnedBlocks:
    """The blocks of an arena, uint8 [num_blocks, block_bytes], of which the first ones are pinned."""

    def __init__(self, blocks: NDArray[np.uint8], pins: Pins, chunk_bytes: int = _CHUNK_BYTES) -> None:
        self._blocks = blocks
        self._pins = pins
        least: int = math.lcm(blocks.shape[1], mmap.PAGESIZE)
        self._chunk: int = max(1, chunk_bytes // least) * least // blocks.shape[1]  # blocks
        self._num_chunks = 0
        self._gave_up = False
        self._lock = threading.Lock()  # the thread that makes the arena grow pins beside the loop

    @property
    def num_pinned(self) -> int:
        """The blocks under pins: the first ones."""
        return min(self._num_chunks * self._chunk, len(self._blocks))

    def grow(self, num_blocks: int) -> None:
        """Pin at least so many. What cannot be pinned is not: copies of it are slower, and said once."""
        with self._lock:
            while self.num_pinned < min(num_blocks, len(self._blocks)) and not self._gave_up:
                start = self._num_chunks * self._chunk
                piece = self._blocks[start : start + self._chunk]
                try:
                    self._pins.pin(piece.ctypes.data, piece.nbytes)
                except MemserveError as error:
                    self._gave_up = True
                    logger.warning(
                        "the host tier is pinned up to block %d, swaps beyond are slower: %s",
                        start,
                        str(error),
                    )
                else:
                    self._num_chunks += 1

    def shrink(self, num_blocks: int) -> None:
        """Unpin what lies wholly beyond so many. No copy may be under way there."""
        with self._lock:
            while self._num_chunks and (self._num_chunks - 1) * self._chunk >= num_blocks:
                first = (self._num_chunks - 1) * self._chunk
                self._pins.unpin(self._blocks[first:].ctypes.data)
                self._num_chunks -= 1
            self._gave_up = False

    def pieces(self, ids: BlockIds) -> Iterator[tuple[int, int]]:
        """Ranges [start, stop) of positions whose blocks are in one chunk."""
        if len(ids) == 0:
            return
        start = 0
        for stop in (*(np.flatnonzero(np.diff(ids // self._chunk)) + 1).tolist(), len(ids)):
            yield start, stop
            start = stop
