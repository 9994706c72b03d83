"""BlockAllocator against a naive oracle, and the properties its callers rely on."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from memserve.pool.allocator import BlockAllocator


def make_allocator(num_blocks: int) -> BlockAllocator:
    return BlockAllocator(num_blocks, np.zeros(num_blocks, dtype=np.uint64))


def longest_run(ids: list[int]) -> int:
    best = run = 0
    for i, block in enumerate(ids):
        run = run + 1 if i and block == ids[i - 1] + 1 else 1
        best = max(best, run)
    return best


class AllocatorMachine(RuleBasedStateMachine):
    """Any order of operations; the oracle is which blocks are held, and which are lost."""

    @initialize(inherited=st.lists(st.integers(6, 9), min_size=1, max_size=40))
    def start(self, inherited: list[int]) -> None:
        self.num_blocks = num_blocks = len(inherited)
        self.generations = np.array(inherited, dtype=np.uint64)
        self.lost = {block for block, generation in enumerate(inherited) if generation % 2}
        self.freed: list[int] = []
        self.allocator = BlockAllocator(num_blocks, self.generations, lambda ids: self.freed.extend(ids))
        self.held: set[int] = set()
        self.before = list(inherited)

    def free_blocks(self) -> list[int]:
        return [block for block in range(self.num_blocks) if block not in self.held]

    def some(self, data: st.DataObject, blocks: list[int]) -> list[int]:
        return data.draw(st.lists(st.sampled_from(blocks), unique=True, max_size=len(blocks)))

    def raised(self, ids: list[int]) -> None:
        """These and no others have a new generation, which was never there before."""
        now, highest = self.generations.tolist(), max(self.before)
        for block, (old, new) in enumerate(zip(self.before, now, strict=True)):
            if block in ids:
                assert new > highest and new % 2 == (block in self.held)
            else:
                assert new == old
        self.before = now

    @rule(num_wanted=st.integers(0, 45))
    def allocate(self, num_wanted: int) -> None:
        free = self.free_blocks()
        ids = self.allocator.allocate(num_wanted)
        if num_wanted > len(free):
            assert ids is None
            return
        assert ids is not None and ids.dtype == np.int64
        got = ids.tolist()
        assert got == sorted(set(got)) and len(got) == num_wanted
        assert set(got) <= set(free)
        others = [block for block in free if block not in self.lost]
        if 0 < num_wanted <= len(others) == longest_run(others):
            assert longest_run(got) == num_wanted
        assert len(self.lost & set(got)) == max(0, num_wanted - len(others)), "lost blocks come last"
        self.held |= set(got)
        self.lost -= set(got)
        self.raised(got)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        ids = self.some(data, sorted(self.held))
        self.freed.clear()
        self.allocator.free(ids)
        assert self.freed == sorted(ids)
        self.held -= set(ids)
        self.raised(ids)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def renew(self, data: st.DataObject) -> None:
        ids = self.some(data, sorted(self.held))
        self.allocator.renew(ids)
        self.raised(ids)

    @precondition(lambda self: len(self.held) < self.num_blocks)
    @rule(data=st.data())
    def misuse(self, data: st.DataObject) -> None:
        stray = data.draw(st.sampled_from(self.free_blocks()))
        held = self.some(data, sorted(self.held) or [stray])
        for misuse in (self.allocator.free, self.allocator.renew):
            with pytest.raises(AssertionError):
                misuse([*held, stray])

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "held"):
            return
        assert self.allocator.num_blocks == self.num_blocks
        assert self.allocator.num_free == len(self.free_blocks())
        assert self.allocator.held_blocks().tolist() == sorted(self.held)
        assert self.generations.tolist() == self.before
        assert self.allocator.num_lost == len(self.lost)


AllocatorMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
test_any_history = AllocatorMachine.TestCase


def test_generation_is_new_before_the_caller_has_the_ids() -> None:
    generations = np.zeros(4, dtype=np.uint64)
    allocator = BlockAllocator(4, generations)
    # 1. a first life of blocks 0 and 1
    first = allocator.allocate(2)
    assert first is not None and first.tolist() == [0, 1]
    in_first_life = generations.tolist()
    assert all(generation % 2 for generation in in_first_life[:2]) and in_first_life[2:] == [0, 0]
    # 2. its end
    allocator.free(first)
    after_it = generations.tolist()
    assert all(g > h and g % 2 == 0 for g, h in zip(after_it[:2], in_first_life[:2], strict=True))
    # 3. a second life
    assert allocator.allocate(2) is not None
    assert all(g > h and g % 2 for g, h in zip(generations.tolist()[:2], after_it[:2], strict=True))
    assert generations.tolist()[2:] == [0, 0]


def test_what_a_dead_owner_held_is_taken_last() -> None:
    generations = np.zeros(6, dtype=np.uint64)
    # 1. the first life holds blocks 0, 1 and 3 when it ends
    first = BlockAllocator(6, generations)
    assert first.allocate(4) is not None
    first.free([2])
    inherited = generations.tolist()
    assert [generation % 2 for generation in inherited] == [1, 1, 0, 1, 0, 0]
    # 2. its replacement leaves them alone as long as it can
    second = BlockAllocator(6, generations)
    assert (second.num_free, second.num_lost) == (6, 3)
    ids = second.allocate(2)
    assert ids is not None and ids.tolist() == [4, 5]
    assert generations.tolist()[:4] == inherited[:4]
    # 3. then it takes them too, and their old addresses end
    more = second.allocate(2)
    assert more is not None and more.tolist() == [0, 2]
    assert generations[0] > inherited[0] and second.num_lost == 2
    assert generations[1] == inherited[1] and generations[3] == inherited[3]
    # 4. what it frees is free like any other
    second.free(more)
    again = second.allocate(1)
    assert again is not None and again.tolist() == [0]
    assert second.num_lost == 2


@pytest.mark.parametrize("ids", [[0, 0], [-1], [4], [3]])
def test_misuse_is_caught_and_changes_nothing(ids: list[int]) -> None:
    allocator = make_allocator(4)
    assert allocator.allocate(2) is not None
    for misuse in (allocator.free, allocator.renew):
        with pytest.raises(AssertionError):
            misuse(ids)
    assert allocator.num_free == 2
    assert allocator.held_blocks().tolist() == [0, 1]


def test_a_run_is_preferred_to_lower_holes() -> None:
    allocator = make_allocator(16)
    assert allocator.allocate(16) is not None
    allocator.free([1, 3, 5, 8, 9, 10])
    run = allocator.allocate(3)
    assert run is not None and run.tolist() == [8, 9, 10]
    rest = allocator.allocate(3)
    assert rest is not None and rest.tolist() == [1, 3, 5]


@pytest.mark.parametrize("num_wanted", [1, 7, 5000])
def test_free_blocks_are_found_anywhere_in_a_large_arena(num_wanted: int) -> None:
    allocator = make_allocator(40_000)
    assert allocator.allocate(40_000) is not None
    holes = np.arange(3, 40_000, 7)
    allocator.free(holes)
    taken = []
    while (ids := allocator.allocate(num_wanted)) is not None:
        taken.append(ids)
        if len(taken) * num_wanted > 1500 and num_wanted < 5000:
            break
    everything = np.concatenate(taken)
    assert len(np.unique(everything)) == len(everything) and np.isin(everything, holes).all()
    if num_wanted == 5000:
        assert len(everything) == 5000 and allocator.num_free == len(holes) - 5000


@pytest.mark.parametrize("num_free", [70, 400, 2_000])
def test_any_history_where_few_of_many_are_free(num_free: int) -> None:
    num_blocks = 30_000
    rng = np.random.default_rng(num_free)
    allocator = make_allocator(num_blocks)
    assert allocator.allocate(num_blocks) is not None
    free = set(rng.choice(num_blocks, num_free, replace=False).tolist())
    allocator.free(list(free))
    held: list[list[int]] = []
    for _ in range(300):
        kind, size = rng.integers(4), int(rng.choice([1, 3, 20, 64, 65, 200]))
        if kind < 2:
            ids = allocator.allocate(size)
            assert (ids is None) == (size > len(free))
            if ids is not None:
                got = ids.tolist()
                assert got == sorted(set(got)) and set(got) <= free
                held.append(got)
                free -= set(got)
        elif kind == 2 and held:
            back = held.pop(rng.integers(len(held)))
            allocator.free(back)
            free |= set(back)
        elif kind == 3 and free:  # these are not to be given out, for a time
            away = rng.choice(sorted(free), min(5, len(free)), replace=False)
            allocator.withdraw(away)
            ids = allocator.allocate(min(size, len(free) - len(away)))
            assert ids is not None and set(ids.tolist()) <= free - set(away.tolist())
            held.append(ids.tolist())
            free -= set(held[-1])
            allocator.restore(away)
        assert allocator.num_free == len(free)
    assert len(allocator.held_blocks()) == num_blocks - len(free)
