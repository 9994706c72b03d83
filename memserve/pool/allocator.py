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

A block that goes through a request is allocated once and freed once, so both are a cost of every prefill
chunk. For a hundred blocks it is the calls of NumPy that cost, not the elements: indexing, `nonzero` and
`argmin` take a fifth of a microsecond, a comparison or sum half of one, `min` and `all` a whole one.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray

BlockIds = NDArray[np.int64]

# How far to look for a run, in ids and in ids for each block wanted: enough to find one mostly, few enough
# to cost little.
_SCAN = 512
_SCAN_PER_BLOCK = 8
_SCAN_MOST = 1 << 14  # where few are free: what an eviction has just freed lies together

_WITHDRAWN = -1  # as a count: neither free nor anybody's

_ONE = np.array(1, dtype=np.uint64)  # an array adds quicker than a scalar does


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
        self._is_lost: NDArray[np.bool_] = generations % np.uint64(2) == 1
        self._num_lost = int(self._is_lost.sum())
        self._is_ready = ~self._is_lost  # free, and not lost
        self._lowest = 0  # no block below this id is ready

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
        if num_lost > 0:
            self._make_ready(num_lost)
        ids = self._choose(num_blocks)
        self._is_ready[ids] = False
        self._counts[ids] = 1
        self._generations[ids] += _ONE
        self._num_free -= num_blocks
        return ids

    def withdraw(self, ids: BlockIds) -> None:
        """Free blocks, of which none is there twice, are not to be given out until `restore`, and their
        memory may go. So lost ones among them no longer verify.
        """
        assert not self._counts[ids].any(), f"blocks in use are withdrawn: {ids[self._counts[ids] != 0]}"
        self._counts[ids] = _WITHDRAWN
        lost = ids[self._is_lost[ids]]
        self._generations[lost] += _ONE
        self._num_lost -= len(lost)
        self._is_lost[ids] = False
        self._is_ready[ids] = False
        self._num_free -= len(ids)

    def is_withdrawn(self, ids: BlockIds) -> NDArray[np.bool_]:
        """Which of `ids` are withdrawn."""
        is_withdrawn: NDArray[np.bool_] = self._counts[ids] == _WITHDRAWN
        return is_withdrawn

    def restore(self, ids: BlockIds) -> None:
        """End a `withdraw`: they are free."""
        assert (self._counts[ids] == _WITHDRAWN).all()
        self._counts[ids] = 0
        self._is_ready[ids] = True
        self._num_free += len(ids)
        self._lowest = 0

    def renew(self, ids: ArrayLike) -> None:
        """Their content is about to change: addresses given out so far no longer verify. They stay held."""
        held, _ = self._held(ids)
        self._generations[held] += np.uint64(2)

    def lock(self, ids: ArrayLike) -> None:
        """One holder more for each of `ids`: they stay what they are until it calls `unlock`."""
        held, counts = self._held(ids)
        self._counts[held] = counts + 1

    def free(self, ids: ArrayLike) -> None:
        """One holder fewer for each of `ids`; those without any are free."""
        freed, counts = self._held(ids)
        if len(freed) == 0:
            return
        if counts.item(counts.argmax()) > 1:
            self._counts[freed] = counts - 1
            freed = freed[counts == 1]
            if len(freed) == 0:
                return
        else:
            self._counts[freed] = 0
        self._generations[freed] += _ONE
        if self._on_free is not None:
            self._on_free(freed)
        self._is_ready[freed] = True
        self._num_free += len(freed)
        self._lowest = min(self._lowest, freed.item(0))

    def unlock(self, ids: ArrayLike) -> None:
        """End a `lock`. All holders are equal: it is `free`, by the name that pairs with a lock."""
        self.free(ids)

    def held_blocks(self) -> BlockIds:
        """The blocks that somebody holds, ascending."""
        return np.flatnonzero(self._counts > 0)

    def _held(self, ids: ArrayLike) -> tuple[BlockIds, NDArray[np.int32]]:
        """`ids`, ascending, and their counts, after a check that each is somebody's and none there twice."""
        held = np.array(ids, dtype=np.int64)
        held.sort()
        if len(held) == 0:
            return held, np.empty(0, dtype=np.int32)
        assert held.item(0) >= 0 and held.item(-1) < len(self._counts), f"no such blocks: {held}"
        if len(held) > 1:
            is_new = held[1:] != held[:-1]
            assert is_new.item(is_new.argmin()), f"blocks given twice: {held}"
        counts = self._counts[held]
        assert counts.item(counts.argmin()) > 0, f"blocks that nobody holds: {held[counts == 0]}"
        return held, counts

    def _make_ready(self, num_lost: int) -> None:
        """The lowest lost blocks are free like any other from now on, with the generation of such."""
        lost = np.flatnonzero(self._is_lost)[:num_lost]
        self._generations[lost] += _ONE
        self._is_lost[lost] = False
        self._is_ready[lost] = True
        self._num_lost -= num_lost
        self._lowest = 0

    def _choose(self, num_blocks: int) -> BlockIds:
        """The ids to be allocated next: of all windows of successive ready ids looked at, the first that
        spans the fewest. At least that many blocks must be ready.
        """
        lowest = self._lowest
        if num_blocks == 1:
            lowest += int(self._is_ready[lowest:].argmax())
            self._lowest = lowest + 1
            return np.array([lowest], dtype=np.int64)
        ids_per_ready = len(self._is_ready) // (self._num_free - self._num_lost)
        to_choose_from = min(2 * num_blocks * ids_per_ready, _SCAN_MOST)
        length = max(_SCAN, num_blocks * _SCAN_PER_BLOCK, to_choose_from)
        while len(ready := self._is_ready[lowest : lowest + length].nonzero()[0]) < num_blocks:
            assert lowest + length < self.num_blocks, "fewer blocks are ready than were counted"
            length *= 4
        first = 0
        if ready.item(num_blocks - 1) - ready.item(0) >= num_blocks:  # the first is not a run already
            first = int((ready[num_blocks - 1 :] - ready[: len(ready) - num_blocks + 1]).argmin())
        ids: BlockIds = ready[first : first + num_blocks] + lowest
        self._lowest = ids.item(-1) + 1 if first == 0 else lowest + ready.item(0)
        return ids
