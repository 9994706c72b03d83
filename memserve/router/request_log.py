"""What was decided for the last requests and what then happened, for `GET /v1/requests/{id}` and the list of
requests; and what hindsight says of all of them.

Pure and bounded: the oldest request is forgotten for the newest. Times are seconds of the dispatcher's clock.
What happens is noted at once and written up before anybody reads it (notes.py).
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial
from typing import NamedTuple

from memserve.messages import CachedTokens
from memserve.router.notes import Notes
from memserve.router.scheduling.hindsight import Hindsight
from memserve.router.scheduling.policies.decision import Decision

MAX_REQUESTS = 500
# Of one request; a request that is replayed again and again keeps its first ones.
_MAX_HAPPENINGS = 64


class Happening(StrEnum):
    """What happens to a request, in the order of a life without accidents."""

    SUBMITTED = "submitted"
    PLACED = "placed"
    COMPUTING = "computing"
    FIRST_TOKEN = "first_token"
    HANDED_OFF = "handed_off"
    REPLAYED = "replayed"
    FINISHED = "finished"
    ABANDONED = "abandoned"
    REFUSED = "refused"


# After these nothing more happens to it.
_ENDS = frozenset((Happening.FINISHED, Happening.ABANDONED, Happening.REFUSED))


class Event(NamedTuple):
    """One of them. `detail`: of a worker, a failure, a finish reason; "" = none."""

    at: float
    what: Happening
    detail: str = ""


@dataclass(slots=True)
class RequestRecord:
    """One request: every decision in the order of its attempts, what was really cached of the prompt at the
    first, and what happened.
    """

    request_id: str
    num_prompt_tokens: int
    decisions: list[Decision] = field(default_factory=list)
    cached: CachedTokens | None = None
    events: list[Event] = field(default_factory=list)

    def at(self, what: Happening) -> float | None:
        """When something first happened."""
        for event in self.events:
            if event.what is what:
                return event.at
        return None

    @property
    def ttft_ms(self) -> float | None:
        """From the first placement to the first token: what a decision predicts."""
        placed, first = self.at(Happening.PLACED), self.at(Happening.FIRST_TOKEN)
        return None if placed is None or first is None else (first - placed) * 1e3

    @property
    def has_ended(self) -> bool:
        """Whether nothing more will happen to it."""
        return self.events[-1].what in _ENDS


class Recent(NamedTuple):
    """Requests as they are at `now`, the newest first."""

    now: float
    records: list[RequestRecord]


class RequestLog:
    """The last requests, by id. `hindsight` is of all, except those forgotten before their first token."""

    def __init__(self, max_requests: int = MAX_REQUESTS) -> None:
        self._max = max_requests
        self._records: OrderedDict[str, RequestRecord] = OrderedDict()
        self._hindsight = Hindsight()
        self._notes = Notes()

    @property
    def is_settled(self) -> bool:
        """Whether all that was noted is written up."""
        return not self._notes

    def settle(self) -> None:
        """Write up what was noted."""
        self._notes.settle()

    # --- what happens ---

    def submitted(self, request_id: str, num_prompt_tokens: int, now: float) -> None:
        """A request came in."""
        self._notes.add(partial(self._submitted, request_id, num_prompt_tokens, now))

    def placed(self, request_id: str, decision: Decision, now: float) -> None:
        """It was given workers."""
        self._notes.add(partial(self._placed, request_id, decision, now))

    def first_token(
        self, request_id: str, cached: CachedTokens | None, now: float, computing_ms: float | None = None
    ) -> None:
        """Its prompt was computed, in `computing_ms` from the beginning of the first step to the end of the
        last as the worker says, and until now as it is noted; only the first time counts.
        """
        self._notes.add(partial(self._first_token, request_id, cached, now, computing_ms))

    def note(self, request_id: str, now: float, what: Happening, detail: str = "") -> None:
        """Something else happened."""
        self._notes.add(partial(self._note, request_id, now, what, detail))

    # --- what is read ---

    @property
    def hindsight(self) -> Hindsight:
        """Of all, until now."""
        self.settle()
        return self._hindsight

    def get(self, request_id: str) -> RequestRecord | None:
        """What is known of a request; it changes while the request goes on."""
        self.settle()
        return self._records.get(request_id)

    def of_prefix(self, prefix: str) -> list[RequestRecord]:
        """Those whose ids begin so. Looks at all."""
        self.settle()
        return [record for request_id, record in self._records.items() if request_id.startswith(prefix)]

    def recent(self, limit: int, now: float) -> Recent:
        """The newest `limit` of those that go on, and as many of those that have ended. Looks at all."""
        self.settle()
        left = {True: limit, False: limit}  # by whether it has ended
        records = []
        for record in reversed(self._records.values()):
            ended = record.has_ended
            if left[ended]:
                left[ended] -= 1
                records.append(record)
        return Recent(now, records)

    # --- inside ---

    def _submitted(self, request_id: str, num_prompt_tokens: int, now: float) -> None:
        self._records[request_id] = RequestRecord(request_id, num_prompt_tokens)
        self._note(request_id, now, Happening.SUBMITTED)
        if len(self._records) > self._max:
            self._records.popitem(last=False)

    def _placed(self, request_id: str, decision: Decision, now: float) -> None:
        record = self._records.get(request_id)
        if record is not None and len(record.decisions) < _MAX_HAPPENINGS:
            record.decisions.append(decision)
            placement = decision.placement
            where = [name for name in (placement.prefill, placement.decode) if name is not None]
            self._note(request_id, now, Happening.PLACED, " → ".join(where))

    def _first_token(
        self, request_id: str, cached: CachedTokens | None, now: float, computing_ms: float | None
    ) -> None:
        record = self._records.get(request_id)
        if record is not None and record.at(Happening.FIRST_TOKEN) is None:
            record.cached = cached
            if computing_ms is not None:
                self._note(
                    request_id, max(record.events[-1].at, now - computing_ms / 1e3), Happening.COMPUTING
                )
            self._note(request_id, now, Happening.FIRST_TOKEN)
            self._look_back(record)

    def _note(self, request_id: str, now: float, what: Happening, detail: str = "") -> None:
        record = self._records.get(request_id)
        if record is not None and len(record.events) < _MAX_HAPPENINGS:
            record.events.append(Event(now, what, detail))

    def _look_back(self, record: RequestRecord) -> None:
        if not record.decisions:
            return
        if record.cached is not None:
            self._hindsight.cached(record.decisions[-1], record.num_prompt_tokens, record.cached)
        ttft_ms = record.ttft_ms
        if ttft_ms is not None and len(record.decisions) == 1:  # no decision foresees a worker's death
            self._hindsight.predicted(record.decisions[0].predicted_ttft_ms, ttft_ms)
