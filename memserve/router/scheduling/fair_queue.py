"""Requests that wait for workers, in an order that is fair across sessions.

    session a   a1 a2 a3 a4 …      served:  a1 b1 c1 a2 a3 …
    session b   b1                 whoever has waited least counts as if it had been served so far
    alone       c1

Start-time fair queueing with a cost of one a request: each gets the number at which it would be served if the
sessions took turns. Requests without a session are each a session of their own, so among themselves they are
served in order of arrival. What goes back (a replay) comes before everything that waits.
"""

from __future__ import annotations

import heapq
import itertools
from typing import NamedTuple


class _Place(NamedTuple):
    turn: float
    number: int
    request_id: str


class FairQueue:
    """See the module. Ids are unique among those that wait."""

    def __init__(self) -> None:
        self._heap: list[_Place] = []
        self._places: dict[str, tuple[_Place, str | None]] = {}
        self._now = 0.0  # the turn of the last that was served
        self._last_turn: dict[str, float] = {}
        self._num_waiting: dict[str, int] = {}
        self._numbers = itertools.count()
        self._returned = itertools.count(-1, -1)

    def __len__(self) -> int:
        return len(self._places)

    def push(self, request_id: str, session: str | None) -> None:
        """A request waits at its session's next turn."""
        turn = self._now + 1
        if session is not None:
            turn = max(self._now, self._last_turn.get(session, 0.0)) + 1
            self._last_turn[session] = turn
            self._num_waiting[session] = self._num_waiting.get(session, 0) + 1
        self._put(_Place(turn, next(self._numbers), request_id), session)

    def push_front(self, request_id: str) -> None:
        """A request that was served before waits again, before all others."""
        self._put(_Place(float("-inf"), next(self._returned), request_id), None)

    def peek(self) -> str:
        """Whose turn it is. There must be one."""
        while self._heap[0].request_id not in self._places or self._is_stale(self._heap[0]):
            heapq.heappop(self._heap)
        return self._heap[0].request_id

    def pop(self) -> str:
        """Serve whose turn it is. There must be one."""
        request_id = self.peek()
        self._now = max(self._now, self._places[request_id][0].turn)
        self.remove(request_id)
        return request_id

    def remove(self, request_id: str) -> None:
        """It does not wait any more."""
        _, session = self._places.pop(request_id)
        if session is not None:
            self._num_waiting[session] -= 1
            if not self._num_waiting[session]:
                del self._num_waiting[session], self._last_turn[session]
        if len(self._heap) > 2 * len(self._places) + 64:  # mostly those that were given up
            self._heap = [place for place, _ in self._places.values()]
            heapq.heapify(self._heap)

    def _put(self, place: _Place, session: str | None) -> None:
        assert place.request_id not in self._places
        self._places[place.request_id] = (place, session)
        heapq.heappush(self._heap, place)

    def _is_stale(self, place: _Place) -> bool:
        return self._places[place.request_id][0] is not place
