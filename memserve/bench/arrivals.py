"""When sessions begin, in an open loop. Pure: randomness is an argument.

    rate λ          gaps are gamma-distributed with mean 1/λ; burstiness is the shape: 1 is Poisson, less is
                    burstier, more is more even, infinite is a clock
    ramp λ0 → λ1    the same process, with a rate that grows linearly over the run: gaps of rate 1 in
                    operational time, carried to the clock by the inverse of the cumulative rate
    trace           each session's own time

In a closed loop (only a limit on concurrency) there are no arrivals: the next session begins when one ends.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from memserve.bench.workload import Session
from memserve.errors import BenchError


@dataclass(frozen=True, slots=True)
class Ramp:
    """A rate that goes from `start` to `end`, both in arrivals a second, over the whole run."""

    start: float
    end: float


@dataclass(frozen=True, slots=True)
class ThinkTime:
    """Seconds between the end of an answer and the next turn: always the same, or exponentially
    distributed.
    """

    mean_s: float = 0.0
    exponential: bool = False

    def draw(self, rng: random.Random) -> float:
        """One think time."""
        return rng.expovariate(1 / self.mean_s) if self.exponential and self.mean_s else self.mean_s


def unit_gaps(count: int, burstiness: float, rng: random.Random) -> list[float]:
    """`count` gaps with mean 1, gamma-distributed of shape `burstiness`."""
    if math.isinf(burstiness):
        return [1.0] * count
    return [rng.gammavariate(burstiness, 1 / burstiness) for _ in range(count)]


def at_rate(count: int, rate: float, burstiness: float, rng: random.Random) -> list[float]:
    """Times of `count` arrivals, the first at 0; all of them at once for an infinite rate."""
    if math.isinf(rate):
        return [0.0] * count
    return [time / rate for time in _cumulative(unit_gaps(count - 1, burstiness, rng))]


def on_ramp(
    count: int, ramp: Ramp, duration_s: float | None, burstiness: float, rng: random.Random
) -> list[float]:
    """Times of `count` arrivals, the first at 0, whose rate reaches `ramp.end` after `duration_s`, or with
    the last one; beyond, it stays there.
    """
    mean = (ramp.start + ramp.end) / 2
    span = duration_s if duration_s is not None else max(count - 1, 1) / mean
    slope = (ramp.end - ramp.start) / span
    at_end = mean * span  # arrivals until the rate has reached its end
    times = []
    for due in _cumulative(unit_gaps(count - 1, burstiness, rng)):
        if due >= at_end:
            times.append(span + (due - at_end) / ramp.end)
        else:  # start·t + slope·t²/2 = due, in the form that has no 0/0 where the slope is 0
            root = math.sqrt(max(0.0, ramp.start**2 + 2 * slope * due))
            times.append(2 * due / (ramp.start + root) if ramp.start + root else 0.0)
    return times


def from_trace(sessions: Sequence[Session]) -> list[float]:
    """Each session's own time, from the first one on. Raises BenchError if one has none."""
    times = [session.at_s for session in sessions]
    known = [time for time in times if time is not None]
    if len(known) != len(times):
        raise BenchError("the workload has no times of arrival: give --rate or --concurrency")
    return [time - min(known) for time in known]


def _cumulative(gaps: Sequence[float]) -> list[float]:
    times = [0.0]
    for gap in gaps:
        times.append(times[-1] + gap)
    return times
