"""How sure a ratio of two figures is: percentile intervals by resampling. Pure, seeded.

Two servers were given the same load in some rounds. Requests of a session depend on each other, and those of
a round on what the machine did then, so neither is drawn by itself: a resample draws rounds, and in each
drawn round sessions, with replacement, the same for both servers (they are paired by what was asked of them).
Figures of whole runs, such as throughput, are resampled by rounds alone; of one round there is no interval.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

NUM_RESAMPLES = 1000
COVERAGE = 0.95

Values = NDArray[np.float64]
# Values of one metric in one round, by session.
BySession = Mapping[str, Sequence[float]]
Statistic = Callable[[Values], Any]


class Ratio(msgspec.Struct, frozen=True):
    """A figure of A, of B, and B / A with its interval; the interval is None where there is none."""

    a: float
    b: float
    ratio: float
    low: float | None
    high: float | None


def sampled_ratio(
    a: Sequence[BySession], b: Sequence[BySession], statistic: Statistic, seed: int = 0
) -> Ratio | None:
    """Of a statistic over pooled values, round by round in `a` and `b`. None if one of them has no values."""
    assert len(a) == len(b) and a
    units, first_of_round = _number(a, b)
    pooled = [_Pool(rounds, units) for rounds in (a, b)]
    if not all(len(pool.values) for pool in pooled):
        return None
    whole = [float(statistic(pool.values)) for pool in pooled]
    rng = np.random.default_rng(seed)
    ratios = []
    for _ in range(NUM_RESAMPLES):
        counts = _draw(first_of_round, rng)
        sample = [pool.resample(counts) for pool in pooled]
        if all(len(values) for values in sample):
            ratios.append(_divide(float(statistic(sample[1])), float(statistic(sample[0]))))
    return _with_interval(whole[0], whole[1], ratios)


def paired_ratio(a: Sequence[float], b: Sequence[float], seed: int = 0) -> Ratio:
    """Of the means of figures of whole runs, one a round."""
    assert len(a) == len(b) and a
    of_a, of_b = np.asarray(a), np.asarray(b)
    ratios: list[float] = []
    if len(a) > 1:
        drawn = np.random.default_rng(seed).integers(len(a), size=(NUM_RESAMPLES, len(a)))
        means = zip(of_b[drawn].mean(axis=1), of_a[drawn].mean(axis=1), strict=True)
        ratios = [_divide(float(mean_b), float(mean_a)) for mean_b, mean_a in means]
    return _with_interval(float(of_a.mean()), float(of_b.mean()), ratios)


# A unit is a session of a round; those of a round have numbers in a row.
Units = Mapping[tuple[int, str], int]


def _number(a: Sequence[BySession], b: Sequence[BySession]) -> tuple[Units, list[int]]:
    """Numbers of all units; the first number of each round, and of the one after the last."""
    units: dict[tuple[int, str], int] = {}
    firsts = [0]
    for index, (of_a, of_b) in enumerate(zip(a, b, strict=True)):
        for name in sorted(set(of_a) | set(of_b)):
            units[index, name] = len(units)
        firsts.append(len(units))
    return units, firsts


class _Pool:
    """All values of one server, each with its unit."""

    def __init__(self, rounds: Sequence[BySession], units: Units) -> None:
        of_values: list[int] = []
        values: list[float] = []
        for index, sessions in enumerate(rounds):
            for name, own in sessions.items():
                of_values += [units[index, name]] * len(own)
                values += own
        self.values: Values = np.asarray(values, dtype=np.float64)
        self._units = np.asarray(of_values, dtype=np.int64)

    def resample(self, counts: NDArray[np.int64]) -> Values:
        """The values, as often as their unit was drawn."""
        return np.repeat(self.values, counts[self._units])


def _draw(firsts: Sequence[int], rng: np.random.Generator) -> NDArray[np.int64]:
    """How often each unit is drawn."""
    counts = np.zeros(firsts[-1], dtype=np.int64)
    for index in rng.integers(len(firsts) - 1, size=len(firsts) - 1).tolist():
        first, end = firsts[index], firsts[index + 1]
        if end > first:
            drawn = rng.integers(end - first, size=end - first)
            counts[first:end] += np.bincount(drawn, minlength=end - first)
    return counts


def _divide(b: float, a: float) -> float:
    return b / a if a else float("nan") if not b else float("inf")


def _with_interval(a: float, b: float, ratios: Sequence[float]) -> Ratio:
    finite = [ratio for ratio in ratios if np.isfinite(ratio)]
    if not finite:
        return Ratio(a, b, _divide(b, a), None, None)
    tail = 50 * (1 - COVERAGE)
    low, high = (float(value) for value in np.percentile(finite, [tail, 100 - tail]))
    return Ratio(a, b, _divide(b, a), low, high)
