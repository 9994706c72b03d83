"""What a simulated run says: percentiles, hit rate, bytes moved, balance."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np

from memserve.simulate.simulation import Setup, Simulation
from memserve.simulate.traces import Trace


class Spread(msgspec.Struct, frozen=True):
    """A distribution in ms."""

    mean: float
    p50: float
    p90: float
    p99: float


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """One policy on one trace. `hit_rate`: share of prompt tokens that were not computed. `balance`: the
    busiest prefilling worker over the mean. `ttft_error`: median relative error of the predictions.
    """

    policy: str
    num_requests: int
    ttft_ms: Spread
    jct_ms: Spread
    hit_rate: float
    utilisation: float
    balance: float
    ttft_error: float
    num_pulls: int
    num_alone: int
    handoff_gb: float
    pulled_gb: float
    pulled_back_gb: float


def simulate(setup: Setup, trace: Trace) -> Report:
    """Run it and sum it up. The trace must be fresh: a run writes the times of later turns into it."""
    simulation = Simulation(setup, trace)
    outcomes = simulation.run()
    totals = simulation.totals
    busy = np.array([ms for name, ms in totals.busy_ms.items() if setup.num_prefill == 0 or "pre" in name])
    ttft = np.array([outcome.ttft_ms for outcome in outcomes])
    predicted = np.array([outcome.predicted_ttft_ms for outcome in outcomes])
    num_tokens = sum(outcome.num_tokens for outcome in outcomes)
    return Report(
        policy="bound" if setup.is_ideal else setup.policy,
        num_requests=len(outcomes),
        ttft_ms=_spread(ttft),
        jct_ms=_spread(np.array([outcome.jct_ms for outcome in outcomes])),
        hit_rate=sum(outcome.num_cached_tokens for outcome in outcomes) / num_tokens,
        utilisation=float(busy.mean()) / max(1e-9, totals.span_s * 1e3),
        balance=float(busy.max() / max(1e-9, busy.mean())),
        ttft_error=float(np.median(np.abs(predicted - ttft) / ttft)),
        num_pulls=totals.num_pulls,
        num_alone=totals.num_alone,
        handoff_gb=totals.handoff_bytes / 1e9,
        pulled_gb=totals.pulled_bytes / 1e9,
        pulled_back_gb=totals.pulled_back_bytes / 1e9,
    )


def table(reports: Sequence[Report]) -> str:
    """One line a policy."""
    lines = [
        f"{'':<12}{'TTFT ms':>9}{'p50':>8}{'p99':>9}{'JCT ms':>9}{'p99':>9}{'hits':>7}{'busy':>6}"
        f"{'max/mean':>9}{'pulls':>7}{'P-D GB':>8}{'pulled':>8}{'back':>7}"
    ]
    for r in reports:
        ttft, jct = r.ttft_ms, r.jct_ms
        lines.append(
            f"{r.policy:<12}{ttft.mean:>9.1f}{ttft.p50:>8.1f}{ttft.p99:>9.1f}{jct.mean:>9.0f}{jct.p99:>9.0f}"
            f"{r.hit_rate:>7.1%}{r.utilisation:>6.0%}{r.balance:>9.2f}{r.num_pulls:>7}"
            f"{r.handoff_gb:>8.0f}{r.pulled_gb:>8.0f}{r.pulled_back_gb:>7.0f}"
        )
    return "\n".join(lines)


def _spread(values: np.ndarray) -> Spread:
    p50, p90, p99 = np.percentile(values, [50, 90, 99])
    return Spread(float(values.mean()), float(p50), float(p90), float(p99))
