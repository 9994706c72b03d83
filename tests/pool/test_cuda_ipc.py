"""Pulls between GPU workers, without a GPU: a driver over memfds, and lanes whose work is done when the
test says.

What is asked of a GPU here is only that it does what is on a stream in order; `tests/gpu` asks it of a real
one.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

from memserve import memfd
from memserve.errors import EngineError
from memserve.messages import BlockRefs, DeviceGrant, Tier, generation_table_bytes
from tests.cuda.fake_driver import FakeDriver
from tests.pool.fake_lanes import FakeLane
from tests.pool.gpu_pools import GpuPool, gpu_pools


@pytest.fixture
def make_pool() -> Iterator[Callable[..., GpuPool]]:
    yield from gpu_pools()


def make_pair(make_pool, **options) -> tuple[GpuPool, GpuPool, np.ndarray]:
    """A source with ten blocks filled and done, and a receiver that may pull from it."""
    source, receiver = make_pool("source"), make_pool("receiver", **options)
    source.grant_to(receiver)
    ids = source.pool.alloc_mem(10)
    source.fill(ids)
    source.lanes.run()
    return source, receiver, ids


def put_under_way(receiver: GpuPool, call: str = "on_mark") -> threading.Event:
    """An event that is set when a pull's copy is on the pull lane, with the mark behind it (`on_mark`), or is
    about to be put there (`on_copy`).
    """
    put = threading.Event()

    def see(lane: FakeLane) -> None:
        if lane.name == "pull":
            put.set()

    setattr(receiver.lanes, call, see)
    return put


@pytest.mark.parametrize("block_size", [1, 4, 16])
@pytest.mark.parametrize("order", [[0, 1, 2, 3], [5, 3, 9, 4, 5, 8], [6], []])
def test_blocks_arrive_in_sequence_order(make_pool, block_size: int, order: list[int]) -> None:
    source = make_pool("source", block_size=block_size)
    receiver = make_pool("receiver", block_size=block_size)
    source.grant_to(receiver)
    ids = source.pool.alloc_mem(10)
    source.fill(ids)
    source.lanes.run()
    into = receiver.pool.alloc_mem(len(order))
    result = receiver.finish(receiver.pool.fetch(source.pool.addresses(ids[order]), into))
    assert (result.num_blocks, result.failure) == (len(order), None)
    assert result.num_bytes == len(order) * source.arena.geometry.block_bytes
    assert receiver.content(into) == [index + 1 for index in order]
    others = np.setdiff1d(np.arange(64), into)
    assert set(receiver.content(others)) <= {0}
    source.pool.free_mem(ids)
    receiver.pool.free_mem(into)


def test_a_pull_ends_when_its_copy_is_done_and_not_when_it_is_put(make_pool) -> None:
    source, receiver, ids = make_pair(make_pool, is_free=False)
    put = put_under_way(receiver)
    into = receiver.pool.alloc_mem(10)
    pull = receiver.pool.fetch(source.pool.addresses(ids), into)
    # 1. the copy is on the lane, and the GPU has not come to it
    assert put.wait(20)
    assert not receiver.woken.acquire(timeout=0.02) and pull.poll() is None
    # 2. now it has
    receiver.lanes.run()
    assert receiver.finish(pull).num_blocks == 10
    assert receiver.content(into) == list(range(1, 11))
    source.pool.free_mem(ids)
    receiver.pool.free_mem(into)


@pytest.mark.parametrize("lane", ["compute", "swap_out"])
def test_a_copy_comes_after_what_our_own_lanes_still_do_with_its_blocks(make_pool, lane: str) -> None:
    source, receiver, ids = make_pair(make_pool, is_free=False)
    put = put_under_way(receiver)
    into = receiver.pool.alloc_mem(10)
    blocks = receiver.arena.as_bytes()
    # 1. a step, or a swap, of whoever had these blocks before is not done yet
    getattr(receiver.lanes, lane).put(lambda: blocks[torch.from_numpy(into)].fill_(77))
    stale = torch.from_numpy(into)
    getattr(receiver.lanes, lane).put(lambda: blocks.index_fill_(0, stale, 77))
    pull = receiver.pool.fetch(source.pool.addresses(ids), into)
    assert put.wait(20)
    # 2. the pull lane may run as far as it can: it waits
    receiver.lanes.run("pull")
    assert pull.poll() is None and set(receiver.content(into)) == {0}
    # 3. with the other done, the copy is the last word
    receiver.lanes.run()
    assert receiver.finish(pull).num_blocks == 10
    assert receiver.content(into) == list(range(1, 11))
    source.pool.free_mem(ids)
    receiver.pool.free_mem(into)


@pytest.mark.parametrize("reused", [0, 4, 9])
def test_a_block_reused_before_the_copy_ends_the_prefix(make_pool, reused: int) -> None:
    source, receiver, ids = make_pair(make_pool)
    refs = source.pool.addresses(ids)
    source.pool.free_mem([reused])
    assert source.pool.alloc_mem(1).tolist() == [reused]
    into = receiver.pool.alloc_mem(10)
    result = receiver.finish(receiver.pool.fetch(refs, into))
    assert result.num_blocks == reused
    assert result.num_bytes == reused * source.arena.geometry.block_bytes
    assert result.failure == f"{10 - reused} of 10 blocks were gone before the copy"
    source.pool.free_mem(ids)
    receiver.pool.free_mem(into)


@pytest.mark.parametrize("reused", [0, 4, 9])
@pytest.mark.parametrize("when", ["put", "done"])
def test_a_block_reused_during_the_copy_is_not_verified(make_pool, reused: int, when: str) -> None:
    source, receiver, ids = make_pair(make_pool, is_free=False)
    put = put_under_way(receiver)
    into = receiver.pool.alloc_mem(10)
    pull = receiver.pool.fetch(source.pool.addresses(ids), into)
    assert put.wait(20)
    if when == "done":
        receiver.lanes.run("pull", most=3)  # two waits and the copy; its mark is not reached
    # the source gives the block to a new owner, whose step writes it
    source.pool.free_mem([reused])
    assert source.pool.alloc_mem(1).tolist() == [reused]
    source.fill([reused], first=99)
    source.lanes.run()
    receiver.lanes.run()
    result = receiver.finish(pull)
    assert result.num_blocks == reused
    assert result.failure == f"{10 - reused} of 10 blocks were gone after the copy"
    assert receiver.content(into)[:reused] == list(range(1, reused + 1))
    source.pool.free_mem(ids)
    receiver.pool.free_mem(into)


@pytest.mark.parametrize("when", ["queued", "put", "done"])
def test_cancelled_blocks_are_safe_only_once_the_copy_is_over(make_pool, when: str) -> None:
    source, receiver, ids = make_pair(make_pool, is_free=False)
    into, others = receiver.pool.alloc_mem(10), receiver.pool.alloc_mem(10)
    put, hold = put_under_way(receiver, "on_copy" if when == "queued" else "on_mark"), threading.Event()
    refs = source.pool.addresses(ids)
    if when == "queued":  # behind one whose copy is being put
        on_copy = receiver.lanes.on_copy

        def held(lane: FakeLane) -> None:
            on_copy(lane)
            assert hold.wait(20)

        receiver.lanes.on_copy = held
        first = receiver.pool.fetch(refs, others)
        assert put.wait(20)
    pull = receiver.pool.fetch(refs, into)
    if when == "queued":
        # 1. one that waits ends at once, and nothing is ever written to its blocks
        pull.cancel()
        result = pull.poll()
        assert result is not None and (result.num_blocks, result.failure) == (0, "cancelled")
        hold.set()
        receiver.lanes.is_free = True
        assert receiver.finish(first).num_blocks == 10
        assert set(receiver.content(into)) == {0}
    else:
        # 2. a copy on the lane cannot be taken back: its blocks are written to until it is over
        assert put.wait(20)
        if when == "done":
            receiver.lanes.run("pull", most=3)
        pull.cancel()
        assert not receiver.woken.acquire(timeout=0.02) and pull.poll() is None
        receiver.lanes.run()
        result = receiver.finish(pull)
        assert (result.num_blocks, result.failure) == (0, "cancelled")
    source.pool.free_mem(ids)
    receiver.pool.free_mem(np.concatenate([into, others]))


@pytest.mark.parametrize("when", ["before", "put", "done"])
def test_a_source_that_dies_is_never_believed(make_pool, when: str) -> None:
    source, receiver, ids = make_pair(make_pool, is_free=False)
    driver, refs = source.driver, source.pool.addresses(ids)
    put = put_under_way(receiver)
    into = receiver.pool.alloc_mem(10)
    if when == "before":
        # 1. it is unknown from now on, and its memory is given back
        receiver.pool.peers.remove("source", Tier.DEVICE)
        result = receiver.finish(receiver.pool.fetch(refs, into))
        assert result.failure == "unknown peer source"
    else:
        # 2. a pull under way fails when its copy is over, though its generations stand
        pull = receiver.pool.fetch(refs, into)
        assert put.wait(20)
        if when == "done":
            receiver.lanes.run("pull", most=3)
        receiver.pool.peers.remove("source", Tier.DEVICE)
        # 3. until then its memory stays mapped: it is being read
        time.sleep(0.01)
        assert driver.open["mappings"] == 3  # two arenas, and the source's at the receiver
        receiver.lanes.run()
        result = receiver.finish(pull)
        assert (result.num_blocks, result.failure) == (0, "the source has died")
    deadline = time.monotonic() + 20
    while driver.open["mappings"] > 2:
        assert time.monotonic() < deadline, "the memory of the dead was never given back"
        time.sleep(1e-3)
    source.pool.free_mem(ids)
    receiver.pool.free_mem(into)


def test_a_new_life_lets_no_address_of_the_old_one_verify(make_pool) -> None:
    # 1. the owner dies holding ten blocks
    source, receiver, ids = make_pair(make_pool)
    refs = source.pool.addresses(ids)
    receiver.pool.peers.remove("source", Tier.DEVICE)
    table_before = source.arena.generations.copy()
    # 2. its replacement has other memory and the same table, in which generations only rise
    again = make_pool("source", incarnation=2, after=source, num_blocks=70)
    assert (again.arena.generations[:64] >= table_before).all()
    assert again.pool.num_available == 70
    again.grant_to(receiver)
    # 3. an address that somebody still holds is a miss, also where the block is held again
    into = receiver.pool.alloc_mem(10)
    for taken in (0, 10):
        held = again.pool.alloc_mem(taken)
        result = receiver.finish(receiver.pool.fetch(refs, into))
        assert (result.num_blocks, result.failure) == (0, "10 of 10 blocks were gone before the copy")
    # 4. and its own are good
    again.fill(held, first=50)
    again.lanes.run()
    assert receiver.finish(receiver.pool.fetch(again.pool.addresses(held), into)).num_blocks == 10
    assert receiver.content(into) == list(range(50, 60))
    again.pool.free_mem(held)
    source.arena.generations[:] = table_before  # for its own pool, which ends as if it had not died
    source.pool.free_mem(ids)
    receiver.pool.free_mem(into)


def test_a_peer_on_a_gpu_that_ours_reaches_is_opened_on_ours(make_pool, caplog) -> None:
    driver = FakeDriver(num_gpus=2)
    opened: list[int] = []
    plain = driver.map

    def keep(handle: int, num_bytes: int, ordinal: int, *, writable: bool) -> int:
        opened.append(ordinal)
        return plain(handle, num_bytes, ordinal, writable=writable)

    driver.map = keep  # type: ignore[method-assign]
    source = make_pool("source", driver=driver, ordinal=1)
    receiver = make_pool("receiver", driver=driver, ordinal=0)
    source.grant_to(receiver)
    assert opened == [1, 0, 0] and not caplog.text
    # without access it is opened where it is, and that is said
    driver.peers = False
    source.grant_to(receiver)
    assert opened[3:] == [1]
    assert "GPU 0 cannot read the memory of GPU 1, where source is" in caplog.text
    ids, into = source.pool.alloc_mem(3), receiver.pool.alloc_mem(3)
    source.fill(ids)
    source.lanes.run()
    assert receiver.finish(receiver.pool.fetch(source.pool.addresses(ids), into)).num_blocks == 3
    assert receiver.content(into) == [1, 2, 3]
    source.pool.free_mem(ids)
    receiver.pool.free_mem(into)


def test_out_of_a_peers_host_tier(make_pool) -> None:
    source, receiver = make_pool("source", host_blocks=16), make_pool("receiver")
    source.grant_to(receiver)
    ids = source.pool.alloc_mem(5, Tier.HOST)
    assert source.host is not None and source.host.blocks is not None
    source.host.blocks[ids] = 7
    into = receiver.pool.alloc_mem(5)
    # it goes on when the device tier does not: it is memory of the machine
    receiver.pool.peers.remove("source", Tier.DEVICE)
    result = receiver.finish(receiver.pool.fetch(source.pool.addresses(ids, Tier.HOST), into))
    assert result.num_blocks == 5 and receiver.content(into) == [7] * 5
    source.pool.free_mem(ids, Tier.HOST)
    receiver.pool.free_mem(into)


@pytest.mark.parametrize("fault", ["cuMemImportFromShareableHandle", "cuMemMap"])
def test_memory_that_cannot_be_opened_is_a_miss_and_leaves_no_descriptor(make_pool, fault: str) -> None:
    driver = FakeDriver()
    source, receiver = make_pool("source", driver=driver), make_pool("receiver")
    num_fds = len(os.listdir("/proc/self/fd"))
    driver.fails = {fault}
    with pytest.raises(EngineError, match=fault):
        source.grant_to(receiver)
    driver.fails = set()
    assert len(os.listdir("/proc/self/fd")) == num_fds
    assert receiver.pool.fetch(source.pool.addresses([]), np.empty(0, dtype=np.int64)).poll() is not None


def test_an_export_smaller_than_its_blocks_is_refused(make_pool) -> None:
    source, receiver = make_pool("source"), make_pool("receiver")
    export, fd = source.memory.export()
    block_bytes = source.arena.geometry.block_bytes
    grant = DeviceGrant("source", 1, 4096, 4096, block_bytes, export)
    table = memfd.create_memfd("generations", generation_table_bytes(4096))
    with pytest.raises(EngineError, match="exported 65536 bytes for 4194304"):
        receiver.pool.peers.add_device(grant, table, fd)


@pytest.mark.parametrize("blocks", [((64,), (1,)), ((-1,), (1,)), ((0,), (1, 1)), ((0,), (-1,))])
def test_addresses_that_cannot_be_are_a_miss(make_pool, blocks) -> None:
    source, receiver, ids = make_pair(make_pool)
    into = receiver.pool.alloc_mem(1)
    bad = BlockRefs("source", 1, Tier.DEVICE, *blocks)
    result = receiver.pool.fetch(bad, into).poll()
    assert result is not None and result.failure is not None
    assert result.failure.startswith("bad addresses at source")
    source.pool.free_mem(ids)
    receiver.pool.free_mem(into)


def test_a_copy_that_cannot_be_put_fails_its_pull_and_no_other(make_pool, caplog) -> None:
    source, receiver, ids = make_pair(make_pool)
    into = receiver.pool.alloc_mem(10)

    def fail(lane: FakeLane) -> None:
        raise RuntimeError("CUDA error: invalid argument")

    receiver.lanes.on_copy = fail
    refs = source.pool.addresses(ids)
    result = receiver.finish(receiver.pool.fetch(refs, into))
    assert (result.num_blocks, result.failure) == (0, "copy failed: CUDA error: invalid argument")
    assert "pull from source failed" in caplog.text
    receiver.lanes.on_copy = lambda lane: None
    assert receiver.finish(receiver.pool.fetch(refs, into)).num_blocks == 10
    source.pool.free_mem(ids)
    receiver.pool.free_mem(into)


def test_closing_ends_what_is_under_way(make_pool) -> None:
    source, receiver, ids = make_pair(make_pool, is_free=False)
    put = put_under_way(receiver)
    into = receiver.pool.alloc_mem(10)
    pull = receiver.pool.fetch(source.pool.addresses(ids), into)
    assert put.wait(20)
    receiver.lanes.is_free = True
    receiver.pool.close()
    result = pull.poll()
    assert result is not None and result.num_blocks == 0
    late = receiver.pool.fetch(source.pool.addresses(ids), into).poll()
    assert late is not None and late.failure == "the pool is closed"
    source.pool.free_mem(ids)
    receiver.pool.free_mem(into)


# --- layer by layer ---


def begin_step(source: GpuPool, ids: np.ndarray) -> int:
    """Put a step on the source's compute lane that writes blocks layer by layer; where its layers count
    from.
    """
    blocks = source.arena.as_bytes()
    size, rows = blocks.shape[1] // 2, torch.from_numpy(ids)
    first = source.pool.progress.count
    source.pool.progress.follow(True)
    for layer in range(2):
        columns = torch.arange(layer * size, (layer + 1) * size)
        source.lanes.compute.put(
            lambda columns=columns: blocks.index_put_(
                (rows[:, None], columns), torch.tensor(9, dtype=torch.uint8)
            )
        )
        source.pool.progress.advance()
    return first


def test_each_layer_is_copied_when_it_is_written_and_not_when_it_is_launched(make_pool) -> None:
    source, receiver = make_pool("source", is_free=False), make_pool("receiver")
    source.grant_to(receiver)
    ids = source.pool.alloc_mem(3)
    into = receiver.pool.alloc_mem(3)
    first_copied = put_under_way(receiver, "on_copy")
    size = receiver.arena.geometry.block_bytes // 2
    # 1. the step is launched, none of it is computed: nothing is copied
    first = begin_step(source, ids)
    pull = receiver.pool.fetch(source.pool.addresses(ids), into, first)
    assert not first_copied.wait(0.02)
    # 2. its first layer is there: it is copied while the second is computed
    source.lanes.run(most=2)
    assert first_copied.wait(20)
    deadline = time.monotonic() + 20
    while not (receiver.arena.as_bytes()[into][:, :size] == 9).all():
        receiver.lanes.run()
        assert time.monotonic() < deadline
    assert (receiver.arena.as_bytes()[into][:, size:] == 0).all() and pull.poll() is None
    # 3. the second: that was all
    source.lanes.run()
    assert receiver.finish(pull).num_blocks == 3
    assert receiver.content(into) == [9, 9, 9]
    source.pool.free_mem(ids)
    receiver.pool.free_mem(into)


def test_a_step_that_failed_and_was_renewed_is_a_miss(make_pool) -> None:
    source, receiver = make_pool("source"), make_pool("receiver")
    source.grant_to(receiver)
    ids, into = source.pool.alloc_mem(3), receiver.pool.alloc_mem(3)
    refs = source.pool.addresses(ids)
    source.arena.generations[ids] += np.uint64(2)  # as `renew` does
    result = receiver.finish(receiver.pool.fetch(refs, into, begin_step(source, ids)))
    assert (result.num_blocks, result.failure) == (0, "3 of 3 blocks were gone after the copy")
    source.pool.free_mem(ids)
    receiver.pool.free_mem(into)


def test_layers_of_another_life_are_not_waited_for(make_pool) -> None:
    source, receiver, ids = make_pair(make_pool)
    refs = source.pool.addresses(ids)
    earlier = BlockRefs("source", 0, refs.tier, refs.blocks, refs.generations)
    into = receiver.pool.alloc_mem(10)
    result = receiver.finish(receiver.pool.fetch(earlier, into, 0))
    assert (result.num_blocks, result.failure) == (0, "the source has restarted")
    source.pool.free_mem(ids)
    receiver.pool.free_mem(into)


def test_a_source_that_stalls_is_given_up(make_pool, monkeypatch: pytest.MonkeyPatch) -> None:
    from memserve.pool.transports import cuda_ipc

    monkeypatch.setattr(cuda_ipc, "_STALLED_S", 0.01)
    source, receiver, ids = make_pair(make_pool)
    into = receiver.pool.alloc_mem(10)
    result = receiver.finish(receiver.pool.fetch(source.pool.addresses(ids), into, 0))
    assert result.failure == "the source took more than 0.01 s for a layer"
    source.pool.free_mem(ids)
    receiver.pool.free_mem(into)
