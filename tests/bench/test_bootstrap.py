"""Ratios with intervals: their values by hand, their width by what varies, their coverage by repetition."""

from __future__ import annotations

import numpy as np
import pytest

from memserve.bench.bootstrap import Ratio, paired_ratio, sampled_ratio


def test_a_ratio_of_pooled_values() -> None:
    a = [{"s": [1.0, 2.0], "t": [3.0]}, {"s": [6.0]}]
    b = [{"s": [2.0, 4.0], "t": [6.0]}, {"s": [12.0]}]
    found = sampled_ratio(a, b, np.mean)
    assert found is not None and (found.a, found.b, found.ratio) == (3.0, 6.0, 2.0)
    # every session of B is twice that of A: whatever is drawn, the ratio is 2
    assert found.low == pytest.approx(2) and found.high == pytest.approx(2)
    assert sampled_ratio(a, b, np.mean) == found


def test_an_interval_is_as_wide_as_sessions_differ() -> None:
    rng = np.random.default_rng(0)

    def drawn(scale: float) -> Ratio:
        a = [{str(i): [10 + scale * rng.standard_normal()] for i in range(40)} for _ in range(3)]
        b = [{str(i): [10 + scale * rng.standard_normal()] for i in range(40)} for _ in range(3)]
        found = sampled_ratio(a, b, np.mean)
        assert found is not None and found.low is not None and found.high is not None
        assert found.low < found.ratio < found.high
        return found

    narrow, wide = drawn(0.1), drawn(2.0)
    assert (wide.high or 0) - (wide.low or 0) > 5 * ((narrow.high or 0) - (narrow.low or 0))


def test_requests_of_a_session_are_not_taken_for_many() -> None:
    """A hundred equal requests of a session say no more than one."""
    rng = np.random.default_rng(1)
    values = rng.uniform(5, 15, size=(2, 10))
    one = [[{str(i): [float(v)] for i, v in enumerate(row)}] for row in values]
    many = [[{str(i): [float(v)] * 100 for i, v in enumerate(row)}] for row in values]
    single, repeated = sampled_ratio(one[0], one[1], np.mean), sampled_ratio(many[0], many[1], np.mean)
    assert single is not None and repeated is not None
    assert (repeated.low, repeated.high) == pytest.approx((single.low, single.high))


def test_rounds_that_differ_widen_the_interval() -> None:
    a = [{str(i): [10.0] for i in range(20)} for _ in range(4)]
    b = [{str(i): [factor] for i in range(20)} for factor in (5.0, 10.0, 10.0, 15.0)]
    found = sampled_ratio(a, b, np.mean)
    assert found is not None and found.low is not None and found.high is not None
    assert found.ratio == 1 and found.low < 0.8 and found.high > 1.2


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    rng = np.random.default_rng(2)
    covered = 0
    for _ in range(60):
        a = [{str(i): [float(rng.exponential(1.0))] for i in range(60)}]
        b = [{str(i): [float(rng.exponential(1.5))] for i in range(60)}]
        found = sampled_ratio(a, b, np.mean)
        assert found is not None and found.low is not None and found.high is not None
        covered += found.low <= 1.5 <= found.high
    assert 50 <= covered <= 60  # 57 of 60 expected


def test_sessions_that_one_side_lacks_and_sides_without_values() -> None:
    found = sampled_ratio([{"s": [1.0], "t": []}], [{"s": [], "t": [3.0], "u": [5.0]}], np.mean)
    assert found is not None and found.ratio == 4.0
    assert sampled_ratio([{"s": []}], [{"s": [1.0]}], np.mean) is None
    assert sampled_ratio([{}], [{}], np.mean) is None


def test_figures_of_whole_runs() -> None:
    assert paired_ratio([2.0], [3.0]) == Ratio(2.0, 3.0, 1.5, None, None)
    found = paired_ratio([1.0, 2.0, 3.0], [2.0, 4.0, 6.0])
    assert (found.a, found.b, found.ratio, found.low, found.high) == (2, 4, 2, 2, 2)
    found = paired_ratio([1.0, 1.0, 1.0], [1.0, 2.0, 3.0])
    assert found.ratio == 2 and found.low is not None and 1 <= found.low < 2 < (found.high or 0) <= 3
