"""The load generator: sends a workload's requests when they are due, and says how well it kept to that.

    open loop      sessions begin at their times of arrival (`arrivals.py`); a limit on concurrency, if there
                   is one, holds them back
    closed loop    only the limit: a session begins when another has ended
    in a session   strictly one turn after the other: answer, think time, next turn. The conversation is
                   continued by the logged answer (replayed: every server gets the same prompts) or by the one
                   that came (live)

A turn that failed does not end a replayed session, whose next prompt is known; a live one cannot go on. The
body of a request is made before it is due, so that a long prompt does not make it late.

`run_load` owns all tasks it starts; when it returns, none is left and every request that was begun has a
record. `State.stop` ends it early: what runs is cut off and recorded as such. The state may be read at any
time from the same thread, for a display.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Literal, Protocol

from memserve.bench.answer_stream import Answer
from memserve.bench.arrivals import Ramp, ThinkTime, at_rate, from_trace, on_ramp
from memserve.bench.punctuality import LagMeter
from memserve.bench.records import RequestRecord
from memserve.bench.request_format import RequestFormat
from memserve.bench.workload import Piece, Session, Workload
from memserve.errors import BenchError

Answers = Literal["replayed", "live"]
# How long before it is due a session's task is made, with the body of its first request.
_LEAD_S = 0.1


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """How a workload is sent.

    Args:
        rate: requests a second in the mean, over all turns: sessions begin at rate / mean number of turns.
            Infinite: all at once. None: the ramp, else the closed loop if there is a limit on concurrency,
            else the trace's times.
        ramp: requests a second at the start and at the end instead.
        burstiness: shape of the gamma-distributed gaps; 1 is Poisson.
        concurrency: most sessions at once.
        think: time between an answer and the next turn.
        answers: what a conversation is continued with.
        duration_s: nothing is sent later; what runs may end.
        seed: of arrivals and think times. Equal seeds, equal times, whatever the server does.
    """

    rate: float | None = None
    ramp: Ramp | None = None
    burstiness: float = 1.0
    concurrency: int | None = None
    think: ThinkTime = ThinkTime()
    answers: Answers = "replayed"
    duration_s: float | None = None
    seed: int = 0


class Sender(Protocol):
    """Where requests go: `Client.send`."""

    async def __call__(
        self, path: str, body: bytes, record: RequestRecord, clock: Callable[[], float], *, keep: bool
    ) -> Answer:
        """See `Client.send`."""
        ...


@dataclass(slots=True)
class State:
    """How far a run is; owned by `run_load`.

    Args:
        records: of every request that was due so far, in that order.
        num_requests: how many there will be, at most.
        num_skipped: turns that could not be sent, because the live answer before them is missing.
        interrupted: `stop` ended the run.
    """

    records: list[RequestRecord] = field(default_factory=list)
    running: dict[int, RequestRecord] = field(default_factory=dict)
    num_requests: int = 0
    num_finished: int = 0
    num_failed: int = 0
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    num_skipped: int = 0
    interrupted: bool = False
    elapsed_s: float = 0.0
    lag: LagMeter = field(default_factory=LagMeter)
    started: float | None = None
    _main: asyncio.Task[None] | None = None

    def now(self) -> float:
        """Seconds since the start; 0 before."""
        return 0.0 if self.started is None else time.perf_counter() - self.started

    @property
    def is_running(self) -> bool:
        """Whether requests are being sent."""
        return self._main is not None and not self._main.done()

    def stop(self) -> None:
        """End the run now; `run_load` returns soon after."""
        self.interrupted = True
        if self._main is not None:
            self._main.cancel()


async def run_load(
    workload: Workload, request_format: RequestFormat, options: LoadOptions, send: Sender, state: State
) -> None:
    """Send the workload; `state`, which is new, holds the outcome. Raises BenchError for options that do not
    fit the workload, before anything is sent.
    """
    if request_format.endpoint == "chat" and not workload.is_text:
        raise BenchError("a workload of token ids cannot be sent as chat: use --endpoint completions")
    sessions = workload.sessions
    if options.answers == "replayed" and not has_answers(sessions):
        raise BenchError("the workload has no logged answers to replay: use --answers live")
    dues = arrival_times(sessions, options)
    state.num_requests = workload.num_requests
    if state.interrupted:
        return
    run = _Run(request_format, options, send, state)
    state.started = time.perf_counter()
    main = run.closed(sessions) if dues is None else run.open(sessions, dues)
    state._main = asyncio.create_task(main)
    with state.lag.measuring():
        try:
            await asyncio.wait([state._main])
        finally:
            if not state._main.done():  # this task was cancelled itself
                state.stop()
                await asyncio.wait([state._main])
    state.elapsed_s = state.now()
    if not state._main.cancelled():
        state._main.result()


# --- what is sent when (pure) -------------------------------------------------------------------------------


def has_answers(sessions: Sequence[Session]) -> bool:
    """Whether every conversation can be replayed to its last turn."""
    return all(turn.output is not None for session in sessions for turn in session.turns[:-1])


def arrival_times(sessions: Sequence[Session], options: LoadOptions) -> list[float] | None:
    """When each session begins, in seconds; None in a closed loop. Raises BenchError."""
    rng = random.Random(options.seed)
    count = len(sessions)
    turns = sum(len(session.turns) for session in sessions) / count
    if options.ramp is not None:
        ramp = Ramp(options.ramp.start / turns, options.ramp.end / turns)
        return on_ramp(count, ramp, options.duration_s, options.burstiness, rng)
    if options.rate is not None:
        return at_rate(count, options.rate / turns, options.burstiness, rng)
    return None if options.concurrency is not None else from_trace(sessions)


# --- the run -----------------------------------------------------------------------------------------------


class _Run:
    """One run's tasks."""

    def __init__(
        self, request_format: RequestFormat, options: LoadOptions, send: Sender, state: State
    ) -> None:
        self._format = request_format
        self._options = options
        self._send = send
        self._state = state
        self._ids = iter(range(1 << 62))

    async def open(self, sessions: Sequence[Session], dues: Sequence[float]) -> None:
        """Every session in a task of its own, made shortly before it is due."""
        limit = self._options.concurrency
        slots = None if limit is None else asyncio.Semaphore(limit)
        async with asyncio.TaskGroup() as tasks:
            for due, session in sorted(zip(dues, sessions, strict=True), key=lambda pair: pair[0]):
                if self._is_over(due):
                    break
                await self._sleep_until(due - _LEAD_S)
                tasks.create_task(self._session(session, due, slots))

    async def closed(self, sessions: Sequence[Session]) -> None:
        """As many tasks as sessions may run at once; each takes the next session when it is done with one."""
        assert self._options.concurrency is not None
        left = iter(sessions)
        async with asyncio.TaskGroup() as tasks:
            for _ in range(min(self._options.concurrency, len(sessions))):
                tasks.create_task(self._one_after_another(left))

    async def _one_after_another(self, sessions: Iterator[Session]) -> None:
        for session in sessions:
            await self._session(session, self._state.now(), None)

    async def _session(self, session: Session, due: float, slots: asyncio.Semaphore | None) -> None:
        """All turns of a session; the first is due at `due`, or when there is a slot."""
        rng = random.Random(f"{self._options.seed} {session.id}")
        live = self._options.answers == "live"
        pieces: list[Piece] = [session.turns[0].input]
        body = self._format.body(pieces, session.turns[0].max_tokens)
        await self._sleep_until(due)
        slot: AbstractAsyncContextManager[None] = nullcontext() if slots is None else slots
        async with slot:
            held_s = 0.0 if slots is None else max(0.0, self._state.now() - due)
            if held_s < _HELD_S:
                held_s = 0.0
            due += held_s
            for index, turn in enumerate(session.turns):
                if index:
                    due = self._state.now() + self._options.think.draw(rng)
                    pieces.append(turn.input)
                    body = self._format.body(pieces, turn.max_tokens)
                    if not self._is_over(due):
                        await self._sleep_until(due)
                if self._is_over(due):
                    return
                record = RequestRecord(
                    session=session.id,
                    conversation=session.conversation,
                    turn=index,
                    max_tokens=turn.max_tokens,
                    scheduled_at=due,
                    held_s=0.0 if index else held_s,
                )
                answer = await self._request(record, body, live)
                if live and record.error is not None:
                    self._state.num_skipped += len(session.turns) - index - 1
                    return
                output = self._output(answer) if live else turn.output
                if output is not None:  # None after the last turn only
                    pieces.append(output)

    async def _request(self, record: RequestRecord, body: bytes, live: bool) -> Answer:
        state, number = self._state, next(self._ids)
        state.records.append(record)
        state.running[number] = record
        try:
            return await self._send(self._format.path, body, record, state.now, keep=live)
        finally:
            del state.running[number]
            state.num_finished += 1
            state.num_failed += record.error is not None
            state.num_prompt_tokens += record.prompt_tokens or 0
            state.num_output_tokens += record.output_tokens

    def _output(self, answer: Answer) -> Piece:
        return tuple(answer.token_ids) if self._format.token_ids else answer.text

    def _is_over(self, due: float) -> bool:
        limit = self._options.duration_s
        return limit is not None and due > limit

    async def _sleep_until(self, due: float) -> None:
        """Return at `due`, or at once."""
        delay = due - self._state.now()
        if delay > 0:
            await asyncio.sleep(delay)


# A slot that is free is taken within this; only longer waits were the limit's doing.
_HELD_S = 0.001
