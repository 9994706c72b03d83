"""The peers of a pool: their grants and descriptors, populating their mappings, those that are not there."""

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


def test_an_unknown_peer_is_a_miss(make_pool) -> None:
    under_test = make_pool()
    pool = under_test.pool
    into = pool.alloc_mem(1)
    result = pool.fetch(BlockRefs("nobody", 1, Tier.DEVICE, (0,), (1,)), into).poll()
    assert result is not None
    assert (result.num_blocks, result.failure) == (0, "unknown peer nobody")
    assert under_test.woken.acquire(blocking=False), "a failure at once wakes the loop like any other end"
    pool.peers.remove("nobody")
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
        receiver.pool.peers.add_mapped(ArenaGrant("peer", 1, Tier.DEVICE, 2, 1024), *fds)
    for fd in fds:
        with pytest.raises(OSError):
            os.fstat(fd)


def test_a_grant_of_other_blocks_is_refused(make_pool) -> None:
    receiver = make_pool("receiver", block_size=4)
    with pytest.raises(EngineError, match="peer has blocks of 4096 bytes, receiver of 1024"):
        make_pool("peer", block_size=16).grant_to(receiver)


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


def test_a_pool_of_private_memory_has_no_peers(make_pool) -> None:
    geometry = KVGeometry(num_layers=2, num_kv_heads=2, block_size=4, head_dim=8, dtype="float32")
    woken: list[bool] = []
    arena = Arena.on_device(geometry, 8, torch.device("cpu"))
    pool = MemPool(arena, "gpu-0", 1, lambda: woken.append(True))
    # 1. grants are accepted, and their descriptors closed
    fds = memfd.create_memfd("a", 8 * geometry.block_bytes), memfd.create_memfd("g", 64)
    pool.peers.add_mapped(ArenaGrant("peer", 1, Tier.DEVICE, 8, geometry.block_bytes), *fds)
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
    pool.peers.remove("peer")
    pool.assert_idle()
    pool.close()
