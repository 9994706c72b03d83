"""A prompt tree against a plain table of every prefix of every life; then its bounds."""

from __future__ import annotations

import os
import random
import tracemalloc

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from memserve.errors import EngineError
from memserve.messages import BlockRefs, Tier
from memserve.router.notes import MAX_NOTES
from memserve.router.scheduling.holders import NO_SLOT, UNKNOWN, Addresses
from memserve.router.scheduling.prompt_tree import PromptTree


def key_of(tokens: list[int]) -> bytes:
    return np.asarray(tokens, dtype="<i4").tobytes()


def addresses(blocks: list[int], tier: Tier = Tier.DEVICE, generation: int = 1) -> Addresses:
    return Addresses.at(
        np.asarray(blocks, dtype=np.int64),
        np.full(len(blocks), tier, dtype=np.uint8),
        np.full(len(blocks), generation, dtype=np.int64),
    )


def assert_sound(tree: PromptTree) -> None:
    """The invariants of holder_tree.py, the long way."""
    step, num_blocks, places = tree.nodes.block_bytes, 0, {}
    for node in tree.nodes:
        held = node.payload
        size = len(node.key) // step
        assert max(len(span.codes) for span in held.spans) == size
        for span in held.spans:
            life = span.life
            num_blocks += len(span.codes)
            assert 0 < len(span.codes) <= size
            known = span.codes[span.codes != UNKNOWN]
            assert span.num_host == int((known % 2 == 1).sum())
            for code in known.tolist():
                assert (id(life), code) not in places
                places[id(life), code] = held.slot
                assert life.slots[code] == held.slot
            above = node.parent
            assert above is not None
            if above.parent is not None:
                whole = above.payload.span_of(life)
                assert whole is not None and len(whole.codes) == len(above.key) // step
    assert num_blocks == tree.num_blocks
    lives = {life for node in tree.nodes for life in (span.life for span in node.payload.spans)}
    for life in lives:
        assert np.count_nonzero(life.slots != NO_SLOT) == sum(owner == id(life) for owner, _ in places)
        spans = (span for node in tree.nodes for span in node.payload.spans)
        hosted = sum(span.num_host for span in spans if span.life is life)
        assert life.num_host == hosted


# Where a block of a life is: block, tier, generation; None = nobody told.
Place = tuple[int, int, int] | None
Prefix = tuple[str, tuple[int, ...]]


class PromptTreeMachine(RuleBasedStateMachine):
    """Few tokens, instances and blocks, so that everything is shared, split, moved and used again."""

    instances = st.sampled_from(["a", "b"])
    spaces = st.sampled_from(["", "salt"])
    sequences = st.lists(st.integers(0, 1), max_size=8)
    tiers = st.sampled_from([0, 1])

    @initialize(block_size=st.sampled_from([1, 2]))
    def start(self, block_size: int) -> None:
        self.block_size = block_size
        self.tree = PromptTree(block_size, max_blocks=10**9)
        self.now = 0.0
        self.next_incarnation = 0
        self.live: dict[str, int] = {}
        self.old: list[tuple[str, int]] = []
        self.table: dict[tuple[str, int], dict[Prefix, Place]] = {}
        self.generations: dict[tuple[str, int], int] = {}
        for instance in ("a", "b"):
            self.join(instance)

    # --- the table ---

    def prefixes(self, space: str, tokens: list[int]) -> list[Prefix]:
        step = self.block_size
        return [(space, tuple(tokens[:end])) for end in range(step, len(tokens) + 1, step)]

    def cut(self, life: tuple[str, int], prefix: Prefix) -> None:
        space, tokens = prefix
        held = self.table[life]
        for other in [p for p in held if p[0] == space and p[1][: len(tokens)] == tokens]:
            del held[other]

    def free(self, life: tuple[str, int], place: tuple[int, int], keep: tuple[Prefix, Place] | None) -> None:
        """A block has new content: its old place is void."""
        for prefix, known in list(self.table[life].items()):
            if known is not None and known[:2] == place and (prefix, known) != keep:
                self.cut(life, prefix)

    def fresh(self, instance: str, count: int, tier: int, data: st.DataObject) -> list[tuple[int, int, int]]:
        blocks = data.draw(st.permutations(range(10)))[:count]
        places = []
        for block in blocks:
            generation = self.generations.get((instance, block * 2 + tier), 0) + data.draw(st.integers(0, 1))
            self.generations[instance, block * 2 + tier] = generation
            places.append((block, tier, generation))
        return places

    # --- steps ---

    @rule(instance=instances)
    def join(self, instance: str) -> None:
        if instance in self.live:
            self.lose(instance)
        self.next_incarnation += 1
        self.live[instance] = self.next_incarnation
        self.table[instance, self.next_incarnation] = {}
        self.tree.join(instance, self.next_incarnation)

    @rule(instance=instances)
    def lose(self, instance: str) -> None:
        incarnation = self.live.pop(instance, None)
        if incarnation is not None:
            self.old.append((instance, incarnation))
            self.tree.lose(instance, incarnation)

    @precondition(lambda self: self.old)
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        life = data.draw(st.sampled_from(self.old))
        self.table.pop(life, None)
        self.tree.drop(*life)

    @precondition(lambda self: self.old)
    @rule(data=st.data(), space=spaces, tokens=sequences)
    def late_message(self, data: st.DataObject, space: str, tokens: list[int]) -> None:
        instance, incarnation = data.draw(st.sampled_from(self.old))
        key = key_of(tokens)
        told = addresses(list(range(len(tokens) // self.block_size)), generation=99)
        self.tree.hold(instance, incarnation, space, key, self.now, addresses=told)
        self.tree.hold(instance, incarnation, space, key, self.now)
        self.tree.remove(instance, incarnation, space, key)
        self.tree.remove_blocks(instance, incarnation, addresses(list(range(10)), generation=1))
        self.tree.relearn(instance, incarnation, space, key, 0, self.now)
        self.tree.lose(instance, incarnation)

    @rule(instance=instances, space=spaces, tokens=sequences)
    def dispatch(self, instance: str, space: str, tokens: list[int]) -> None:
        incarnation = self.live.get(instance)
        self.now += 1
        self.tree.hold(instance, incarnation or 0, space, key_of(tokens), self.now)
        if incarnation is not None:
            for prefix in self.prefixes(space, tokens):
                self.table[instance, incarnation].setdefault(prefix, None)

    @rule(instance=instances, space=spaces, tokens=sequences, tier=tiers, data=st.data())
    def stored(self, instance: str, space: str, tokens: list[int], tier: int, data: st.DataObject) -> None:
        incarnation = self.live.get(instance)
        prefixes = self.prefixes(space, tokens)
        if incarnation is None or not prefixes:
            return
        self.now += 1
        first = data.draw(st.integers(0, len(prefixes)))
        places = self.fresh(instance, len(prefixes) - first, tier, data)
        told = Addresses.at(
            np.asarray([p[0] for p in places], dtype=np.int64),
            np.asarray([p[1] for p in places], dtype=np.uint8),
            np.asarray([p[2] for p in places], dtype=np.int64),
        )
        self.tree.hold(
            instance, incarnation, space, key_of(tokens), self.now, first_block=first, addresses=told
        )
        for life in self.table:
            if life[0] == instance:
                for prefix, place in zip(prefixes[first:], places, strict=True):
                    keep = (prefix, place) if life == (instance, incarnation) else None
                    self.free(life, place[:2], keep)
        held = self.table[instance, incarnation]
        for prefix in prefixes:
            held.setdefault(prefix, None)
        held.update(zip(prefixes[first:], places, strict=True))

    @rule(instance=instances, space=spaces, tokens=sequences, num_blocks=st.integers(0, 8))
    def remove(self, instance: str, space: str, tokens: list[int], num_blocks: int) -> None:
        incarnation = self.live.get(instance, 0)
        self.tree.remove(instance, incarnation, space, key_of(tokens), num_blocks)
        if incarnation:
            for prefix in self.prefixes(space, tokens)[num_blocks:]:
                self.cut((instance, incarnation), prefix)

    @rule(instance=instances, blocks=st.lists(st.integers(0, 12), max_size=4, unique=True), tier=tiers)
    def removed(self, instance: str, blocks: list[int], tier: int) -> None:
        incarnation = self.live.get(instance, 0)
        generations = [self.generations.get((instance, block * 2 + tier), 0) for block in blocks]
        gone = Addresses.at(
            np.asarray(blocks, dtype=np.int64),
            np.full(len(blocks), tier, dtype=np.uint8),
            np.asarray(generations, dtype=np.int64),
        )
        self.tree.remove_blocks(instance, incarnation, gone)
        for place in zip(blocks, [tier] * len(blocks), generations, strict=True) if incarnation else ():
            held = self.table[instance, incarnation]
            for prefix in [prefix for prefix, known in held.items() if known == place]:
                self.cut((instance, incarnation), prefix)

    @rule(instance=instances, space=spaces, tokens=sequences, num_cached=st.integers(0, 8))
    def relearn(self, instance: str, space: str, tokens: list[int], num_cached: int) -> None:
        incarnation = self.live.get(instance, 0)
        num_cached = min(num_cached, max(0, len(tokens) - 1))
        self.now += 1
        self.tree.relearn(instance, incarnation, space, key_of(tokens), num_cached, self.now)
        if incarnation:
            num_blocks = num_cached // self.block_size
            for prefix in self.prefixes(space, tokens)[:num_blocks]:
                self.table[instance, incarnation].setdefault(prefix, None)
            for prefix in self.prefixes(space, tokens[:-1])[num_blocks:]:
                self.cut((instance, incarnation), prefix)

    # --- what must be so ---

    @rule(space=spaces, tokens=sequences)
    def match(self, space: str, tokens: list[int]) -> None:
        found = self.tree.match(space, key_of(tokens), self.now)
        got = {(h.life.instance, h.life.incarnation): h for h in [*found.live.values(), *found.lost]}
        expected: dict[tuple[str, int], list[Place]] = {}
        for life, held in self.table.items():
            for prefix in self.prefixes(space, tokens):
                if prefix not in held:
                    break
                expected.setdefault(life, []).append(held[prefix])
        assert {life: h.num_tokens for life, h in got.items()} == {
            life: len(places) * self.block_size for life, places in expected.items()
        }
        assert {h.life.incarnation for h in found.live.values()} <= set(self.live.values())
        for life, places in expected.items():
            holding = got[life]
            in_host = sum(place is not None and place[1] == Tier.HOST for place in places)
            assert holding.num_host_tokens == in_host * self.block_size
            for first in (0, 1):
                after = places[first:]
                known = after[: after.index(None)] if None in after else after
                told = self.tree.addresses(found, holding.life, first)
                columns = (told.blocks, told.tiers, told.generations)
                assert list(zip(*(column.tolist() for column in columns), strict=True)) == known
                if first == 0:
                    assert self.tree.num_known_tokens(found, holding.life) == len(known) * self.block_size

    @rule()
    def settle(self) -> None:
        self.tree.settle()
        assert self.tree.is_settled

    @invariant()
    def is_sound(self) -> None:
        """Looked at where it is settled anyway: so that notes gather, as they do while nobody asks."""
        if hasattr(self, "tree") and self.tree.is_settled:
            assert_sound(self.tree)
            assert self.tree.num_blocks == sum(map(len, self.table.values()))

    def teardown(self) -> None:
        if hasattr(self, "tree"):
            self.tree.settle()
            self.is_sound()


TestPromptTree = PromptTreeMachine.TestCase
TestPromptTree.settings = settings(max_examples=120, stateful_step_count=30, deadline=None)


def test_life_of_a_prefix() -> None:
    tree = PromptTree(4, max_blocks=1000)
    prompt = key_of(list(range(18)))  # four whole blocks and two tokens more
    # 1. dispatched: believed, without addresses
    tree.join("p0", 1)
    tree.hold("p0", 1, "", prompt, now=0.0)
    found = tree.match("", prompt, now=0.0)
    assert found.live["p0"].num_tokens == 16
    assert len(tree.addresses(found, found.live["p0"].life).blocks) == 0
    # 2. told in two parts, the second in the host tier
    tree.hold("p0", 1, "", prompt, 1.0, addresses=addresses([7, 3]))
    tree.hold("p0", 1, "", prompt, 1.0, first_block=2, addresses=addresses([5, 6], Tier.HOST, generation=9))
    found = tree.match("", prompt, now=1.0)
    holding = found.live["p0"]
    assert (holding.num_tokens, holding.num_host_tokens) == (16, 8)
    refs = tree.addresses(found, holding.life, first_block=1).refs("p0", 1)
    assert refs == (
        BlockRefs("p0", 1, Tier.DEVICE, (3,), (1,)),
        BlockRefs("p0", 1, Tier.HOST, (5, 6), (9, 9)),
    )
    assert Addresses.of(refs[1]).codes.tolist() == [11, 13]
    # 3. a removal of another generation changes nothing; the right one takes what follows along
    tree.remove_blocks("p0", 1, addresses([3], generation=2))
    assert tree.match("", prompt, 1.0).live["p0"].num_tokens == 16
    tree.remove_blocks("p0", 1, addresses([3]))
    assert tree.match("", prompt, 1.0).live["p0"].num_tokens == 4
    # 4. it dies: a source, but nobody to route to; its replacement overwrites the block, and it is none
    tree.lose("p0", 1)
    tree.join("p0", 2)
    found = tree.match("", prompt, 1.0)
    assert not found.live and [h.num_tokens for h in found.lost] == [4]
    tree.hold("p0", 2, "", key_of([9] * 4), 2.0, addresses=addresses([7], generation=2))
    assert not tree.match("", prompt, 2.0).lost
    # 5. nothing stays
    tree.drop("p0", 2)
    assert tree.num_blocks == 0 and not list(tree.nodes)


def test_what_is_told_is_noted_and_entered_when_asked() -> None:
    tree = PromptTree(1, max_blocks=1000)
    tree.join("a", 1)
    # 1. noted, and there for whoever asks
    tree.hold("a", 1, "", key_of([1, 2, 3]), 0.0, addresses=addresses([1, 2, 3]))
    tree.remove_blocks("a", 1, addresses([3]))
    assert not tree.is_settled
    assert tree.match("", key_of([1, 2, 3]), 0.0).live["a"].num_tokens == 2
    assert tree.is_settled
    # 2. what a life had told before it ended is what it left
    tree.hold("a", 1, "", key_of([7]), 0.0, addresses=addresses([7]))
    tree.lose("a", 1)
    assert [h.num_tokens for h in tree.match("", key_of([7]), 0.0).lost] == [1]
    # 3. notes are bounded where nobody asks
    tree.join("a", 2)
    for number in range(1000):
        tree.hold("a", 2, "", key_of([number]), 0.0)
        assert len(tree._notes) <= MAX_NOTES
    # 4. what a life told is entered before the next one of its instance begins
    tree.hold("a", 2, "", key_of([5000]), 0.0)
    tree.join("a", 3)
    assert "a" not in tree.match("", key_of([5000]), 0.0).live


@pytest.mark.parametrize("tier", list(Tier))
@pytest.mark.parametrize("block", [-(2**40), -(2**31), -(2**30), -1, 2**30, 2**31 - 1, 2**31, 2**63])
def test_a_number_that_is_no_block_is_an_error(block: int, tier: Tier) -> None:
    for blocks in ((block,), (3, block, 5)):
        with pytest.raises(EngineError, match="p0 told of blocks"):
            Addresses.of(BlockRefs("p0", 1, tier, blocks, (1,) * len(blocks)))


def test_the_largest_and_the_empty_are_blocks() -> None:
    refs = BlockRefs("p0", 1, Tier.HOST, (0, 2**30 - 1), (1, 2**63 - 1))
    assert Addresses.of(refs).refs("p0", 1) == (refs,)
    assert len(Addresses.of(BlockRefs("p0", 1, Tier.DEVICE, (), ())).codes) == 0
    with pytest.raises(EngineError, match="p0 told of blocks"):
        Addresses.of(BlockRefs("p0", 1, Tier.DEVICE, (1,), (2**63,)))


def test_what_nobody_uses_is_not_believed() -> None:
    tree = PromptTree(1, max_blocks=1000, ttl_s=10.0)
    tree.join("a", 1)
    tree.join("b", 1)
    tree.hold("a", 1, "", key_of([1, 2, 3]), now=0.0)
    tree.hold("b", 1, "", key_of([1, 2]), now=0.0)
    tree.hold("a", 1, "", key_of([1, 2, 4]), now=8.0)
    found = tree.match("", key_of([1, 2, 3]), now=12.0)
    assert {name: holding.num_tokens for name, holding in found.live.items()} == {"a": 2}
    tree.expire(now=12.0)
    assert tree.match("", key_of([1, 2, 3]), now=12.0).num_blocks == 2
    tree.expire(now=20.0)
    assert tree.num_blocks == 0


@pytest.mark.parametrize("block_size", [1, 4, 16])
def test_random_inserts_stay_within_the_bound(block_size: int) -> None:
    _insert_at_random(block_size, num_inserts=3_000, max_blocks=500)


def test_many_random_inserts_stay_within_the_bound() -> None:
    """TREE_INSERTS=1000000 is the long form: some minutes."""
    _insert_at_random(16, num_inserts=int(os.environ.get("TREE_INSERTS", "10000")), max_blocks=20_000)


def _insert_at_random(block_size: int, num_inserts: int, max_blocks: int) -> None:
    rng = random.Random(0)
    tree = PromptTree(block_size, max_blocks)
    for index in range(8):
        tree.join(str(index), 1)
    stems = [key_of(rng.choices(range(100), k=block_size * 3)) for _ in range(50)]
    most = 0
    for now in range(num_inserts):
        num_blocks = rng.randrange(1, 6)
        tokens = rng.choice(stems) + key_of(rng.choices(range(100), k=block_size * num_blocks))
        told = addresses(rng.sample(range(4096), num_blocks), generation=now)
        tree.hold(
            str(rng.randrange(8)), 1, f"salt-{rng.randrange(3)}", tokens, now, first_block=3, addresses=told
        )
        assert tree.num_blocks <= max_blocks
        most = max(most, len(tree.nodes.candidates))
    assert most <= 2 * max_blocks + 64 and len(list(tree.nodes)) <= max_blocks
    assert_sound(tree)


@pytest.mark.parametrize(("num_blocks", "most_bytes"), [(1, 600), (2, 400), (100, 60)])
def test_what_a_block_takes_beside_its_token_ids(num_blocks: int, most_bytes: int) -> None:
    """Short edges pay for their nodes, long ones for their addresses: 4 bytes, and 12 to 30 in the tables."""
    rng, count = np.random.default_rng(0), 4000 // num_blocks
    tracemalloc.start()
    tree = PromptTree(16, max_blocks=10**6)
    tree.join("a", 1)
    for number in range(count):
        tokens = rng.integers(0, 32_000, num_blocks * 16).astype("<i4").tobytes()
        told = addresses(list(range(number * num_blocks, (number + 1) * num_blocks)))
        tree.hold("a", 1, "", tokens, 0.0, addresses=told)
    held = tracemalloc.get_traced_memory()[0] - sum(len(node.key) for node in tree.nodes)
    tracemalloc.stop()
    assert tree.num_blocks == count * num_blocks
    assert held / tree.num_blocks <= most_bytes


@pytest.mark.parametrize("tier", list(Tier))
def test_a_block_that_the_pool_does_not_have_costs_no_memory(tier: Tier) -> None:
    tree = PromptTree(4, max_blocks=1000)
    tree.join("p0", 1, max_blocks=300)
    tree.hold("p0", 1, "", key_of([1] * 4), 0.0, addresses=addresses([299], tier))
    # 1. told as stored, or as where something moved to
    with pytest.raises(EngineError, match="p0 told of blocks that its pool does not have"):
        tree.hold("p0", 1, "", key_of([1] * 8), 0.0, addresses=addresses([7, 2**29], tier))
    for old, new in (([299], [2**29]), ([2**29], [5])):
        with pytest.raises(EngineError, match="p0 told of blocks that its pool does not have"):
            tree.move_blocks("p0", 1, addresses(old, tier), addresses(new, tier))
    # 2. as removed it is ignored, like any that is not known
    tree.remove_blocks("p0", 1, addresses([2**29], tier))
    assert len(tree.life("p0").slots) <= 1000
    assert tree.match("", key_of([1] * 4), 0.0).live["p0"].num_tokens == 4
