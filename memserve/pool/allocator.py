"""Which blocks of an arena are free, and which have an owner. Pure: a few arrays, no memory.

A block is free or held: `allocate` makes it its caller's, `free` ends that, and in between it has one owner
(DESIGN "The block"); who else needs it to stay has a lock in the index, not here. It is in one of four
states: ready (free), lost (free, see below), withdrawn (nobody's), or held, which has no flag of its own.
Invariant: `num_free` counts the first two.

Generations are raised here, before the first new write of a new owner and again when a block becomes free:
that is what lets a reader elsewhere notice that an address no longer means what it meant (DESIGN "Moving
KV"). They never fall, and an odd one means held. So a table inherited from a worker that died tells which
blocks it held: they are lost to us, but peers may still pull them by their old addresses, so they are free
here, keep their generation, and are allocated last (DESIGN "Failure").

    generation   0 ──allocate──► odd ──free──► even ──allocate──► odd   its owner dies   odd ──allocate──► odd
                 free            held          free               held                  lost              held

A block that goes through a request is allocated once and freed once, so both are a cost of every prefill
chunk. For a hundred blocks it is the calls of NumPy that cost, not the elements: to index by ids or to fill
from an array takes an eighth of a microsecond (from a number, a fifth), a comparison or sum of two arrays a
third, of an array and a number half, `any`, `all` and `min` a whole one; to look for a byte in `tobytes`
less than a tenth. Hence no generation is counted up by itself: all blocks of one call get one that is above
all that were given before. To search an arena takes a microsecond for five thousand ids. So where few are
free, what a search left or a `free` brought is remembered (`_recent`), and looked at first: a hint, which an
allocation checks.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray

BlockIds = NDArray[np.int64]

# How far to look for blocks that lie together, in ids: at least, and for each block wanted.
_SCAN = 256
_SCAN_PER_BLOCK = 4
_SCAN_MOST = 1 << 14  # where few are free: what an eviction has just freed lies together
_LONG_SCAN = 1 << 9  # where more ids must be looked at, some that are known to be ready are as good

_YES, _NO = np.array(True), np.array(False)  # arrays are stored quicker than numbers are


class BlockAllocator:
    """A fixed-size block allocator over ids `0 … num_blocks - 1` (MemServe §MemPool API, memory block).

    Args:
        num_blocks: size of the arena.
        generations: uint64 [num_blocks], shared with readers; written here alone.
        on_free: told the ids of blocks that have just become free, before anybody can get them.

    Freeing what nobody holds, or a block twice in one call, is a bug: AssertionError, and nothing is changed.
    """

    def __init__(
        self,
        num_blocks: int,
        generations: NDArray[np.uint64],
        on_free: Callable[[BlockIds], None] | None = None,
    ) -> None:
        assert generations.shape == (num_blocks,) and generations.dtype == np.uint64
        self._ids = np.arange(num_blocks)
        self._generations = generations
        self._latest = int(generations.max(initial=0))
        self._given = np.empty((), dtype=np.uint64)
        self._on_free = on_free
        self._num_free = num_blocks
        self._is_withdrawn = np.zeros(num_blocks, dtype=np.bool_)
        self._num_withdrawn = 0
        self._is_lost: NDArray[np.bool_] = generations % np.uint64(2) == 1
        self._num_lost = int(self._is_lost.sum())
        self._is_ready = ~self._is_lost
        self._lowest = 0  # no block below this id is ready
        self._recent: BlockIds = self._ids[:0]  # ascending; were ready when they were put here

    @property
    def num_blocks(self) -> int:
        """Blocks in all."""
        return len(self._ids)

    @property
    def num_free(self) -> int:
        """Blocks that `allocate` could give now, lost ones included."""
        return self._num_free

    @property
    def num_lost(self) -> int:
        """Blocks that an earlier worker held and nobody has taken since."""
        return self._num_lost

    def allocate(self, num_blocks: int) -> BlockIds | None:
        """Take blocks, under a new generation: int64 ids, ascending, the caller's own array.

        Ids are low, and close together where that is to be had without a long search, so that copies of them
        coalesce; lost blocks are among them only where the others do not suffice. None, and nothing taken, if
        there are not enough.
        """
        if num_blocks > self._num_free:
            return None
        if num_blocks == 0:
            return np.empty(0, dtype=np.int64)
        num_lost = num_blocks - (self._num_free - self._num_lost)
        if num_lost > 0:
            self._make_ready(num_lost)
        ids = self._choose(num_blocks)
        self._is_ready[ids] = _NO
        self._raise(ids, held=True)
        self._num_free -= num_blocks
        return ids

    def withdraw(self, ids: BlockIds) -> None:
        """Free blocks, of which none is there twice, are not to be given out until `restore`, and their
        memory may go. So lost ones among them no longer verify.
        """
        is_free = self._is_ready[ids] | self._is_lost[ids]
        assert is_free.all(), f"blocks in use are withdrawn: {ids[~is_free]}"
        self._is_withdrawn[ids] = True
        self._num_withdrawn += len(ids)
        lost = ids[self._is_lost[ids]]
        self._raise(lost, held=False)
        self._num_lost -= len(lost)
        self._is_lost[ids] = False
        self._is_ready[ids] = False
        self._num_free -= len(ids)

    def is_withdrawn(self, ids: BlockIds) -> NDArray[np.bool_]:
        """Which of `ids` are withdrawn."""
        return self._is_withdrawn[ids]

    def restore(self, ids: BlockIds) -> None:
        """End a `withdraw`: they are free."""
        assert self._is_withdrawn[ids].all()
        self._is_withdrawn[ids] = False
        self._num_withdrawn -= len(ids)
        self._is_ready[ids] = True
        self._num_free += len(ids)
        self._lowest = 0

    def renew(self, ids: ArrayLike) -> None:
        """Their content is about to change: addresses given out so far no longer verify. They stay held."""
        self._raise(self._held(ids), held=True)

    def free(self, ids: ArrayLike) -> None:
        """Their owner needs them no more."""
        freed = self._held(ids)
        if len(freed) == 0:
            return
        self._raise(freed, held=False)
        if self._on_free is not None:
            self._on_free(freed)
        self._is_ready[freed] = _YES
        self._num_free += len(freed)
        self._lowest = min(self._lowest, freed.item(0))
        is_long = len(freed) * len(self._ids) > _LONG_SCAN * self._num_free
        if is_long and len(freed) >= len(self._recent):
            self._recent = freed.copy()

    def held_blocks(self) -> BlockIds:
        """The blocks that somebody holds, ascending."""
        return np.flatnonzero(~(self._is_ready | self._is_lost | self._is_withdrawn))

    def _held(self, ids: ArrayLike) -> BlockIds:
        """`ids`, ascending, after a check that each is somebody's and none there twice."""
        held = np.asarray(ids, dtype=np.int64)
        if not _is_ascending(held):
            held = np.sort(held)
            assert _is_ascending(held), f"blocks given twice: {held}"
        if len(held):
            assert held.item(0) >= 0 and held.item(-1) < len(self._ids), f"no such blocks: {held}"
            is_held = 1 not in self._is_ready[held].tobytes()
            if is_held and (self._num_lost or self._num_withdrawn):
                is_held = not (self._is_lost[held] | self._is_withdrawn[held]).any()
            assert is_held, f"blocks that nobody holds: {np.setdiff1d(held, self.held_blocks())}"
        return held

    def _raise(self, ids: BlockIds, *, held: bool) -> None:
        """Give blocks a new generation, which says whether they are held."""
        self._latest += 1 if self._latest % 2 != held else 2
        self._given[()] = self._latest
        self._generations[ids] = self._given

    def _make_ready(self, num_lost: int) -> None:
        """The lowest lost blocks are free like any other from now on, with the generation of such."""
        lost = np.flatnonzero(self._is_lost)[:num_lost]
        self._raise(lost, held=False)
        self._is_lost[lost] = False
        self._is_ready[lost] = True
        self._num_lost -= num_lost
        self._lowest = 0

    def _choose(self, num_blocks: int) -> BlockIds:
        """The ids to be allocated next: the first or the last of the ready ones looked at, whichever lie
        closer together. At least that many blocks must be ready.
        """
        lowest = self._lowest
        ids_per_ready = len(self._ids) // (self._num_free - self._num_lost)
        length = num_blocks * ids_per_ready
        if ids_per_ready <= 2:  # else it is not worth the look
            next_ready = self._is_ready[lowest : lowest + num_blocks].tobytes()
            if 0 not in next_ready and len(next_ready) == num_blocks:  # a run, and the lowest ids
                self._lowest = lowest + num_blocks
                return self._ids[lowest : lowest + num_blocks].copy()
        is_long = length > _LONG_SCAN
        if is_long and len(self._recent) >= num_blocks:
            recent, self._recent = self._recent[:num_blocks], self._recent[num_blocks:]
            if 0 not in self._is_ready[recent].tobytes():
                return recent
        length = max(_SCAN, num_blocks * _SCAN_PER_BLOCK, min(length * 5 // 4, _SCAN_MOST))
        while len(ready := self._is_ready[lowest : lowest + length].nonzero()[0]) < num_blocks:
            assert lowest + length < self.num_blocks, "fewer blocks are ready than were counted"
            length *= 4
        first, end = ready.item(0), ready.item(num_blocks - 1)
        if ready.item(-1) - ready.item(-num_blocks) < end - first:
            self._lowest = lowest + first
            chosen, left = ready[-num_blocks:], ready[:-num_blocks]
        else:
            self._lowest = lowest + end + 1
            chosen, left = ready[:num_blocks], ready[num_blocks:]
        if is_long:
            self._recent = self._ids[lowest:][left]
        ids: BlockIds = self._ids[lowest:][chosen]
        return ids


def _is_ascending(ids: BlockIds) -> bool:
    return 0 not in (ids[1:] > ids[:-1]).tobytes()
