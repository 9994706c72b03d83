"""Rules for pools that know nothing of each other; test_pools_machine.py adds transfers, faults, deaths."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from memserve.messages import Tier
from memserve.pool.block_table import BlockTable
from memserve.pool.eviction import least_frequently_used, least_recently_used
from memserve.pool.index import Lock
from memserve.pool.mempool import PoolStats
from tests.pool.pool_oracle import MAX_HOST_BLOCKS, PoolBesideOracle, Prefix, Sizes, prefixes

numbers = st.integers(0, 2)
salts = st.sampled_from(["", "x"])
host_sizes = st.sampled_from([0, 1, 2, 3, 4, 5, 6, 6, 8, 8, 10, MAX_HOST_BLOCKS, MAX_HOST_BLOCKS])
sequences = st.tuples(*[st.integers(0, 1)] * 6).flatmap(
    lambda symbols: st.integers(1, 6).map(lambda length: symbols[:length])
)
tiers = st.sampled_from([Tier.DEVICE, Tier.DEVICE, Tier.HOST])


@st.composite
def sizes(draw: st.DrawFn) -> list[Sizes]:
    block_size = draw(st.sampled_from([1, 4, 16]))
    made = []
    for _ in range(draw(st.integers(2, 3))):
        caches = draw(st.integers(0, 5)) > 0
        made.append(
            Sizes(
                block_size,
                num_blocks=draw(st.integers(4, 12)),
                caches=caches,
                num_host=draw(st.none() | host_sizes) if caches else None,
                rank=draw(st.sampled_from([least_recently_used, least_frequently_used])),
                tells=caches and draw(st.integers(0, 3)) > 0,
            )
        )
    return made


@dataclass
class Sequence:
    """A table, and what its blocks are to hold."""

    held: PoolBesideOracle
    table: BlockTable
    salt: str
    symbols: tuple[int, ...]

    def own(self) -> list[int]:
        return self.table.ids(self.table.num_blocks)[self.table.num_shared :].tolist()


class PoolsAlone(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.now = 1.0
        self.num_values = 1 << 20  # of blocks that are nobody's but their callers'
        self.pools: list[PoolBesideOracle] = []
        self.loose: list[tuple[PoolBesideOracle, Tier, int]] = []  # from alloc_mem
        self.kept: list[tuple[PoolBesideOracle, Lock]] = []
        self.sequences: list[Sequence] = []

    @initialize(sizes=sizes())
    def begin(self, sizes: list[Sizes]) -> None:
        values: dict[Prefix, int] = {}
        for name, size in zip("abc", sizes, strict=False):
            self.pools.append(PoolBesideOracle(name, size, values, lambda: self.now))
        for source in self.pools:
            for other in self.pools:
                if other is not source:
                    source.grant_to(other)

    def at(self, number: int) -> PoolBesideOracle:
        return self.pools[number % len(self.pools)]

    def pick(self, data: st.DataObject, held: PoolBesideOracle) -> Prefix:
        """A sequence, mostly one of which something is cached."""
        if held.cached and data.draw(st.integers(0, 3)):
            ends = [
                p for p in sorted(held.cached) if not any((p[0], (*p[1], s)) in held.cached for s in (0, 1))
            ]
            return data.draw(st.sampled_from(ends) | st.sampled_from(sorted(held.cached)))
        return data.draw(salts), data.draw(sequences)

    @rule()
    def time_passes(self) -> None:
        self.now += 1

    # --- blocks ---

    def take(self, held: PoolBesideOracle, num_blocks: int, tier: Tier = Tier.DEVICE) -> list[int] | None:
        """Allocate; they are the caller's, with no content to speak of."""
        stats = held.pool.stats()
        is_device = tier is Tier.DEVICE
        free = stats.free if is_device else held.num_host - len(held.own[tier]) - stats.host_historical
        cached = stats.historical if is_device else stats.host_historical
        ids = held.pool.alloc_mem(num_blocks, tier)
        has_tier = tier in held.arenas
        assert (ids is None) == (not has_tier or num_blocks > free + cached)
        if ids is None:
            return None
        after = held.pool.stats()
        num_evicted = max(0, num_blocks - free)
        assert num_evicted == cached - (after.historical if is_device else after.host_historical)
        if num_evicted:
            held.may_evict()
        held.own[tier].update(dict.fromkeys(ids.tolist()))
        return ids.tolist()

    @rule(number=numbers, num_blocks=st.integers(0, 6), tier=tiers)
    def alloc(self, number: int, num_blocks: int, tier: Tier) -> None:
        held = self.at(number)
        for block in self.take(held, num_blocks, tier) or ():
            self.num_values += 1
            held.fill(np.array([block]), [self.num_values], tier)
            self.loose.append((held, tier, block))

    @precondition(lambda self: self.loose)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        self.give_back(data.draw(st.lists(st.sampled_from(self.loose), unique=True, min_size=1)))

    def give_back(self, some: list[tuple[PoolBesideOracle, Tier, int]]) -> None:
        """Those of `some` that are of the pool and tier of the first."""
        if not some:
            return
        held, tier, _ = some[0]
        ids = [block for other, where, block in some if other is held and where is tier]
        held.pool.free_mem(ids, tier)
        for block in ids:
            del held.own[tier][block]
            self.loose.remove((held, tier, block))

    # --- the index ---

    def put(self, number: int, salt: str, symbols: tuple[int, ...]) -> None:
        held = self.at(number)
        ids = self.take(held, len(symbols))
        if ids is None:
            return
        held.fill(np.array(ids), [held.value(prefix) for prefix in prefixes(salt, symbols)])
        for block in ids:
            del held.own[Tier.DEVICE][block]
        now_in = held.pool.insert(held.tokens(symbols), ids, salt)
        if not held.sizes.caches:
            assert len(now_in) == 0
            return
        self.published(held, salt, symbols, now_in)

    insert = rule(number=numbers, salt=salts, symbols=sequences)(put)
    insert_more = rule(number=numbers, salt=salts, symbols=sequences)(put)

    def published(self, held: PoolBesideOracle, salt: str, symbols: tuple[int, ...], ids: np.ndarray) -> None:
        """Cached from now on, in these blocks."""
        held.add(prefixes(salt, symbols))
        cached = held.walk()
        wanted = [(Tier.DEVICE, block) for block in ids.tolist()]
        assert [cached[prefix] for prefix in prefixes(salt, symbols)] == wanted

    @rule(number=numbers, data=st.data(), num_more=st.integers(0, 3))
    def match(self, number: int, data: st.DataObject, num_more: int) -> None:
        held = self.at(number)
        salt, symbols = self.pick(data, held)
        match = held.pool.match(held.tokens(symbols, num_more), salt)
        found = held.found(salt, symbols)
        assert match.num_tokens == len(found) * held.sizes.block_size
        wanted = [held.cached[prefix] for prefix in found]
        blocks = [(Tier.DEVICE, block) for block in match.device_blocks.tolist()]
        assert blocks + [(Tier.HOST, block) for block in match.host_blocks.tolist()] == wanted
        held.use(found)

    @rule(number=numbers, data=st.data())
    def delete(self, number: int, data: st.DataObject) -> None:
        held, locked = self.at(number), self.at(number).locked()
        salt, symbols = self.pick(data, held)
        if (salt, symbols) in held.cached:
            held.expected -= {
                (other, path)
                for other, path in held.expected - locked
                if other == salt and path[: len(symbols)] == symbols
            }
            above = symbols[:-1]
            while above and (salt, above) not in locked:  # what nobody shares
                if any((salt, (*above, symbol)) in held.expected for symbol in (0, 1)):
                    break
                held.expected.remove((salt, above))
                above = above[:-1]
        num_freed = held.pool.delete(held.tokens(symbols), salt)
        assert num_freed == len(held.cached) - len(held.expected)

    @rule(number=numbers, ago=st.sampled_from([-1, 0, 1, 1, 2, 2, 3, 3]))
    def expire(self, number: int, ago: int) -> None:
        held, before = self.at(number), self.now - ago
        num_freed = held.pool.flush() if before > self.now else held.pool.expire(before)
        cached = set(held.walk())
        assert num_freed == len(held.cached) - len(cached)
        stays = held.locked() | {prefix for prefix in held.cached if held.used[prefix] >= before}
        assert cached == stays if before > self.now else cached >= stays
        held.may_evict()

    @rule(number=numbers, data=st.data())
    def lock(self, number: int, data: st.DataObject) -> None:
        held = self.at(number)
        salt, symbols = self.pick(data, held)
        lock = held.pool.lock(held.tokens(symbols), salt)
        assert (lock is None) == (not held.sizes.caches)
        if lock is not None:
            held.locks[id(lock)] = (salt, symbols[: held.in_device(salt, symbols)])
            held.use(held.found(salt, symbols))
            self.kept.append((held, lock))

    @precondition(lambda self: self.kept)
    @rule(data=st.data())
    def unlock(self, data: st.DataObject) -> None:
        held, lock = self.kept.pop(data.draw(st.integers(0, len(self.kept) - 1)))
        held.pool.unlock(lock)
        del held.locks[id(lock)]

    # --- tiers ---

    @rule(number=numbers, num_blocks=st.integers(0, 8))
    def swap_out(self, number: int, num_blocks: int) -> None:
        held, before = self.at(number), self.at(number).pool.stats()
        num_moved = held.pool.swap_out(num_blocks)
        left = before.historical - held.pool.stats().historical
        assert num_moved <= left
        assert left == (min(num_blocks, before.historical) if Tier.HOST in held.arenas else 0)
        in_host = {prefix for prefix, (tier, _) in held.walk().items() if tier is Tier.HOST}
        num_new = sum(held.cached[prefix][0] is Tier.DEVICE for prefix in in_host)
        assert num_new <= num_moved  # of those moved first some may have been dropped for others
        num_free = held.num_host - len(held.own[Tier.HOST]) - before.host_historical
        if left <= num_free:
            assert num_moved == num_new == left
        else:
            held.may_evict()

    def swapped_in(self, held: PoolBesideOracle, salt: str, symbols: tuple[int, ...], count: int) -> None:
        """So many blocks more of a sequence are in the device tier than before this step."""
        found, num_before = held.found(salt, symbols), held.in_device(salt, symbols)
        cached = held.walk()
        now_in = [prefix for prefix in found if cached.get(prefix, (None,))[0] is Tier.DEVICE]
        assert now_in == found[: num_before + count]
        held.may_evict()
        if len(found) - num_before <= self.num_free_before:
            assert num_before + count == len(found) and set(cached) == set(held.cached)
        held.use([prefix for prefix in found if prefix in cached])

    @rule(number=numbers, data=st.data())
    def swap_in(self, number: int, data: st.DataObject) -> None:
        held = self.at(number)
        salt, symbols = self.pick(data, held)
        self.num_free_before = held.pool.stats().free
        count = held.pool.swap_in(held.tokens(symbols), salt)
        self.swapped_in(held, salt, symbols, count)

    @rule(number=numbers, num_blocks=host_sizes)
    def resize(self, number: int, num_blocks: int) -> None:
        held = self.at(number)
        if Tier.HOST not in held.arenas:
            return
        before, own = held.pool.stats().host_historical, held.own[Tier.HOST]
        num_now = held.pool.resize(num_blocks)
        while held.pool.stats().num_host < num_now:  # memory comes from a thread
            time.sleep(0.0002)
            held.pool.poll()
        assert num_now == max(num_blocks, min(held.num_host, max(own, default=-1) + 1))
        held.num_host = num_now
        num_evicted = min(before, max(0, before + len(own) - num_blocks))
        assert held.pool.stats().host_historical == before - num_evicted
        if num_evicted:
            held.may_evict()

    # --- sequences ---

    @rule(number=numbers, data=st.data())
    def acquire(self, number: int, data: st.DataObject) -> None:
        held = self.at(number)
        salt, symbols = self.pick(data, held)
        self.num_free_before = held.pool.stats().free
        table = held.pool.acquire(held.tokens(symbols, 1), salt)
        self.swapped_in(held, salt, symbols, table.num_swapped_in)
        assert table.num_shared == held.in_device(salt, symbols) + table.num_swapped_in
        if table.lock is not None:
            held.locks[id(table)] = (salt, symbols[: table.num_shared])
        self.sequences.append(Sequence(held, table, salt, symbols[: table.num_shared]))

    @precondition(lambda self: self.sequences)
    @rule(data=st.data(), more=sequences)
    def grow(self, data: st.DataObject, more: tuple[int, ...]) -> None:
        of = data.draw(st.sampled_from(self.sequences))
        ids = self.take(of.held, len(more))
        if ids is not None:
            symbols = of.symbols + more
            new = prefixes(of.salt, symbols)[len(of.symbols) :]
            of.held.fill(np.array(ids), [of.held.value(prefix) for prefix in new])
            of.table.append(np.array(ids))
            of.symbols = symbols

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def publish(self, data: st.DataObject) -> None:
        of = data.draw(st.sampled_from(self.sequences))
        own = of.own()
        count = data.draw(st.integers(0, len(own)))
        start = of.table.num_shared
        of.held.pool.publish(of.table, of.held.tokens(of.symbols[start : start + count]))
        if not of.held.sizes.caches:
            assert of.table.num_shared == 0
            return
        for block in own[:count]:
            del of.held.own[Tier.DEVICE][block]
        assert of.table.num_shared == start + count
        if count:
            shared = of.symbols[: start + count]
            of.held.locks[id(of.table)] = (of.salt, shared)
            self.published(of.held, of.salt, shared, of.table.ids(start + count))

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def renew(self, data: st.DataObject) -> None:
        of = data.draw(st.sampled_from(self.sequences))
        told = of.held.pool.addresses(of.own())
        of.held.pool.renew(of.table)
        assert not any(of.held.verifies(told))

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        of = self.sequences.pop(data.draw(st.integers(0, len(self.sequences) - 1)))
        for block in of.own():
            del of.held.own[Tier.DEVICE][block]
        of.held.pool.release(of.table)
        of.held.locks.pop(id(of.table), None)

    # --- what must hold ---

    @invariant()
    def everything_is_as_it_must_be(self) -> None:
        for held in self.pools:
            held.check()

    def teardown(self) -> None:
        try:
            self.leave()
        finally:
            for held in self.pools:
                held.close()
                held.drop_memory()

    def leave(self) -> None:
        """Nobody wants anything any more."""
        for held, lock in self.kept:
            held.pool.unlock(lock)
        for of in self.sequences:
            of.held.pool.release(of.table)
        for held, tier, block in self.loose:
            held.pool.free_mem([block], tier)
        for held in self.pools:
            held.pool.assert_idle()
            stats = held.pool.stats()
            assert stats.active == 0
            # every block can be had, whatever is cached
            for tier, count in ((Tier.HOST, stats.num_host), (Tier.DEVICE, held.sizes.num_blocks)):
                ids = held.pool.alloc_mem(count, tier)
                assert (ids is None) == (tier not in held.arenas)
                if ids is not None:
                    assert (held.arenas[tier].generations[ids] % 2 == 1).all()
                    held.pool.free_mem(ids, tier)
            held.pool.flush()
            held.pool.assert_idle()
            assert held.pool.stats() == PoolStats(held.sizes.num_blocks, 0, 0, held.num_host, 0)
            if held.sizes.caches:
                assert not list(held.pool._index._tree.roots())
