"""What happened between two snapshots, through every kind of restart; percentiles out of buckets."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pytest

from memserve.top.rates import Buckets, Counters, Quantile, WorkerRates, quantile, worker_rates
from memserve.top.snapshot import Samples, Snapshot, Told, Worker, WorkerLoad
from tests.top.recordings import recorded

TIME = ("memserve_start_time_seconds", "")


def make_counters(before: Samples | None, now: Samples, elapsed_s: float = 2.0) -> Counters:
    return Counters(None if before is None else Told(10.0, before), Told(10.0 + elapsed_s, now))


def test_a_counter_that_grows() -> None:
    counters = make_counters({("x", "a"): 10.0, TIME: 5.0}, {("x", "a"): 16.0, ("y", ""): 3.0, TIME: 5.0})
    assert (counters.total("x", "a"), counters.grown("x", "a"), counters.rate("x", "a")) == (16.0, 6.0, 3.0)
    assert (counters.total("y"), counters.grown("y"), counters.rate("y")) == (3.0, None, None)
    assert counters.total("x") is counters.rate("z") is None


@pytest.mark.parametrize("value", [4.0, 16.0])
def test_a_server_that_began_anew(value: float) -> None:
    """Even where a counter has overtaken what it was."""
    counters = make_counters({("x", ""): 10.0, TIME: 5.0}, {("x", ""): value, TIME: 11.0})
    assert (counters.grown("x"), counters.rate("x")) == (value, value / 2)


def test_a_counter_that_fell_began_anew() -> None:
    assert make_counters({("x", ""): 10.0}, {("x", ""): 4.0}).grown("x") == 4.0


@pytest.mark.parametrize("elapsed_s", [0.0, -1.0])
def test_no_time_has_passed(elapsed_s: float) -> None:
    counters = make_counters({("x", ""): 1.0}, {("x", ""): 4.0}, elapsed_s)
    assert counters.rate("x") is None and counters.grown_buckets("h") == []
    assert make_counters(None, {("x", ""): 4.0}).rate("x") is None


# --- histograms --------------------------------------------------------------------------------------------


def histogram(
    *counts: float, bounds: tuple[str, ...] = ("0.1", "1.0", "+Inf")
) -> dict[tuple[str, str], float]:
    return {("h_bucket", bound): count for bound, count in zip(bounds, counts, strict=True)}


def test_buckets_of_an_interval() -> None:
    counters = make_counters(histogram(1, 3, 3) | {TIME: 1.0}, histogram(1, 7, 8) | {TIME: 1.0})
    assert counters.grown_buckets("h") == [(0.1, 0.0), (1.0, 4.0), (math.inf, 5.0)]
    assert counters.all_buckets("h") == [(0.1, 1.0), (1.0, 7.0), (math.inf, 8.0)]


@pytest.mark.parametrize(
    "before",
    [
        histogram(9, 9, 9),  # fell, by whatever cause
        histogram(0, 0, 0) | {TIME: 0.5},  # another life
    ],
)
def test_buckets_that_began_anew(before: Mapping[tuple[str, str], float]) -> None:
    counters = make_counters(before, histogram(1, 7, 8))
    assert counters.grown_buckets("h") == [(0.1, 1.0), (1.0, 7.0), (math.inf, 8.0)]


def test_buckets_that_make_no_sense() -> None:
    now = histogram(1, 7, 8)
    other = histogram(1, 2, 3, bounds=("0.1", "0.5", "+Inf"))
    assert make_counters(other, now).grown_buckets("h") == []
    assert make_counters(now, histogram(1, 2, 3, bounds=("0.1", "x", "+Inf"))).all_buckets("h") == []
    assert make_counters(now, histogram(1, 2, 3, bounds=("0.1", "1", "2"))).all_buckets("h") == []
    assert make_counters(now, {}).all_buckets("h") == []


@pytest.mark.parametrize(
    ("share", "expected"),
    [
        (0.05, Quantile(0.05)),  # half of the first bucket
        (0.1, Quantile(0.1)),
        (0.5, Quantile(0.1 + 0.9 * 4 / 8)),
        (0.9, Quantile(1.0)),
        (0.95, Quantile(1.0, is_over=True)),
    ],
)
def test_quantiles(share: float, expected: Quantile) -> None:
    buckets = [(0.1, 1.0), (1.0, 9.0), (math.inf, 10.0)]
    found = quantile(buckets, share)
    assert found is not None
    assert (found.value, found.is_over) == (pytest.approx(expected.value), expected.is_over)


@pytest.mark.parametrize(
    "buckets", [[], [(0.1, 0.0), (math.inf, 0.0)], [(0.1, 3.0), (math.inf, -1.0)], [(math.inf, math.nan)]]
)
def test_quantiles_of_nothing(buckets: Buckets) -> None:
    assert quantile(buckets, 0.5) is None


def test_quantiles_skip_empty_buckets() -> None:
    buckets = [(0.1, 0.0), (0.5, 0.0), (1.0, 2.0), (math.inf, 2.0)]
    assert quantile(buckets, 0.5) == Quantile(0.75)
    assert quantile([(math.inf, 3.0)], 0.5) == Quantile(0.0, is_over=True)


# --- workers -----------------------------------------------------------------------------------------------


def make_snapshot(at: float, steps: int, incarnation: int = 0, started: float = 1.0) -> Snapshot:
    worker = Worker("w", incarnation=incarnation, load=WorkerLoad(steps=steps, prefill_tokens=10 * steps))
    return Snapshot(Told(at, [worker]), Told(at, {TIME: started}))


@pytest.mark.parametrize(
    ("now", "steps"),
    [
        (make_snapshot(12.0, 16), 3.0),
        (make_snapshot(12.0, 16, incarnation=1), 8.0),  # its next life has overtaken the one before
        (make_snapshot(12.0, 4), 2.0),  # fell
        (make_snapshot(12.0, 16, started=11.0), 8.0),  # the server began anew
    ],
)
def test_rates_of_a_worker(now: Snapshot, steps: float) -> None:
    before = make_snapshot(10.0, 10)
    assert worker_rates(before, now) == {"w": WorkerRates(steps, 10 * steps, 0.0)}


def test_no_rates_of_a_worker() -> None:
    now = make_snapshot(12.0, 16)
    for before in (None, Snapshot(), Snapshot(Told(10.0, [Worker("other")])), now):
        assert worker_rates(before, now) == {}
    assert worker_rates(now, Snapshot()) == {}


def test_recorded() -> None:
    before, now = recorded("before", 0.0), recorded("after", 1.0)
    assert now.samples is not None
    counters = Counters(before.samples, now.samples)
    assert counters.grown("memserve_prompt_tokens_total") == 2373
    assert counters.grown("memserve_cached_prompt_tokens_total", "pulled") == 288
    rates = worker_rates(before, now)
    assert list(rates) == ["prefill-0", "prefill-1", "decode-0", "decode-1"]
    assert all(rate.steps > 0 for rate in rates.values())
    found = quantile(counters.grown_buckets("memserve_time_to_first_token_seconds"), 0.5)
    assert found is not None and 0.1 < found.value < 0.3
