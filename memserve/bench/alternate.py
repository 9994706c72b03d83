"""The same load on several servers in turn, round after round, and what it says of them.

Rounds go forwards and backwards by turns (A B, B A, A B, …), so that a machine that slows down or warms up
favours nobody; only one of the servers that are started here lives at a time. Every round has arrivals of its
own, the same for all. Figures of latencies are those of all rounds' requests together, other figures means
over the rounds; ratios come with intervals (`bootstrap.py`). Rounds that did not get to their end are
reported, but compared with nothing.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from functools import partial

import msgspec
import numpy as np

from memserve.bench.bootstrap import Ratio, Statistic, paired_ratio, sampled_ratio
from memserve.bench.interrupt import Interrupt
from memserve.bench.metrics import Summary, latencies
from memserve.bench.records import RequestRecord
from memserve.bench.run import Report, RunOptions


@dataclass(frozen=True, slots=True)
class Arm:
    """One of the servers. `serving` gives its URL, and has it run as long as it is entered."""

    name: str
    server: str
    serving: Callable[[], AbstractAsyncContextManager[str]]


class Measured(msgspec.Struct, frozen=True):
    """One run of one arm."""

    arm: str
    round: int
    report: Report


# Runs one arm at a URL; the number is the round's, from 0.
Measure = Callable[[Arm, str, int], Awaitable[Report]]


async def alternate(
    arms: Sequence[Arm], num_rounds: int, measure: Measure, interrupt: Interrupt, runs: list[Measured]
) -> None:
    """Make all runs and append them to `runs` in their order; fewer if the user interrupts. Raises BenchError
    if a server does not start or cannot be measured; what was measured before stays in `runs`.
    """
    try:
        for number in range(num_rounds):
            for arm in arms if number % 2 == 0 else reversed(arms):
                if interrupt.pressed:
                    return
                async with arm.serving() as url:
                    runs.append(Measured(arm.name, number, await measure(arm, url, number)))
    except asyncio.CancelledError:
        if not interrupt.pressed:
            raise
        task = asyncio.current_task()
        assert task is not None
        task.uncancel()  # it was the user's signal, and it is dealt with


def of_round(options: RunOptions, number: int) -> RunOptions:
    """The same load with the arrivals of another round."""
    return dataclasses.replace(
        options, load=dataclasses.replace(options.load, seed=options.load.seed + number)
    )


def by_arm(runs: Sequence[Measured], arms: Sequence[Arm]) -> dict[str, list[Report]]:
    """The reports of complete rounds, in order; an arm a key. Empty if no round is complete."""
    rounds: dict[int, dict[str, Report]] = {}
    for run in runs:
        if not run.report.interrupted:
            rounds.setdefault(run.round, {})[run.arm] = run.report
    complete = [reports for _, reports in sorted(rounds.items()) if len(reports) == len(arms)]
    return {arm.name: [reports[arm.name] for reports in complete] for arm in arms} if complete else {}


# --- figures -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Figure:
    """One of the figures that are compared: a statistic of a latency, or of a run's summary.

    `sense`: 1 where more is better, -1 where less is, 0 where neither.
    """

    name: str
    unit: str
    sense: int
    latency: str | None = None
    statistic: Statistic | None = None
    of_run: Callable[[Summary], float | None] | None = None

    def value(self, reports: Sequence[Report]) -> float | None:
        """Of all rounds; None if there is nothing to say it of."""
        if self.latency is None:
            values = self.run_values(reports)
            return None if values is None else float(np.mean(values))
        assert self.statistic is not None
        pooled = [ms for report in reports for ms in latencies(report.requests, self.latency)]
        return float(self.statistic(np.asarray(pooled))) if pooled else None

    def run_values(self, reports: Sequence[Report]) -> list[float] | None:
        """A figure a round of those of whole runs; None if a round has none."""
        assert self.of_run is not None
        values = [self.of_run(report.summary) for report in reports]
        known = [value for value in values if value is not None]
        return known if len(known) == len(values) and known else None


def _percentile(percent: float, values: object) -> float:
    return float(np.percentile(values, percent))  # type: ignore[call-overload]


_P50, _P99 = partial(_percentile, 50), partial(_percentile, 99)
FIGURES = (
    Figure("TTFT mean", "ms", -1, "ttft", np.mean),
    Figure("TTFT P50", "ms", -1, "ttft", _P50),
    Figure("TTFT P99", "ms", -1, "ttft", _P99),
    Figure("TPOT mean", "ms", -1, "tpot", np.mean),
    Figure("TPOT P99", "ms", -1, "tpot", _P99),
    Figure("JCT mean", "ms", -1, "jct", np.mean),
    Figure("JCT P99", "ms", -1, "jct", _P99),
    Figure("request rate", "/s", 1, of_run=lambda summary: summary.request_rate),
    Figure("output throughput", "tokens/s", 1, of_run=lambda summary: summary.output_throughput),
    Figure("goodput", "/s", 1, of_run=lambda summary: summary.goodput),
    Figure("cached tokens", "of prompts", 0, of_run=lambda summary: summary.cached_ratio),
    Figure("infinite cache", "of prompts", 0, of_run=lambda summary: summary.available_ratio),
    Figure("failed requests", "", -1, of_run=lambda summary: float(summary.num_failed)),
)


class Contrast(msgspec.Struct, frozen=True):
    """Arm B against arm A: ratios by figure, for those figures that both have."""

    b: str
    a: str
    ratios: dict[str, Ratio]


def contrast(a: str, b: str, reports: Mapping[str, Sequence[Report]]) -> Contrast:
    """B against A; both have run the same rounds, at least one."""
    ratios = {}
    for figure in FIGURES:
        if not figure.sense:
            continue
        ratio = _ratio(figure, reports[a], reports[b])
        if ratio is not None:
            ratios[figure.name] = ratio
    return Contrast(b, a, ratios)


def _ratio(figure: Figure, a: Sequence[Report], b: Sequence[Report]) -> Ratio | None:
    if figure.latency is not None:
        assert figure.statistic is not None
        values = [[_by_session(report.requests, figure.latency) for report in of] for of in (a, b)]
        return sampled_ratio(values[0], values[1], figure.statistic)
    of_a, of_b = figure.run_values(a), figure.run_values(b)
    if of_a is None or of_b is None or not any(of_a):
        return None
    return paired_ratio(of_a, of_b)


def _by_session(records: Sequence[RequestRecord], latency: str) -> dict[str, list[float]]:
    values: dict[str, list[float]] = {}
    for record in records:
        values.setdefault(record.session, []).extend(latencies([record], latency))
    return values


def verdict(figure: Figure, ratio: Ratio) -> str:
    """Whether B is better or worse; nothing is said where the interval has 1 in it, or there is none."""
    if ratio.low is None or ratio.high is None or not figure.sense or ratio.low <= 1 <= ratio.high:
        return ""
    return "better" if (ratio.ratio > 1) == (figure.sense > 0) else "worse"
