"""When a worker counts as stuck, and when a dead one is started again. Pure: time is an argument."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Timing:
    """The supervisor's patience.

    A worker that is not ready yet may hold its interpreter for long (importing torch from a cold disk,
    say), so `startup_silence_s` replaces the ping deadline until it is. A worker that was up for `steady_s`
    is restarted as if it were its first death. `max_failed_restarts`: lives in a row that never became
    ready.
    """

    startup_silence_s: float = 300.0
    first_restart_s: float = 0.1
    max_restart_s: float = 5.0
    steady_s: float = 30.0
    max_failed_restarts: int = 3
    shutdown_s: float = 5.0
    terminate_s: float = 1.0


class PingWatch:
    """Tells a worker's silence from our own absence.

    When the router itself did not run (stopped, suspended, starved), frames lie unread and prove nothing; so
    silence counts only from when we were there to hear. Call `is_silent` about every `interval_s`.
    """

    def __init__(self, interval_s: float, now: float) -> None:
        self.interval_s = interval_s
        self._checked_at = now
        self._present_since = now

    def is_silent(self, heard_at: float | None, deadline_s: float, now: float) -> bool:
        """Whether nothing was heard for more than `deadline_s`, although we listened.

        `heard_at` None: nothing is to be expected yet.
        """
        if now - self._checked_at > 2 * self.interval_s:
            self._present_since = now
        self._checked_at = now
        return heard_at is not None and now - max(heard_at, self._present_since) > deadline_s


class Backoff:
    """Pauses between the lives of one instance: doubling, bounded, and then no more."""

    def __init__(self, timing: Timing) -> None:
        self._timing = timing
        self._pause_s = timing.first_restart_s
        self._num_failed = 0

    def next_pause(self, up_s: float | None) -> float | None:
        """The pause after a life that was up for `up_s` (None: never ready). None: give the instance up."""
        self._num_failed = self._num_failed + 1 if up_s is None else 0
        if self._num_failed >= self._timing.max_failed_restarts:
            return None
        if up_s is not None and up_s >= self._timing.steady_s:
            self._pause_s = self._timing.first_restart_s
        pause_s = self._pause_s
        self._pause_s = min(2 * pause_s, self._timing.max_restart_s)
        return pause_s
