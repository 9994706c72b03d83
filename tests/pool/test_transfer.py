"""transfer and transfer_with_insert between two pools: offered here, pulled and published there."""

from __future__ import annotations

import numpy as np
import pytest

from memserve.messages import Transfer
from memserve.pool.incoming import Incoming, Received
from tests.pool.conftest import MakePool, PoolUnderTest


def tokens_of(num_blocks: int, block_size: int = 4) -> bytes:
    return np.arange(num_blocks * block_size, dtype="<i4").tobytes()


def publish(under_test: PoolUnderTest, num_blocks: int, first: int = 10) -> np.ndarray:
    """The sequence of `tokens_of`, whose block i holds first + i."""
    ids = under_test.pool.alloc_mem(num_blocks)
    assert ids is not None
    under_test.fill(ids, first)
    return under_test.pool.insert(tokens_of(num_blocks, under_test.pool.block_size), ids)


def finish(under_test: PoolUnderTest, incoming: Incoming) -> Received:
    while (received := incoming.poll()) is None:
        assert under_test.woken.acquire(timeout=30)
    return received


def make_pair(make_pool: MakePool) -> tuple[PoolUnderTest, PoolUnderTest]:
    source = make_pool("source", caches=True)
    receiver = make_pool("receiver", num_blocks=12, caches=True)
    source.grant_to(receiver)
    return source, receiver


@pytest.mark.parametrize("num_here", [0, 1, 7, 8])
def test_only_what_is_lacking_is_pulled_and_then_found(make_pool: MakePool, num_here: int) -> None:
    source, receiver = make_pair(make_pool)
    publish(source, 8)
    if num_here:
        publish(receiver, num_here)
    offered, lock = source.pool.transfer_with_insert("receiver", tokens_of(8))
    assert source.pool.stats().active == 8
    received = finish(receiver, receiver.pool.receive(offered))
    assert received.num_blocks == 8 - num_here and received.failure is None
    assert receiver.content(received.blocks) == list(range(10, 18))
    assert receiver.content(receiver.pool.match(tokens_of(8)).device_blocks) == list(range(10, 18))
    source.pool.unlock(lock)
    assert source.pool.stats().active == receiver.pool.stats().active == 0


def test_a_salt_stays_with_it(make_pool: MakePool) -> None:
    source, receiver = make_pair(make_pool)
    ids = source.pool.alloc_mem(2)
    source.pool.insert(tokens_of(2), ids, "mine")
    offered, lock = source.pool.transfer_with_insert("receiver", tokens_of(2), "mine")
    finish(receiver, receiver.pool.receive(offered))
    assert receiver.pool.match(tokens_of(2)).num_tokens == 0
    assert receiver.pool.match(tokens_of(2), "mine").num_tokens == 8
    source.pool.unlock(lock)


def test_blocks_alone_are_the_receivers(make_pool: MakePool) -> None:
    source, receiver = make_pair(make_pool)
    ids = source.pool.alloc_mem(3)
    source.fill(ids, 20)
    # 1. into blocks that it allocates
    received = finish(receiver, receiver.pool.receive(source.pool.transfer("receiver", ids)))
    assert receiver.content(received.blocks) == [20, 21, 22]
    assert receiver.pool.stats().active == 3
    receiver.pool.free_mem(received.blocks)
    # 2. into its own
    into = receiver.pool.alloc_mem(3)
    offered = source.pool.transfer("receiver", ids, into=tuple(into.tolist()))
    assert finish(receiver, receiver.pool.receive(offered)).blocks.tolist() == into.tolist()
    assert receiver.content(into) == [20, 21, 22]
    receiver.pool.free_mem(into)
    source.pool.free_mem(ids)


def test_what_the_source_gave_up_is_a_miss(make_pool: MakePool) -> None:
    source, receiver = make_pair(make_pool)
    publish(source, 8)
    offered, lock = source.pool.transfer_with_insert("receiver", tokens_of(8))
    source.pool.unlock(lock)
    source.pool.alloc_mem(60)  # evicts the last four
    received = finish(receiver, receiver.pool.receive(offered))
    assert received.num_blocks == 4 and "gone" in received.failure
    assert receiver.pool.match(tokens_of(8)).num_tokens == 16
    source.pool.free_mem(source.pool._allocator.held_blocks()[4:])
    # blocks of one's own: what did not come is free again
    ids = source.pool.alloc_mem(2)
    offered = source.pool.transfer("receiver", ids)
    source.pool.free_mem(ids)
    received = finish(receiver, receiver.pool.receive(offered))
    assert len(received.blocks) == 0 and receiver.pool.stats().active == 0


def test_what_cannot_be_received_ends_at_once(make_pool: MakePool) -> None:
    source, receiver = make_pair(make_pool)
    publish(source, 13)
    offered, lock = source.pool.transfer_with_insert("receiver", tokens_of(12))

    def refused(message: Transfer, **options: int) -> str:
        received = receiver.pool.receive(message, **options).poll()
        assert received is not None and received.num_blocks == 0 and received.failure is not None
        return received.failure

    assert refused(offered, spare=1) == "no room"
    assert refused(Transfer("receiver", offered.refs, tokens_of(13))) == "12 blocks from 0 for 13"
    assert "no longer cached" in refused(Transfer("receiver", offered.refs, tokens_of(13), first_block=1))
    assert refused(Transfer("receiver", offered.refs, into=(1, 2))) == "12 blocks into 2"
    assert refused(Transfer("receiver", source.pool.addresses(np.arange(13)))) == "no room"
    assert receiver.pool.stats().free == 12
    source.pool.unlock(lock)
