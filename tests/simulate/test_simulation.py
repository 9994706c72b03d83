"""Simulated runs: what must hold whatever the policy, then what the policies are for."""

from __future__ import annotations

import gzip
import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest

from memserve.router.scheduling.cost_model import Budget, CostModel, Link, Links, Operators, Ramp
from memserve.router.scheduling.hardware import h200_llama_3_8b
from memserve.router.scheduling.policies.policies import POLICIES
from memserve.simulate.report import Report, simulate, table
from memserve.simulate.simulation import Setup, Simulation
from memserve.simulate.traces import Job, Trace, read_mooncake, read_sessions
from memserve.simulate.worker import ModelledCache

# The test data lie beside the repository, as ../shared/data.
DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"
MODEL = CostModel(
    name="test",
    operators=Operators(rows=Ramp((0,), (0.1,)), fixed_ms=2.0, context_ms=1e-4),
    budget=Budget(1024),
    kv_token_bytes=1000,
    links=Links(from_device=Link(1.0, 1e6), from_host=Link(1.0, 1e6), swap_in=Link(1.0, 1e6)),
)


def find_data(*parts: str) -> Path:
    path = DATA.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"{'/'.join(parts)} is not beside the repository (../shared/data)")
    return path


def ids_of(*numbers: int) -> bytes:
    return np.array(numbers, dtype="<i4").tobytes()


def conversations(count: int, num_turns: int, gap_s: float) -> Trace:
    """Blocks of 16 tokens with an id each; every conversation begins with the same two blocks."""
    jobs = []
    for index in range(count):
        later: Job | None = None
        for turn in reversed(range(num_turns)):
            known = [0, 1] + [1000 * (index + 1) + i for i in range(4 + 8 * turn)]
            after = [*known, *(1000 * (index + 1) + i for i in range(4 + 8 * turn, 8 + 8 * turn))]
            later = Job(str(index), ids_of(*known), ids_of(*after), 16 * len(known) + 3, 70, then=later)
        assert later is not None
        later.at_s = gap_s * index
        jobs.append(later)
    return Trace(jobs, 16, 1)


# --- parts ---


def test_a_cache_keeps_what_was_used_last() -> None:
    cache = ModelledCache(1, 4)
    # 1. new blocks
    first, placed, gone = cache.put(ids_of(1, 2), 0, now=1.0)
    assert (first, len(placed.blocks), len(gone.blocks)) == (0, 2, 0)
    # 2. more of the same, then something else in the place of what is oldest
    first, placed, gone = cache.put(ids_of(1, 2, 3), 0, now=2.0)
    assert (first, len(placed.blocks), len(gone.blocks)) == (2, 1, 0)
    cache.match(ids_of(1), now=3.0)
    first, placed, gone = cache.put(ids_of(7, 8), 0, now=4.0)
    assert (first, len(placed.blocks), len(gone.blocks)) == (0, 2, 1)
    assert cache.match(ids_of(1, 2, 3), now=5.0) == 2
    assert set(gone.blocks.tolist()) <= set(placed.blocks.tolist())
    assert placed.generations.max() == 1
    # 3. running requests take room from it; what does not fit is cut
    first, placed, gone = cache.put(ids_of(7, 8, 9, 10), 1, now=6.0)
    assert (first, len(placed.blocks), len(gone.blocks)) == (2, 1, 2)


def test_a_lone_request_takes_what_the_model_says() -> None:
    trace = Trace([Job("a", ids_of(*range(128)), ids_of(*range(128)), 2048, 11)], 16, 1)
    simulation = Simulation(Setup(MODEL, 1, 1, cache_tokens=8192), trace)
    (outcome,) = simulation.run()
    assert outcome.ttft_ms == outcome.predicted_ttft_ms == pytest.approx(2 * 2.0 + 204.8)
    decode_ms = sum(2.1 + 1e-4 * (2048 + step) for step in range(10))
    assert outcome.jct_ms == pytest.approx(208.8 + 1.0 + 2.048 + decode_ms, abs=0.1)
    assert simulation.totals.handoff_bytes == 2048 * 1000


@pytest.mark.parametrize("cache_tokens", [4000, 800])
@pytest.mark.parametrize("fleet", [(2, 2, 0), (0, 0, 3)])
@pytest.mark.parametrize("policy", POLICIES)
def test_every_request_ends_and_gives_back_what_it_took(
    policy: str, fleet: tuple[int, int, int], cache_tokens: int
) -> None:
    trace = conversations(40, 3, gap_s=0.02)
    simulation = Simulation(Setup(MODEL, *fleet, policy=policy, cache_tokens=cache_tokens), trace)
    outcomes = simulation.run()
    assert len(outcomes) == 120
    for outcome in outcomes:
        assert 0 < outcome.ttft_ms <= outcome.jct_ms
        assert 0 <= outcome.num_cached_tokens < outcome.num_tokens
    for worker in simulation._workers.values():
        view = worker.candidate.view
        assert (view.num_placed, view.reserved_blocks, worker.num_context) == (0, 0, 0)
        assert not worker.batch and not worker.waiting and worker.running is None
        assert worker.backlog.queue_ms(1e9) == 0.0
        # what the router believes is what is there, and no more
        tree = simulation._trees[simulation._side[worker.name]]
        for job in trace.all_jobs():
            holding = tree.match("", job.ids_after, 1e8).live.get(worker.name)
            believed = 0 if holding is None else holding.num_tokens // 16
            assert believed == worker.cache.match(job.ids_after, 1e8)


def test_a_prefill_takes_the_batch_along() -> None:
    jobs = [
        Job("a", ids_of(*range(64)), ids_of(*range(64)), 1024, 101),
        Job("b", ids_of(*range(100, 420)), ids_of(*range(100, 420)), 5120, 1, at_s=0.2),
    ]
    outcomes = Simulation(Setup(MODEL, 0, 0, 1, cache_tokens=16_000), Trace(jobs, 16, 1)).run()
    first, second = sorted(outcomes, key=lambda outcome: outcome.jct_ms, reverse=True)
    # 6 of the 100 steps (5,120 tokens in chunks of 1,023) were the chunks' own
    step_ms = 2.1 + 1e-4 * 1074
    prefill_ms = 6 * (2.0 + 0.1 + 1e-4 * 1065) + 512.0
    assert first.jct_ms == pytest.approx(104.4 + prefill_ms + 94 * step_ms, rel=0.01)
    assert second.ttft_ms == pytest.approx(prefill_ms, rel=0.01)


def test_what_was_drawn_is_found_by_the_next_turn_if_it_was_pulled_back() -> None:
    # the decode side has it too, and would be the source
    hit_rates = []
    for pull_back in (True, False):
        trace = conversations(10, 4, gap_s=0.2)
        setup = Setup(MODEL, 1, 1, policy="least-load", cache_tokens=40_000, pull_back=pull_back)
        simulation = Simulation(setup, trace)
        outcomes = simulation.run()
        assert (simulation.totals.pulled_back_bytes > 0) == pull_back
        # a turn comes the moment the one before is answered: time to pull back only what ended before
        hit_rates.append(sum(o.num_cached_tokens for o in outcomes))
    assert hit_rates[0] > hit_rates[1]


def test_what_does_not_fit_beside_running_requests_is_not_believed() -> None:
    ids = ids_of(*range(10))
    simulation = Simulation(Setup(MODEL, 0, 0, 1, cache_tokens=160), Trace([], 16, 1))
    (worker,) = simulation._workers.values()
    tree = simulation._trees[0]
    tree.hold(worker.name, 1, "", ids, 0.0)  # as at its dispatch
    worker.candidate.view.reserved_blocks = 6
    simulation._keep(worker, ids, 1.0)
    assert worker.cache.match(ids, 1.0) == 4
    assert tree.match("", ids, 1.0).live[worker.name].num_tokens == 64


def test_a_run_is_repeatable() -> None:
    runs = [
        Simulation(Setup(MODEL, 2, 2, cache_tokens=3000), conversations(20, 3, 0.05)).run() for _ in range(2)
    ]
    assert runs[0] == runs[1]


def test_it_needs_no_torch() -> None:
    script = "import sys, memserve.simulate.report; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


# --- traces ---


def test_mooncake_rows_are_read(tmp_path: Path) -> None:
    rows = [
        {"timestamp": 0, "input_length": 1300, "output_length": 7, "hash_ids": [0, 5, 6]},
        {"timestamp": 2500, "input_length": 100, "output_length": 0, "hash_ids": [9]},
    ]
    path = tmp_path / "trace.jsonl.gz"
    path.write_bytes(gzip.compress(b"\n".join(map(msgspec.json.encode, rows))))
    trace = read_mooncake(path)
    first, second = trace.jobs
    assert (first.ids, first.num_tokens, first.num_new_tokens, first.session) == (ids_of(0, 5), 1300, 7, "5")
    assert (second.ids, second.at_s, second.num_new_tokens, second.session) == (b"", 2.5, 1, "9")
    assert len(read_mooncake(path, limit=1).jobs) == 1
    assert trace.stretched(2.0).jobs[1].at_s == 5.0


def test_sessions_grow_turn_by_turn(tmp_path: Path) -> None:
    session = {
        "id": "s",
        "prefix": "p",
        "turns": [{"in": "a" * 200, "out": "b" * 80}, {"in": "c" * 99, "out": ""}],
    }
    (tmp_path / "sessions.jsonl.gz").write_bytes(gzip.compress(msgspec.json.encode(session)))
    prefix = {"id": "p", "text": "x" * 64}
    (tmp_path / "prefixes.jsonl.gz").write_bytes(gzip.compress(msgspec.json.encode(prefix)))
    (first,) = read_sessions(tmp_path, rate=1.0).jobs
    second = first.then
    assert second is not None and second.then is None and first.at_s > 0
    assert (first.num_tokens, first.num_new_tokens) == (66, 20)
    assert (len(first.ids) // 64, len(first.ids_after) // 64) == (4, 5)
    assert second.ids.startswith(first.ids_after)
    assert (second.num_tokens, second.num_new_tokens) == (110, 1)


# --- what the policies are for ---


def test_prompt_tree_beats_the_others_and_nears_the_bound() -> None:
    quick = Link(0.1, 1e7)
    model = msgspec.structs.replace(MODEL, links=Links(from_device=quick, from_host=quick, swap_in=quick))
    reports = {
        policy: simulate(Setup(model, 4, 4, policy=policy, cache_tokens=40_000), conversations(80, 6, 0.08))
        for policy in POLICIES
    }
    bound = simulate(Setup(model, 4, 4, is_ideal=True, cache_tokens=40_000), conversations(80, 6, 0.08))
    best = reports.pop("prompt-tree")
    for report in reports.values():
        assert best.ttft_ms.mean < report.ttft_ms.mean
        assert best.hit_rate >= report.hit_rate
    assert bound.ttft_ms.mean <= best.ttft_ms.mean <= 1.15 * bound.ttft_ms.mean
    assert best.hit_rate == pytest.approx(bound.hit_rate, abs=0.02)
    assert len(table([best, bound]).splitlines()) == 3


def test_a_hot_prefix_is_replicated_and_stays_balanced() -> None:
    """Nine of ten requests begin with the same 2,048 tokens, once the first has computed them."""
    jobs = []
    for index in range(600):
        stem = list(range(128)) if index % 10 else [10_000 * index + i for i in range(128)]
        ids = ids_of(*stem, *(1000 * (index + 1) + i for i in range(8)))
        jobs.append(Job(str(index), ids, ids, 16 * 136 + 1, 2, at_s=0.015 * index + (index > 0)))
    simulation = Simulation(Setup(MODEL, 8, 4, cache_tokens=30_000), Trace(jobs, 16, 1))
    simulation.run()
    busy = [ms for name, ms in simulation.totals.busy_ms.items() if name.startswith("prefill")]
    assert max(busy) / (sum(busy) / len(busy)) <= 1.3
    assert simulation.totals.num_pulls >= 2


def test_on_the_mooncake_trace() -> None:
    path = find_data("mooncake", "synthetic_trace.jsonl.gz")

    def run(policy: str) -> Report:
        trace = read_mooncake(path, limit=300).stretched(0.35)
        return simulate(Setup(h200_llama_3_8b(), 4, 4, policy=policy, cache_tokens=1_000_000), trace)

    best = run("prompt-tree")
    for policy in ("round-robin", "least-load", "session"):
        other = run(policy)
        assert best.ttft_ms.mean < other.ttft_ms.mean
        assert best.ttft_ms.p99 < other.ttft_ms.p99
