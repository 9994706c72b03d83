"""Room in the two tiers of a pool: what gives way to whom when no block is free.

    device    free ──► free, but still being copied to the host (`Cooling`) ──► historical: evicted
    host      free ──► the coldest of what is cached there: gone

What an eviction takes first is the index's order, how its content gets to the host tier swaps.py's; here it
is how much is taken, and when. Device blocks that are given up are noted as removed and then free, in one
place. Called from the pool's thread alone.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from memserve.messages import Tier
from memserve.pool.allocator import BlockAllocator, BlockIds
from memserve.pool.host_tier import HostTier
from memserve.pool.index import Index
from memserve.pool.lanes import Lanes
from memserve.pool.removals import RemovalLog
from memserve.pool.swaps import Cooling

# Where evictions are copies beside the steps: the share of the pool that is kept free.
_AHEAD_SHARE = 32


class Room:
    """See the module.

    Args:
        allocator: of the device tier.
        index: what is cached; None = nothing is ever, so nothing can be evicted.
        host: the tier below; None = what is evicted is gone.
        removals: told what is given up.
        lanes: of the GPU that makes the copies, if one does.
    """

    def __init__(
        self,
        allocator: BlockAllocator,
        index: Index | None,
        host: HostTier | None,
        removals: RemovalLog | None,
        lanes: Lanes | None,
    ) -> None:
        self._allocator = allocator
        self._index = index
        self._host = host
        self._removals = removals
        self._cooling = Cooling(allocator, lanes) if lanes is not None and host is not None else None

    @property
    def num_free(self) -> int:
        """Device blocks that nobody has, those that are still being copied to the host included."""
        return self._allocator.num_free + (0 if self._cooling is None else self._cooling.num_blocks)

    @property
    def num_available(self) -> int:
        """Device blocks that `take` could give now."""
        return self.num_free + (0 if self._index is None else self._index.num_evictable)

    def take(self, num_blocks: int) -> BlockIds | None:
        """Device blocks, with what `MemPool.alloc_mem` says of them."""
        ids = self._allocate(num_blocks)
        if ids is not None or self._index is None:
            return ids
        num_lacking = num_blocks - self.num_free
        if num_lacking > self._index.num_evictable:
            return None
        self._evict(num_lacking)
        return self._allocate(num_blocks)

    def take_host(self, num_blocks: int) -> BlockIds | None:
        """Host blocks, likewise."""
        if self._host is None:
            return None
        num_lacking = num_blocks - self._host.num_free
        if num_lacking > 0 and self._index is not None and num_lacking <= self._index.num_host_blocks:
            self._index.evict_host(num_lacking)
        return self._host.allocate(num_blocks)

    def swap_out(self, num_blocks: int) -> int:
        """See `MemPool.swap_out`."""
        if self._index is None or self._host is None:
            return 0
        before = self._host.num_stored
        self._evict(num_blocks)
        return self._host.num_stored - before

    def forget(self, give_up: Callable[[Index], BlockIds]) -> int:
        """Free what the index gives up, in both tiers; how many blocks."""
        if self._index is None:
            return 0
        num_host_before = self._index.num_host_blocks
        freed = give_up(self._index)
        self._free_historical(freed)
        return len(freed) + num_host_before - self._index.num_host_blocks

    def resize(self, num_blocks: int, wake: Callable[[], None]) -> int:
        """See `MemPool.resize`; `wake` is rung as memory comes."""
        host = self._host
        if host is None or not 0 <= num_blocks <= host.capacity:
            capacity = 0 if host is None else host.capacity
            raise ValueError(f"a host tier of {num_blocks} blocks, but from 0 to {capacity} are possible")
        host.stop_growing()
        if num_blocks >= host.num_blocks:
            host.grow_to(num_blocks, wake)
            return num_blocks
        assert self._index is not None
        host.settle()
        self._index.evict_host(host.num_held - num_blocks)
        host.withdraw_from(num_blocks)
        self._index.relocate_host(partial(host.relocate, limit=num_blocks))
        in_the_way = host.held_blocks()
        num_blocks = max(num_blocks, in_the_way.item(-1) + 1 if len(in_the_way) else 0)
        host.shrink_to(num_blocks)
        return num_blocks

    def poll(self) -> None:
        """Take what has become room beside the loop; cheap."""
        if self._host is not None:
            self._host.absorb()
        if self._cooling is not None:
            self._cooling.poll()
            self._evict_ahead()

    def _allocate(self, num_blocks: int) -> BlockIds | None:
        if self._cooling is not None:
            self._cooling.poll()
            if num_blocks <= self.num_free:
                self._cooling.take(num_blocks - self._allocator.num_free)
        return self._allocator.allocate(num_blocks)

    def _evict_ahead(self) -> None:
        """Swap out before room is needed, so that no step waits for the copies: a little, and only what the
        host tier has room for.
        """
        assert self._host is not None and self._index is not None
        num_lacking = self._allocator.num_blocks // _AHEAD_SHARE - self.num_free
        num_blocks = min(num_lacking, self._host.num_free, self._index.num_evictable)
        if num_blocks > 0:
            self._evict(num_blocks)

    def _evict(self, num_blocks: int) -> None:
        assert self._index is not None
        blocks = self._index.evict(num_blocks)
        self._free_historical(blocks)
        if self._cooling is not None:
            self._cooling.add(blocks)

    def _free_historical(self, blocks: BlockIds) -> None:
        if self._removals is not None:
            self._removals.gone(blocks, Tier.DEVICE)
        self._allocator.free(blocks)
