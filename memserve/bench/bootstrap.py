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
    pooled = [_Pool(rounds) for rounds in (a, b)]
    if not all(len(pool.values) for pool in pooled):
        return None
    whole = [float(statistic(pool.values)) for pool in pooled]
    rng = np.random.default_rng(seed)
    names = [sorted(set(of_a) | set(of_b)) for of_a, of_b in zip(a, b, strict=True)]
    ratios = []
    for _ in range(NUM_RESAMPLES):
        weights = _draw(names, rng)
        sample = [pool.resample(weights) for pool in pooled]
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


class _Pool:
    """All values of one server, each with its (round, session)."""

    def __init__(self, rounds: Sequence[BySession]) -> None:
        keys: dict[tuple[int, str], int] = {}
        units: list[int] = []
        values: list[float] = []
        for index, sessions in enumerate(rounds):
            for name, own in sessions.items():
                units += [keys.setdefault((index, name), len(keys))] * len(own)
                values += own
        self.values: Values = np.asarray(values, dtype=np.float64)
        self._units = np.asarray(units, dtype=np.int64)
        self._keys = list(keys)

    def resample(self, weights: Mapping[tuple[int, str], int]) -> Values:
        """The values, as often as their unit was drawn."""
        counts = np.asarray([weights.get(key, 0) for key in self._keys], dtype=np.int64)
        return np.repeat(self.values, counts[self._units])


def _draw(names: Sequence[Sequence[str]], rng: np.random.Generator) -> dict[tuple[int, str], int]:
    """How often each session of each round is drawn."""
    weights: dict[tuple[int, str], int] = {}
    for index in rng.integers(len(names), size=len(names)).tolist():
        own = names[index]
        for session in rng.integers(len(own), size=len(own)).tolist() if own else ():
            key = (index, own[session])
            weights[key] = weights.get(key, 0) + 1
    return weights


def _divide(b: float, a: float) -> float:
    return b / a if a else float("nan") if not b else float("inf")


def _with_interval(a: float, b: float, ratios: Sequence[float]) -> Ratio:
    finite = [ratio for ratio in ratios if np.isfinite(ratio)]
    if not finite:
        return Ratio(a, b, _divide(b, a), None, None)
    tail = 50 * (1 - COVERAGE)
    low, high = (float(value) for value in np.percentile(finite, [tail, 100 - tail]))
    return Ratio(a, b, _divide(b, a), low, high)
