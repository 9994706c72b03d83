"""The local index against a naive oracle: a dictionary from every cached prefix to its last block."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

from memserve.messages import Tier
from memserve.pool.eviction import Rank, least_frequently_used, least_recently_used
from memserve.pool.index import Index, Lock


def key_of(tokens: list[int]) -> bytes:
    return np.asarray(tokens, dtype="<i4").tobytes()


def ids(*numbers: int) -> np.ndarray:
    return np.array(numbers, dtype=np.int64)


def cached(index: Index, tokens: list[int], namespace: str = "", now: float = 0.0) -> list[int]:
    device, host = index.match(namespace, key_of(tokens), now).blocks()
    assert len(host) == 0
    return device.tolist()


class FakeHost:
    """A host tier without memory. Its ids are never used twice, so that a stale one is noticed."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.content: dict[int, int] = {}  # host block: the device block that it is a copy of
        self.num_stored = 0

    @property
    def num_free(self) -> int:
        return self.capacity - len(self.content)

    def store(self, blocks: np.ndarray) -> np.ndarray:
        assert 0 < len(blocks) <= self.num_free
        first = 1000 + self.num_stored
        self.num_stored += len(blocks)
        self.content.update(zip(range(first, first + len(blocks)), blocks.tolist(), strict=True))
        return np.arange(first, first + len(blocks))

    def free(self, blocks: np.ndarray) -> None:
        for block in blocks.tolist():
            del self.content[block]


def test_what_was_inserted_is_found_up_to_where_sequences_part() -> None:
    index = Index(block_size=2)
    index.insert("", key_of([1, 2, 3, 4, 5, 6]), ids(10, 11, 12), 0.0)
    assert cached(index, [1, 2, 3, 4, 9, 9]) == [10, 11]
    assert cached(index, [1, 2, 3]) == [10]
    assert cached(index, [9]) == []
    assert cached(index, [1, 2], namespace="salt") == []


def test_duplicates_come_back() -> None:
    index = Index(block_size=1)
    index.insert("", key_of([1, 2, 3]), ids(10, 11, 12), 0.0)
    extended = index.insert("", key_of([1, 2, 7]), ids(20, 21, 22), 0.0)
    assert extended.blocks.tolist() == [10, 11, 22]
    assert extended.duplicates.tolist() == [20, 21]
    assert index.num_blocks == 4


def test_a_growing_sequence_stays_one_edge_and_its_lock_moves() -> None:
    index = Index(block_size=1)
    lock = index.lock(index.match("", b"", 0.0))
    for token in range(50):
        index.extend(lock, key_of([token]), ids(token), 0.0)
    assert len(list(index._tree)) == 1
    assert index.num_evictable == 0
    assert index.evict(10).tolist() == []
    index.unlock(lock)
    assert index.num_evictable == 50
    assert sorted(index.evict(10).tolist()) == list(range(40, 50))


def test_eviction_takes_the_least_recently_used_ends_first() -> None:
    index = Index(block_size=1)
    index.insert("", key_of([1, 2, 3]), ids(0, 1, 2), now=1.0)
    index.insert("", key_of([1, 5]), ids(9, 3), now=2.0)
    index.insert("", key_of([7]), ids(4), now=3.0)
    cached(index, [1, 2, 3], now=4.0)
    assert index.evict(1).tolist() == [3]
    assert index.evict(1).tolist() == [4]
    assert sorted(index.evict(5).tolist()) == [0, 1, 2]
    assert index.num_blocks == index.num_evictable == 0


def test_lfu_keeps_what_is_used_often() -> None:
    index = Index(block_size=1, rank=least_frequently_used)
    index.insert("", key_of([1]), ids(0), now=1.0)
    index.insert("", key_of([2]), ids(1), now=2.0)
    for _ in range(3):
        cached(index, [1], now=1.5)
    cached(index, [2], now=9.0)
    assert index.evict(1).tolist() == [1]


def test_a_lock_keeps_only_what_matched() -> None:
    index = Index(block_size=1)
    index.insert("", key_of([1, 2, 3, 4]), ids(0, 1, 2, 3), 0.0)
    lock = index.lock(index.match("", key_of([1, 2, 9]), 0.0))
    assert sorted(index.evict(10).tolist()) == [2, 3]
    index.unlock(lock)
    assert sorted(index.evict(10).tolist()) == [0, 1]


def test_time_to_live() -> None:
    index = Index(block_size=1)
    index.insert("", key_of([1, 2]), ids(0, 1), now=0.0)
    index.insert("", key_of([1, 3]), ids(5, 2), now=5.0)
    cached(index, [1, 3], now=6.0)
    assert index.expire(before=4.0).tolist() == [1]
    assert sorted(index.expire(before=10.0).tolist()) == [0, 2]


def test_delete_drops_the_sequence_and_what_continues_it_but_nothing_shared() -> None:
    index = Index(block_size=1)
    index.insert("", key_of([1, 2, 3]), ids(0, 1, 2), 0.0)
    index.insert("", key_of([1, 9]), ids(7, 3), 0.0)
    assert index.delete("", key_of([1, 5])).tolist() == []
    assert sorted(index.delete("", key_of([1, 2])).tolist()) == [1, 2]
    assert cached(index, [1, 9]) == [0, 3]


def test_namespaces_do_not_pile_up() -> None:
    index = Index(block_size=1)
    for salt in range(100):
        index.insert(str(salt), key_of([1]), ids(salt), 0.0)
        cached(index, [1, 2], namespace=f"never-{salt}")
    assert len(index.evict(1000)) == 100
    assert index._tree._roots == {}


def test_candidates_do_not_pile_up() -> None:
    index = Index(block_size=1)
    for turn in range(1000):
        index.insert("", key_of([turn]), ids(0), float(turn))
        index.delete("", key_of([turn]))
    assert len(index._device) < 200


def test_what_is_evicted_goes_to_the_host_and_comes_back() -> None:
    host = FakeHost(capacity=3)
    index = Index(block_size=1, lower=host)
    index.insert("", key_of([1, 2, 3, 4]), ids(0, 1, 2, 3), now=1.0)
    # 1. the end of the sequence is lowered, its beginning stays
    assert index.evict(2).tolist() == [2, 3]
    device, lowered = index.match("", key_of([1, 2, 3, 4]), 2.0).blocks()
    assert device.tolist() == [0, 1] and lowered.tolist() == [1000, 1001]
    assert host.content == {1000: 2, 1001: 3}
    # 2. a lock keeps the device's part alone, and blocks that hold the same take the place of the host's
    lock = index.lock(index.match("", key_of([1, 2, 3, 4]), 3.0))
    assert index.num_evictable == 0 and index.num_host_blocks == 2
    extended = index.extend(lock, key_of([3, 4]), ids(8, 9), 3.0)
    assert extended.blocks.tolist() == [8, 9] and extended.duplicates.tolist() == []
    assert host.content == {} and index.num_host_blocks == 0 and index.num_evictable == 0
    index.unlock(lock)
    assert cached(index, [1, 2, 3, 4], now=4.0) == [0, 1, 8, 9]


def test_a_host_tier_too_small_keeps_the_beginning_of_what_is_evicted() -> None:
    host = FakeHost(capacity=2)
    index = Index(block_size=1, lower=host)
    index.insert("", key_of([1, 2, 3, 4, 5]), ids(0, 1, 2, 3, 4), now=1.0)
    assert sorted(index.evict(4).tolist()) == [1, 2, 3, 4]
    device, lowered = index.match("", key_of([1, 2, 3, 4, 5]), 2.0).blocks()
    assert device.tolist() == [0] and [host.content[block] for block in lowered.tolist()] == [1, 2]


def test_what_is_colder_than_all_in_a_full_host_tier_is_dropped() -> None:
    host = FakeHost(capacity=1)
    index = Index(block_size=1, lower=host)
    index.insert("", key_of([1]), ids(0), now=1.0)
    assert index.evict(1).tolist() == [0]
    index.insert("", key_of([2]), ids(1), now=2.0)
    index.match("", key_of([1]), 3.0)
    assert index.evict(1).tolist() == [1]
    assert host.content == {1000: 0} and cached(index, [2], now=4.0) == []


def test_expiry_and_deletion_reach_the_host_tier() -> None:
    host = FakeHost(capacity=9)
    index = Index(block_size=1, lower=host)
    index.insert("", key_of([1, 2, 3]), ids(0, 1, 2), now=1.0)
    index.insert("", key_of([5, 6]), ids(3, 4), now=2.0)
    index.evict(3)
    assert index.num_host_blocks == 3
    index.delete("", key_of([5]))
    assert sorted(host.content.values()) == [0, 1, 2]
    index.expire(before=1.5)
    assert host.content == {} and index.num_host_blocks == 0


HOST = 1000  # from here on block ids are the host tier's


class IndexMachine(RuleBasedStateMachine):
    """Random operations over few tokens, so that everything is shared and split."""

    locks = Bundle("locks")
    sequences = st.lists(st.integers(0, 1), max_size=10)
    spaces = st.sampled_from(["", "salt"])

    @initialize(
        block_size=st.sampled_from([1, 2]),
        rank=st.sampled_from([least_recently_used, least_frequently_used]),
        host=st.none() | st.builds(FakeHost, st.integers(0, 8)),
    )
    def start(self, block_size: int, rank: Rank, host: FakeHost | None) -> None:
        self.block_size = block_size
        self.host = host
        self.index = Index(block_size, rank, host)
        self.oracle: dict[tuple[str, tuple[int, ...]], int] = {}
        self.locked: dict[int, tuple[str, tuple[int, ...]]] = {}
        self.next_block = 0
        self.now = 0.0

    def fresh(self, count: int) -> np.ndarray:
        self.next_block += count
        return np.arange(self.next_block - count, self.next_block, dtype=np.int64)

    def prefixes(self, space: str, tokens: list[int]) -> list[tuple[str, tuple[int, ...]]]:
        step = self.block_size
        return [(space, tuple(tokens[:end])) for end in range(step, len(tokens) + 1, step)]

    def learn(
        self, keys: list[tuple[str, tuple[int, ...]]], offered: np.ndarray
    ) -> tuple[list[int], list[int]]:
        duplicates = [
            int(b) for key, b in zip(keys, offered, strict=True) if self.oracle.get(key, HOST) < HOST
        ]
        for key, block in zip(keys, offered.tolist(), strict=True):
            if self.oracle.get(key, HOST) >= HOST:
                self.oracle[key] = block
        return [self.oracle[key] for key in keys], duplicates

    def forget(self, freed: np.ndarray) -> None:
        gone = set(freed.tolist())
        assert len(gone) == len(freed)
        assert gone <= set(self.oracle.values())
        lowered = {} if self.host is None else {copy: block for block, copy in self.host.content.items()}
        left = {}
        for key, block in self.oracle.items():
            if block in gone and block in lowered:
                left[key] = lowered[block]
            elif block not in gone and (block < HOST or block in self.host.content):
                left[key] = block
        self.oracle = left

    @rule(space=spaces, tokens=sequences)
    def insert(self, space: str, tokens: list[int]) -> None:
        self.now += 1
        keys = self.prefixes(space, tokens)
        offered = self.fresh(len(keys))
        key = key_of(tokens[: len(keys) * self.block_size])
        extended = self.index.insert(space, key, offered, self.now)
        kept, duplicates = self.learn(keys, offered)
        assert extended.blocks.tolist() == kept
        assert sorted(extended.duplicates.tolist()) == sorted(duplicates)

    @rule(space=spaces, tokens=sequences)
    def match(self, space: str, tokens: list[int]) -> None:
        self.now += 1
        expected = []
        for key in self.prefixes(space, tokens):
            if key not in self.oracle:
                break
            expected.append(self.oracle[key])
        device, host = self.index.match(space, key_of(tokens), self.now).blocks()
        assert [*device.tolist(), *host.tolist()] == expected
        assert (device < HOST).all() and (host >= HOST).all()

    @rule(target=locks, space=spaces, tokens=sequences)
    def lock(self, space: str, tokens: list[int]) -> Lock:
        self.now += 1
        prefix = self.index.match(space, key_of(tokens), self.now)
        num_device_blocks = len(prefix.blocks()[0])
        lock = self.index.lock(prefix)
        self.locked[id(lock)] = (space, tuple(tokens[: num_device_blocks * self.block_size]))
        return lock

    @rule(lock=locks, more=st.lists(st.integers(0, 1), min_size=1, max_size=6))
    def extend(self, lock: Lock, more: list[int]) -> None:
        self.now += 1
        if id(lock) not in self.locked:
            return
        space, before = self.locked[id(lock)]
        more = more[: len(more) // self.block_size * self.block_size]
        tokens = [*before, *more]
        keys = self.prefixes(space, tokens)[len(before) // self.block_size :]
        offered = self.fresh(len(keys))
        extended = self.index.extend(lock, key_of(more), offered, self.now)
        kept, duplicates = self.learn(keys, offered)
        assert extended.blocks.tolist() == kept
        assert sorted(extended.duplicates.tolist()) == sorted(duplicates)
        self.locked[id(lock)] = (space, tuple(tokens))

    @rule(lock=consumes(locks))
    def unlock(self, lock: Lock) -> None:
        if self.locked.pop(id(lock), None) is not None:
            self.index.unlock(lock)

    @rule(count=st.integers(1, 8))
    def evict(self, count: int) -> None:
        evictable = self.index.num_evictable
        freed = self.index.evict(count)
        assert len(freed) == min(count, evictable)
        self.forget(freed)

    @rule(age=st.integers(0, 10))
    def expire(self, age: int) -> None:
        self.forget(self.index.expire(self.now - age))

    @rule(space=spaces, tokens=sequences)
    def delete(self, space: str, tokens: list[int]) -> None:
        self.forget(self.index.delete(space, key_of(tokens)))

    @rule(count=st.integers(1, 8))
    def evict_host(self, count: int) -> None:
        num_before = self.index.num_host_blocks
        assert self.index.evict_host(count) == min(count, num_before)
        self.forget(ids())

    @rule()
    def relocate_host(self) -> None:
        moved = {block: block + 10**6 for block in self.host.content} if self.host is not None else {}
        self.index.relocate_host(lambda blocks: blocks + 10**6)
        if self.host is not None:
            self.host.content = {moved[block]: copy for block, copy in self.host.content.items()}
        self.oracle = {key: moved.get(block, block) for key, block in self.oracle.items()}

    @invariant()
    def adds_up(self) -> None:
        if not hasattr(self, "index"):
            return
        on_device = [block for block in self.oracle.values() if block < HOST]
        assert self.index.num_blocks == len(on_device)
        assert self.index.num_host_blocks == len(self.oracle) - len(on_device)
        assert set(self.index.blocks().tolist()) == set(on_device)
        in_host = set(self.oracle.values()) - set(on_device)
        assert set(self.index.blocks(Tier.HOST).tolist()) == in_host
        assert in_host == (set() if self.host is None else set(self.host.content))
        locked = {
            self.oracle[key]
            for space, tokens in self.locked.values()
            for key in self.prefixes(space, list(tokens))
        }
        assert self.index.num_evictable == len(on_device) - len(locked)
        for (space, tokens), block in self.oracle.items():
            if len(tokens) > self.block_size:  # prefix-closed, and nothing of the device below the host's
                before = self.oracle[space, tokens[: -self.block_size]]
                assert before < HOST or block >= HOST


TestIndexMachine = IndexMachine.TestCase
TestIndexMachine.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


@pytest.mark.parametrize("block_size", [1, 4, 16])
def test_at_most_whole_blocks_match(block_size: int) -> None:
    index = Index(block_size)
    tokens = list(range(3 * block_size))
    index.insert("", key_of(tokens), ids(0, 1, 2), 0.0)
    for length in range(3 * block_size + 1):
        assert len(cached(index, tokens[:length])) == length // block_size
