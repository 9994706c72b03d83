"""Pulls over shared memory: what arrives is what was asked for, whatever goes wrong at whichever step."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest

from memserve.messages import BlockRefs, Tier
from memserve.pool.arena import PeerArena
from memserve.pool.transports import shm
from memserve.pool.transports.base import PullResult
from memserve.pool.transports.shm import Bytes, ShmTransfer, copy_bytes


class FaultyCopy:
    """Copies, and calls `fault(destination, source)` before each piece; its result replaces the copy's."""

    def __init__(self) -> None:
        self.fault: Callable[[Bytes, Bytes], int | None] = lambda destination, source: None
        self.num_pieces = 0

    def __call__(self, destination: Bytes, source: Bytes) -> int:
        self.num_pieces += 1
        result = self.fault(destination, source)
        return copy_bytes(destination, source) if result is None else result


class HeldCopy:
    """A copy that stops before its first piece until it is let go."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self.go_on = threading.Event()

    def __call__(self, destination: Bytes, source: Bytes) -> int:
        self.reached.set()
        assert self.go_on.wait(30)
        return copy_bytes(destination, source)


def make_pair(make_pool, copy=copy_bytes, **options):
    """A source with blocks 0 … 9 filled, and a receiver that may pull from it."""
    source = make_pool("source", **options)
    receiver = make_pool("receiver", copy=copy, **options)
    source.grant_to(receiver)
    ids = source.pool.alloc_mem(10)
    source.fill(ids)
    return source, receiver, ids


@pytest.mark.parametrize("block_size", [1, 4, 16])
@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4, 5], [5, 3, 9, 4, 5, 8], [0, 1, 2, 7, 8, 4], [6], []])
def test_blocks_arrive_in_sequence_order(make_pool, block_size: int, order: list[int]) -> None:
    source, receiver, ids = make_pair(make_pool, block_size=block_size)
    # 1. the receiver has room only in scattered places
    held = receiver.pool.alloc_mem(64)
    holes = held[[1, 2, 3, 7, 12, 13]]
    receiver.pool.free_mem(holes)
    into = receiver.pool.alloc_mem(len(order))
    assert np.isin(into, holes).all()
    # 2. pull
    result = receiver.finish(receiver.pool.fetch(source.pool.addresses(ids[order]), into))
    # 3. everything came, and nothing else was written
    assert (result.num_blocks, result.failure) == (len(order), None)
    assert result.num_bytes == len(order) * source.arena.geometry.block_bytes
    assert receiver.content(into) == [index + 1 for index in order]
    others = np.setdiff1d(np.arange(64), into)
    assert set(receiver.content(others)) <= {0, 0x5A}
    source.pool.free_mem(ids)
    receiver.pool.free_mem(np.setdiff1d(held, holes))
    receiver.pool.free_mem(into)


def test_runs_move_in_one_copy_each_and_long_runs_in_pieces(make_pool, monkeypatch) -> None:
    copy = FaultyCopy()
    source, receiver, ids = make_pair(make_pool, copy)
    into = receiver.pool.alloc_mem(10)
    # 1. a run at both sides is one copy
    receiver.finish(receiver.pool.fetch(source.pool.addresses(ids), into))
    assert copy.num_pieces == 1
    # 2. so is each of the four runs of this order
    copy.num_pieces = 0
    order = [4, 5, 6, 0, 1, 2, 3, 8, 9, 7]
    receiver.finish(receiver.pool.fetch(source.pool.addresses(ids[order]), into))
    assert copy.num_pieces == 4
    # 3. a run longer than a piece is cut
    copy.num_pieces = 0
    monkeypatch.setattr(shm, "_PIECE_BYTES", 4 * source.arena.geometry.block_bytes)
    result = receiver.finish(receiver.pool.fetch(source.pool.addresses(ids), into))
    assert copy.num_pieces == 3 and result.num_blocks == 10
    assert receiver.content(into) == list(range(1, 11))
    source.pool.free_mem(ids)
    receiver.pool.free_mem(into)


def test_a_block_reused_before_the_copy_ends_the_prefix(make_pool) -> None:
    source, receiver, ids = make_pair(make_pool)
    # 1. the receiver learns the addresses, then the source gives block 6 to somebody else
    refs = source.pool.addresses(ids)
    source.pool.free_mem([6])
    assert source.pool.alloc_mem(1).tolist() == [6]
    # 2. only what lies before it comes
    into = receiver.pool.alloc_mem(10)
    result = receiver.finish(receiver.pool.fetch(refs, into))
    assert result.num_blocks == 6
    assert result.num_bytes == 6 * source.arena.geometry.block_bytes
    assert result.failure == "4 of 10 blocks were gone before the copy"
    assert receiver.content(into) == [1, 2, 3, 4, 5, 6, 0, 0, 0, 0]
    source.pool.free_mem(ids)
    receiver.pool.free_mem(into)


@pytest.mark.parametrize("reused", [0, 4, 9])
def test_a_block_reused_during_the_copy_is_not_verified(make_pool, reused: int) -> None:
    copy = FaultyCopy()
    source, receiver, ids = make_pair(make_pool, copy)

    def reuse(destination: Bytes, data: Bytes) -> None:
        source.pool.free_mem([reused])
        assert source.pool.alloc_mem(1).tolist() == [reused]
        source.fill([reused], first=99)

    copy.fault = reuse
    into = receiver.pool.alloc_mem(10)
    result = receiver.finish(receiver.pool.fetch(source.pool.addresses(ids), into))
    assert result.num_blocks == reused
    assert result.failure == f"{10 - reused} of 10 blocks were gone after the copy"
    assert receiver.content(into)[:reused] == list(range(1, reused + 1))
    source.pool.free_mem(ids)
    receiver.pool.free_mem(into)


@pytest.mark.parametrize(("num_bytes", "num_blocks"), [(10_239, 9), (8192, 8), (1023, 0), (0, 0)])
def test_a_short_copy_ends_the_prefix_at_its_last_whole_block(
    make_pool, num_bytes: int, num_blocks: int
) -> None:
    copy = FaultyCopy()
    source, receiver, ids = make_pair(make_pool, copy)
    assert source.arena.geometry.block_bytes == 1024
    refs = source.pool.addresses(ids)

    def stop_short(destination: Bytes, data: Bytes) -> int:
        destination.reshape(-1)[:num_bytes] = data.reshape(-1)[:num_bytes]
        return num_bytes

    copy.fault = stop_short
    into = receiver.pool.alloc_mem(10)
    result = receiver.finish(receiver.pool.fetch(refs, into))
    assert result.num_blocks == num_blocks
    assert result.failure == f"the copy stopped after {num_bytes} bytes"
    assert receiver.content(into[:num_blocks]) == list(range(1, num_blocks + 1))
    source.pool.free_mem(ids)
    receiver.pool.free_mem(into)


def test_a_copy_that_raises_fails_its_pull_and_no_other(make_pool, caplog) -> None:
    copy = FaultyCopy()
    source, receiver, ids = make_pair(make_pool, copy)
    refs = source.pool.addresses(ids)
    into = receiver.pool.alloc_mem(10)

    def fail(destination: Bytes, data: Bytes) -> None:
        raise OSError("no such link")

    # 1. the failure is a result, and logged
    copy.fault = fail
    failed = receiver.finish(receiver.pool.fetch(refs, into))
    assert (failed.num_blocks, failed.failure) == (0, "copy failed: no such link")
    assert "pull from source failed" in caplog.text
    caplog.clear()  # its traceback holds the peer's mapping
    # 2. the thread goes on
    copy.fault = lambda destination, data: None
    assert receiver.finish(receiver.pool.fetch(refs, into)).num_blocks == 10
    source.pool.free_mem(ids)
    receiver.pool.free_mem(into)


@pytest.mark.parametrize(
    ("blocks", "generations"),
    [((64,), (1,)), ((-1,), (1,)), ((0,), (1, 1)), ((2**63,), (1,)), ((0,), (-1,)), ((0,), (2**64,))],
)
def test_addresses_that_cannot_be_are_a_miss(make_pool, blocks, generations) -> None:
    source, receiver, ids = make_pair(make_pool)
    refs = source.pool.addresses(ids)
    bad = BlockRefs(refs.instance, refs.incarnation, refs.tier, blocks, generations)
    into = receiver.pool.alloc_mem(1)
    result = receiver.pool.fetch(bad, into).poll()
    assert result is not None and result.num_blocks == 0
    assert result.failure is not None and result.failure.startswith("bad addresses at source")
    source.pool.free_mem(ids)
    receiver.pool.free_mem(into)


def test_an_address_of_an_earlier_incarnation_is_good_while_its_generation_is(make_pool) -> None:
    source, receiver, ids = make_pair(make_pool)
    refs = source.pool.addresses(ids)
    earlier = BlockRefs(refs.instance, 0, refs.tier, refs.blocks, refs.generations)
    into = receiver.pool.alloc_mem(10)
    assert receiver.finish(receiver.pool.fetch(earlier, into)).num_blocks == 10
    source.pool.free_mem(ids)
    receiver.pool.free_mem(into)


def test_cancel_stops_a_copy_and_its_blocks_are_safe_only_then(make_pool, monkeypatch) -> None:
    copy = HeldCopy()
    source, receiver, ids = make_pair(make_pool, copy)
    monkeypatch.setattr(shm, "_PIECE_BYTES", 3 * source.arena.geometry.block_bytes)
    into = receiver.pool.alloc_mem(10)
    pull = receiver.pool.fetch(source.pool.addresses(ids), into)
    # 1. the copy is under way: cancelling does not end it yet
    assert copy.reached.wait(30)
    pull.cancel()
    assert pull.poll() is None
    # 2. the piece being copied is finished, no further one begun
    copy.go_on.set()
    result = receiver.finish(pull)
    assert (result.num_blocks, result.failure) == (3, "cancelled")
    # 3. from now on nothing writes there: the blocks can go
    receiver.pool.free_mem(into)
    assert set(receiver.content(into)) == {0x5A}
    pull.cancel()
    assert pull.poll() == result
    source.pool.free_mem(ids)


def test_cancel_of_a_waiting_pull_ends_it_at_once(make_pool) -> None:
    copy = HeldCopy()
    source, receiver, ids = make_pair(make_pool, copy)
    refs = source.pool.addresses(ids)
    into, into_other = receiver.pool.alloc_mem(10), receiver.pool.alloc_mem(10)
    # 1. one pull is held in its copy, another waits behind it
    first = receiver.pool.fetch(refs, into)
    assert copy.reached.wait(30)
    second = receiver.pool.fetch(refs, into_other)
    assert second.poll() is None
    # 2. the waiting one ends without having written a byte
    second.cancel()
    result = second.poll()
    assert result is not None
    assert (result.num_blocks, result.num_bytes, result.failure) == (0, 0, "cancelled")
    # 3. and the first one comes whole; each end gives a wake-up
    copy.go_on.set()
    assert receiver.finish(first).num_blocks == 10
    assert receiver.woken.acquire(timeout=30)
    assert set(receiver.content(into_other)) == {0}
    source.pool.free_mem(ids)
    receiver.pool.free_mem(into)
    receiver.pool.free_mem(into_other)


def test_pulls_beyond_the_queue_fail_at_once(make_pool) -> None:
    copy = HeldCopy()
    source, receiver, ids = make_pair(make_pool)
    refs = source.pool.addresses(ids)
    into = receiver.pool.alloc_mem(10)
    transfer = ShmTransfer(receiver.arena.blocks, receiver.woken.release, copy=copy, max_queued=2)
    transfer.add_peer(
        PeerArena("source", Tier.DEVICE, source.arena.blocks, source.arena.generations, source.arena.progress)
    )
    # 1. one is being copied, two wait
    begun = [transfer.begin(refs, into)]
    assert copy.reached.wait(30)
    begun += [transfer.begin(refs, into) for _ in range(2)]
    # 2. the next is a miss
    refused = transfer.begin(refs, into)
    refused.cancel()
    assert refused.poll() == PullResult(0, 0, 0.0, "2 pulls are waiting already")
    # 3. the others come
    copy.go_on.set()
    assert [receiver.finish(pull).num_blocks for pull in begun] == [10, 10, 10]
    transfer.close()
    source.pool.free_mem(ids)
    receiver.pool.free_mem(into)


def test_close_ends_every_pull(make_pool) -> None:
    copy = HeldCopy()
    source, receiver, ids = make_pair(make_pool, copy)
    refs = source.pool.addresses(ids)
    into = receiver.pool.alloc_mem(10)
    pulls = [receiver.pool.fetch(refs, into) for _ in range(3)]
    assert copy.reached.wait(30)
    closing = threading.Thread(target=receiver.pool.close)
    closing.start()
    receiver.pool.peers._closing.wait(30)
    copy.go_on.set()
    closing.join()
    results = [pull.poll() for pull in pulls]
    assert all(result is not None for result in results)
    assert [result.failure for result in results[1:]] == ["cancelled", "cancelled"]
    after = receiver.pool.fetch(refs, into).poll()
    assert after is not None and after.failure == "the pool is closed"
    source.pool.free_mem(ids)
    receiver.pool.free_mem(into)


def test_removing_a_peer_lets_its_pulls_end(make_pool) -> None:
    copy = HeldCopy()
    source, receiver, ids = make_pair(make_pool, copy)
    refs = source.pool.addresses(ids)
    into = receiver.pool.alloc_mem(10)
    pull = receiver.pool.fetch(refs, into)
    assert copy.reached.wait(30)
    # 1. forgotten while the copy is under way
    receiver.pool.peers.remove("source")
    copy.go_on.set()
    assert receiver.finish(pull).num_blocks == 10
    # 2. no new pull
    refused = receiver.pool.fetch(refs, into).poll()
    assert refused is not None and refused.failure == "unknown peer source"
    source.pool.free_mem(ids)
    receiver.pool.free_mem(into)


def test_copies_may_run_where_their_maker_may_not() -> None:
    """A worker keeps to its core; a copy for it takes any that is idle."""
    every = os.sched_getaffinity(0)
    if len(every) < 2:
        pytest.skip("one core")
    os.sched_setaffinity(0, {min(every)})
    try:
        transfer = ShmTransfer(np.zeros((2, 8), np.uint8), lambda: None, cores=every)
        try:
            (thread,) = (thread for thread in threading.enumerate() if thread.name == "memserve-pull")
            deadline = time.monotonic() + 10
            while os.sched_getaffinity(thread.native_id or 0) != every:
                assert time.monotonic() < deadline, "it stays on the core of its maker"
                time.sleep(0.001)
        finally:
            transfer.close()
    finally:
        os.sched_setaffinity(0, every)
