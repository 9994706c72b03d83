"""What a simulated run says: percentiles, hit rate, bytes moved, balance, distance from the bound."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np

from memserve.errors import WorkloadError
from memserve.simulate.simulation import Setup, Simulation
from memserve.simulate.traces import Trace

BOUND = "bound"


class Spread(msgspec.Struct, frozen=True):
    """A distribution in ms."""

    mean: float
    p50: float
    p90: float
    p99: float


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """One policy on one trace. `load` as asked for (None: the trace's own times); `hit_rate`: share of prompt
    tokens that were not computed; `utilisation`: share of the time that prefilling workers computed prompts,
    `balance`: the busiest of them over the mean. `ttft_error`: median relative error of the predictions.
    """

    policy: str
    load: float | None
    cache_tokens: int
    num_requests: int
    ttft_ms: Spread
    jct_ms: Spread
    hit_rate: float
    utilisation: float
    balance: float
    ttft_error: float
    num_pulls: int
    num_failed_pulls: int
    num_alone: int
    handoff_gb: float
    pulled_gb: float
    pulled_back_gb: float
    evicted_blocks: int


def simulate(setup: Setup, trace: Trace, load: float | None = None) -> Report:
    """Run it and sum it up. `load`: what the trace was stretched to, for the record.

    Raises WorkloadError if the trace sends no request in its duration.
    """
    simulation = Simulation(setup, trace)
    outcomes, counters = simulation.run(), simulation.counters
    if not outcomes:
        raise WorkloadError("no request is sent")
    prefilling = [worker for name, worker in simulation.workers.items() if not name.startswith("decode")]
    busy = np.array([worker.busy_ms for worker in prefilling])
    ttft = np.array([outcome.ttft_ms for outcome in outcomes])
    predicted = np.array([outcome.predicted_ttft_ms for outcome in outcomes])
    num_tokens = sum(outcome.num_tokens for outcome in outcomes)
    return Report(
        policy=BOUND if setup.is_ideal else setup.policy,
        load=load,
        cache_tokens=setup.cache_tokens,
        num_requests=len(outcomes),
        ttft_ms=_spread(ttft),
        jct_ms=_spread(np.array([outcome.jct_ms for outcome in outcomes])),
        hit_rate=sum(outcome.num_cached_tokens for outcome in outcomes) / num_tokens,
        utilisation=float(busy.mean()) / max(1e-9, simulation.ended_at * 1e3),
        balance=float(busy.max() / max(1e-9, busy.mean())),
        ttft_error=float(np.median(np.abs(predicted - ttft) / ttft)),
        num_pulls=counters.prefill_pulls,
        num_failed_pulls=counters.failed_pulls,
        num_alone=simulation.num_alone,
        handoff_gb=(counters.pulled_bytes - counters.prefill_pulled_bytes) / 1e9,
        pulled_gb=counters.prefill_pulled_bytes / 1e9,
        pulled_back_gb=counters.pulled_back_bytes / 1e9,
        evicted_blocks=counters.evicted_blocks,
    )


def table(reports: Sequence[Report]) -> str:
    """One line a policy, under a heading for each load and cache size."""
    lines = []
    for group in groups(reports):
        bound = next((report for report in group if report.policy == BOUND), None)
        load = "" if group[0].load is None else f"load {group[0].load:.0%}, "
        lines += [
            f"{load}pools of {group[0].cache_tokens:,} tokens, {group[0].num_requests:,} requests",
            f"{'':<12}{'TTFT ms':>9}{'p50':>8}{'p99':>9}{'regret':>8}{'JCT ms':>9}{'p99':>9}{'hits':>7}"
            f"{'busy':>6}{'max/mean':>9}{'pulls':>7}{'P-D GB':>8}{'pulled':>8}{'back':>7}",
        ]
        for r in group:
            ttft, jct = r.ttft_ms, r.jct_ms
            over = "" if bound is None or r is bound else f"{regret(r, bound):+.1%}"
            lines.append(
                f"{r.policy:<12}{ttft.mean:>9.1f}{ttft.p50:>8.1f}{ttft.p99:>9.1f}{over:>8}{jct.mean:>9.0f}"
                f"{jct.p99:>9.0f}{r.hit_rate:>7.1%}{r.utilisation:>6.0%}{r.balance:>9.2f}{r.num_pulls:>7}"
                f"{r.handoff_gb:>8.0f}{r.pulled_gb:>8.0f}{r.pulled_back_gb:>7.0f}"
            )
    return "\n".join(lines)


def groups(reports: Sequence[Report]) -> list[list[Report]]:
    """Those of the same load and cache size together, in order."""
    found: dict[tuple[float | None, int], list[Report]] = {}
    for report in reports:
        found.setdefault((report.load, report.cache_tokens), []).append(report)
    return list(found.values())


def regret(report: Report, bound: Report) -> float:
    """By how much its mean TTFT exceeds the bound's, as a share of the bound's."""
    return report.ttft_ms.mean / bound.ttft_ms.mean - 1.0


def _spread(values: np.ndarray) -> Spread:
    p50, p90, p99 = np.percentile(values, [50, 90, 99])
    return Spread(float(values.mean()), float(p50), float(p90), float(p99))
