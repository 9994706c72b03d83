"""Predicted work that instances have not done yet, and how work was shared out lately. Times in seconds, work
in ms.

A prediction goes in when a request is dispatched, and out when its answer comes: what was predicted wrong is
wrong for one request only.
"""

from __future__ import annotations

from collections.abc import Iterable


class Backlog:
    """Predicted work of one worker, done one after another in the order that it was given."""

    def __init__(self) -> None:
        self._work: dict[str, float] = {}
        self._total_ms = 0.0
        self._head_since = 0.0

    def __contains__(self, request_id: str) -> bool:
        """Whether a request's work is not done yet."""
        return request_id in self._work

    def add(self, request_id: str, ms: float, now: float) -> None:
        """Work was dispatched. A request has one piece of work at a time."""
        assert request_id not in self._work
        if not self._work:
            self._head_since = now
        self._work[request_id] = ms
        self._total_ms += ms

    def remove(self, request_id: str, now: float) -> None:
        """It is done, or given up. Unknown ids are ignored: cancelled work may be removed twice."""
        ms = self._work.pop(request_id, None)
        if ms is None:
            return
        self._total_ms = self._total_ms - ms if self._work else 0.0
        self._head_since = now

    def worked_ms(self, request_id: str, now: float) -> float | None:
        """How long it has been worked on, if it is the one that is; None if others come before it."""
        if next(iter(self._work), None) != request_id:
            return None
        return (now - self._head_since) * 1e3

    def queue_ms(self, now: float) -> float:
        """Time until all of it is done. The first counts less as time passes, but never less than nothing."""
        if not self._work:
            return 0.0
        first_ms = next(iter(self._work.values()))
        return self._total_ms - min(first_ms, max(0.0, (now - self._head_since) * 1e3))


class RecentWork:
    """Work given to each of several instances, older pieces counting less: of any piece, half is forgotten
    after `half_life` more per instance. In a unit of its own, of which only ratios count.
    """

    def __init__(self, half_life: float = 16.0) -> None:
        self._half_life = half_life
        self._sums: dict[str, float] = {}
        self._unit = 1.0

    def join(self, instance: str) -> None:
        """A new instance begins as one of the average, not as the one that lacks everything."""
        self._sums[instance] = sum(self._sums.values()) / len(self._sums) if self._sums else 0.0

    def leave(self, instance: str) -> None:
        """An instance is gone."""
        del self._sums[instance]

    def add(self, instance: str, ms: float) -> None:
        """An instance was given a piece of work."""
        self._sums[instance] += ms * self._unit
        self._unit *= 2.0 ** (1.0 / (self._half_life * len(self._sums)))
        if self._unit > 1e100:
            self._sums = {name: total / self._unit for name, total in self._sums.items()}
            self._unit = 1.0

    def items(self) -> Iterable[tuple[str, float]]:
        """What each was given."""
        return self._sums.items()
