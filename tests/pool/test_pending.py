"""Two transfers of one prefix to one pool: the second waits for what the first brings, and takes over what it
does not.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from memserve.messages import Transfer
from memserve.pool.incoming import Incoming, Received
from memserve.pool.index import Lock
from memserve.pool.pending import PendingBook
from tests.pool.conftest import MakePool, PoolUnderTest
from tests.pool.gate import Gate


class Two:
    """A source that caches `num_blocks` of `tokens`, and a receiver whose first pull is under way."""

    def __init__(self, make_pool: MakePool, gate: Gate, block_size: int) -> None:
        self.gate = gate
        self.block_size = block_size
        self.source = make_pool("source", block_size=block_size, caches=True)
        self.receiver = make_pool("receiver", block_size=block_size, caches=True, copy=gate.copy)
        self.source.grant_to(self.receiver)
        self.locks: list[Lock | None] = []
        ids = self.source.pool.alloc_mem(8)
        self.source.fill(ids, 10)
        self.source.pool.insert(self.tokens(8), ids)

    def tokens(self, num_blocks: int) -> bytes:
        return np.arange(num_blocks * self.block_size, dtype="<i4").tobytes()

    def offered(self, num_blocks: int) -> Transfer:
        offered, lock = self.source.pool.transfer_with_insert("receiver", self.tokens(num_blocks))
        self.locks.append(lock)
        return offered

    def begin(self, num_blocks: int) -> Incoming:
        return self.receiver.pool.receive(self.offered(num_blocks))

    def let_go_of_source(self) -> None:
        for lock in self.locks:
            self.source.pool.unlock(lock)
        self.locks.clear()

    def finish(self, *incoming: Incoming) -> list[Received]:
        """The ends, polled in the given order whenever the bell rings."""
        self.gate.go_on.set()
        while None in (received := [each.poll() for each in incoming]):
            assert self.receiver.woken.acquire(timeout=30), "nobody rings any more"
        return received

    @property
    def num_copied(self) -> int:
        return self.gate.num_bytes // self.receiver.arena.geometry.block_bytes

    def end(self) -> None:
        self.let_go_of_source()
        for under_test in (self.source, self.receiver):
            under_test.pool.assert_idle()


@pytest.fixture(params=[1, 4, 16])
def two(make_pool: MakePool, request: pytest.FixtureRequest) -> Iterator[Two]:
    made = Two(make_pool, Gate(), request.param)
    yield made
    made.gate.go_on.set()
    vars(made).clear()  # pytest keeps it until the memory has been counted


def content(under_test: PoolUnderTest, tokens: bytes) -> list[int]:
    return under_test.content(under_test.pool.match(tokens).device_blocks)


@pytest.mark.parametrize("leader_is_polled_first", [True, False])
def test_the_second_uses_what_the_first_brings(two: Two, leader_is_polled_first: bool) -> None:
    # 1. the first copies 6 blocks; the second, which is for 8, takes nothing meanwhile
    first = two.begin(6)
    assert two.gate.entered.wait(30)
    num_free = two.receiver.pool.stats().free
    second = two.begin(8)
    assert second.is_waiting and second.poll() is None and two.receiver.pool.stats().free == num_free
    # 2. the first ends, and the second copies what is lacking
    order = (first, second) if leader_is_polled_first else (second, first)
    ends = dict(zip(order, two.finish(*order), strict=True))
    assert (ends[first].num_blocks, ends[first].failure) == (6, None)
    assert (ends[second].num_blocks, ends[second].failure) == (2, None)
    assert two.num_copied == 8
    # 3. all of it is there
    assert content(two.receiver, two.tokens(8)) == list(range(10, 18))
    two.end()


def test_a_second_that_lacks_nothing_copies_nothing(two: Two) -> None:
    first, second = two.begin(8), two.begin(5)
    assert second.is_waiting
    ends = two.finish(first, second)
    assert [(end.num_blocks, end.failure) for end in ends] == [(8, None), (0, None)]
    assert two.num_copied == 8 and two.receiver.content(ends[1].blocks) == list(range(10, 15))
    two.end()


def test_the_second_takes_over_when_the_first_is_cancelled(two: Two) -> None:
    first, second = two.begin(8), two.begin(8)
    assert two.gate.entered.wait(30)
    first.cancel()
    before, after = two.finish(first, second)
    # a copy that was under way may have brought all
    assert before.num_blocks + after.num_blocks == 8 and after.failure is None
    assert content(two.receiver, two.tokens(8)) == list(range(10, 18))
    two.end()


@pytest.mark.parametrize("dies", [False, True])
def test_when_the_first_fails_the_second_tries_for_itself(two: Two, dies: bool) -> None:
    first = two.begin(8)
    assert two.gate.entered.wait(30)
    second = two.begin(8)
    if dies:  # its memory outlives it, but nothing new is pulled from it
        two.receiver.pool.peers.remove("source")
    two.let_go_of_source()
    two.source.pool.flush()  # 1. what was offered is gone
    before, after = two.finish(first, second)
    # 2. neither has anything, and each says so
    assert before.num_blocks == after.num_blocks == 0
    assert before.failure is not None and after.failure is not None
    assert two.receiver.pool.match(two.tokens(8)).num_tokens == 0
    two.end()


def test_one_that_waits_can_be_cancelled(two: Two) -> None:
    first, second, third = two.begin(8), two.begin(8), two.begin(8)
    assert second.is_waiting and third.is_waiting
    second.cancel()
    received = second.poll()
    assert received is not None and (received.num_blocks, received.failure) == (0, "cancelled")
    assert [end.num_blocks for end in two.finish(first, third)] == [8, 0]
    two.end()


def test_what_does_not_help_is_not_waited_for(two: Two) -> None:
    # 1. all that the first brings of it is here already
    ids = two.receiver.pool.alloc_mem(4)
    two.receiver.fill(ids, 10)
    two.receiver.pool.insert(two.tokens(4), ids)
    first = two.begin(8)
    assert not two.begin(4).is_waiting
    # 2. another salt has nothing in common with it
    ids = two.source.pool.alloc_mem(2)
    two.source.fill(ids, 40)
    two.source.pool.insert(two.tokens(2), ids, "salt")
    offered, lock = two.source.pool.transfer_with_insert("receiver", two.tokens(2), "salt")
    other = two.receiver.pool.receive(offered)
    assert not other.is_waiting
    assert [end.num_blocks for end in two.finish(first, other)] == [4, 2]
    two.source.pool.unlock(lock)
    two.end()


def test_the_book_finds_the_most_and_rings_once_somebody_has_looked() -> None:
    rung: list[int] = []
    book = PendingBook(lambda: rung.append(1))
    tokens = np.arange(40, dtype="<i4").tobytes()
    assert book.best(tokens, "") is None
    # 1. once begun, of two the one with more, of equals the earlier
    short, long, same = (book.expect(tokens[: 4 * count], "") for count in (8, 16, 16))
    salted = book.expect(tokens, "salt")
    assert book.best(tokens, "") is None and book.best(tokens, "", only_begun=False) is long
    for entry in (short, long, same, salted):
        entry.begin()
    assert book.best(tokens, "") is long and long.num_common(tokens) == 16
    # 2. it is over once, and rings only if it was found
    same.end()
    assert not rung and same.is_over and not long.is_over
    long.end()
    long.end()
    assert len(rung) == 1 and book.best(tokens, "") is short
    short.end()
    salted.end()
    assert len(book) == 0


def test_the_book_agrees_with_a_full_comparison() -> None:
    random = np.random.default_rng(3)
    for _ in range(200):
        # 1. few different tokens, so that prefixes are common and long
        sequences = random.integers(0, 2, (9, 12)) * 256 + 1
        *made, asked = (row[: random.integers(0, 13)].astype("<i4").tobytes() for row in sequences)
        book = PendingBook(lambda: None)
        entries = [book.expect(tokens, "") for tokens in made]
        for entry in entries:
            entry.begin()
        # 2. the first of those with most
        naive = max(entries, key=lambda entry: entry.num_common(asked))
        assert book.best(asked, "") is (naive if naive.num_common(asked) else None)


def test_a_transfer_waits_for_what_has_begun_alone(two: Two) -> None:
    # 1. all of it is expected, by a pull that is merely meant: the transfer goes by itself
    meant = two.receiver.pool.expect(two.tokens(8))
    first = two.begin(6)
    assert not first.is_waiting
    assert [end.num_blocks for end in two.finish(first)] == [6]
    # 2. once that has begun, one waits for its end, and then lacks the same
    meant.begin()
    second = two.begin(8)
    assert second.is_waiting and second.poll() is None
    meant.end()
    assert [end.num_blocks for end in two.finish(second)] == [2]
    assert content(two.receiver, two.tokens(8)) == list(range(10, 18))
    two.end()


def test_what_was_brought_is_there_when_those_who_wait_are_called(two: Two) -> None:
    pool, found = two.receiver.pool, []
    first = two.begin(8)
    leader = pool.pending(two.tokens(8))
    assert leader is not None
    pool._pending._wake = lambda: found.append(pool.match(two.tokens(8)).num_tokens)
    two.finish(first)
    assert leader.is_over and found == [8 * two.block_size]
    two.end()
