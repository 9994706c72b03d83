"""One pool beside a naive oracle of it, for test_pools_machine.py.

The oracle knows a set of prefixes (salt, symbols), one symbol a block, and gives each a number that fills
the blocks which hold it. `expected` says what must be cached after a step, or what may be at the most where
the pool had to evict; `check` compares everything with everything: the index, the content of both tiers, the
blocks of callers, the counts, the generations, and what was told of removals.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from memserve import memfd
from memserve.messages import ArenaGrant, BlockRefs, Tier
from memserve.model_config import KVGeometry
from memserve.pool.arena import Arena
from memserve.pool.eviction import Rank
from memserve.pool.mempool import MemPool, PoolStats
from memserve.pool.retention import HostArena, Retention
from memserve.pool.transports.by_peer import PeerTransfer
from memserve.pool.transports.shm import Bytes, ShmTransfer, copy_bytes

BLOCK_BYTES = 4096  # a page, so that memory is really given back
MAX_HOST_BLOCKS = 12
Prefix = tuple[str, tuple[int, ...]]  # salt, symbols


def prefixes(salt: str, symbols: tuple[int, ...]) -> list[Prefix]:
    """All of a sequence, the shortest first."""
    return [(salt, symbols[:stop]) for stop in range(1, len(symbols) + 1)]


class Gate:
    """What a pool's copies wait at, and how they fail; the transfer thread stands still between two steps."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._is_waiting = False
        self._num_may_pass = 0.0
        self.waits_after = False
        self.fault = ""

    def notify(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def copy(self, destination: Bytes, source: Bytes) -> int:
        if not self.waits_after:
            self._wait()
        if self.fault == "raises":
            raise RuntimeError("no copy today")
        to, come_from = destination.reshape(-1), source.reshape(-1)
        size = source.nbytes // 2 if self.fault == "short" else source.nbytes
        copied = copy_bytes(to[:size], come_from[:size])
        if self.waits_after:
            self._wait()
        return copied

    def _wait(self) -> None:
        with self._changed:
            self._is_waiting = True
            self._changed.notify_all()
            assert self._changed.wait_for(lambda: self._num_may_pass > 0, timeout=30)
            self._num_may_pass -= 1
            self._is_waiting = False

    def let_pass(self, num_pieces: float) -> None:
        """So many copies may go on; infinite = all from now on."""
        with self._changed:
            self._num_may_pass = num_pieces
            self._is_waiting = self._is_waiting and not num_pieces
            self._changed.notify_all()

    def settle(self, has_ended: Callable[[], bool]) -> None:
        """Until a copy waits here, or all have ended."""
        with self._changed:
            assert self._changed.wait_for(
                lambda: (self._is_waiting and not self._num_may_pass) or has_ended(), timeout=30
            )


@dataclass(frozen=True)
class Sizes:
    """What a pool is made of; `num_host` None = no host tier."""

    block_size: int
    num_blocks: int
    caches: bool
    num_host: int | None
    rank: Rank
    tells: bool


class PoolBesideOracle:
    """See the module. `values` and `now` are common to all pools."""

    def __init__(
        self, name: str, sizes: Sizes, values: dict[Prefix, int], clock: Callable[[], float]
    ) -> None:
        self.name, self.sizes, self.values, self.clock = name, sizes, values, clock
        geometry = KVGeometry(
            num_layers=1,
            num_kv_heads=1,
            block_size=sizes.block_size,
            head_dim=BLOCK_BYTES // (8 * sizes.block_size),
            dtype="float32",
        )
        self.fds: dict[Tier, tuple[int, int]] = {}
        self.arenas: dict[Tier, Arena] = {}
        self.arenas[Tier.DEVICE], self.fds[Tier.DEVICE] = Arena.create(name, geometry, sizes.num_blocks)
        if sizes.num_host is not None:
            self.arenas[Tier.HOST], self.fds[Tier.HOST] = Arena.create(name, geometry, MAX_HOST_BLOCKS)
        self.incarnation = 0
        self.begin_life(sizes.num_host)

    def begin_life(self, num_host: int | None) -> None:
        """A pool over the memory as it is."""
        self.incarnation += 1
        self.num_host = num_host or 0
        self.gate = Gate()
        retention = host = None
        if num_host is not None:
            arena = self.arenas[Tier.HOST]
            host = HostArena(arena, num_host, lambda ids: self.poison(Tier.HOST, ids))
        if self.sizes.caches:
            retention = Retention("model", self.sizes.rank, host, self.sizes.tells)
        blocks = self.arenas[Tier.DEVICE].blocks
        assert blocks is not None
        shm = ShmTransfer(blocks, self.gate.notify, copy=self.gate.copy)
        self.pool = MemPool(
            self.arenas[Tier.DEVICE],
            self.name,
            self.incarnation,
            self.gate.notify,
            retention=retention,
            clock=self.clock,
            on_free=lambda ids: self.poison(Tier.DEVICE, ids),
            transfer=PeerTransfer(self.gate.notify, shm),
        )
        self.own: dict[Tier, dict[int, int | None]] = {Tier.DEVICE: {}, Tier.HOST: {}}  # None: being written
        self.locks: dict[int, Prefix] = {}
        self.used: dict[Prefix, float] = {}
        self.cached: dict[Prefix, tuple[Tier, int]] = {}
        self.expected: set[Prefix] = set()
        self.is_exact = True
        self.told: dict[tuple[Tier, int, int], Prefix] = {}

    def grant_to(self, other: PoolBesideOracle) -> None:
        for tier, arena in self.arenas.items():
            grant = ArenaGrant(self.name, self.incarnation, tier, arena.num_blocks, BLOCK_BYTES)
            other.pool.peers.add_mapped(grant, *map(memfd.reopen_readonly, self.fds[tier]))

    def close(self) -> None:
        self.gate.let_pass(float("inf"))
        self.pool.close()

    def drop_memory(self) -> None:
        for fds in self.fds.values():
            for fd in fds:
                os.close(fd)

    # --- content ---

    def words(self, tier: Tier) -> np.ndarray:
        blocks = self.arenas[tier].blocks
        assert blocks is not None
        return blocks.view(np.uint32)

    def poison(self, tier: Tier, ids: np.ndarray) -> None:
        self.words(tier)[ids] = 0xFFFFFFFF

    def value(self, prefix: Prefix) -> int:
        return self.values.setdefault(prefix, len(self.values) + 1)

    def fill(self, ids: np.ndarray, values: list[int], tier: Tier = Tier.DEVICE) -> None:
        """The caller's own blocks get a content."""
        for block, value in zip(ids.tolist(), values, strict=True):
            self.words(tier)[block] = value
            self.own[tier][block] = value

    def verifies(self, refs: BlockRefs) -> list[bool]:
        table = self.arenas[refs.tier].generations
        return [bool(table[block] == told) for block, told in zip(refs.blocks, refs.generations, strict=True)]

    # --- tokens ---

    def tokens(self, symbols: tuple[int, ...], num_more: int = 0) -> bytes:
        """Blocks that differ in their last token, and some tokens that fill no block."""
        tokens = np.zeros((len(symbols), self.sizes.block_size), dtype="<i4")
        tokens[:, -1] = symbols
        return tokens.tobytes() + bytes(4 * min(num_more, self.sizes.block_size - 1))

    def walk(self) -> dict[Prefix, tuple[Tier, int]]:
        """What the index holds, by a walk of its tree."""
        found: dict[Prefix, tuple[Tier, int]] = {}
        index = self.pool._index
        for namespace, root in index._tree._roots.items() if index is not None else ():
            stack = [(root, (namespace.removeprefix("model/"), ()))]
            while stack:
                node, (salt, above) = stack.pop()
                key = np.frombuffer(node.key, "<i4").reshape(-1, self.sizes.block_size)
                assert len(key) == len(node.payload.blocks)
                for symbol, block in zip(key[:, -1].tolist(), node.payload.blocks.tolist(), strict=True):
                    above = (*above, symbol)
                    found[salt, above] = (node.payload.tier, block)
                stack.extend((child, (salt, above)) for child in node.children.values())
        return found

    def count(self, tier: Tier) -> int:
        """Blocks cached in a tier before this step."""
        return sum(where is tier for where, _ in self.cached.values())

    def found(self, salt: str, symbols: tuple[int, ...]) -> list[Prefix]:
        """What was cached of a sequence before this step."""
        return [prefix for prefix in prefixes(salt, symbols) if prefix in self.cached]

    def in_device(self, salt: str, symbols: tuple[int, ...]) -> int:
        """How many blocks of a sequence were in the device tier before this step."""
        return sum(self.cached[prefix][0] is Tier.DEVICE for prefix in self.found(salt, symbols))

    def locked(self) -> set[Prefix]:
        return {prefix for salt, symbols in self.locks.values() for prefix in prefixes(salt, symbols)}

    # --- expectations ---

    def use(self, some: list[Prefix]) -> None:
        self.used.update(dict.fromkeys(some, self.clock()))

    def add(self, some: list[Prefix]) -> None:
        """They are cached from now on."""
        self.expected.update(some)
        self.use(some)

    def may_evict(self) -> None:
        """No more is cached than before, but maybe less."""
        self.is_exact = False

    def check(self) -> None:
        """All that must hold between two steps; what was evicted is known from now on."""
        cached, stats = self.walk(), self.pool.stats()
        # 1. the index: what it must hold, in the right tiers
        assert set(cached) == self.expected if self.is_exact else set(cached) <= self.expected
        locked = self.locked()
        for (salt, symbols), (tier, _) in cached.items():
            above = cached.get((salt, symbols[:-1]))
            assert len(symbols) == 1 or above is not None
            assert above is None or not (above[0] is Tier.HOST and tier is Tier.DEVICE)
        assert all(cached[prefix][0] is Tier.DEVICE for prefix in locked)
        # 2. blocks have one owner, and hold what they should
        for tier, arena in self.arenas.items():
            held: dict[int, int | None] = dict(self.own[tier])
            for prefix, (where, block) in cached.items():
                if where is tier:
                    assert block not in held, f"{tier!r} {block} is held twice"
                    held[block] = self.value(prefix)
            words = self.words(tier)
            for block, value in held.items():
                assert arena.generations[block] % 2 == 1
                assert value is None or (words[block] == value).all(), (tier, block, value, words[block])
        # 3. the counts
        num_device = sum(tier is Tier.DEVICE for tier, _ in cached.values())
        num_own = len(self.own[Tier.DEVICE])
        assert stats == PoolStats(
            free=self.sizes.num_blocks - num_own - num_device,
            active=num_own + len(locked),
            historical=num_device - len(locked),
            num_host=self.num_host,
            host_historical=len(cached) - num_device,
        )
        assert self.pool.num_available == stats.free + stats.historical
        # 4. what was told of removals
        self._check_removals(cached)
        self.cached, self.expected, self.is_exact = cached, set(cached), True
        self.used = {prefix: used for prefix, used in self.used.items() if prefix in cached}
        table = {tier: arena.generations for tier, arena in self.arenas.items()}
        self.told = {
            (tier, block, int(table[tier][block])): prefix for prefix, (tier, block) in cached.items()
        }

    def _check_removals(self, cached: dict[Prefix, tuple[Tier, int]]) -> None:
        events = self.pool.take_removed()
        if not self.sizes.tells:
            assert not events
            return
        for removed in events:
            where = _addresses(removed.refs)
            to = [None] * len(where) if removed.moved_to is None else _addresses(removed.moved_to)
            assert not any(self.verifies(removed.refs)), "what was told as removed still verifies"
            for old, new in zip(where, to, strict=True):
                prefix = self.told.pop(old, None)  # None: came and went within a step
                if prefix is not None and new is not None:
                    self.told[new] = prefix
                elif prefix in cached:  # computed anew
                    assert cached[prefix][0] is Tier.DEVICE, f"{prefix} was moved, and told as gone"
        for (tier, block, generation), prefix in self.told.items():
            assert cached.get(prefix) == (tier, block), f"{prefix} left {tier!r} {block} unnoticed"
            assert self.arenas[tier].generations[block] == generation


def _addresses(refs: BlockRefs) -> list[tuple[Tier, int, int]]:
    return [(refs.tier, *at) for at in zip(refs.blocks, refs.generations, strict=True)]
