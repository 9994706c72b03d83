"""Each peer is reached in the way it was introduced, by one pool at once if need be."""

from __future__ import annotations

import os
import threading
import time

import numpy as np
import pytest

from memserve import memfd
from memserve.errors import EngineError
from memserve.messages import ArenaGrant, BlockRefs, Connect, PeerGrant, Tier
from memserve.model_config import KVGeometry
from memserve.pool.arena import Arena, ArenaFds
from memserve.pool.mempool import MemPool
from memserve.pool.transports.base import Pull, PullResult
from memserve.pool.transports.by_peer import PeerTransfer
from memserve.pool.transports.shm import ShmTransfer
from memserve.pool.transports.torch_distributed import TorchPool

GEOMETRY = KVGeometry(num_layers=2, num_kv_heads=2, block_size=4, head_dim=8, dtype="float32")
NUM_BLOCKS = 8


class End:
    """A pool of eight blocks, all of one value, that can do what `ways` says."""

    def __init__(self, instance: str, value: int, *ways: str) -> None:
        self.instance = instance
        sizes = (NUM_BLOCKS * GEOMETRY.block_bytes, (NUM_BLOCKS + 1) * 8)
        self.fds = ArenaFds(*(memfd.create_memfd(instance, size) for size in sizes))
        self.arena = Arena.map(GEOMETRY, NUM_BLOCKS, self.fds)
        self.woken = threading.Semaphore(0)
        blocks = self.arena.blocks
        assert blocks is not None
        wake = self.woken.release
        shm = ShmTransfer(blocks, wake) if "shm" in ways else None
        torch_pool = None
        if "torch" in ways:
            words = GEOMETRY.description
            torch_pool = TorchPool(instance, 1, words, "model", blocks, self.arena.generations)
        self.pool = MemPool(self.arena, instance, 1, wake, transfer=PeerTransfer(wake, shm, torch_pool))
        self.ids = self.pool.alloc_mem(NUM_BLOCKS)
        self.arena.kv.fill_(value)

    def grant(self) -> ArenaGrant:
        return ArenaGrant(self.instance, 1, Tier.DEVICE, NUM_BLOCKS, GEOMETRY.block_bytes)

    def refs(self, *blocks: int) -> BlockRefs:
        return self.pool.addresses(list(blocks))

    def close(self) -> None:
        self.pool.free_mem(self.ids)
        self.pool.assert_idle()
        self.pool.close()
        for fd in self.fds:
            os.close(fd)


@pytest.fixture
def ends():
    made = [End("receiver", 0, "shm", "torch"), End("mapped", 1, "shm"), End("sending", 2, "torch")]
    yield made
    for end in made:
        end.close()


def finish(ends: list[End], pull: Pull) -> PullResult:
    """Wait for a pull's end, taking messages from one to the other as loops and router do."""
    pools = {end.instance: end.pool for end in ends}
    deadline_s = time.monotonic() + 30
    while (result := pull.poll()) is None:
        assert time.monotonic() < deadline_s, "pull never ended"
        for end in ends:
            for message in end.pool.peers.take_control():
                target = message.source if isinstance(message, Connect) else message.receiver
                pools[target].peers.on_control(message)
        time.sleep(0.001)
    return result


def test_two_peers_by_two_ways(ends) -> None:
    receiver, mapped, sending = ends
    receiver.pool.peers.add_mapped(mapped.grant(), *map(memfd.reopen_readonly, mapped.fds))
    receiver.pool.peers.add_sending(PeerGrant("sending", 1, NUM_BLOCKS))
    for end, into in ((mapped, [1, 2]), (sending, [5, 3])):
        result = finish(ends, receiver.pool.fetch(end.refs(4, 5), np.array(into)))
        assert (result.num_blocks, result.failure) == (2, None)
    assert receiver.arena.kv[:, 0, 0, 0, 0, 0].tolist() == [0, 1, 1, 2, 0, 2, 0, 0]
    # whoever is removed is unknown, whichever way it was reached
    for end in (mapped, sending):
        receiver.pool.peers.remove(end.instance)
        gone = receiver.pool.fetch(end.refs(1), np.array([1])).poll()
        assert gone is not None and gone.failure == f"unknown peer {end.instance}"


def test_the_loop_is_rung_for_messages_and_takes_them_in_its_own_time(ends) -> None:
    receiver, _, sending = ends
    receiver.pool.peers.add_sending(PeerGrant("sending", 1, NUM_BLOCKS))
    pull = receiver.pool.fetch(sending.refs(1), np.array([1]))
    # 1. the link's thread has something to say, and says it to nobody
    assert receiver.woken.acquire(timeout=30)
    assert pull.poll() is None
    (message,) = receiver.pool.peers.take_control()
    assert isinstance(message, Connect) and message.source == "sending"
    assert receiver.pool.peers.take_control() == []
    # 2. the answer too
    sending.pool.peers.on_control(message)
    assert sending.woken.acquire(timeout=30)
    for answer in sending.pool.peers.take_control():
        receiver.pool.peers.on_control(answer)
    assert finish(ends, pull).failure is None


def test_both_tiers_of_a_peer_are_sent(ends) -> None:
    receiver, _, sending = ends
    # 1. as many blocks in the host tier, of another content and with generations of their own
    host, fds = Arena.create("sending-host", GEOMETRY, NUM_BLOCKS)
    for fd in fds:
        os.close(fd)
    host.kv.fill_(7)
    host.generations[:] = 100
    pool = TorchPool.of("sending", 1, "model", sending.arena, host)
    sending.pool.peers._transfer._torch_pool = pool
    receiver.pool.peers.add_sending(PeerGrant("sending", 1, NUM_BLOCKS, NUM_BLOCKS))
    in_host = BlockRefs("sending", 1, Tier.HOST, (4, 5), (100, 100))
    for refs, into in ((in_host, [1, 2]), (sending.refs(4, 5), [5, 3])):
        result = finish(ends, receiver.pool.fetch(refs, np.array(into)))
        assert (result.num_blocks, result.failure) == (2, None)
    assert receiver.arena.kv[:, 0, 0, 0, 0, 0].tolist() == [0, 7, 7, 2, 0, 2, 0, 0]
    # 2. generations of one tier do not verify blocks of the other
    mixed = BlockRefs("sending", 1, Tier.HOST, (4,), sending.refs(4).generations)
    assert finish(ends, receiver.pool.fetch(mixed, np.array([6]))).num_blocks == 0
    # 3. a tier that the peer was not said to have is a miss
    receiver.pool.peers.add_sending(PeerGrant("sending", 1, NUM_BLOCKS))
    missing = receiver.pool.fetch(in_host, np.array([1, 2])).poll()
    assert missing is not None and missing.failure == "bad addresses at sending: no such block among 0"


def test_a_way_that_is_not_there_is_an_error_to_be_logged(ends) -> None:
    _, mapped, sending = ends
    with pytest.raises(EngineError, match="sending is not to be asked for blocks here"):
        mapped.pool.peers.add_sending(PeerGrant("sending", 1, NUM_BLOCKS))
    with pytest.raises(EngineError, match="the arena of mapped is not to be mapped here"):
        sending.pool.peers.add_mapped(mapped.grant(), *map(memfd.reopen_readonly, mapped.fds))
    unknown = mapped.pool.fetch(sending.refs(1), np.array([1])).poll()
    assert unknown is not None and unknown.failure == "unknown peer sending"


def test_nothing_listens_until_a_block_is_to_be_sent(ends) -> None:
    receiver, _, _ = ends
    num_threads = threading.active_count()
    receiver.pool.peers.add_sending(PeerGrant("sending", 1, NUM_BLOCKS))
    assert threading.active_count() == num_threads
    assert receiver.pool.peers._transfer._torch._means._device is None
