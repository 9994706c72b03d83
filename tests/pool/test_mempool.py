"""The façade: life of blocks, addresses, peers and their descriptors, start and end."""

from __future__ import annotations

import os
import threading

import numpy as np
import pytest
import torch

from memserve import memfd
from memserve.errors import EngineError, MemoryError_
from memserve.messages import ArenaGrant, BlockRefs, Tier
from memserve.model_config import KVGeometry
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


def test_an_unknown_peer_is_a_miss(make_pool) -> None:
    under_test = make_pool()
    pool = under_test.pool
    into = pool.alloc_mem(1)
    result = pool.fetch(BlockRefs("nobody", 1, Tier.DEVICE, (0,), (1,)), into).poll()
    assert result is not None
    assert (result.num_blocks, result.failure) == (0, "unknown peer nobody")
    assert under_test.woken.acquire(blocking=False), "a failure at once wakes the loop like any other end"
    pool.remove_peer("nobody")
    pool.free_mem(into)


def test_a_second_grant_of_a_peer_replaces_the_first(make_pool) -> None:
    receiver, old, new = make_pool("receiver"), make_pool("peer"), make_pool("peer")
    for source, value in ((old, 1), (new, 2)):
        source.grant_to(receiver)
        source.fill(source.pool.alloc_mem(1), first=value)
    into = receiver.pool.alloc_mem(1)
    receiver.finish(receiver.pool.fetch(new.pool.addresses([0]), into))
    assert receiver.content(into) == [2]
    for each in (receiver, old, new):
        each.pool.free_mem([0])


def test_a_grant_that_cannot_be_mapped_costs_no_descriptor(make_pool) -> None:
    receiver = make_pool("receiver")
    fds = memfd.create_memfd("small", 1024), memfd.create_memfd("small", 8)
    with pytest.raises(MemoryError_):
        receiver.pool.add_peer(ArenaGrant("peer", 1, Tier.DEVICE, 2, 1024), *fds)
    for fd in fds:
        with pytest.raises(OSError):
            os.fstat(fd)


def test_a_grant_of_other_blocks_is_refused(make_pool) -> None:
    receiver = make_pool("receiver", block_size=4)
    with pytest.raises(EngineError, match="peer has blocks of 4096 bytes, receiver of 1024"):
        make_pool("peer", block_size=16).grant_to(receiver)


def test_populate_fills_the_arena_and_tells_how_far_it_is(make_pool) -> None:
    under_test = make_pool()
    assert memfd.resident_bytes(under_test.fds.arena) == 0
    told: list[float] = []
    under_test.pool.populate(told.append)
    assert told == sorted(told) and told[0] == 0.0 and told[-1] == 1.0
    assert memfd.resident_bytes(under_test.fds.arena) == under_test.arena.kv.nbytes
    assert not under_test.pool.kv.any()


def test_populate_includes_the_peers_there_are(make_pool, monkeypatch) -> None:
    pool, peer, later = make_pool("decode-0"), make_pool("prefill-0"), make_pool("prefill-1")
    threads: dict[int, str] = {}
    populate = memfd.populate

    def spy(mapped: np.ndarray, *args: object, **kwargs: object) -> bool:
        threads[mapped.ctypes.data] = threading.current_thread().name
        return populate(mapped, *args, **kwargs)

    monkeypatch.setattr(memfd, "populate", spy)
    # 1. nothing is done when a peer comes, all in one go before the first step
    peer.grant_to(pool)
    assert not threads
    told: list[float] = []
    pool.pool.populate(told.append)
    assert list(threads.values()) == [threading.current_thread().name] * 2
    assert told == sorted(told) and told[-1] == 1.0
    # 2. one that comes later does not hold up the loop
    later.grant_to(pool)
    pool.pool.close()
    assert list(threads.values())[2:] == ["memserve-populate"]


def test_memory_that_cannot_be_populated(make_pool, monkeypatch, caplog) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise MemoryError_("no memory")

    pool, peer = make_pool("decode-0"), make_pool("prefill-0")
    monkeypatch.setattr(memfd, "populate", fail)
    # 1. our own memory is needed
    with pytest.raises(MemoryError_):
        peer.pool.populate()
    # 2. a peer's mapping is a matter of speed only, populated in the background once the own one is
    with pytest.raises(MemoryError_):
        pool.pool.populate()
    peer.grant_to(pool)
    pool.pool.close()
    assert "decode-0: cannot populate the arena of prefill-0: no memory" in caplog.text


def test_close_twice_is_close(make_pool) -> None:
    pool = make_pool().pool
    pool.populate()
    pool.close()
    pool.close()


def test_a_pool_of_private_memory_has_no_peers(make_pool) -> None:
    geometry = KVGeometry(num_layers=2, num_kv_heads=2, block_size=4, head_dim=8, dtype="float32")
    woken: list[bool] = []
    arena = Arena.on_device(geometry, 8, torch.device("cpu"))
    pool = MemPool(arena, "gpu-0", 1, lambda: woken.append(True))
    # 1. grants are accepted, and their descriptors closed
    fds = memfd.create_memfd("a", 8 * geometry.block_bytes), memfd.create_memfd("g", 64)
    pool.add_peer(ArenaGrant("peer", 1, Tier.DEVICE, 8, geometry.block_bytes), *fds)
    for fd in fds:
        with pytest.raises(OSError):
            os.fstat(fd)
    # 2. every pull is a miss
    ids = pool.alloc_mem(2)
    result = pool.fetch(BlockRefs("peer", 1, Tier.DEVICE, (0, 1), (1, 1)), ids).poll()
    assert result is not None and result.failure == "unknown peer peer"
    assert woken
    # 3. the rest works as ever
    assert np.array_equal(pool.addresses(ids).generations, [1, 1])
    pool.free_mem(ids)
    pool.populate()
    pool.remove_peer("peer")
    pool.assert_idle()
    pool.close()
