"""The façade: life of blocks, addresses, hand-offs, start and end."""

from __future__ import annotations

import pytest
import torch

from memserve import memfd
from memserve.messages import BlockRefs, Tier
from memserve.pool.arena import Arena
from memserve.pool.mempool import MemPool
from memserve.pool.retention import PoolStats


@pytest.mark.parametrize("block_size", [1, 4, 16])
def test_life_of_blocks(make_pool, block_size: int) -> None:
    pool = make_pool(num_blocks=8, block_size=block_size).pool
    assert (pool.num_blocks, pool.num_available, pool.block_size) == (8, 8, block_size)
    # 1. allocate
    first, second = pool.alloc_mem(3), pool.alloc_mem(4)
    assert first.tolist() == [0, 1, 2] and second.tolist() == [3, 4, 5, 6]
    assert pool.stats() == PoolStats(free=1, active=7, historical=0)
    # 2. what is not there is not given, in part neither
    assert pool.alloc_mem(2) is None and pool.num_available == 1
    # 3. what is given back is free
    pool.free_mem(first)
    assert pool.stats() == PoolStats(free=4, active=4, historical=0)
    # 4. nothing may be given back twice
    with pytest.raises(AssertionError):
        pool.free_mem(first)
    with pytest.raises(AssertionError, match="held and not cached: {3, 4, 5, 6}"):
        pool.assert_idle()
    pool.free_mem(second)
    pool.assert_idle()


def test_addresses_name_the_content(make_pool) -> None:
    pool = make_pool("decode-1").pool
    ids = pool.alloc_mem(3)
    expected = BlockRefs("decode-1", 1, Tier.DEVICE, (2, 0), (1, 1))
    assert pool.addresses(ids[[2, 0]]) == expected
    pool.free_mem(ids)
    assert pool.addresses([2, 0]).generations == (2, 2)
    again = pool.alloc_mem(1)
    assert pool.addresses([2, 0]).generations == (2, 3)
    pool.free_mem(again)


def test_what_a_dead_worker_offered_can_be_pulled_while_its_replacement_runs(make_pool) -> None:
    dead, decode = make_pool("prefill-0", num_blocks=8), make_pool("decode-0")
    dead.grant_to(decode)
    # 1. the first life offers blocks, and ends without a word
    ids = dead.pool.alloc_mem(3)
    dead.fill(ids)
    refs = dead.pool.addresses(ids)
    # 2. the second one, over the same memory, warms up and serves
    arena = Arena.map(dead.arena.geometry, 8, dead.fds)
    second = MemPool(arena, "prefill-0", 2, lambda: None)
    taken = second.alloc_mem(5)
    arena.blocks[taken] = 0xFF
    # 3. what was offered is all there
    into = decode.pool.alloc_mem(3)
    result = decode.finish(decode.pool.fetch(refs, into))
    assert (result.num_blocks, result.failure) == (3, None)
    assert decode.content(into) == dead.content(ids)
    # 4. until room runs out: a part is gone, and known to be
    last = second.alloc_mem(1)
    result = decode.finish(decode.pool.fetch(refs, into))
    assert result.num_blocks < 3 and "gone" in result.failure
    decode.pool.free_mem(into)
    second.free_mem([*taken, *last])
    second.assert_idle()
    second.close()
    dead.pool.free_mem(ids)


def test_a_hand_off_between_two_pools(make_pool) -> None:
    prefill, decode = make_pool("prefill-0"), make_pool("decode-0")
    prefill.grant_to(decode)
    decode.grant_to(prefill)
    # 1. P computes and offers
    ids = prefill.pool.alloc_mem(5)
    prefill.pool.kv[torch.from_numpy(ids)] = torch.randn(5, *prefill.pool.kv.shape[1:])
    refs = prefill.pool.addresses(ids)
    # 2. D pulls
    into = decode.pool.alloc_mem(5)
    assert decode.finish(decode.pool.fetch(refs, into)).failure is None
    assert torch.equal(decode.pool.kv[torch.from_numpy(into)], prefill.pool.kv[torch.from_numpy(ids)])
    # 3. P releases and uses the blocks again; D is not concerned
    kept = decode.pool.kv[torch.from_numpy(into)].clone()
    prefill.pool.free_mem(ids)
    assert torch.equal(decode.pool.kv[torch.from_numpy(into)], kept)
    # 4. the address is no good from the next allocation on
    taken = prefill.pool.alloc_mem(1)
    result = decode.finish(decode.pool.fetch(refs, into))
    assert (result.num_blocks, result.failure) == (0, "5 of 5 blocks were gone before the copy")
    prefill.pool.free_mem(taken)
    decode.pool.free_mem(into)


def test_populate_fills_the_arena_and_tells_how_far_it_is(make_pool) -> None:
    under_test = make_pool()
    assert memfd.resident_bytes(under_test.fds.arena) == 0
    told: list[float] = []
    under_test.pool.populate(told.append)
    assert told == sorted(told) and told[0] == 0.0 and told[-1] == 1.0
    assert memfd.resident_bytes(under_test.fds.arena) == under_test.arena.kv.nbytes
    assert not under_test.pool.kv.any()


def test_close_twice_is_close(make_pool) -> None:
    pool = make_pool().pool
    pool.populate()
    pool.close()
    pool.close()
