"""Times of arrival: means, shapes and ends of the processes; repeatable by seed."""

from __future__ import annotations

import math
import random
import statistics

import pytest

from memserve.bench.arrivals import Ramp, ThinkTime, at_rate, from_trace, on_ramp, unit_gaps
from memserve.bench.workload import Session, Turn
from memserve.errors import BenchError

MANY = 20_000


def rng() -> random.Random:
    return random.Random(3)


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_gaps_have_mean_one_and_the_shape_s_variance(burstiness: float) -> None:
    gaps = unit_gaps(MANY, burstiness, rng())
    assert statistics.fmean(gaps) == pytest.approx(1, rel=0.05)
    assert statistics.variance(gaps) == pytest.approx(1 / burstiness, rel=0.1)  # 1 for Poisson
    assert min(gaps) >= 0


def test_a_clock() -> None:
    assert at_rate(4, 2.0, math.inf, rng()) == [0, 0.5, 1.0, 1.5]


def test_a_rate() -> None:
    times = at_rate(MANY, 50.0, 1.0, rng())
    assert len(times) == MANY and times[0] == 0 and times == sorted(times)
    assert times[-1] == pytest.approx(MANY / 50, rel=0.05)
    assert times == at_rate(MANY, 50.0, 1.0, rng())
    assert times != at_rate(MANY, 50.0, 1.0, random.Random(4))
    assert at_rate(1, 50.0, 1.0, rng()) == [0]
    assert at_rate(3, math.inf, 1.0, rng()) == [0, 0, 0]


@pytest.mark.parametrize("ramp", [Ramp(1, 9), Ramp(9, 1), Ramp(0, 10), Ramp(5, 5)])
@pytest.mark.parametrize("burstiness", [math.inf, 1.0])
def test_a_ramp(ramp: Ramp, burstiness: float) -> None:
    span = 2000.0
    times = on_ramp(MANY, ramp, span, burstiness, rng())
    assert times == sorted(times) and times[0] == 0
    for start in (0.0, span / 4, span / 2, span * 3 / 4):
        seen = sum(start <= time < start + span / 4 for time in times)
        middle = ramp.start + (ramp.end - ramp.start) * (start + span / 8) / span
        assert seen == pytest.approx(middle * span / 4, rel=0.1)


def test_a_ramp_over_the_count() -> None:
    # 1/s to 3/s in the mean 2/s: 200 gaps take 100 s
    times = on_ramp(201, Ramp(1, 3), None, math.inf, rng())
    assert times[-1] == pytest.approx(100)
    assert times[1] - times[0] == pytest.approx(1, rel=0.02)
    assert times[-1] - times[-2] == pytest.approx(1 / 3, rel=0.02)
    assert on_ramp(1, Ramp(1, 3), None, 1.0, rng()) == [0]


def test_a_ramp_stays_at_its_end() -> None:
    times = on_ramp(100, Ramp(1, 5), 2.0, math.inf, rng())
    gaps = [after - before for before, after in zip(times, times[1:], strict=False) if before > 2]
    assert gaps and gaps == pytest.approx([0.2] * len(gaps))


def session(at_s: float | None) -> Session:
    return Session("s", (Turn("x", None, 1),), at_s)


def test_a_trace_begins_at_once() -> None:
    assert from_trace([session(5.0), session(5.5), session(9.0)]) == [0, 0.5, 4.0]
    with pytest.raises(BenchError, match="--rate or --concurrency"):
        from_trace([session(5.0), session(None)])


def test_think_times() -> None:
    assert ThinkTime().draw(rng()) == 0 and ThinkTime(2.0).draw(rng()) == 2.0
    generator = rng()
    drawn = [ThinkTime(2.0, exponential=True).draw(generator) for _ in range(MANY)]
    assert statistics.fmean(drawn) == pytest.approx(2, rel=0.05)
    assert statistics.stdev(drawn) == pytest.approx(2, rel=0.05)
    assert ThinkTime(0.0, exponential=True).draw(rng()) == 0
