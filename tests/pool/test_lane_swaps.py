"""Swaps that a GPU makes beside its steps: in whatever order its lanes run, nothing is read too early."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import permutations

import numpy as np
import pytest
import torch

from memserve.messages import CacheCommand, CacheVerb, Removed, Tier, pack_tokens
from memserve.pool import swaps
from memserve.pool.pinned import PinnedBlocks
from memserve.workers.cache_admin import CacheAdmin
from memserve.workers.publisher import Publisher
from tests.pool.fake_lanes import FakeGpu, FakeMark
from tests.pool.gpu_pools import FakePins, GpuPool, gpu_pools

ORDERS = tuple(permutations(("compute", "swap_out", "swap_in")))


@pytest.fixture
def make_pool() -> Iterator[Callable[..., GpuPool]]:
    yield from gpu_pools()


def tokens(first: int, num_blocks: int) -> bytes:
    return pack_tokens(list(range(first * 1000, first * 1000 + 4 * num_blocks)))


def keep(pool: GpuPool, first: int, num_blocks: int) -> np.ndarray:
    """Compute and cache a sequence whose blocks hold `first`, `first` + 1, …"""
    ids = pool.pool.alloc_mem(num_blocks)
    assert ids is not None
    pool.fill(ids, first)
    pool.pool.insert(tokens(first, num_blocks), ids)
    return ids


def run_out(gpu: FakeGpu, order: tuple[str, ...]) -> None:
    """Each lane as far as it can, in this order, again and again."""
    while sum(gpu.run(name) for name in order):
        pass


def host_content(pool: GpuPool, ids: np.ndarray) -> list[int]:
    assert pool.host is not None and pool.host.blocks is not None
    blocks = pool.host.blocks[ids]
    assert (blocks == blocks[:, :1]).all()
    return blocks[:, 0].tolist()


@pytest.mark.parametrize("order", ORDERS)
def test_a_block_is_written_anew_only_after_it_was_swapped_out(make_pool, order) -> None:
    # 1. the pool is full of what is cached, and of steps that are only launched
    pool = make_pool("pool", num_blocks=16, host_blocks=32, is_free=False)
    keep(pool, 1, 8)
    keep(pool, 50, 8)
    # 2. a new sequence takes the room of the older, and its step is launched
    ids = pool.pool.alloc_mem(8)
    pool.fill(ids, 100)
    # 3. whichever lane runs first, what was cached is in the host tier, what is new in the device's
    run_out(pool.lanes, order)
    assert pool.content(ids) == list(range(100, 108))
    in_host = pool.pool.match(tokens(1, 8)).host_blocks
    assert host_content(pool, in_host) == list(range(1, 9))
    pool.pool.free_mem(ids)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("num_blocks", [16, 32])  # all of it is used anew, or there is room beside
def test_what_is_swapped_in_is_there_when_a_step_reads_it(make_pool, order, num_blocks: int) -> None:
    pool = make_pool("pool", num_blocks=num_blocks, host_blocks=32, is_free=False)
    keep(pool, 1, 8)
    keep(pool, 50, 8)
    # 1. swapped out, and others write to whatever is free then
    pool.pool.swap_out(16)
    if num_blocks == 16:
        others = pool.pool.alloc_mem(16)
        pool.fill(others, 200)
        pool.pool.free_mem(others)
    # 2. swapped in again, without a moment for the lanes in between
    table = pool.pool.acquire(tokens(1, 8))
    assert table.num_swapped_in == 8
    # 3. a step reads it
    blocks, seen = pool.arena.as_bytes(), []
    ids = torch.from_numpy(table.ids(8).copy())
    pool.lanes.compute.put(lambda: seen.extend(blocks[ids][:, 0].tolist()))
    run_out(pool.lanes, order)
    assert seen == list(range(1, 9))
    pool.pool.release(table)


@pytest.mark.parametrize("order", ORDERS)
def test_swaps_in_a_row_keep_their_content(make_pool, order) -> None:
    """Host blocks that a swap in has freed are written by the next swap out only after they were read."""
    pool = make_pool("pool", num_blocks=8, host_blocks=8, is_free=False)
    keep(pool, 1, 4)
    keep(pool, 50, 4)
    for first in (1, 50, 1, 50):
        pool.pool.swap_out(8)
        table = pool.pool.acquire(tokens(first, 4))
        pool.pool.release(table)
    run_out(pool.lanes, order)
    for first in (1, 50):
        device, host = pool.pool.match(tokens(first, 4))[1:]
        assert pool.content(device) + host_content(pool, host) == list(range(first, first + 4))


def test_room_made_ahead_makes_no_step_wait(make_pool) -> None:
    pool = make_pool("pool", num_blocks=64, host_blocks=64, is_free=False)
    keep(pool, 1, 61)
    held = pool.pool.alloc_mem(2)
    pool.lanes.run()
    # 1. less is free than is kept free: the loop's turn swaps out, and nobody waits
    assert pool.pool.stats().free == 1
    pool.pool.poll()
    assert pool.pool.stats().free == 2 and pool.pool.num_available == 62
    (one,) = pool.pool.alloc_mem(1)
    assert not any(isinstance(work, FakeMark) for work in pool.lanes.compute.todo)
    # 2. what is still being copied is given out when there is nothing else, and then the step waits
    (cooling,) = pool.pool.alloc_mem(1)
    assert any(isinstance(work, FakeMark) for work in pool.lanes.compute.todo)
    # 3. the next is free like any other once its copy is done
    pool.pool.free_mem([one, cooling])
    pool.pool.alloc_mem(2)
    pool.lanes.run()
    pool.pool.poll()
    pool.lanes.run()
    pool.pool.poll()
    assert pool.pool.stats().free == 2
    pool.pool.alloc_mem(2)
    assert not any(isinstance(work, FakeMark) for work in pool.lanes.compute.todo)
    everything = np.setdiff1d(np.arange(64), pool.pool.match(tokens(1, 61)).device_blocks)
    pool.pool.free_mem(everything)
    assert held is not None


def test_nobody_is_told_of_a_swap_before_it_is_done(make_pool) -> None:
    pool = make_pool("pool", num_blocks=16, host_blocks=32, is_free=False)
    said: list[object] = []
    publisher = Publisher(pool.pool, said.append, by_layer=True, swaps_mark=pool.pool.swaps_mark)
    keep(pool, 1, 8)
    pool.lanes.run()
    pool.pool.swap_out(8)
    # 1. the copies are on their lane: whoever were told could read what is not there
    publisher.tell_removed()
    publisher.flush()
    assert said == [] and publisher.is_holding
    # 2. they are done
    pool.lanes.run()
    publisher.flush()
    (removed,) = said
    assert isinstance(removed, Removed) and removed.moved_to is not None
    assert removed.moved_to.tier is Tier.HOST and not publisher.is_holding


def test_a_tier_made_smaller_waits_for_its_copies(make_pool) -> None:
    pool = make_pool("pool", num_blocks=32, host_blocks=32)
    keep(pool, 1, 8)
    pool.pool.swap_out(8)
    assert pool.pool.resize(8) == 8
    in_host = pool.pool.match(tokens(1, 8)).host_blocks
    assert host_content(pool, in_host) == list(range(1, 9))


def test_copies_that_do_not_end_leave_a_tier_its_size(make_pool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(swaps, "_SETTLE_S", 0.0)
    pool = make_pool("pool", num_blocks=32, host_blocks=32, is_free=False)
    keep(pool, 1, 8)
    pool.pool.swap_out(8)
    # 1. the GPU stands still: it is said, and nothing has changed
    report = CacheAdmin(pool.pool).obey(CacheCommand(7, CacheVerb.RESIZE, num_host_blocks=4))
    assert report.error is not None and "has not ended its copies" in report.error
    assert report.num_blocks == 32
    assert len(pool.pool.match(tokens(1, 8)).host_blocks) == 8
    # 2. it goes on
    pool.lanes.run()
    pool.lanes.is_free = True
    assert pool.pool.resize(8) == 8
    assert host_content(pool, pool.pool.match(tokens(1, 8)).host_blocks) == list(range(1, 9))


# --- pins ---


def chunks(
    block_bytes: int, num_blocks: int, most: int = 1 << 40
) -> tuple[PinnedBlocks, FakePins, np.ndarray]:
    blocks, pins = np.zeros((num_blocks, block_bytes), dtype=np.uint8), FakePins(most)
    return PinnedBlocks(blocks, pins, chunk_bytes=1 << 14), pins, blocks


@pytest.mark.parametrize(("block_bytes", "per_chunk"), [(1024, 16), (4096, 4), (3072, 4), (1 << 15, 1)])
def test_chunks_are_whole_blocks_and_whole_pages(block_bytes: int, per_chunk: int) -> None:
    pinned, pins, blocks = chunks(block_bytes, 40)
    pinned.grow(1)
    assert pinned.num_pinned == per_chunk and per_chunk * block_bytes % 4096 == 0
    pinned.grow(per_chunk + 1)
    first = blocks.ctypes.data
    assert pins.pinned == {first + n * per_chunk * block_bytes: per_chunk * block_bytes for n in (0, 1)}


def test_copies_end_where_a_chunk_does() -> None:
    pinned, _, _ = chunks(4096, 40)
    ids = np.array([0, 1, 2, 3, 4, 5, 9, 8, 3])
    assert list(pinned.pieces(ids)) == [(0, 4), (4, 6), (6, 8), (8, 9)]
    assert list(pinned.pieces(ids[:0])) == []


def test_what_is_in_use_stays_pinned() -> None:
    pinned, pins, _ = chunks(4096, 10)
    pinned.grow(10)
    assert pinned.num_pinned == 10 and len(pins.pinned) == 3
    pinned.shrink(5)
    assert pinned.num_pinned == 8
    pinned.shrink(0)
    assert pinned.num_pinned == 0 and not pins.pinned


def test_what_cannot_be_pinned_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    pinned, _, _ = chunks(4096, 40, most=1 << 15)
    pinned.grow(20)
    pinned.grow(40)
    assert pinned.num_pinned == 8
    assert caplog.messages == [
        "the host tier is pinned up to block 8, swaps beyond are slower: out of memory"
    ]
