"""Predicted work that is outstanding, and how it was shared out."""

from __future__ import annotations

import pytest

from memserve.router.scheduling.load import Backlog, RecentWork


def test_a_backlog_runs_down_and_is_corrected() -> None:
    backlog = Backlog()
    assert backlog.queue_ms(now=0.0) == 0.0
    backlog.add("a", 100.0, now=10.0)
    backlog.add("b", 50.0, now=10.01)
    assert backlog.queue_ms(now=10.03) == pytest.approx(120.0)
    # late: the first is due at any moment, the second still takes its time
    assert backlog.queue_ms(now=11.0) == pytest.approx(50.0)
    backlog.remove("a", now=11.0)
    assert backlog.queue_ms(now=11.02) == pytest.approx(30.0)
    backlog.remove("b", now=11.03)
    backlog.remove("b", now=11.03)
    assert backlog.queue_ms(now=11.03) == 0.0


def test_recent_work_forgets_and_a_newcomer_is_average() -> None:
    recent = RecentWork(half_life=4.0)
    recent.join("a")
    recent.join("b")
    recent.add("a", 100.0)
    for _ in range(8):
        recent.add("b", 10.0)
    shares = dict(recent.items())
    assert shares["a"] / (shares["b"] / 80.0 * 100.0) == pytest.approx(0.68, abs=0.02)
    recent.join("c")
    shares = dict(recent.items())
    assert shares["c"] == pytest.approx((shares["a"] + shares["b"]) / 2)
    for _ in range(20_000):
        recent.add("b", 1.0)
    recent.leave("b")
    assert all(0.0 <= share < 1e110 for _, share in recent.items())
