"""The pool of one instance behind the paper's API (MemServe §MemPool API): its blocks, what they cache, and
pulls from peers.

    free ── alloc_mem ──► active ── insert, publish ──► historical ── delete, eviction ──► free
      ▲──────── free_mem ────┘                             └─ match, acquire: kept by a lock while in use

Owned by the worker's loop and called from its thread alone. A block has one owner: whoever allocated it, or
the index. `alloc_mem` evicts what nobody uses when no block is free. The destination of a pull counts as
written until the pull has a result. Memory and layout are arena.py's, who holds what allocator.py's and
index.py's, how bytes move the transports'. Peers come and go by grants of the supervisor.
"""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import ArrayLike

from memserve import memfd
from memserve.errors import EngineError, MemserveError
from memserve.messages import ArenaGrant, BlockRefs, Link, PeerGrant, Tier
from memserve.pool.allocator import BlockAllocator, BlockIds
from memserve.pool.arena import Arena, ArenaFds, PeerArena, Progress
from memserve.pool.block_table import BlockTable
from memserve.pool.index import Index
from memserve.pool.transports.base import FailedPull, Pull
from memserve.pool.transports.by_peer import PeerTransfer
from memserve.pool.transports.shm import ShmTransfer

logger = logging.getLogger(__name__)

_POPULATE_NICENESS = 10


@dataclass(frozen=True, slots=True)
class PoolStats:
    """Blocks by state; they add up to the arena. `historical`: cached, and in nobody's use now."""

    free: int
    active: int
    historical: int


class MemPool:
    """The pool of `instance` over `arena`.

    Args:
        arena: the memory, owned from now on.
        instance, incarnation: who we are, as part of every address given out.
        wake: called after each pull's end, from any thread, until `close` returns (see `ShmTransfer`).
        index: keeps the blocks of finished sequences for reuse; None = nothing is kept.
        clock: seconds, for the order of eviction.
        on_free: told which blocks have become free (tests poison them; no generation tells of such a write).
        transfer: how peers are reached, owned from now on; None = they are mapped. Must know this arena.
    """

    def __init__(
        self,
        arena: Arena,
        instance: str,
        incarnation: int,
        wake: Callable[[], None],
        *,
        index: Index | None = None,
        clock: Callable[[], float] = time.monotonic,
        on_free: Callable[[BlockIds], None] | None = None,
        transfer: PeerTransfer | None = None,
    ) -> None:
        self._arena = arena
        self._index = index
        self._clock = clock
        self._instance = instance
        self._incarnation = incarnation
        self._wake = wake
        self._allocator = BlockAllocator(arena.num_blocks, arena.generations, on_free)
        # An arena the host cannot address has no way to pull yet: its peers are unknown, every pull a miss.
        self._progress = Progress(arena.progress, incarnation)
        self._transfer = None
        if arena.blocks is not None:
            self._transfer = transfer or PeerTransfer(
                wake, ShmTransfer(arena.blocks, wake, num_layers=arena.geometry.num_layers)
            )
        self._is_populated = False
        self._unpopulated: dict[str, PeerArena] = {}
        self._populating: list[threading.Thread] = []
        self._closing = threading.Event()

    @property
    def kv(self) -> torch.Tensor:
        """The arena, [num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim]. Dead after `close`."""
        return self._arena.kv

    @property
    def num_blocks(self) -> int:
        """Blocks in all."""
        return self._allocator.num_blocks

    @property
    def num_available(self) -> int:
        """Blocks that `alloc_mem` could give now: the free ones, and those that it would evict."""
        return self._allocator.num_free + (0 if self._index is None else self._index.num_evictable)

    @property
    def block_size(self) -> int:
        """Tokens of one block."""
        return self._arena.geometry.block_size

    # --- memory blocks -----------------------------------------------------------------------------------

    def alloc_mem(self, num_blocks: int) -> BlockIds | None:
        """Take blocks: int64 ids, ascending, the caller's, with whatever content they had before.

        Historical blocks are evicted where the free ones do not suffice, the least useful first. None, and
        nothing taken or evicted, if there are not enough of both.
        """
        num_lacking = num_blocks - self._allocator.num_free
        if num_lacking > 0 and self._index is not None and num_lacking <= self._index.num_evictable:
            self._allocator.free(self._index.evict(num_lacking))
        return self._allocator.allocate(num_blocks)

    def free_mem(self, ids: ArrayLike) -> None:
        """Give back blocks that `alloc_mem` gave and nobody published."""
        self._allocator.free(ids)

    # --- the index -----------------------------------------------------------------------------------------

    def match(self, tokens: bytes, salt: str = "") -> int:
        """Tokens of the longest cached prefix of `tokens` (little-endian int32): whole blocks. Counts as a
        use.
        """
        if self._index is None:
            return 0
        return self._index.match(salt, tokens, self._clock()).num_blocks * self.block_size

    def insert(self, tokens: bytes, ids: ArrayLike, salt: str = "") -> BlockIds:
        """Publish a sequence (active → historical): `ids` hold the KV of `tokens`, whole blocks.

        Returns the ids under which it is cached from now on: where the same tokens were cached before, those,
        and the blocks given for them are free. Without an index everything is free.
        """
        blocks = np.asarray(ids, dtype=np.int64)
        if self._index is None:
            self._allocator.free(blocks)
            return blocks[:0]
        extended = self._index.insert(salt, tokens, blocks, self._clock())
        self._allocator.free(extended.duplicates)
        return extended.blocks

    def delete(self, tokens: bytes, salt: str = "") -> int:
        """Forget a cached prefix with all that continues it; what is in use stays. Returns the blocks
        freed.
        """
        if self._index is None:
            return 0
        freed = self._index.delete(salt, tokens)
        self._allocator.free(freed)
        return len(freed)

    def flush(self) -> int:
        """Forget all that is cached and not in use. Returns the blocks freed."""
        return self.expire(math.inf)

    def expire(self, before: float) -> int:
        """Forget what was not used since `before`, by the pool's clock (time to live). Returns the blocks
        freed.
        """
        if self._index is None:
            return 0
        freed = self._index.expire(before)
        self._allocator.free(freed)
        return len(freed)

    # --- sequences -----------------------------------------------------------------------------------------

    def acquire(self, tokens: bytes, salt: str = "") -> BlockTable:
        """A table that begins with what is cached of `tokens` (whole blocks), kept until `release`."""
        if self._index is None:
            return BlockTable()
        prefix = self._index.match(salt, tokens, self._clock())
        blocks = prefix.blocks()
        return BlockTable(blocks, self._index.lock(prefix))

    def publish(self, table: BlockTable, tokens: bytes) -> None:
        """The table's next own blocks hold the KV of `tokens`, whole blocks: they become shared.

        Visible to `match` from now on, so the KV must be there. Where another sequence has published the same
        tokens, the table gets its blocks, and its own are free.
        """
        if self._index is None or table.lock is None or not tokens:
            return
        stop = table.num_shared + len(tokens) // (4 * self.block_size)
        own = table.ids(stop)[table.num_shared :].copy()
        extended = self._index.extend(table.lock, tokens, own, self._clock())
        table.share(extended.blocks)
        self._allocator.free(extended.duplicates)

    def renew(self, table: BlockTable) -> None:
        """What was told of the table's own blocks does not hold: their addresses no longer verify."""
        self._allocator.renew(table.ids(table.num_blocks)[table.num_shared :])

    def release(self, table: BlockTable) -> None:
        """The sequence is over: its own blocks are free, the shared ones historical. The table is empty."""
        own = table.ids(table.num_blocks)[table.num_shared :].copy()
        table.num_blocks = table.num_shared = 0
        self._allocator.free(own)
        if table.lock is not None:
            assert self._index is not None
            self._index.unlock(table.lock)
            table.lock = None

    def addresses(self, ids: ArrayLike) -> BlockRefs:
        """Where our blocks `ids` can be pulled from; good until they are freed."""
        blocks = np.asarray(ids, dtype=np.int64)
        return BlockRefs(
            instance=self._instance,
            incarnation=self._incarnation,
            tier=Tier.DEVICE,
            blocks=tuple(blocks.tolist()),
            generations=tuple(self._arena.generations[blocks].tolist()),
        )

    # --- other instances ----------------------------------------------------------------------------------

    def add_peer(self, grant: ArenaGrant, arena_fd: int, generations_fd: int) -> None:
        """Map a peer's arena to pull from; a second grant of the same instance replaces the first.

        Its mapping is populated by `populate`, or in the background if that was before. The descriptors are
        ours from now on: they are closed, whatever happens. Raises MemoryError_, or EngineError if it is not
        to be mapped, or made of other blocks.
        """
        try:
            if self._transfer is None:
                return
            ours = self._arena.geometry.block_bytes
            if grant.block_bytes != ours:
                raise EngineError(
                    f"{grant.instance} has blocks of {grant.block_bytes} bytes, {self._instance} of {ours}"
                )
            peer = PeerArena.map(grant, ArenaFds(arena_fd, generations_fd))
        finally:
            os.close(arena_fd)
            os.close(generations_fd)
        self._transfer.add_mapped(peer)
        if self._is_populated:
            self._populate_later(peer)
        else:
            self._unpopulated[peer.instance] = peer

    def add_sending_peer(self, grant: PeerGrant) -> None:
        """Pull from a peer that cannot be mapped, by asking it; a later life replaces the one before.

        Raises EngineError if that is not to be done here.
        """
        if self._transfer is not None:
            self._transfer.add_sending(grant)

    def on_control(self, message: Link) -> None:
        """Take what another worker says of a link between it and us. Never waits."""
        if self._transfer is not None:
            self._transfer.on_control(message)

    def take_control(self) -> list[Link]:
        """What is to be said to other workers, by way of the router; `wake` tells when there is something."""
        return [] if self._transfer is None else self._transfer.take_control()

    def remove_peer(self, instance: str) -> None:
        """Forget a peer: pulls from it that are under way still end. Unknown names are ignored."""
        self._unpopulated.pop(instance, None)
        if self._transfer is not None:
            self._transfer.remove_peer(instance)

    @property
    def progress(self) -> Progress:
        """Whoever computes into our blocks tells here how far it has got, layer by layer."""
        return self._progress

    def fetch(self, refs: BlockRefs, into: ArrayLike, layers_from: int | None = None) -> Pull:
        """Pull blocks at `refs` into our blocks `into`, in order: the paper's `transfer`, by the receiver.

        With `layers_from` they are being computed: each layer is copied as soon as the owner's progress says
        that it is there (the paper's by-layer mode).
        Never raises or waits: an unknown peer, a full queue, bad addresses are results. The caller holds
        `into` and may not free it before the pull has a result.
        """
        if self._transfer is None:
            self._wake()
            return FailedPull(f"unknown peer {refs.instance}")
        return self._transfer.begin(refs, np.asarray(into, dtype=np.int64), layers_from)

    # --- life --------------------------------------------------------------------------------------------

    def populate(self, progress: Callable[[float], None] | None = None) -> None:
        """Back the arena and the mappings of the peers so far with memory: half a second a GiB.

        Left to the first touch it would slow the first prompts down; done beside them it would take a core
        from them, and two threads that share one matrix product wait for the slower. `progress` is told
        fractions from 0 to 1. Raises MemoryError_ if there is not enough for our own.
        """
        peers, self._unpopulated = tuple(self._unpopulated.values()), {}
        self._is_populated = True
        num_parts = 1 + len(peers)

        def tell(part: int, fraction: float) -> None:
            if progress is not None:
                progress((part + fraction) / num_parts)

        if self._arena.blocks is not None:
            memfd.populate(self._arena.blocks.reshape(-1), progress=partial(tell, 0))
        for part, peer in enumerate(peers, start=1):
            self._populate_peer(peer, partial(tell, part))
        tell(num_parts - 1, 1.0)

    def stats(self) -> PoolStats:
        """Blocks by state, now; from any thread."""
        free, total = self._allocator.num_free, self._allocator.num_blocks
        historical = 0 if self._index is None else self._index.num_evictable
        return PoolStats(free=free, active=total - free - historical, historical=historical)

    def assert_idle(self) -> None:
        """AssertionError naming the blocks, unless each is free or cached and in nobody's use (DESIGN
        invariant 2; for tests).
        """
        held = set(self._allocator.held_blocks().tolist())
        cached: set[int] = set()
        if self._index is not None:
            assert self._index.num_evictable == self._index.num_blocks, "cached blocks are still locked"
            assert self._index.num_locked_roots() == 0, "a namespace is still locked"
            cached = set(self._index.blocks().tolist())
            assert len(cached) == self._index.num_blocks, "blocks are cached twice"
        if held != cached:
            raise AssertionError(f"held and not cached: {held - cached}; cached and free: {cached - held}")

    def close(self) -> None:
        """End every pull and background thread. The memory goes when the last view of `kv` does."""
        self._closing.set()
        self._unpopulated.clear()
        if self._transfer is not None:
            self._transfer.close()
        for thread in self._populating:
            thread.join()
        self._populating.clear()

    def _populate_peer(self, peer: PeerArena, progress: Callable[[float], None] | None = None) -> None:
        try:
            memfd.populate(peer.blocks.reshape(-1), self._closing, progress)
        except MemserveError as error:  # only a matter of speed, until the memory is really needed
            logger.warning(
                "%s: cannot populate the arena of %s: %s", self._instance, peer.instance, str(error)
            )

    def _populate_later(self, peer: PeerArena) -> None:
        def run() -> None:
            # Of this thread alone, on Linux: serving must not wait for it.
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _POPULATE_NICENESS)
            self._populate_peer(peer)

        self._populating = [thread for thread in self._populating if thread.is_alive()]
        thread = threading.Thread(target=run, name="memserve-populate", daemon=True)
        self._populating.append(thread)
        thread.start()
