"""The host tier of a pool: DRAM beside the device arena, for KV that the device has no room for.

    device arena ── store (swap out) ──► host arena ── evicted ──► gone
                 ◄── load (swap in) ───

It has an arena, an allocator and generations of its own, like the device's, so peers can pull from it, and
what it holds outlives its worker. The arena is mapped at its greatest size; `num_blocks` of it are in use,
the rest is withdrawn from the allocator and takes no memory (`MemPool.resize`). What is kept here, and for
how long, is the index's business: to it this is the `LowerTier`.

How copies are made, at once or by a GPU beside its steps, is swaps.py's concern. Where a GPU makes them the
memory in use is pinned.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from memserve import memfd
from memserve.messages import Tier
from memserve.pool.allocator import BlockAllocator, BlockIds
from memserve.pool.arena import Arena
from memserve.pool.growth import Growth
from memserve.pool.removals import RemovalLog
from memserve.pool.swaps import HostSwaps, Swaps, copy_blocks


class HostTier:
    """See the module.

    Args:
        arena: the memory at its greatest size, which the host can address.
        device: the device tier, of equal geometry.
        num_blocks: how much of `arena` to use at first.
        removals: told what the index gives up here, and what comes here.
        on_free: told which blocks have become free.
        swaps: makes the copies; None = the caller's thread does.
    """

    def __init__(
        self,
        arena: Arena,
        device: Arena,
        num_blocks: int,
        removals: RemovalLog | None = None,
        on_free: Callable[[BlockIds], None] | None = None,
        swaps: Swaps | None = None,
    ) -> None:
        assert arena.geometry == device.geometry and arena.blocks is not None
        self.arena = arena
        self._swaps = swaps or HostSwaps(arena, device)
        self._allocator = BlockAllocator(arena.num_blocks, arena.generations, on_free)
        self._removals = removals
        self._num_blocks = arena.num_blocks
        self.num_stored = 0
        self._growth: Growth | None = None
        self.shrink_to(num_blocks)

    @property
    def num_blocks(self) -> int:
        """Blocks in use, free ones included. `num_stored` is how many were ever stored."""
        return self._num_blocks

    @property
    def capacity(self) -> int:
        """The greatest number of blocks."""
        return self.arena.num_blocks

    @property
    def num_free(self) -> int:
        """Blocks that could be had now."""
        return self._allocator.num_free

    @property
    def num_held(self) -> int:
        """Blocks that the index or somebody else holds."""
        return self._num_blocks - self._allocator.num_free

    def allocate(self, num_blocks: int) -> BlockIds | None:
        """See `BlockAllocator.allocate`."""
        return self._allocator.allocate(num_blocks)

    def give_back(self, blocks: BlockIds) -> None:
        """Give back blocks from `allocate`."""
        self._allocator.free(blocks)

    def free(self, blocks: BlockIds) -> None:
        """Blocks that the index gives up."""
        if self._removals is not None:
            self._removals.gone(blocks, Tier.HOST)
        self._allocator.free(blocks)

    def held_blocks(self) -> BlockIds:
        """The blocks that are not free, ascending."""
        return self._allocator.held_blocks()

    # --- between the tiers ---

    def store(self, blocks: BlockIds) -> BlockIds:
        """Copy device blocks, at most `num_free`, into as many host blocks; their ids, the caller's."""
        into = self._allocator.allocate(len(blocks))
        assert into is not None
        self._swaps.store(blocks, into)
        self.num_stored += len(blocks)
        if self._removals is not None:
            self._removals.moved(blocks, Tier.DEVICE, into, Tier.HOST)
        return into

    def load(self, blocks: BlockIds, into: BlockIds) -> None:
        """Copy host blocks into device blocks, which are the caller's."""
        self._swaps.load(blocks, into)

    # --- size ---

    def populate(self) -> None:
        """Back the blocks in use with memory. Raises MemoryError_ if there is not enough."""
        assert self.arena.blocks is not None
        memfd.populate(self.arena.blocks[: self._num_blocks].reshape(-1))
        self._swaps.pin(self._num_blocks)

    def grow_to(self, num_blocks: int, wake: Callable[[], None]) -> None:
        """Use more of the arena, as memory comes: `absorb` takes what is there. Raises MemoryError_, and
        changes nothing, if the machine has not so much.
        """
        assert self._num_blocks <= num_blocks <= self.capacity and self.arena.blocks is not None
        memfd.check_available((num_blocks - self._num_blocks) * self.arena.geometry.block_bytes)
        if num_blocks > self._num_blocks:
            self._growth = Growth(self.arena.blocks, self._num_blocks, num_blocks, wake, self._swaps.pin)

    def absorb(self) -> None:
        """Use the blocks that have got memory since the last call."""
        growth = self._growth
        if growth is None:
            return
        is_done, num_backed = growth.is_done, growth.num_backed
        if num_backed > self._num_blocks:
            self._allocator.restore(np.arange(self._num_blocks, num_backed))
            self._num_blocks = num_backed
        if is_done:
            growth.cancel()  # only its wake-up is left
            self._growth = None

    def stop_growing(self) -> None:
        """Keep the size that was reached."""
        if self._growth is not None:
            self._growth.cancel()
            self.absorb()

    def settle(self) -> None:
        """Wait until no copy into or out of it is under way, as it must be before `relocate` and `shrink_to`.
        Raises EngineError where that takes too long.
        """
        self._swaps.settle()

    def relocate(self, blocks: BlockIds, limit: int) -> BlockIds:
        """Move those of `blocks` that lie at `limit` or above below it, where as many must be free. What they
        leave is withdrawn.
        """
        is_above = blocks >= limit
        if not is_above.any():
            return blocks
        moving = blocks[is_above]
        into = self._allocator.allocate(len(moving))
        assert into is not None and into.item(-1) < limit
        copy_blocks(self.arena, into, self.arena, moving)
        if self._removals is not None:
            self._removals.moved(moving, Tier.HOST, into, Tier.HOST)
        self.free(moving)
        self._allocator.withdraw(moving)  # or the next would be moved there
        moved = blocks.copy()
        moved[is_above] = into
        return moved

    def withdraw_from(self, limit: int) -> None:
        """Hand out no block at `limit` or above any more. Those that are held stay until they are free."""
        ids = np.arange(limit, self._num_blocks)
        self._allocator.withdraw(np.setdiff1d(ids, self._allocator.held_blocks(), assume_unique=True))

    def shrink_to(self, num_blocks: int) -> None:
        """Give the memory of all blocks from `num_blocks` on, which must be free, back to the machine; what
        was withdrawn below can be had again.

        Readers of theirs find another generation, and zeros: it was raised when the block was freed.
        """
        ids = np.arange(self._num_blocks)
        is_withdrawn = self._allocator.is_withdrawn(ids)
        self._allocator.restore(ids[is_withdrawn & (ids < num_blocks)])
        self._allocator.withdraw(ids[~is_withdrawn & (ids >= num_blocks)])
        self._num_blocks = num_blocks
        assert self.arena.blocks is not None
        memfd.release(self.arena.blocks[self._swaps.unpin(num_blocks) :].reshape(-1))
