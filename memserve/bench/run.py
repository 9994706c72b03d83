"""One run, from the first check of the server to the report.

    check ─► warm-up ─► flush the cache ─► load ─► report

`Target` and `RunOptions` are everything that a run depends on beside its workload; both go into the report.
The warm-up sends the workload's first prompts backwards: as long, and with nothing in common with what is
measured, so that a server without a flush has no hits by it.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import msgspec

from memserve.bench.client import Client
from memserve.bench.load import Answers, LoadOptions, State, run_load
from memserve.bench.metrics import Summary, summarize
from memserve.bench.punctuality import Punctuality, punctuality
from memserve.bench.records import RequestRecord
from memserve.bench.request_format import Endpoint, RequestFormat
from memserve.bench.reuse import Reuse
from memserve.bench.server_check import check_server, model_name
from memserve.bench.workload import Piece, Session, Turn, Workload, expand
from memserve.errors import BenchError

_WARM_UP_CONCURRENCY = 8


class Target(msgspec.Struct, frozen=True, kw_only=True):
    """A server and how it is spoken to. The key is no part of it: it is never written anywhere.

    `model` None: its first. `extra`: fields for the body of every request.
    """

    url: str
    model: str | None = None
    endpoint: Endpoint = "completions"
    temperature: float = 0.0
    ignore_eos: bool = True
    extra: dict[str, object] = {}
    timeout_s: float = 600.0
    stall_s: float = 120.0


@dataclass(frozen=True, slots=True)
class RunOptions:
    """How a run goes. `limits_ms`: for the goodput (`metrics.py`)."""

    load: LoadOptions = LoadOptions()
    warmup: int = 0
    flush: bool = True
    limits_ms: dict[str, float] = field(default_factory=dict)


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """A run's outcome. `notes`: what a reader of the figures must know."""

    workload: str
    description: str
    target: Target
    options: RunOptions
    notes: list[str]
    interrupted: bool
    summary: Summary
    punctuality: Punctuality
    requests: list[RequestRecord]


async def run(
    target: Target,
    workload: Workload,
    options: RunOptions,
    state: State,
    *,
    api_key: str | None = None,
    reuse: Reuse | None = None,
) -> Report:
    """One run. `state` is new; `state.stop` ends the run early, with a report of what there is. `reuse`: of
    the workload, where its answers are replayed. Raises BenchError if nothing could be measured.
    """
    notes: list[str] = []
    client = Client(target.url, api_key=api_key, timeout_s=target.timeout_s, stall_s=target.stall_s)
    async with client:
        wanted = RequestFormat(
            model=target.model or await model_name(client),
            endpoint=target.endpoint,
            temperature=target.temperature,
            ignore_eos=target.ignore_eos,
            extra=target.extra,
        )
        if target.endpoint == "chat" and not workload.is_text:
            raise BenchError("a workload of token ids cannot be sent as chat: use --endpoint completions")
        checked = await check_server(client, wanted, workload, live=options.load.answers == "live")
        notes += checked.notes
        if options.warmup:
            warming, warmed = warm_up(workload, options.warmup), State()
            load = LoadOptions(concurrency=min(options.warmup, _WARM_UP_CONCURRENCY))
            await run_load(warming, checked.format, load, client.send, warmed)
            if warmed.num_failed:
                notes.append(f"{warmed.num_failed} of {warmed.num_finished} warm-up requests failed")
        if options.flush and not await client.flush_cache():
            notes.append("the server's cache could not be flushed: it may have KV of earlier runs")
        with _quiet_collector():
            await run_load(workload, checked.format, options.load, client.send, state)
    ratio = None if reuse is None else available_ratio(reuse, state.records, options.load.answers)
    summary = summarize(
        state.records,
        limits_ms=options.limits_ms,
        available_ratio=ratio,
        num_skipped=state.num_skipped,
    )
    return Report(
        workload=workload.name,
        description=workload.description,
        target=msgspec.structs.replace(target, url=client.url, model=wanted.model),
        options=options,
        notes=notes,
        interrupted=state.interrupted,
        summary=summary,
        punctuality=punctuality(state.records, state.lag),
        requests=state.records,
    )


def available_ratio(reuse: Reuse, records: Sequence[RequestRecord], answers: Answers) -> float | None:
    """Share of the completed requests' prompt tokens that a cache without bounds would have had; None without
    any. Of a replayed conversation it has prompts alone to find: the server's own answers are in nobody's
    next prompt. Of a live one it has the answers too, which are as long as the logged ones.
    """
    done = {(record.session, record.turn) for record in records if record.completed}
    requests = [request for request in reuse.requests if (request.session, request.turn) in done]
    total = sum(request.num_prompt_tokens for request in requests)
    live = answers == "live"
    cached = sum(request.cached_with_answers if live else request.cached for request in requests)
    return cached / total if total else None


def warm_up(workload: Workload, count: int) -> Workload:
    """`count` requests like the workload's first ones, with nothing in common with them."""
    firsts = itertools.islice((turn for session in workload.sessions for turn in session.turns), count)
    sessions = [
        Session(f"warm-up {index}", (Turn(_backwards(turn.input), None, turn.max_tokens),))
        for index, turn in enumerate(firsts)
    ]
    return Workload("warm-up", tuple(sessions), workload.is_text)


def _backwards(piece: Piece) -> Piece:
    content = expand(piece)
    return " ".join(reversed(content.split(" "))) if isinstance(content, str) else tuple(reversed(content))


@contextlib.contextmanager
def _quiet_collector() -> Iterator[None]:
    """A workload is millions of objects that stay: a collection that walks them all would stop the clock."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
