"""A modelled worker's pool: the real allocator, index and addresses, without any memory behind them.

It has the calls of `pool.mempool.MemPool` that the worker's own parts use (its scheduler, hand-off,
pull-backs and publisher are the real ones), so that what is cached, evicted, locked and verified is the real
code's doing. What a copy takes is the links' business (links.py). No host tier.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike

from memserve.messages import BlockRefs, Removed, Tier, Transfer
from memserve.pool.addresses import Addresses
from memserve.pool.allocator import BlockAllocator, BlockIds
from memserve.pool.block_table import BlockTable
from memserve.pool.incoming import Incoming, begin_transfer
from memserve.pool.index import Index, Match
from memserve.pool.pending import Pending, PendingBook
from memserve.pool.removals import RemovalLog
from memserve.pool.transports.base import Pull

Fetch = Callable[[BlockRefs, int | None], Pull]


class Storage:
    """Blocks, who holds them and what they cache: one pool's, or all pools' that share a cache."""

    def __init__(self, block_size: int, num_blocks: int) -> None:
        self.generations = np.zeros(num_blocks, dtype=np.uint64)
        self.allocator = BlockAllocator(num_blocks, self.generations)
        self.index = Index(block_size)

    def verified(self, refs: BlockRefs) -> int:
        """How many of the first blocks still are what they were when their addresses were told."""
        blocks = np.asarray(refs.blocks, dtype=np.int64)
        is_same = self.generations[blocks] == np.asarray(refs.generations, dtype=np.uint64)
        return len(blocks) if is_same.all() else int(is_same.argmin())

    def is_idle(self) -> bool:
        """Whether each block is free or owned by an index node that nobody locks."""
        held = np.sort(self.index.blocks())
        is_same = bool(np.array_equal(held, self.allocator.held_blocks()))
        return (
            is_same
            and self.index.num_evictable == self.index.num_blocks
            and not self.index.num_locked_roots()
        )


class StepCount:
    """The steps begun here: stands for the layers written (`pool.arena.Progress`), all of a step at once."""

    def __init__(self) -> None:
        self.count = 0


class ModelledPool:
    """See the module; the calls are `MemPool`'s.

    Args:
        instance: whose it is; incarnation 1.
        storage: shared with others or not.
        clock: seconds, for the order of eviction.
        fetch: begins a copy of blocks of another instance.
        wake: has the worker look again, as something that it waited for is over.
    """

    def __init__(
        self,
        instance: str,
        storage: Storage,
        clock: Callable[[], float],
        fetch: Fetch,
        wake: Callable[[], None],
    ) -> None:
        self.storage = storage
        self.progress = StepCount()
        self._instance = instance
        self._addresses = Addresses(instance, 1, {Tier.DEVICE: storage.generations})
        self._removals = RemovalLog(self._addresses)
        self._clock = clock
        self._fetch = fetch
        self._pending = PendingBook(wake)

    @property
    def num_blocks(self) -> int:
        """Blocks in all."""
        return self.storage.allocator.num_blocks

    @property
    def num_available(self) -> int:
        """Blocks that `alloc_mem` could give now."""
        return self.storage.allocator.num_free + self.storage.index.num_evictable

    @property
    def block_size(self) -> int:
        """Tokens of one block."""
        return self.storage.index.block_size

    def alloc_mem(self, num_blocks: int) -> BlockIds | None:
        """Take blocks, evicting what nobody uses where the free ones do not suffice; None = not enough."""
        storage = self.storage
        num_lacking = num_blocks - storage.allocator.num_free
        if 0 < num_lacking <= storage.index.num_evictable:
            evicted = storage.index.evict(num_lacking)
            self._removals.gone(evicted, Tier.DEVICE)
            storage.allocator.free(evicted)
        return storage.allocator.allocate(num_blocks)

    def free_mem(self, ids: ArrayLike) -> None:
        """Give back blocks that nobody published."""
        self.storage.allocator.free(ids)

    def match(self, tokens: bytes, salt: str) -> Match:
        """The longest cached prefix; counts as a use."""
        prefix = self.storage.index.match(salt, tokens, self._clock())
        return Match(prefix.num_blocks * self.block_size, *prefix.blocks())

    def acquire(self, tokens: bytes, salt: str) -> BlockTable:
        """A table that begins with what is cached of `tokens`, kept until `release`."""
        prefix = self.storage.index.match(salt, tokens, self._clock())
        return BlockTable(prefix.blocks()[0], self.storage.index.lock(prefix))

    def copy_last(self, tokens: bytes, salt: str, into: int) -> bool:
        """Whether all of `tokens` is cached, so that the last block could be copied."""
        return self.match(tokens, salt).num_tokens * 4 == len(tokens)

    def publish(self, table: BlockTable, tokens: bytes) -> None:
        """The table's next own blocks hold the KV of `tokens`: they become shared."""
        if not tokens:
            return
        assert table.lock is not None
        stop = table.num_shared + len(tokens) // (4 * self.block_size)
        own = table.ids(stop)[table.num_shared :].copy()
        extended = self.storage.index.extend(table.lock, tokens, own, self._clock())
        table.share(extended.blocks)
        self.storage.allocator.free(extended.duplicates)

    def release(self, table: BlockTable) -> None:
        """The sequence is over: its own blocks are free, the shared ones historical."""
        own = table.ids(table.num_blocks)[table.num_shared :].copy()
        table.num_blocks = table.num_shared = 0
        self.storage.allocator.free(own)
        if table.lock is not None:
            self.storage.index.unlock(table.lock)
            table.lock = None

    def expect(self, tokens: bytes, salt: str) -> Pending:
        """Blocks of `tokens` will be pulled: the caller begins the entry, and ends it."""
        return self._pending.expect(tokens, salt)

    def pending(self, tokens: bytes, salt: str, *, only_begun: bool = True) -> Pending | None:
        """What is expected of `tokens` by a pull under way, or also by one that is merely meant."""
        return self._pending.best(tokens, salt, only_begun=only_begun)

    def addresses(self, ids: ArrayLike) -> BlockRefs:
        """Where blocks can be pulled from."""
        return self._addresses.of(ids, Tier.DEVICE)

    def take_removed(self) -> list[Removed]:
        """What is no longer cached where it was, since the last call."""
        return self._removals.take()

    def fetch(self, refs: BlockRefs, into: BlockIds, layers_from: int | None = None) -> Pull:
        """Pull blocks of another instance."""
        assert len(into) == len(refs.blocks)
        return self._fetch(refs, layers_from)

    def receive(self, offered: Transfer, *, spare: int = 0) -> Incoming:
        """Take a transfer from another pool."""
        assert offered.target == self._instance
        return begin_transfer(self, offered, spare)
