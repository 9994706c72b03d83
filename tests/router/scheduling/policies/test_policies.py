"""The policies on fleets that were made up, each decision checked with its table."""

from __future__ import annotations

import random
from collections import Counter

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memserve.config import Role
from memserve.messages import Tier
from memserve.router.scheduling.cost_model import Budget, CostModel, Link, Links, Operators, Ramp
from memserve.router.scheduling.holders import Addresses
from memserve.router.scheduling.load import RecentWork
from memserve.router.scheduling.policies.decision import Ask, Candidate, Decision
from memserve.router.scheduling.policies.policies import POLICIES
from memserve.router.scheduling.policies.pricing import source_of
from memserve.router.scheduling.policy import Placement, WorkerView, load_key
from memserve.router.scheduling.predictor import Phase, Predictor
from memserve.router.scheduling.prompt_tree import PromptTree

BLOCK_SIZE = 16
MODEL = CostModel(
    name="test",
    operators=Operators(rows=Ramp((0,), (0.1,)), fixed_ms=1.0),
    budget=Budget(4096),
    kv_token_bytes=1000,
    links=Links(from_device=Link(1.0, 1e5), from_host=Link(2.0, 5e4), swap_in=Link(0.5, 2e5)),
)
PREDICTOR = Predictor(MODEL)


def tokens_of(seed: int, count: int) -> bytes:
    return np.random.default_rng(seed).integers(0, 32_000, count).astype("<i4").tobytes()


def fleet(num_prefill: int, num_decode: int, num_colocated: int = 0) -> dict[str, Candidate]:
    roles = [Role.PREFILL] * num_prefill + [Role.DECODE] * num_decode + [Role.COLOCATED] * num_colocated
    names = [f"{role.value[0]}{index}" for index, role in enumerate(roles)]
    return {
        name: Candidate(WorkerView(name, role, 1, 1000, BLOCK_SIZE, 64), PREDICTOR)
        for name, role in zip(names, roles, strict=True)
    }


class Trees:
    """A prompt tree for each side."""

    def __init__(self, candidates: dict[str, Candidate]) -> None:
        self.prefill, self.decode = PromptTree(BLOCK_SIZE, 10**6), PromptTree(BLOCK_SIZE, 10**6)
        for name, candidate in candidates.items():
            (self.decode if candidate.view.role is Role.DECODE else self.prefill).join(name, 1)

    def hold(self, name: str, tokens: bytes, num_host: int = 0) -> None:
        count = len(tokens) // 4 // BLOCK_SIZE
        tiers = np.array([Tier.DEVICE] * (count - num_host) + [Tier.HOST] * num_host, dtype=np.uint8)
        told = Addresses.at(np.arange(count), tiers, np.ones(count, dtype=np.int64))
        for tree in (self.prefill, self.decode):
            tree.hold(name, 1, "", tokens, 0.0, addresses=told)

    def ask(self, tokens: bytes, num_new_tokens: int = 100, **more: object) -> Ask:
        found, decode_found = self.prefill.match("", tokens, 0.0), self.decode.match("", tokens, 0.0)
        source = source_of(self.prefill, found)
        ask = Ask(len(tokens) // 4, num_new_tokens, random.Random(0), source=source)
        ask.prefill_found, ask.decode_found = found, decode_found
        for name, value in more.items():
            setattr(ask, name, value)
        return ask


def decide(policy: str, candidates: dict[str, Candidate], ask: Ask) -> Decision:
    decision = POLICIES[policy](list(candidates.values()), ask)
    assert decision is not None
    return decision


# --- every policy ---


@pytest.mark.parametrize("policy", POLICIES)
def test_roles_are_kept_and_replaced(policy: str) -> None:
    for roles, is_alone in (((2, 2), False), ((2, 0), True), ((0, 2), True), ((0, 0, 2), True)):
        candidates = fleet(*roles)
        decision = decide(policy, candidates, Trees(candidates).ask(tokens_of(0, 2000)))
        prefill, decode = decision.placement
        assert decode is not None
        if is_alone:
            assert prefill is None
        else:
            assert prefill in ("p0", "p1")
            assert decode in ("d2", "d3")
        assert decision.policy == policy
        assert decision.prefill.instance == (prefill or decode)
        assert len(decision.prefills) == 2


@pytest.mark.parametrize("policy", POLICIES)
def test_a_prompt_with_one_token_to_draw_needs_no_decode_worker(policy: str) -> None:
    candidates = fleet(1, 1)
    decision = decide(policy, candidates, Trees(candidates).ask(tokens_of(0, 200), num_new_tokens=1))
    assert decision.placement == ("p0", None)


@pytest.mark.parametrize("policy", POLICIES)
def test_without_room_a_request_waits(policy: str) -> None:
    candidates = fleet(1, 1)
    ask = Trees(candidates).ask(tokens_of(0, 200))
    candidates["d1"].view.num_placed = 64
    assert POLICIES[policy](list(candidates.values()), ask) is None
    candidates["d1"].view.num_placed = 0
    candidates["p0"].view.num_placed, candidates["p0"].view.reserved_blocks = 1, 995
    assert POLICIES[policy](list(candidates.values()), ask) is None
    assert POLICIES[policy](list(fleet(0, 0, 1).values()), Ask(16 * 1000, 5, random.Random(0))) is None


@given(
    st.lists(st.tuples(st.integers(0, 900), st.integers(0, 64), st.integers(0, 5000)), min_size=4, max_size=4)
)
def test_least_load_takes_the_least_loaded_of_each_role_that_has_room(
    loads: list[tuple[int, int, int]],
) -> None:
    candidates = fleet(2, 2)
    for candidate, (reserved, placed, outstanding) in zip(candidates.values(), loads, strict=True):
        view = candidate.view
        view.reserved_blocks, view.num_placed, view.outstanding_tokens = reserved, placed, outstanding
    views = [candidate.view for candidate in candidates.values()]
    prefills = [view for view in views if view.role is Role.PREFILL and view.has_room(1000, 0)]
    decodes = [view for view in views if view.role is Role.DECODE and view.has_room(1000, 100)]
    expected = None
    if prefills and decodes:
        best = (min(prefills, key=load_key).instance, min(decodes, key=load_key).instance)
        expected = Placement(*best)
    decision = POLICIES["least-load"](list(candidates.values()), Ask(1000, 100, random.Random(0)))
    assert (None if decision is None else decision.placement) == expected


# --- the baselines ---


def test_round_robin_and_random_go_everywhere() -> None:
    candidates = fleet(4, 4)
    rng = random.Random(0)
    for policy in ("round-robin", "random"):
        seen: Counter[str | None] = Counter()
        for turn in range(400):
            decision = decide(policy, candidates, Ask(100, 10, rng, turn=turn))
            seen.update(decision.placement)
        assert len(seen) == 8
        assert min(seen.values()) >= (100 if policy == "round-robin" else 60)


def test_a_session_stays_and_moves_only_with_its_worker() -> None:
    candidates = fleet(8, 8)
    homes = {
        f"user-{i}": decide(
            "session", candidates, Ask(100, 10, random.Random(0), session=f"user-{i}")
        ).placement
        for i in range(200)
    }
    assert max(Counter(home.prefill for home in homes.values()).values()) < 60
    del candidates["p3"]
    for session, home in homes.items():
        now = decide("session", candidates, Ask(100, 10, random.Random(1), session=session)).placement
        assert now == home or home.prefill == "p3"
        assert now.decode == home.decode
    anonymous = decide("session", candidates, Ask(100, 10, random.Random(0)))
    assert anonymous.placement == decide("least-load", candidates, Ask(100, 10, random.Random(0))).placement


# --- prompt-tree ---


def test_the_holder_wins_until_its_queue_costs_more() -> None:
    candidates = fleet(2, 1)
    trees, prompt = Trees(candidates), tokens_of(0, 1600)
    trees.hold("p0", prompt[: 800 * 4])
    for can_pull in (True, False):
        ask = trees.ask(prompt)
        if not can_pull:
            ask.source = None
        # 1. idle: 80 ms saved
        candidates["p0"].view.queue_ms = 0.0
        decision = decide("prompt-tree", candidates, ask)
        assert decision.placement.prefill == "p0"
        assert decision.prefill.num_device_tokens == decision.prefill.num_cached_tokens == 800
        assert decision.predicted_ttft_ms == pytest.approx(1.0 + 80.0)
        # 2. a queue of 100 ms: the other recomputes, or pulls 800 kB in 1 + 8 ms
        candidates["p0"].view.queue_ms = 100.0
        decision = decide("prompt-tree", candidates, ask)
        assert decision.placement.prefill == "p1"
        rows = {row.instance: row for row in decision.prefills}
        assert rows["p0"].total_ms == pytest.approx(181.0)
        assert (rows["p0"].queue_ms, rows["p0"].num_pulled_tokens) == (100.0, 0)
        if can_pull:
            assert decision.prefill.total_ms == pytest.approx(9.0 + 81.0)
            assert decision.prefill.num_pulled_tokens == 800
            assert decision.prefill.source is not None
            assert decision.prefill.source.instance == "p0"
        else:
            assert decision.prefill.total_ms == pytest.approx(161.0)
            assert decision.prefill.num_cached_tokens == 0


def test_a_pull_that_costs_more_than_computing_is_not_made() -> None:
    candidates = fleet(2, 1)
    trees, prompt = Trees(candidates), tokens_of(0, 1600)
    trees.hold("p0", prompt[: 32 * 4])
    candidates["p0"].view.queue_ms = 100.0
    # 32 tokens: 3.2 ms to compute, 1.32 ms to pull; at a fifth of the speed it is no use
    assert decide("prompt-tree", candidates, trees.ask(prompt)).prefill.num_pulled_tokens == 32
    slow = msgspec.structs.replace(
        MODEL, links=msgspec.structs.replace(MODEL.links, from_device=Link(5.0, 2e4))
    )
    candidates["p1"] = Candidate(candidates["p1"].view, Predictor(slow))
    decision = decide("prompt-tree", candidates, trees.ask(prompt))
    assert (decision.prefill.num_pulled_tokens, decision.prefill.source) == (0, None)
    # but a pull beside a queue costs nothing
    candidates["p1"].view.queue_ms = 50.0
    decision = decide("prompt-tree", candidates, trees.ask(prompt))
    assert decision.placement.prefill == "p1"
    assert decision.prefill.num_pulled_tokens == 32
    assert decision.prefill.total_ms == pytest.approx(50.0 + 1.0 + 156.8)


def test_tiers_are_told_apart() -> None:
    candidates = fleet(2, 1)
    trees, prompt = Trees(candidates), tokens_of(0, 1601)
    trees.hold("p0", prompt, num_host=50)
    candidates["p1"].view.queue_ms = 1000.0
    row = decide("prompt-tree", candidates, trees.ask(prompt)).prefill
    assert (row.num_device_tokens, row.num_host_tokens) == (800, 800)
    assert row.swap_in_ms == pytest.approx(0.5 + 4.0)
    assert row.total_ms == pytest.approx(4.5 + 1.0 + 0.1)
    # both are pulled, each at its own speed
    candidates["p0"].view.queue_ms, candidates["p1"].view.queue_ms = 1000.0, 0.0
    row = decide("prompt-tree", candidates, trees.ask(prompt)).prefill
    assert row.num_pulled_tokens == 1600 and row.pull_ms == pytest.approx(1.0 + 8.0 + 2.0 + 16.0)
    # where to pull out of the host tier is slower than computing, only the rest is pulled
    links = MODEL.links.__class__(
        from_device=Link(1.0, 1e5), from_host=Link(1e4, 1.0), swap_in=Link(0.5, 2e5)
    )
    candidates["p1"].predictor = Predictor(
        CostModel(
            name="slow", operators=MODEL.operators, budget=MODEL.budget, kv_token_bytes=1000, links=links
        )
    )
    row = decide("prompt-tree", candidates, trees.ask(prompt)).prefill
    assert row.num_pulled_tokens == 800 and row.pull_ms == pytest.approx(1.0 + 8.0)
    # where the host tier is slower than computing, its part is computed
    slow = MODEL.links.__class__(from_device=Link(1e4, 1.0), from_host=Link(1e4, 1.0), swap_in=Link(1e4, 1.0))
    other = Predictor(
        CostModel(
            name="slow", operators=MODEL.operators, budget=MODEL.budget, kv_token_bytes=1000, links=slow
        )
    )
    for candidate in candidates.values():
        candidate.predictor = other
    candidates["p0"].view.queue_ms = 0.0
    candidates["p1"].view.queue_ms = 1000.0
    row = decide("prompt-tree", candidates, trees.ask(prompt)).prefill
    assert (row.num_device_tokens, row.num_host_tokens) == (800, 0)


@pytest.mark.parametrize("num_host", [1, 2, 100])
def test_the_last_block_of_a_prompt_that_is_there_whole_is_not_swapped_in(num_host: int) -> None:
    """A worker swaps in what it need not compute, and the last token it must."""
    candidates = fleet(1, 1)
    trees, prompt = Trees(candidates), tokens_of(0, 1600)
    trees.hold("p0", prompt, num_host=num_host)
    row = decide("prompt-tree", candidates, trees.ask(prompt)).prefill
    assert row.num_device_tokens == 1600 - 16 * num_host
    assert row.num_host_tokens == 16 * (num_host - 1)
    assert row.total_ms == pytest.approx(row.swap_in_ms + 1.0 + 1.6)


def test_the_last_token_is_always_computed() -> None:
    candidates = fleet(1, 1)
    trees, prompt = Trees(candidates), tokens_of(0, 1600)
    trees.hold("p0", prompt)
    assert decide("prompt-tree", candidates, trees.ask(prompt)).prefill.num_cached_tokens == 1599
    longer = tokens_of(0, 1601)
    assert decide("prompt-tree", candidates, trees.ask(longer)).prefill.num_cached_tokens == 1600


def test_the_dead_are_only_sources() -> None:
    candidates = fleet(2, 1)
    trees, prompt = Trees(candidates), tokens_of(0, 1600)
    trees.hold("p0", prompt)
    trees.prefill.lose("p0", 1)
    trees.prefill.join("p0", 2)
    candidates["p0"].view.incarnation = 2
    candidates["p0"].view.recent_ms = 1000.0
    ask = trees.ask(prompt)
    assert ask.source is not None and ask.source.is_lost
    decision = decide("prompt-tree", candidates, ask)
    assert decision.placement.prefill == "p1"
    rows = {row.instance: row for row in decision.prefills}
    # its own replacement does not map the arena that it inherits
    assert (rows["p0"].num_cached_tokens, rows["p1"].num_pulled_tokens) == (0, 1584)


def test_believed_blocks_are_no_source_before_they_are_told() -> None:
    candidates = fleet(2, 1)
    trees, prompt = Trees(candidates), tokens_of(0, 1600)
    trees.prefill.hold("p0", 1, "", prompt, 0.0)
    assert trees.ask(prompt).source is None
    trees.hold("p0", prompt[: 64 * 4])
    source = trees.ask(prompt).source
    assert source is not None and source.num_tokens == 64


@pytest.mark.parametrize("share_hot", [0.0, 0.9])
def test_work_is_shared_out_and_a_hot_prefix_replicated(share_hot: float) -> None:
    candidates = fleet(8, 2)
    trees, rng, recent = Trees(candidates), random.Random(0), RecentWork()
    for name in candidates:
        recent.join(name)
    hot, given_ms, pulls = tokens_of(0, 1600), Counter[str](), 0
    for index in range(800):
        prompt = hot + tokens_of(index, 160) if rng.random() < share_hot else tokens_of(index + 1, 800)
        decision = decide("prompt-tree", candidates, trees.ask(prompt, rng=rng))
        row = decision.prefill
        trees.hold(row.instance, prompt)
        recent.add(row.instance, row.exec_ms)
        given_ms[row.instance] += row.exec_ms
        pulls += row.num_pulled_tokens > 0
        for name, ms in recent.items():
            candidates[name].view.recent_ms = ms
    assert len(given_ms) == 8
    assert max(given_ms.values()) / (sum(given_ms.values()) / 8) < 1.3
    assert (2 <= pulls <= 7) if share_hot else (pulls == 0)


def test_ties_are_broken_without_bias() -> None:
    candidates = fleet(4, 4)
    rng = random.Random(0)
    seen = Counter(
        decide("prompt-tree", candidates, Ask(1000, 10, rng)).placement.prefill for _ in range(400)
    )
    assert len(seen) == 4 and min(seen.values()) > 60


def test_decode_goes_where_least_must_move_unless_it_is_crowded() -> None:
    candidates = fleet(1, 2)
    trees, prompt = Trees(candidates), tokens_of(0, 3200)
    trees.hold("d1", prompt[: 1600 * 4])
    decision = decide("prompt-tree", candidates, trees.ask(prompt, num_new_tokens=10))
    assert decision.decode is not None and decision.placement.decode == "d1"
    assert decision.decode.num_moved_tokens == 1600
    candidates["d1"].view.num_decoding = 40
    decision = decide("prompt-tree", candidates, trees.ask(prompt, num_new_tokens=10))
    assert decision.placement.decode == "d2"
    # and from a pool that is nearly full
    candidates["d1"].view.num_decoding = 0
    candidates["d1"].view.reserved_blocks = 780
    decision = decide("prompt-tree", candidates, trees.ask(prompt, num_new_tokens=100))
    assert decision.placement.decode == "d2"


def test_prompts_that_a_decode_worker_was_given_lately_do_not_crowd_the_others() -> None:
    candidates = fleet(1, 2)
    trees, prompt = Trees(candidates), tokens_of(0, 1600)
    candidates["d1"].view.recent_ms = 500.0
    candidates["d2"].view.num_decoding = 1  # a step of 1.2 ms in place of 1.1, with one that waits for it
    assert decide("prompt-tree", candidates, trees.ask(prompt)).placement.decode == "d1"


def test_a_short_prompt_stays_on_a_warm_decode_worker() -> None:
    candidates = fleet(1, 1)
    trees, prompt = Trees(candidates), tokens_of(0, 1610)
    trees.hold("d1", prompt[: 1600 * 4])
    ask = trees.ask(prompt)
    ask.source = None
    decision = decide("prompt-tree", candidates, ask)
    assert decision.placement == (None, "d1")
    assert decision.prefill.instance == "d1" and decision.prefill.num_device_tokens == 1600
    # not a long one, be it idle
    long = trees.ask(prompt[: 800 * 4] + tokens_of(1, 2000))
    assert decide("prompt-tree", candidates, long).placement == ("p0", "d1")
    # nor a short one beside a batch, each of which would wait for it
    trees.hold("p0", prompt[: 1600 * 4])
    short = trees.ask(prompt[: 1600 * 4] + tokens_of(1, 26))
    assert decide("prompt-tree", candidates, short).placement == (None, "d1")
    candidates["d1"].view.num_decoding = 50
    candidates["d1"].view.num_context = 50_000
    assert decide("prompt-tree", candidates, short).placement == ("p0", "d1")


def test_what_was_seen_corrects_the_table() -> None:
    candidates = fleet(2, 1)
    for _ in range(100):
        candidates["p0"].correction.observe(Phase.PREFILL, False, 10.0, 20.0)
    rows = {
        row.instance: row
        for row in decide("prompt-tree", candidates, Ask(1024, 9, random.Random(0))).prefills
    }
    assert rows["p0"].exec_ms == pytest.approx(2 * 103.4, rel=0.01)
    assert rows["p1"].exec_ms == pytest.approx(103.4)
