"""The pool of one instance behind the paper's API (MemServe §MemPool API): its blocks, what they cache, and
pulls from peers.

    free ── alloc_mem ──► active ── insert, publish ──► historical ── delete, eviction ──► free
      ▲──────── free_mem ────┘                            │  ▲  └─ match, acquire: kept by a lock while in use
                                                 swap_out ▼  │ swap_in
                                                      host tier ── eviction ──► gone

Owned by the worker's loop and called from its thread alone. A block has one owner: whoever allocated it, or
the index. `alloc_mem` evicts what nobody uses when no block is free; with a host tier that is a `swap_out`,
and `acquire` swaps in. The destination of a pull counts as written until the pull has a result. Memory and
layout are arena.py's, who holds what allocator.py's and index.py's, who gives way room.py's, how bytes move
the transports'. From whom it can pull is the business of its `peers` (peers.py).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from numpy.typing import ArrayLike

from memserve import memfd
from memserve.messages import BlockRefs, Removed, Tier, Transfer
from memserve.pool.addresses import Addresses
from memserve.pool.allocator import BlockAllocator, BlockIds
from memserve.pool.arena import Arena, Progress
from memserve.pool.block_table import BlockTable
from memserve.pool.device_progress import DeviceProgress
from memserve.pool.host_tier import HostTier
from memserve.pool.incoming import Incoming, begin_transfer
from memserve.pool.index import Index, Lock, Match
from memserve.pool.lanes import AllMarks, Lanes, Mark
from memserve.pool.peers import Peers
from memserve.pool.pending import Pending, PendingBook
from memserve.pool.removals import RemovalLog
from memserve.pool.retention import PoolStats, Retention
from memserve.pool.room import Room
from memserve.pool.swaps import LaneSwaps
from memserve.pool.transports.base import Pull
from memserve.pool.transports.by_peer import PeerTransfer
from memserve.pool.transports.shm import ShmTransfer

_NO_BLOCKS: BlockIds = np.empty(0, dtype=np.int64)


class MemPool:
    """The pool of `instance` over `arena`.

    Args:
        arena: the memory, owned from now on.
        instance, incarnation: who we are, as part of every address given out.
        wake: called after each pull's end, from any thread, until `close` returns (see `ShmTransfer`).
        retention: keep the blocks of finished sequences for reuse; None = nothing is kept.
        clock: seconds, for the order of eviction.
        on_free: told which blocks have become free (tests poison them; no generation tells of such a write).
        transfer: how peers are reached, owned from now on; None = they are mapped, or none is reached if the
            host cannot address the arena. Must know this arena.
        lanes: of the GPU that the arena is on, if it is.

    `peers` are the pools that it can pull from.
    """

    def __init__(
        self,
        arena: Arena,
        instance: str,
        incarnation: int,
        wake: Callable[[], None],
        *,
        retention: Retention | None = None,
        clock: Callable[[], float] = time.monotonic,
        on_free: Callable[[BlockIds], None] | None = None,
        transfer: PeerTransfer | None = None,
        lanes: Lanes | None = None,
    ) -> None:
        self._arena = arena
        self._lanes = lanes
        self._addresses = Addresses(instance, incarnation, {Tier.DEVICE: arena.generations})
        self._host: HostTier | None = None
        self._index: Index | None = None
        self._namespace = ""
        self._removals: RemovalLog | None = None
        if retention is not None:
            if retention.tells_removals:
                self._removals = RemovalLog(self._addresses)
            if (host := retention.host) is not None:
                self._addresses.generations[Tier.HOST] = host.arena.generations
                swaps = None
                if lanes is not None and host.pins is not None:
                    swaps = LaneSwaps(host.arena, arena, lanes, host.pins)
                self._host = HostTier(host.arena, arena, host.num_blocks, self._removals, host.on_free, swaps)
            self._index = Index(arena.geometry.block_size, retention.rank, self._host)
            self._namespace = f"{retention.fingerprint}/"
        self._pending = PendingBook(wake)
        self._clock = clock
        self._instance = instance
        self._wake = wake
        self._allocator = BlockAllocator(arena.num_blocks, arena.generations, on_free)
        self._room = Room(self._allocator, self._index, self._host, self._removals, lanes)
        if lanes is None:
            self._progress = Progress(arena.progress, incarnation)
        else:
            self._progress = DeviceProgress(arena.progress, incarnation, lanes.compute.mark)
        if transfer is None and arena.blocks is not None:
            shm = ShmTransfer(arena.blocks, wake, num_layers=arena.geometry.num_layers)
            transfer = PeerTransfer(wake, shm)
        self.peers = Peers(instance, arena.geometry.block_bytes, transfer, wake)

    @property
    def kv(self) -> torch.Tensor:
        """The arena, [num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim]. Dead after `close`."""
        return self._arena.kv

    @property
    def num_blocks(self) -> int:
        """Blocks in all."""
        return self._allocator.num_blocks

    @property
    def host_capacity(self) -> int:
        """Blocks that the host tier may have at most; 0 = there is none."""
        return 0 if self._host is None else self._host.capacity

    @property
    def num_available(self) -> int:
        """Blocks that `alloc_mem` could give now: the free ones, and those that it would evict."""
        return self._room.num_available

    @property
    def block_size(self) -> int:
        """Tokens of one block."""
        return self._arena.geometry.block_size

    # --- memory blocks -----------------------------------------------------------------------------------

    def alloc_mem(self, num_blocks: int, tier: Tier = Tier.DEVICE) -> BlockIds | None:
        """Take blocks: int64 ids, ascending, the caller's, with whatever content they had before.

        Historical blocks are evicted where the free ones do not suffice, the least useful first; those of the
        device tier are swapped out if there is a host tier. None, and nothing taken or evicted, if there are
        not enough of both.
        """
        return self._room.take(num_blocks) if tier is Tier.DEVICE else self._room.take_host(num_blocks)

    def free_mem(self, ids: ArrayLike, tier: Tier = Tier.DEVICE) -> None:
        """Give back blocks that `alloc_mem` gave and nobody published."""
        if tier is Tier.DEVICE:
            self._allocator.free(ids)
        else:
            assert self._host is not None
            self._host.give_back(np.asarray(ids, dtype=np.int64))

    def swap_out(self, num_blocks: int) -> int:
        """Move that many blocks that nobody uses to the host tier, the least useful first, or as many as
        there are; those that are colder than all of a full host tier are dropped. Returns the blocks moved.
        """
        return self._room.swap_out(num_blocks)

    def swap_in(self, tokens: bytes, salt: str = "") -> int:
        """Move what the host tier holds of a cached prefix to the device tier, as far as there is room.
        Returns the blocks moved.
        """
        table = self.acquire(tokens, salt)
        num_blocks = table.num_swapped_in
        self.release(table)
        return num_blocks

    def load(self, host_ids: ArrayLike, into: ArrayLike) -> None:
        """Copy blocks of the host tier into as many of the device tier; the caller holds both."""
        assert self._host is not None
        self._host.load(np.asarray(host_ids, dtype=np.int64), np.asarray(into, dtype=np.int64))

    def resize(self, num_blocks: int) -> int:
        """Let the host tier have so many blocks, from 0 to its capacity; returns how many it will have.

        It grows beside everything else, and `poll` takes what has got memory. To shrink it evicts, moves what
        it keeps together, and gives the memory back; blocks that somebody has from `alloc_mem` stand in the
        way, and it keeps all up to the last of them. Raises MemoryError_ if the machine has not the memory to
        grow, ValueError outside the bounds, EngineError if a GPU does not end its copies: nothing changed.
        """
        return self._room.resize(num_blocks, self._wake)

    def poll(self) -> None:
        """Take note of what goes on beside the loop; cheap."""
        self._room.poll()

    # --- the index -----------------------------------------------------------------------------------------

    def match(self, tokens: bytes, salt: str = "") -> Match:
        """The longest cached prefix of `tokens` (little-endian int32), whole blocks. Counts as a use."""
        if self._index is None:
            return Match(0, _NO_BLOCKS, _NO_BLOCKS)
        prefix = self._index.match(self._namespace + salt, tokens, self._clock())
        return Match(prefix.num_blocks * self.block_size, *prefix.blocks())

    def insert(self, tokens: bytes, ids: ArrayLike, salt: str = "") -> BlockIds:
        """Publish a sequence (active → historical): `ids` hold the KV of `tokens`, whole blocks.

        Returns the ids under which it is cached from now on: where the same tokens were cached before, those,
        and the blocks given for them are free. Without retention everything is free.
        """
        blocks = np.asarray(ids, dtype=np.int64)
        if self._index is None:
            self._allocator.free(blocks)
            return blocks[:0]
        extended = self._index.insert(self._namespace + salt, tokens, blocks, self._clock())
        self._allocator.free(extended.duplicates)
        return extended.blocks

    def delete(self, tokens: bytes, salt: str = "") -> int:
        """Forget a cached prefix with all that continues it, in either tier; what is in use stays. Returns
        the blocks freed.
        """
        return self._room.forget(lambda index: index.delete(self._namespace + salt, tokens))

    def flush(self) -> int:
        """Forget all that is cached and not in use. Returns the blocks freed."""
        return self.expire(math.inf)

    def expire(self, before: float) -> int:
        """Forget what was not used since `before`, by the pool's clock (time to live). Returns the blocks
        freed.
        """
        return self._room.forget(lambda index: index.expire(before))

    def lock(self, tokens: bytes, salt: str = "") -> Lock | None:
        """Keep what the device tier caches of `tokens` until `unlock`; None = the pool keeps nothing."""
        if self._index is None:
            return None
        return self._index.lock(self._index.match(self._namespace + salt, tokens, self._clock()))

    def unlock(self, lock: Lock) -> None:
        """End a `lock`, once."""
        assert self._index is not None
        self._index.unlock(lock)

    def expect(self, tokens: bytes, salt: str = "") -> Pending:
        """Blocks of `tokens` will be pulled: others find them `pending` from when the caller begins the entry
        until it ends it, which it must.
        """
        return self._pending.expect(tokens, salt)

    def pending(self, tokens: bytes, salt: str = "", *, only_begun: bool = True) -> Pending | None:
        """What is expected of `tokens` by a pull under way, so that it is worth waiting for; the most there
        is. Without `only_begun` also by one that is merely meant.
        """
        return None if self._index is None else self._pending.best(tokens, salt, only_begun=only_begun)

    def take_removed(self) -> list[Removed]:
        """What is no longer cached where it was, since the last call; empty unless `tells_removals`."""
        return [] if self._removals is None else self._removals.take()

    # --- sequences -----------------------------------------------------------------------------------------

    def acquire(self, tokens: bytes, salt: str = "") -> BlockTable:
        """A table that begins with what is cached of `tokens` (whole blocks), kept until `release`."""
        if self._index is None:
            return BlockTable()
        now = self._clock()
        prefix = self._index.match(self._namespace + salt, tokens, now)
        device, host = prefix.blocks()
        table = BlockTable(device, self._index.lock(prefix))
        if len(host):
            self._swap_in(table, tokens, salt, len(host))
        return table

    def copy_last(self, tokens: bytes, salt: str, into: int) -> bool:
        """Copy the block of the last of `tokens` (whole blocks), with all before it, to the block `into`,
        which the caller holds. False = it is not cached in the device tier.
        """
        if self._index is None:
            return False
        prefix = self._index.match(self._namespace + salt, tokens, self._clock())
        device, _ = prefix.blocks()
        if len(device) * self.block_size * 4 != len(tokens):
            return False
        self.kv[into].copy_(self.kv[int(device[-1])])
        return True

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

    def addresses(self, ids: ArrayLike, tier: Tier = Tier.DEVICE) -> BlockRefs:
        """Where our blocks `ids` can be pulled from; good until they are freed."""
        return self._addresses.of(ids, tier)

    # --- other instances ----------------------------------------------------------------------------------

    @property
    def progress(self) -> Progress:
        """Whoever computes into our blocks tells here how far it has got, layer by layer."""
        return self._progress

    @property
    def tells_layers(self) -> bool:
        """Whether `progress` tells when a layer has been written, and not only when it was launched."""
        return self._arena.blocks is not None or self._lanes is not None

    @property
    def orders_pulls(self) -> bool:
        """Whether a pull begins after what was launched before it."""
        return self._lanes is not None

    def compute_mark(self) -> Mark | None:
        """When all that was launched so far has been computed; None = it has."""
        return None if self._lanes is None else self._lanes.compute.mark()

    def swaps_mark(self) -> Mark | None:
        """When all swaps so far are done; None = they are."""
        if self._lanes is None or self._host is None:
            return None
        return AllMarks((self._lanes.swap_out.mark(), self._lanes.swap_in.mark()))

    def fetch(self, refs: BlockRefs, into: ArrayLike, layers_from: int | None = None) -> Pull:
        """Pull blocks at `refs` into our blocks `into`, in order: the paper's `transfer`, by the receiver.

        With `layers_from` they are being computed: each layer is copied as soon as the owner's progress says
        that it is there (the paper's by-layer mode).
        Never raises or waits: an unknown peer, a full queue, bad addresses are results. The caller holds
        `into` and may not free it before the pull has a result.
        """
        return self.peers.pull(refs, np.asarray(into, dtype=np.int64), layers_from)

    def transfer(self, target: str, ids: ArrayLike, into: tuple[int, ...] | None = None) -> Transfer:
        """Offer our blocks `ids` to the pool `target`: what to send it, for its `receive` (the paper's
        `transfer`; the receiver copies). Without `into`, blocks that it has allocated, it allocates. The
        caller holds `ids` until the receiver has answered.
        """
        return Transfer(target, self.addresses(ids), into=into)

    def transfer_with_insert(
        self, target: str, tokens: bytes, salt: str = ""
    ) -> tuple[Transfer, Lock | None]:
        """Offer what the device tier caches of `tokens`; the receiver publishes it once it is there.

        Returns what to send it, and the lock that keeps the blocks until the receiver has answered and
        `unlock` is called.
        """
        lock = self.lock(tokens, salt)
        blocks = self.match(tokens, salt).device_blocks
        known = tokens[: len(blocks) * 4 * self.block_size]
        return Transfer(target, self.addresses(blocks), known, salt), lock

    def receive(self, offered: Transfer, *, spare: int = 0) -> Incoming:
        """Take a transfer from another pool: pull what is lacking here, and publish it if it comes with
        tokens. Never raises or waits. One for which there is no room ends at once; with `spare`, that
        many blocks must be left, and a prefix that is swapped out is not brought back for it.
        """
        assert offered.target == self._instance, offered.target
        return begin_transfer(self, offered, spare)

    # --- life --------------------------------------------------------------------------------------------

    def populate(self, progress: Callable[[float], None] | None = None) -> None:
        """Back the arena and the mappings of the peers so far with memory: half a second a GiB.

        Left to the first touch it would slow the first prompts down; done beside them it would take a core
        from them, and two threads that share one matrix product wait for the slower. `progress` is told
        fractions from 0 to 1. Raises MemoryError_ if there is not enough for our own.
        """
        peers = self.peers.take_unpopulated()
        num_parts = 1 + len(peers)

        def tell(part: int, fraction: float) -> None:
            if progress is not None:
                progress((part + fraction) / num_parts)

        if self._arena.blocks is not None:
            memfd.populate(self._arena.blocks.reshape(-1), progress=partial(tell, 0))
        if self._host is not None:
            self._host.populate()
        for part, peer in enumerate(peers, start=1):
            self.peers.populate(peer, partial(tell, part))
        tell(num_parts - 1, 1.0)

    def stats(self) -> PoolStats:
        """Blocks by state, now; from any thread."""
        free, total = self._room.num_free, self._allocator.num_blocks
        historical = 0 if self._index is None else self._index.num_evictable
        return PoolStats(
            free=free,
            active=total - free - historical,
            historical=historical,
            num_host=0 if self._host is None else self._host.num_blocks,
            host_historical=0 if self._index is None else self._index.num_host_blocks,
        )

    def assert_idle(self) -> None:
        """AssertionError naming the blocks, unless each is free or cached and in nobody's use (DESIGN
        invariant 2; for tests).
        """
        assert not len(self._pending), "blocks are still expected"
        held = set(self._allocator.held_blocks().tolist())
        cached: set[int] = set()
        if self._index is not None:
            assert self._index.num_evictable == self._index.num_blocks, "cached blocks are still locked"
            assert self._index.num_locked_roots() == 0, "a namespace is still locked"
            cached = set(self._index.blocks().tolist())
            assert len(cached) == self._index.num_blocks, "blocks are cached twice"
            if self._host is not None:
                in_host = np.sort(self._index.blocks(Tier.HOST)).tolist()
                assert in_host == self._host.held_blocks().tolist(), "the host tier holds what is not cached"
        if held != cached:
            raise AssertionError(f"held and not cached: {held - cached}; cached and free: {cached - held}")

    def close(self) -> None:
        """End every pull and background thread. The memory goes when the last view of `kv` does."""
        if self._host is not None:
            self._host.stop_growing()
        self.peers.close()
        self._progress.close()

    def _swap_in(self, table: BlockTable, tokens: bytes, salt: str, num_blocks: int) -> None:
        """Copy the host blocks that follow those of the table, as far as there is room, into its own."""
        assert self._index is not None and self._host is not None and table.lock is not None
        into = self.alloc_mem(min(num_blocks, self.num_available))
        assert into is not None
        now = self._clock()
        # To make room may have dropped some of them from the host tier, and has moved others there.
        _, host = self._index.match(self._namespace + salt, tokens, now).blocks()
        count = min(len(into), len(host))
        self._host.load(host[:count], into[:count])
        if self._removals is not None:
            self._removals.moved(host[:count], Tier.HOST, into[:count], Tier.DEVICE)
        step = 4 * self.block_size
        start = table.num_shared * step
        extended = self._index.extend(table.lock, tokens[start : start + count * step], into[:count], now)
        assert len(extended.duplicates) == 0
        self._allocator.free(into[count:])
        table.append(extended.blocks)
        table.share(extended.blocks)
        table.num_swapped_in = count
