"""Patience with silent workers, and pauses between lives, under a clock of our own."""

from __future__ import annotations

from memserve.router.supervision.liveness import Backoff, PingWatch, Timing


def test_silence_is_noticed_after_the_deadline() -> None:
    watch = PingWatch(1.0, now=0.0)
    heard_at = 0.0
    # 1. As long as something is heard, all is well.
    for second in range(1, 20):
        heard_at = second - 0.5
        assert not watch.is_silent(heard_at, 5.0, float(second))
    # 2. Then nothing more comes.
    assert [watch.is_silent(heard_at, 5.0, float(second)) for second in range(20, 26)] == [False] * 4 + [
        True
    ] * 2


def test_our_own_absence_is_no_silence() -> None:
    watch = PingWatch(1.0, now=0.0)
    assert not watch.is_silent(0.0, 5.0, 1.0)
    # 1. The router was stopped for an hour: the worker's frames lie unread.
    assert not watch.is_silent(1.0, 5.0, 3600.0)
    # 2. The deadline counts from our return.
    for now in (3601.0, 3602.0, 3603.0, 3604.0, 3605.0):
        assert not watch.is_silent(1.0, 5.0, now)
    assert watch.is_silent(1.0, 5.0, 3605.5)


def test_worker_that_has_nothing_to_say_yet() -> None:
    watch = PingWatch(1.0, now=0.0)
    assert not any(watch.is_silent(None, 5.0, float(second)) for second in range(1, 100))


def test_pauses_grow_until_the_worker_holds() -> None:
    backoff = Backoff(Timing(first_restart_s=0.1, max_restart_s=0.5, steady_s=30.0))
    assert [backoff.next_pause(1.0) for _ in range(5)] == [0.1, 0.2, 0.4, 0.5, 0.5]
    assert backoff.next_pause(31.0) == 0.1


def test_given_up_after_failures_in_a_row() -> None:
    backoff = Backoff(Timing(max_failed_restarts=3))
    assert backoff.next_pause(None) is not None
    assert backoff.next_pause(None) is not None
    assert backoff.next_pause(5.0) is not None, "it was up once: the count starts again"
    assert backoff.next_pause(None) is not None
    assert backoff.next_pause(None) is not None
    assert backoff.next_pause(None) is None
