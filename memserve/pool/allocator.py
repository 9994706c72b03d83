"""Which blocks of an arena are free, and how many hold each of the others. Pure: two arrays, no memory.

A block is free (count 0) or held (count ≥ 1). `allocate` gives count 1; whoever else needs the block to
stay locks it; it is free again when the last holder lets go. Invariant: `num_free` counts the zeros.

Generations are bumped here, before the first new write of a new owner and again when a block becomes free:
that is what lets a reader elsewhere notice that an address no longer means what it meant (DESIGN "Moving
KV"). They never fall, and an odd one means held. So a table inherited from a worker that died tells which
blocks it held: they are lost to us, but peers may still pull them by their old addresses, so they are free
here, keep their generation, and are allocated last (DESIGN "Failure").

    generation   0 ──allocate──► 1 ──free──► 2 ──allocate──► 3    the owner dies    3 ──allocate──► 5
                 free            held        free            held                   lost           held
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray

BlockIds = NDArray[np.int64]

# Free blocks looked at for each block wanted: enough to find a run, few enough to cost little.
_CANDIDATES_PER_BLOCK = 4
_SCAN = 1024


class BlockAllocator:
    """A fixed-size block allocator over ids `0 … num_blocks - 1` (MemServe §MemPool API, memory block).

    Args:
        num_blocks: size of the arena.
        generations: uint64 [num_blocks], shared with readers; written here alone.
        on_free: told the ids of blocks that have just become free, before anybody can get them.

    Freeing or locking what nobody holds, or a block twice in one call, is a bug: AssertionError, and nothing
    is changed.
    """

    def __init__(
        self,
        num_blocks: int,
        generations: NDArray[np.uint64],
        on_free: Callable[[BlockIds], None] | None = None,
    ) -> None:
        assert generations.shape == (num_blocks,) and generations.dtype == np.uint64
        self._counts = np.zeros(num_blocks, dtype=np.int32)
        self._generations = generations
        self._on_free = on_free
        self._num_free = num_blocks
        self._lowest = 0  # no block below this id is free, except lost ones
        self._is_lost: NDArray[np.bool_] = generations % np.uint64(2) == 1
        self._num_lost = int(self._is_lost.sum())

    @property
    def num_blocks(self) -> int:
        """Blocks in all."""
        return len(self._counts)

    @property
    def num_free(self) -> int:
        """Blocks that `allocate` could give now, lost ones included."""
        return self._num_free

    @property
    def num_lost(self) -> int:
        """Blocks that an earlier worker held and nobody has taken since."""
        return self._num_lost

    def allocate(self, num_blocks: int) -> BlockIds | None:
        """Take blocks, with count 1 and a new generation: int64 ids, ascending, the caller's own array.

        Ids are low and close together (one run where there is one), so that copies of them coalesce; lost
        blocks are among them only where the others do not suffice. None, and nothing taken, if there are not
        enough.
        """
        if num_blocks > self._num_free:
            return None
        if num_blocks == 0:
            return np.empty(0, dtype=np.int64)
        num_lost = num_blocks - (self._num_free - self._num_lost)
        if num_lost <= 0:
            ids = self._take(num_blocks)
        else:
            lost = np.flatnonzero(self._is_lost)[:num_lost]
            self._is_lost[lost] = False
            self._num_lost -= num_lost
            ids = np.flatnonzero((self._counts == 0) & ~self._is_lost)
            self._lowest = self.num_blocks
        self._counts[ids] = 1
        # To the next odd number: one on from a free block's, two from a lost one's.
        self._generations[ids] = (self._generations[ids] + np.uint64(1)) | np.uint64(1)
        self._num_free -= num_blocks
        return ids

    def lock(self, ids: ArrayLike) -> None:
        """One holder more for each of `ids`: they stay what they are until it calls `unlock`."""
        held = self._held(ids)
        self._counts[held] += 1

    def free(self, ids: ArrayLike) -> None:
        """One holder fewer for each of `ids`; those without any are free."""
        held = self._held(ids)
        counts = self._counts[held] - 1
        self._counts[held] = counts
        freed = held[counts == 0]
        if len(freed) == 0:
            return
        self._generations[freed] += np.uint64(1)
        if self._on_free is not None:
            self._on_free(freed)
        self._num_free += len(freed)
        self._lowest = min(self._lowest, int(freed[0]))

    def unlock(self, ids: ArrayLike) -> None:
        """End a `lock`. All holders are equal: it is `free`, by the name that pairs with a lock."""
        self.free(ids)

    def held_blocks(self) -> BlockIds:
        """The blocks that are not free, ascending."""
        return np.flatnonzero(self._counts)

    def _held(self, ids: ArrayLike) -> BlockIds:
        """`ids`, ascending, after a check that each of them is somebody's and none is there twice."""
        held = np.sort(np.asarray(ids, dtype=np.int64))
        if len(held):
            assert held[0] >= 0 and held[-1] < self.num_blocks, f"no such blocks: {held}"
            assert (held[1:] != held[:-1]).all(), f"blocks given twice: {held}"
            counts = self._counts[held]
            assert counts.min() > 0, f"blocks that nobody holds: {held[counts == 0]}"
        return held

    def _take(self, num_blocks: int) -> BlockIds:
        """The ids to be allocated next, none of them lost."""
        candidates = self._find_free(num_blocks)
        first = 0
        if num_blocks > 1:  # of all windows of successive candidates, the one that spans the fewest ids
            spans = candidates[num_blocks - 1 :] - candidates[: len(candidates) - num_blocks + 1]
            first = int(spans.argmin())
        ids = candidates[first : first + num_blocks].copy()
        self._lowest = int(ids[-1]) + 1 if first == 0 else int(candidates[0])
        return ids

    def _find_free(self, num_blocks: int) -> BlockIds:
        """The lowest ids free and not lost, ascending: at least `num_blocks`, more if there are."""
        wanted = 1 if num_blocks == 1 else _CANDIDATES_PER_BLOCK * num_blocks
        found: list[BlockIds] = []
        start, length = self._lowest, max(_SCAN, wanted)
        while wanted > 0 and start < self.num_blocks:
            is_free = self._counts[start : start + length] == 0
            if self._num_lost:
                is_free &= ~self._is_lost[start : start + length]
            ids = np.flatnonzero(is_free) + start
            found.append(ids)
            wanted -= len(ids)
            start, length = start + length, 2 * length
        return found[0] if len(found) == 1 else np.concatenate(found)
