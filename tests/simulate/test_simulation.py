"""Simulated runs: sums done by hand, what must hold whatever the policy, what the policies are for."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import msgspec
import pytest

from memserve.bench.workload import Session, Turn
from memserve.config import PolicyName, Transfer
from memserve.messages import Release, ToWorker
from memserve.router.scheduling.cost_model import Budget, Link, Links
from memserve.router.scheduling.hardware import h200_llama_3_8b
from memserve.router.scheduling.policies.policies import POLICIES
from memserve.simulate.command import POLICY_NAMES, at_load
from memserve.simulate.report import Report, simulate, table
from memserve.simulate.simulation import Setup, Simulation
from memserve.simulate.traces import Trace, read_trace
from memserve.simulate.worker import ModelledWorker
from tests.simulate.fleets import MODEL, blocks, conversations, find_data, single, trace_of

# --- sums done by hand ---


def test_a_lone_request_takes_what_the_model_says() -> None:
    trace = trace_of([single("a", blocks(*range(128)), 11)])
    simulation = Simulation(Setup(MODEL, 1, 1, cache_tokens=8192, transfer="request"), trace)
    (outcome,) = simulation.run()
    # 1. two steps of 1,024 tokens
    assert outcome.ttft_ms == pytest.approx(2 * 2.0 + 204.8)
    assert outcome.predicted_ttft_ms == pytest.approx(outcome.ttft_ms)
    # 2. all blocks go over; then ten steps, each with one token of context more
    decode_ms = sum(2.1 + 1e-4 * (2048 + step) for step in range(10))
    assert outcome.jct_ms == pytest.approx(208.8 + 1.0 + 2.048 + decode_ms)
    counters = simulation.counters
    assert counters.pulled_bytes - counters.prefill_pulled_bytes == 2048 * 1000
    # 3. what was drawn goes back in whole blocks: the last token has no KV
    assert counters.pulled_back_tokens == 0


def test_no_time_is_spent_on_years_without_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tick a second would be thirty billion of them."""
    num_ticks = 0
    tick = Simulation._tick

    def counted(simulation: Simulation) -> None:
        nonlocal num_ticks
        num_ticks += 1
        assert num_ticks < 100
        tick(simulation)

    monkeypatch.setattr(Simulation, "_tick", counted)
    trace = trace_of([single(str(at_s), blocks(*range(128)), 11, at_s) for at_s in (0.0, 1e9, 3e10)])
    first, *others = Simulation(Setup(MODEL, 1, 1, cache_tokens=8192), trace).run()
    assert [round(outcome.arrived_at) for outcome in others] == [10**9, 3 * 10**10]
    assert num_ticks >= 2


def test_what_http_takes_is_added_once() -> None:
    trace = trace_of([single("a", blocks(*range(128)), 11)])
    plain, late = (
        Simulation(Setup(MODEL, 1, 1, cache_tokens=8192, overhead_ms=ms), trace).run()[0] for ms in (0.0, 7.5)
    )
    assert late.ttft_ms == pytest.approx(plain.ttft_ms + 7.5)
    assert late.jct_ms == pytest.approx(plain.jct_ms + 7.5)


@pytest.mark.parametrize(
    ("transfer", "after_ms"),
    # the last chunk of 1,024 tokens; a thirty-second of it; all
    [("chunk", 1.0 + 1.024), ("layer", 1.0 + 1.024 / 32), ("request", 1.0 + 2.048)],
)
def test_a_hand_over_overlaps_the_prefill(transfer: Transfer, after_ms: float) -> None:
    model = MODEL
    if transfer == "layer":  # only a worker whose steps have a time limit tells of layers
        model = msgspec.structs.replace(MODEL, budget=Budget(1024, 1e6))
    trace = trace_of([single("a", blocks(*range(128)), 2)])
    (outcome,) = Simulation(Setup(model, 1, 1, cache_tokens=8192, transfer=transfer), trace).run()
    decode_ms = 2.1 + 1e-4 * 2048
    assert outcome.jct_ms - outcome.ttft_ms == pytest.approx(after_ms + decode_ms)


def test_a_prompt_waits_for_the_step_and_takes_the_batch_along() -> None:
    # 1. a decodes alone from 102.4 + 2 = 104.4 ms on, b comes in the middle of a step
    trace = trace_of([single("a", blocks(*range(64)), 101), single("b", blocks(*range(100, 420)), 1, 0.2)])
    setup = Setup(MODEL, 0, 0, 1, cache_tokens=16_000)
    second, first = Simulation(setup, trace).run()
    at, num_steps = 104.4, 0
    while at < 200.0:
        at, num_steps = at + 2.1 + 1e-4 * (1024 + num_steps), num_steps + 1
    # 2. six steps hold b's 5,120 tokens in chunks of 1,023, beside one token of a's
    prefill_ms = 512.0 + sum(2.0 + 0.1 + 1e-4 * (1024 + num_steps + step) for step in range(6))
    assert second.ttft_ms == pytest.approx(at - 200.0 + prefill_ms)
    # 3. then a goes on alone
    rest_ms = sum(2.1 + 1e-4 * (1024 + step) for step in range(num_steps + 6, 100))
    assert first.jct_ms == pytest.approx(at + prefill_ms + rest_ms)


def test_the_next_turn_finds_what_was_pulled_back() -> None:
    def run(pull_back: bool) -> Simulation:
        turns = (Turn(blocks(*range(16)), blocks(99, size=64), 64), Turn(blocks(98), None, 1))
        trace = trace_of([Session("a", turns, 0.0)])
        trace = replace(trace, think=replace(trace.think, mean_s=1.0))
        simulation = Simulation(Setup(MODEL, 1, 1, cache_tokens=800, pull_back=pull_back), trace)
        simulation.run()
        return simulation

    # 63 of the 64 drawn tokens have KV: 3 whole blocks
    with_it, without = run(True), run(False)
    assert with_it.counters.pulled_back_tokens == 48
    assert [outcome.num_cached_tokens for outcome in with_it.outcomes] == [0, 304]
    assert with_it.outcomes[1].num_pulled_tokens == 0
    assert without.counters.pull_backs == 0


def test_an_answer_that_is_replayed_is_not_the_one_that_was_drawn() -> None:
    turns = (Turn(blocks(1, 2), blocks(3, size=64), 64), Turn(blocks(4), None, 1))
    trace = trace_of([Session("a", turns, 0.0)], answers="replayed")
    second = Simulation(Setup(MODEL, 1, 1, cache_tokens=800), trace).run()[1]
    assert (second.num_tokens, second.num_cached_tokens) == (112, 32)


def test_a_closed_loop_begins_a_session_when_one_ends() -> None:
    trace = trace_of([single(str(i), blocks(i), 5) for i in range(6)], dues=None, concurrency=2)
    outcomes = Simulation(Setup(MODEL, 1, 1, cache_tokens=800), trace).run()
    arrivals = sorted(outcome.arrived_at for outcome in outcomes)
    ends = sorted(outcome.arrived_at + outcome.jct_ms / 1e3 for outcome in outcomes)
    assert arrivals[:2] == [0.0, 0.0]
    assert arrivals[2:] == pytest.approx(ends[:4])


def test_nothing_is_sent_after_the_end_of_a_run() -> None:
    turns = (Turn(blocks(1), None, 5), Turn(blocks(2), None, 5))
    trace = trace_of([Session(str(i), turns, 0.01 * i) for i in range(10)], duration_s=0.045)
    outcomes = Simulation(Setup(MODEL, 1, 1, cache_tokens=800), trace).run()
    assert {outcome.session for outcome in outcomes} == {"0", "1", "2", "3", "4"}
    assert max(outcome.arrived_at for outcome in outcomes) <= 0.045
    assert 5 < len(outcomes) < 10


# --- whatever the policy ---


@pytest.mark.parametrize("transfer", ["layer", "request"])
@pytest.mark.parametrize("cache_tokens", [4000, 900])
@pytest.mark.parametrize("fleet", [(2, 2, 0), (0, 0, 3)])
@pytest.mark.parametrize("policy", POLICIES)
def test_every_request_ends_once_and_gives_back_what_it_took(
    policy: PolicyName,
    fleet: tuple[int, int, int],
    cache_tokens: int,
    transfer: Transfer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    released: list[str] = []
    receive = ModelledWorker.receive

    def counted(worker: ModelledWorker, message: ToWorker) -> None:
        if isinstance(message, Release):
            released.append(message.request_id)
        receive(worker, message)

    monkeypatch.setattr(ModelledWorker, "receive", counted)
    trace = conversations(16, 3, gap_s=0.02)
    setup = Setup(MODEL, *fleet, policy=policy, cache_tokens=cache_tokens, transfer=transfer)
    simulation = Simulation(setup, trace)
    outcomes = simulation.run()
    # 1. every request once, and within reason
    assert sorted(outcome.number for outcome in outcomes) == list(range(48))
    for outcome in outcomes:
        assert 0 < outcome.ttft_ms <= outcome.jct_ms
        assert 0 <= outcome.num_cached_tokens < outcome.num_tokens
    # 2. the dispatcher has nothing left: no request, no promise, no offer
    dispatcher = simulation.dispatcher
    assert not dispatcher.requests and not dispatcher.num_waiting
    assert dispatcher.counters.finished == 48 and dispatcher.counters.stale == 0
    for view in dispatcher.fleet:
        assert (view.num_placed, view.reserved_blocks, view.outstanding_tokens) == (0, 0, 0)
        assert (view.num_decoding, view.num_context) == (0, 0)
    num_prefilled = 48 - simulation.num_alone if fleet[0] else 0
    assert len(released) == len(set(released)) == num_prefilled
    # 3. nor have the workers
    for worker in simulation.workers.values():
        assert worker.is_idle and worker.storage.is_idle()


@pytest.mark.parametrize("block_size", [1, 4, 16])
def test_a_run_is_repeatable(block_size: int) -> None:
    setup = Setup(MODEL, 2, 2, cache_tokens=1200)
    runs = [Simulation(setup, conversations(12, 3, 0.05, block_size)).run() for _ in range(2)]
    assert runs[0] == runs[1]


def test_it_needs_no_torch() -> None:
    script = "import sys, memserve.simulate.report; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


# --- what the policies are for ---


def test_prompt_tree_beats_the_others_and_nears_the_bound() -> None:
    quick = Link(0.1, 1e7)
    model = msgspec.structs.replace(MODEL, links=Links(from_device=quick, from_host=quick, swap_in=quick))
    trace = conversations(40, 5, 0.06)
    setup = Setup(model, 4, 4, cache_tokens=40_000)
    reports = {policy: simulate(replace(setup, policy=policy), trace) for policy in POLICY_NAMES}
    bound = simulate(replace(setup, is_ideal=True), trace)
    best = reports.pop("prompt-tree")
    for report in reports.values():
        assert best.ttft_ms.mean < report.ttft_ms.mean
        assert best.hit_rate >= report.hit_rate
    assert bound.ttft_ms.mean <= best.ttft_ms.mean <= 1.15 * bound.ttft_ms.mean
    assert len(table([best, bound]).splitlines()) == 4


def hot_prefix(count: int, gap_s: float, pause_s: float) -> Trace:
    """Nine of ten requests begin with the same 2,048 tokens; a pause after the first."""
    sessions = []
    for index in range(count):
        stem = range(128) if index % 10 != 1 else range(10_000 * index, 10_000 * index + 128)
        own = range(10_000 * index + 500, 10_000 * index + 508)
        at_s = gap_s * index + pause_s * (index > 0)
        sessions.append(single(str(index), (*blocks(*stem, *own), 7), 2, at_s))
    return trace_of(sessions)


def balance(simulation: Simulation) -> float:
    """The busiest prefill worker over the mean."""
    busy = [worker.busy_ms for name, worker in simulation.workers.items() if name.startswith("prefill")]
    return max(busy) / (sum(busy) / len(busy))


@pytest.mark.parametrize("gap_s", [0.015, 0.007])  # a third and a half of what the prefill workers can do
def test_a_hot_prefix_is_replicated_by_pulls_and_stays_balanced(gap_s: float) -> None:
    trace = hot_prefix(600, gap_s, pause_s=1.0)
    simulation = Simulation(Setup(MODEL, 8, 4, cache_tokens=30_000), trace)
    simulation.run()
    assert balance(simulation) <= 1.3
    # it was computed once; whoever else has it has pulled it
    computed = [o for o in simulation.outcomes if o.number % 10 != 1 and o.num_cached_tokens < 2048]
    pulled = [o for o in simulation.outcomes if o.num_pulled_tokens == 2048]
    assert [outcome.number for outcome in computed] == [0]
    hot = trace.ids(blocks(*range(128))).tobytes()
    prefills = [worker for name, worker in simulation.workers.items() if name.startswith("prefill")]
    num_holders = sum(worker.pool.match(hot, "").num_tokens == 2048 for worker in prefills)
    assert num_holders == 1 + len(pulled) >= 4
    assert simulation.counters.failed_pulls == 0


def test_a_hot_prefix_that_nobody_has_yet_stays_balanced() -> None:
    simulation = Simulation(Setup(MODEL, 8, 4, cache_tokens=30_000), hot_prefix(600, 0.015, pause_s=0.0))
    simulation.run()
    assert balance(simulation) <= 1.3


def test_on_the_mooncake_trace() -> None:
    model = h200_llama_3_8b()
    trace = read_trace(find_data("mooncake", "synthetic_trace.jsonl.gz"), limit=250)
    loaded = at_load(trace, model, 4, 0.7)

    def run(policy: PolicyName) -> Report:
        return simulate(Setup(model, 4, 4, policy=policy, cache_tokens=1_000_000), loaded)

    best = run("prompt-tree")
    for policy in ("round-robin", "least-load", "session"):
        other = run(policy)
        assert best.ttft_ms.mean < other.ttft_ms.mean
        assert best.ttft_ms.p99 < other.ttft_ms.p99
