"""The host tier of a pool: what is evicted goes there, comes back whole, and its size follows `resize`."""

from __future__ import annotations

import time

import numpy as np
import pytest

from memserve import memfd
from memserve.errors import MemoryError_
from memserve.messages import BlockRefs, Removed, Tier, Transfer
from memserve.pool import growth
from memserve.pool.eviction import least_frequently_used
from tests.pool.conftest import MakePool, PoolUnderTest


def tokens_of(first: int, num_tokens: int) -> bytes:
    return np.arange(first, first + num_tokens, dtype="<i4").tobytes()


def cache(under_test: PoolUnderTest, first: int, num_blocks: int) -> bytes:
    """Put a sequence of its own into the cache: its block i holds first + i."""
    pool = under_test.pool
    tokens = tokens_of(first * 1000, num_blocks * pool.block_size)
    ids = pool.alloc_mem(num_blocks)
    assert ids is not None
    under_test.fill(ids, first)
    pool.insert(tokens, ids)
    return tokens


def content(under_test: PoolUnderTest, tokens: bytes) -> list[int]:
    """What is cached of a sequence, wherever it is."""
    found = under_test.pool.match(tokens)
    in_host = under_test.content(found.host_blocks, Tier.HOST) if len(found.host_blocks) else []
    return under_test.content(found.device_blocks) + in_host


@pytest.mark.parametrize("block_size", [1, 4, 16])
def test_out_and_in_again(make_pool: MakePool, block_size: int) -> None:
    held = make_pool(num_blocks=8, block_size=block_size, host_blocks=16)
    pool = held.pool
    a = cache(held, 10, 5)
    # 1. swapped out by hand: the end of the sequence goes first, the content is the same
    assert pool.swap_out(2) == 2
    found = pool.match(a)
    assert (len(found.device_blocks), len(found.host_blocks)) == (3, 2)
    assert content(held, a) == [10, 11, 12, 13, 14]
    assert pool.stats().host_historical == 2
    # 2. an allocation that finds no room swaps out what is needed
    ids = pool.alloc_mem(8)
    assert ids is not None and pool.stats().host_historical == 5
    assert content(held, a) == [10, 11, 12, 13, 14]
    # 3. with no room on the device only what fits comes back
    pool.free_mem(ids[:2])
    assert pool.swap_in(a) == 2
    assert content(held, a) == [10, 11, 12, 13, 14]
    # 4. a sequence that begins with it gets all of it
    pool.free_mem(ids[2:])
    table = pool.acquire(a + tokens_of(77, block_size))
    assert (table.num_shared, table.num_swapped_in) == (5, 3)
    assert held.content(table.ids(5)) == [10, 11, 12, 13, 14]
    assert pool.stats().host_historical == 0
    pool.release(table)
    # 5. what is locked is not swapped out
    lock = pool.lock(a)
    assert lock is not None and pool.swap_out(8) == 0
    pool.unlock(lock)
    assert pool.swap_out(8) == 5


def grow(under_test: PoolUnderTest, num_blocks: int) -> None:
    assert under_test.pool.resize(num_blocks) == num_blocks
    deadline = time.monotonic() + 30
    while under_test.pool.stats().num_host < num_blocks:
        assert time.monotonic() < deadline
        assert under_test.woken.acquire(timeout=30)
        under_test.pool.poll()


def test_the_coldest_leave_the_host_tier_first(make_pool: MakePool) -> None:
    held = make_pool(num_blocks=4, host_blocks=4)
    a, b = cache(held, 10, 2), cache(held, 20, 2)
    c = cache(held, 30, 4)  # a and b are swapped out
    assert held.pool.stats().host_historical == 4
    held.pool.match(a)
    held.pool.match(c)
    cache(held, 40, 2)  # two of c go out, and the two of b are gone for them
    assert content(held, b) == []
    assert content(held, a) == [10, 11] and content(held, c) == [30, 31, 32, 33]


def test_what_is_colder_than_all_of_a_full_host_tier_is_dropped(make_pool: MakePool) -> None:
    held = make_pool(num_blocks=2, host_blocks=2)
    a, b = cache(held, 10, 2), cache(held, 20, 2)
    held.pool.match(a)
    cache(held, 30, 2)
    assert content(held, a) == [10, 11] and content(held, b) == []


def test_least_frequently_used(make_pool: MakePool) -> None:
    held = make_pool(num_blocks=4, host_blocks=0, rank=least_frequently_used)
    often, once = cache(held, 10, 2), cache(held, 20, 2)
    for _ in range(3):
        held.pool.match(often)
    held.pool.match(once)
    cache(held, 30, 2)
    assert content(held, often) == [10, 11] and content(held, once) == []


def test_the_same_computed_anew_takes_the_place_of_the_host_copy(make_pool: MakePool) -> None:
    held = make_pool(num_blocks=8, host_blocks=8)
    tokens = cache(held, 10, 3)
    held.pool.swap_out(2)
    ids = held.pool.alloc_mem(3)
    assert ids is not None
    held.fill(ids, 50)
    held.pool.insert(tokens, ids)
    assert content(held, tokens) == [10, 51, 52], "of the device's own block the first copy stays"
    assert held.pool.stats().host_historical == 0


def test_forgetting_reaches_both_tiers(make_pool: MakePool) -> None:
    held = make_pool(num_blocks=8, host_blocks=8)
    a, b = cache(held, 10, 3), cache(held, 20, 3)
    held.pool.swap_out(2)
    assert held.pool.delete(a) == 3 and content(held, b) == [20, 21, 22]
    held.pool.swap_out(2)
    assert held.pool.flush() == 3
    assert held.pool.stats() == held.pool.stats().__class__(8, 0, 0, 8, 0)


def test_blocks_of_ones_own_in_the_host_tier(make_pool: MakePool) -> None:
    held = make_pool(num_blocks=4, host_blocks=4)
    tokens = cache(held, 10, 3)
    held.pool.swap_out(3)
    ids = held.pool.alloc_mem(3, Tier.HOST)  # two of the sequence make room
    assert ids is not None and content(held, tokens) == [10]
    assert held.pool.alloc_mem(2, Tier.HOST) is None
    held.pool.free_mem(ids, Tier.HOST)
    assert make_pool("none", caches=True).pool.alloc_mem(1, Tier.HOST) is None


def test_it_grows_and_shrinks_and_gives_its_memory_back(make_pool: MakePool) -> None:
    held = make_pool(num_blocks=40, block_size=16, host_blocks=40, max_host_blocks=64)
    pool, host_fds = held.pool, held.host_fds
    assert host_fds is not None
    early, late = cache(held, 10, 20), cache(held, 60, 20)
    assert pool.swap_out(40) == 40
    full = memfd.resident_bytes(host_fds.arena)
    # 1. to half: the colder half is gone, the rest was moved together and is whole
    assert pool.resize(20) == 20
    assert content(held, early) == [] and content(held, late) == list(range(60, 80))
    assert memfd.resident_bytes(host_fds.arena) <= full * 0.6
    # 2. to more than before
    grow(held, 64)
    assert memfd.resident_bytes(host_fds.arena) == 64 * held.arena.geometry.block_bytes
    ids = pool.alloc_mem(44, Tier.HOST)
    assert ids is not None and pool.alloc_mem(21, Tier.HOST) is None
    # 3. what somebody holds is in the way, up to its last block
    pool.free_mem(ids[1:], Tier.HOST)
    assert pool.resize(0) == ids[0] + 1
    assert content(held, late) == []
    pool.free_mem(ids[:1], Tier.HOST)
    assert pool.resize(0) == 0
    assert memfd.resident_bytes(host_fds.arena) == 0
    # 4. without room nothing is swapped out, only evicted
    cache(held, 100, 40)
    assert pool.swap_out(1) == 0 and pool.stats().historical == 39
    for impossible in (-1, 65):
        with pytest.raises(ValueError, match="from 0 to 64"):
            pool.resize(impossible)
    with pytest.raises(ValueError, match="from 0 to 0"):
        make_pool("none", caches=True).pool.resize(1)


def test_to_shrink_moves_nothing_to_where_something_was_moved_from(make_pool: MakePool) -> None:
    held = make_pool(num_blocks=12, host_blocks=10, tells_removals=True)
    singles = [cache(held, first, 1) for first in range(1, 7)]
    pairs = [cache(held, first, 2) for first in (10, 20)]
    for num_blocks in (6, 2, 2):  # in this order, each sequence in one piece
        held.pool.swap_out(num_blocks)
    for tokens in (singles[0], singles[2], singles[4], singles[5]):
        held.pool.delete(tokens)
    # free are 0, 2, 4, 5; and, once the first pair has moved, two neighbours above
    before = [held.pool.addresses(held.pool.match(tokens).host_blocks, Tier.HOST) for tokens in pairs]
    held.pool.take_removed()
    assert held.pool.resize(6) == 6
    after = [held.pool.addresses(held.pool.match(tokens).host_blocks, Tier.HOST) for tokens in pairs]
    moved = {removed.refs: removed.moved_to for removed in held.pool.take_removed()}
    assert moved == dict(zip(before, after, strict=True))
    assert [content(held, tokens) for tokens in (singles[1], singles[3], *pairs)] == [
        [2],
        [4],
        [10, 11],
        [20, 21],
    ]


def test_it_does_not_grow_beyond_the_machine(make_pool: MakePool, monkeypatch: pytest.MonkeyPatch) -> None:
    held = make_pool(host_blocks=4)
    monkeypatch.setattr(memfd, "available_bytes", lambda: 10)
    with pytest.raises(MemoryError_, match="missing"):
        held.pool.resize(10)
    assert held.pool.stats().num_host == 4


def test_it_ends_where_the_machine_runs_out_on_the_way(
    make_pool: MakePool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another tier, say, that grows at the same time."""
    held = make_pool(host_blocks=4)
    left = [10**9, 10**9, 10]
    monkeypatch.setattr(memfd, "available_bytes", lambda: left.pop(0))
    monkeypatch.setattr(growth, "_PIECE_BYTES", 3 * held.arena.geometry.block_bytes)
    assert held.pool.resize(20) == 20
    assert held.woken.acquire(timeout=30)
    held.pool.poll()
    assert held.pool.stats().num_host == 7
    assert held.pool.resize(2) == 2 and held.pool.stats().num_host == 2


def test_peers_pull_from_it(make_pool: MakePool) -> None:
    source, receiver = make_pool("source", host_blocks=8), make_pool("receiver")
    source.grant_to(receiver)
    tokens = cache(source, 10, 4)
    source.pool.swap_out(4)
    refs = source.pool.addresses(source.pool.match(tokens).host_blocks, Tier.HOST)
    into = receiver.pool.alloc_mem(4)
    assert into is not None
    result = receiver.finish(receiver.pool.fetch(refs, into))
    assert result.num_blocks == 4 and receiver.content(into) == [10, 11, 12, 13]
    # what was given up there meanwhile does not verify, nor what lies beyond its size
    source.pool.resize(2)
    result = receiver.finish(receiver.pool.fetch(refs, into))
    assert result.num_blocks == 2 and result.failure is not None
    receiver.pool.free_mem(into)


def test_removals_are_told_with_the_addresses_that_were_told_before(make_pool: MakePool) -> None:
    held = make_pool(num_blocks=4, host_blocks=2, tells_removals=True)
    pool = held.pool
    tokens = cache(held, 10, 4)
    before = pool.addresses(pool.match(tokens).device_blocks)

    def part(refs: BlockRefs, start: int, stop: int) -> BlockRefs:
        return BlockRefs(
            refs.instance, refs.incarnation, refs.tier, refs.blocks[start:stop], refs.generations[start:stop]
        )

    # 1. three are evicted: two are moved, one is gone
    ids = pool.alloc_mem(3)
    in_host = pool.addresses(pool.match(tokens).host_blocks, Tier.HOST)
    assert pool.take_removed() == [Removed(part(before, 1, 3), in_host), Removed(part(before, 3, 4), None)]
    assert pool.take_removed() == []
    # 2. the two come back
    pool.free_mem(ids)
    pool.swap_in(tokens)
    now = pool.addresses(pool.match(tokens).device_blocks)
    assert pool.take_removed() == [Removed(in_host, part(now, 1, 3))]
    # 3. and all are forgotten
    pool.flush()
    (removed,) = pool.take_removed()
    assert removed.moved_to is None
    assert sorted(zip(removed.refs.blocks, removed.refs.generations, strict=True)) == sorted(
        zip(now.blocks, now.generations, strict=True)
    )
    # 4. to shrink moves what is kept
    a, b = cache(held, 20, 1), cache(held, 30, 1)
    pool.swap_out(2)
    pool.take_removed()
    pool.resize(1)
    kept = pool.addresses(pool.match(b).host_blocks, Tier.HOST)
    assert content(held, a) == [] and kept.blocks == (0,)
    removed = pool.take_removed()
    assert [each.moved_to for each in removed if each.moved_to is not None] in ([], [kept])
    assert sum(len(each.refs.blocks) for each in removed if each.moved_to is None) == 1


def test_models_do_not_share(make_pool: MakePool) -> None:
    a, b = (make_pool(name, host_blocks=4, fingerprint=name).pool for name in ("a", "b"))
    assert a._namespace != b._namespace


def test_holes_and_many_nodes_above_the_new_size(make_pool: MakePool) -> None:
    """A block that was moved down must not be given to the next one that moves."""
    held = make_pool(num_blocks=64, host_blocks=32, max_host_blocks=64)
    pool = held.pool
    singles = [cache(held, n, 1) for n in range(16)]
    longs = [cache(held, 20 + 4 * n, 4) for n in range(4)]
    assert pool.swap_out(32) == 32
    for tokens in (*singles[1::2], *longs[:2]):
        pool.delete(tokens)
    assert pool.resize(16) == 16
    assert content(held, longs[2]) == [28, 29, 30, 31] and content(held, longs[3]) == [32, 33, 34, 35]
    assert [content(held, tokens) for tokens in singles[::2]] == [[n] for n in range(0, 16, 2)]


def test_what_comes_back_from_elsewhere_pushes_nothing_out(make_pool: MakePool) -> None:
    """A transfer that is to leave room does not swap in a prefix for it either."""
    held = make_pool(num_blocks=32, host_blocks=64)
    pool = held.pool
    cold = cache(held, 100, 24)
    assert pool.swap_out(24) == 24
    hot = cache(held, 10, 30)
    refs = BlockRefs("nobody", 1, Tier.DEVICE, (0,), (1,))
    offered = Transfer("pool", refs, cold + tokens_of(7, pool.block_size), first_block=24)
    received = pool.receive(offered, spare=2).poll()
    assert received is not None and "swapped out" in (received.failure or "")
    assert len(pool.match(hot).device_blocks) == 30
