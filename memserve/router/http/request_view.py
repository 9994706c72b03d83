"""GET /v1/requests/{id}: why a request went where it went, as JSON; the headers that say it in short, and GET
/v1/requests: the last ones, a row each.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from memserve.messages import CachedTokens
from memserve.router.request_log import Happening, Recent, RequestRecord
from memserve.router.scheduling.policies.decision import Decision, DecodeRow, PrefillRow


class PrefillCandidate(msgspec.Struct, frozen=True):
    """A worker that could have computed the prompt. Predictions in ms, cached tokens by source."""

    instance: str
    chosen: bool
    total_ms: float
    queue_ms: float
    exec_ms: float
    pull_ms: float
    swap_in_ms: float
    device_tokens: int
    host_tokens: int
    pulled_tokens: int
    pulled_from: str | None


class DecodeCandidate(msgspec.Struct, frozen=True):
    """A worker that could have drawn the answer."""

    instance: str
    chosen: bool
    total_ms: float
    move_ms: float
    step_ms: float
    moved_tokens: int
    running: int
    free_blocks: int


class DecisionObject(msgspec.Struct, frozen=True):
    """One placement; `prefill` equal to `decode`: it does both, `decode` None: the first token ends it."""

    policy: str
    prefill: str | None
    decode: str | None
    predicted_ttft_ms: float
    prefill_candidates: list[PrefillCandidate]
    decode_candidates: list[DecodeCandidate]


class EventObject(msgspec.Struct, frozen=True):
    """`at_ms` since the request came."""

    at_ms: float
    event: str
    detail: str


class CachedObject(msgspec.Struct, frozen=True):
    device: int
    host: int
    pulled: int
    pulled_from: str | None


class SequenceObject(msgspec.Struct, frozen=True):
    """One choice of a request. `ttft_ms` from the placement, as predicted, to the first token."""

    id: str
    prompt_tokens: int
    cached_tokens: CachedObject | None
    ttft_ms: float | None
    decisions: list[DecisionObject]
    timeline: list[EventObject]


class RequestObject(msgspec.Struct, frozen=True):
    id: str
    choices: list[SequenceObject]
    object: str = "request"


class RequestRow(msgspec.Struct, frozen=True):
    """One sequence in short. `policy`, `prefill`, `decode` and the prediction are of its last placement, None
    before it; `id` is the engine's, as in the log. `age_ms` since it came, `duration_ms` until it ended.
    """

    id: str
    state: str
    prompt_tokens: int
    age_ms: float
    duration_ms: float | None
    attempts: int
    policy: str | None
    prefill: str | None
    decode: str | None
    expected_cached_tokens: int | None
    cached_tokens: CachedObject | None
    predicted_ttft_ms: float | None
    ttft_ms: float | None


class RequestList(msgspec.Struct, frozen=True):
    data: list[RequestRow]
    object: str = "list"


# What a request is in after each of its events.
_STATES = {
    Happening.SUBMITTED: "waiting",
    Happening.PLACED: "prefilling",
    Happening.COMPUTING: "prefilling",
    Happening.FIRST_TOKEN: "decoding",
    Happening.HANDED_OFF: "decoding",
    Happening.REPLAYED: "waiting",
    Happening.FINISHED: "finished",
    Happening.ABANDONED: "abandoned",
    Happening.REFUSED: "refused",
}


def request_list(recent: Recent) -> RequestList:
    """A row a sequence, in their order."""
    return RequestList([_row(record, recent.now) for record in recent.records])


def _row(record: RequestRecord, now: float) -> RequestRow:
    start, last = record.events[0].at, record.events[-1]
    decision = record.decisions[-1] if record.decisions else None
    placement = None if decision is None else decision.placement
    return RequestRow(
        id=record.request_id,
        state=_STATES[last.what],
        prompt_tokens=record.num_prompt_tokens,
        age_ms=round((now - start) * 1e3, 3),
        duration_ms=round((last.at - start) * 1e3, 3) if record.has_ended else None,
        attempts=len(record.decisions),
        policy=None if decision is None else decision.policy,
        prefill=None if placement is None else placement.prefill or placement.decode,
        decode=None if placement is None else placement.decode,
        expected_cached_tokens=None if decision is None else decision.prefill.num_cached_tokens,
        cached_tokens=_cached(record.cached),
        predicted_ttft_ms=None if decision is None else _rounded(decision.predicted_ttft_ms),
        ttft_ms=_rounded(record.ttft_ms),
    )


def request_object(name: str, records: Sequence[RequestRecord]) -> RequestObject:
    """The records of one HTTP request."""
    return RequestObject(name, [_sequence(record) for record in records])


def decision_headers(record: RequestRecord | None) -> dict[str, str]:
    """Of the last decision; none where nothing was decided yet, or nothing is known any more."""
    if record is None or not record.decisions:
        return {}
    decision = record.decisions[-1]
    placement = decision.placement
    return {
        "x-memserve-policy": decision.policy,
        "x-memserve-prefill": placement.prefill or placement.decode or "",
        "x-memserve-decode": placement.decode or "",
        "x-memserve-predicted-ttft-ms": f"{decision.predicted_ttft_ms:.1f}",
    }


def _sequence(record: RequestRecord) -> SequenceObject:
    start = record.events[0].at
    return SequenceObject(
        id=record.request_id,
        prompt_tokens=record.num_prompt_tokens,
        cached_tokens=_cached(record.cached),
        ttft_ms=_rounded(record.ttft_ms),
        decisions=[_decision(decision) for decision in record.decisions],
        timeline=[
            EventObject(round((event.at - start) * 1e3, 3), event.what.value, event.detail)
            for event in record.events
        ],
    )


def _decision(decision: Decision) -> DecisionObject:
    placement = decision.placement
    return DecisionObject(
        policy=decision.policy,
        prefill=placement.prefill or placement.decode,
        decode=placement.decode,
        predicted_ttft_ms=round(decision.predicted_ttft_ms, 3),
        prefill_candidates=[_prefill(row, row is decision.prefill) for row in decision.prefills],
        decode_candidates=[_decode(row, row is decision.decode) for row in decision.decodes],
    )


def _prefill(row: PrefillRow, chosen: bool) -> PrefillCandidate:
    return PrefillCandidate(
        instance=row.instance,
        chosen=chosen,
        total_ms=round(row.total_ms, 3),
        queue_ms=round(row.queue_ms, 3),
        exec_ms=round(row.exec_ms, 3),
        pull_ms=round(row.pull_ms, 3),
        swap_in_ms=round(row.swap_in_ms, 3),
        device_tokens=row.num_device_tokens,
        host_tokens=row.num_host_tokens,
        pulled_tokens=row.num_pulled_tokens,
        pulled_from=None if row.source is None else row.source.instance,
    )


def _decode(row: DecodeRow, chosen: bool) -> DecodeCandidate:
    return DecodeCandidate(
        instance=row.instance,
        chosen=chosen,
        total_ms=round(row.total_ms, 3),
        move_ms=round(row.move_ms, 3),
        step_ms=round(row.step_ms, 3),
        moved_tokens=row.num_moved_tokens,
        running=row.num_decoding,
        free_blocks=row.num_free_blocks,
    )


def _cached(cached: CachedTokens | None) -> CachedObject | None:
    if cached is None:
        return None
    return CachedObject(cached.device, cached.host, cached.pulled, cached.pulled_from or None)


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)
