"""The life of a request, without I/O: `on_event(event, now) -> actions`.

One object holds every request between admission and its last token. The asyncio shell (engine.py) feeds it
events and carries out its actions; a simulator or a test does the same under its own clock.

    Submit ──► QUEUED ──► PREFILLING ──► HANDOFF ──► DECODING ──► (gone)
                 ▲  │        │ P computes   │ D pulls    │ D draws
                 │  └─ colocated, or no worker of the other role: straight to DECODING
                 └── a worker died: attempt + 1, prompt and tokens so far, at the head of the queue

Invariants
  * Every submitted request ends exactly once: with an `Emit` that has a finish reason, a `Refuse`, or the
    client's `Abandon`; after it nothing of that request is emitted.
  * An answer counts only if it comes from the instance, incarnation and attempt asked; others are dropped.
  * What workers were given, a seat or a command, is taken back on every transition that ends its use, offers
    exactly once (assignments.py).
"""

from __future__ import annotations

import logging
from array import array
from dataclasses import dataclass, field

import msgspec

from memserve.config import Transfer
from memserve.errors import EngineError, MemserveError, Overloaded, RequestError
from memserve.messages import (
    BlockRefs,
    Failed,
    Heartbeat,
    Output,
    Prefilled,
    Pulled,
    PulledBack,
    Removed,
    StepOutputs,
    Stored,
    pack_tokens,
)
from memserve.model_config import blocks_for
from memserve.router.assignments import Assignments
from memserve.router.counters import DispatcherCounters
from memserve.router.events import (
    Abandon,
    Action,
    Emit,
    Event,
    FromWorker,
    Refuse,
    Send,
    Submit,
    Tick,
    WorkerDown,
    WorkerUp,
)
from memserve.router.fleet import Fleet, Seat
from memserve.router.request_log import Happening, RequestLog
from memserve.router.request_state import DepartureRate, Origin, Phase, RequestState
from memserve.router.scheduling.fair_queue import FairQueue
from memserve.router.scheduling.global_scheduler import GlobalScheduler
from memserve.router.scheduling.kept_kv import SentPullBack, pull_back, what_is_left
from memserve.router.scheduling.policy import WorkerView

logger = logging.getLogger(__name__)

# In which of its phases a request may get tokens from its decode worker.
_DRAWS = (Phase.HANDOFF, Phase.DECODING)


@dataclass(frozen=True, slots=True)
class DispatcherLimits:
    """Bounds. A request is given up as a killer of workers when more than `max_deaths` died under it, or more
    than `max_deaths_in_vain` in a row without its getting on by a single token. `transfer`: whether a
    prompt's KV is pulled when it is computed, or chunk by chunk or layer by layer beside it. `pull_back`:
    what was generated goes back to the worker that had prefilled the prompt (PD-Caching-3).
    """

    max_waiting: int = 512
    max_deaths: int = 10
    max_deaths_in_vain: int = 3
    transfer: Transfer = "request"
    pull_back: bool = False
    request_timeout_s: float = 3600.0


@dataclass(slots=True)
class Dispatcher:
    """See the module. Not thread-safe; the router's loop owns it."""

    limits: DispatcherLimits = field(default_factory=DispatcherLimits)
    scheduler: GlobalScheduler = field(default_factory=GlobalScheduler)
    fleet: Fleet = field(default_factory=Fleet)
    requests: dict[str, RequestState] = field(default_factory=dict)
    counters: DispatcherCounters = field(default_factory=DispatcherCounters)
    log: RequestLog = field(default_factory=RequestLog)
    _pull_backs: dict[str, SentPullBack] = field(default_factory=dict)
    _queue: FairQueue = field(default_factory=FairQueue)
    _actions: list[Action] = field(default_factory=list)
    _departures: DepartureRate = field(default_factory=DepartureRate)
    _assignments: Assignments = field(init=False)

    def __post_init__(self) -> None:
        self._assignments = Assignments(self.limits.transfer, self.scheduler, self.fleet, self._actions)

    def on_event(self, event: Event, now: float) -> list[Action]:
        """Take one event; the caller owns the returned actions and carries them out in order."""
        match event:
            case FromWorker():
                self._on_message(event, now)
            case Submit():
                self._on_submit(event, now)
            case Abandon():
                self._on_abandon(event, now)
            case WorkerUp():
                self.fleet.add(event)
                self.scheduler.join(self.fleet.views[event.instance])
            case WorkerDown():
                self._on_worker_down(event, now)
            case Tick():
                self._on_tick(now)
        self._place_queued(now)
        actions = self._actions.copy()
        self._actions.clear()
        return actions

    @property
    def num_waiting(self) -> int:
        """Requests without a worker."""
        return len(self._queue)

    @property
    def is_settled(self) -> bool:
        """Whether all that was told has been entered where it is kept."""
        return self.scheduler.is_settled and self.log.is_settled

    def settle(self) -> None:
        """Do what nobody waits for: call it when the actions are carried out."""
        self.scheduler.settle()
        self.log.settle()

    # --- admission and placement ---

    def refusal(self, num_requests: int) -> Overloaded | None:
        """Why so many requests, submitted in a row, would not all be admitted; None if they would."""
        num_waiting = len(self._queue)
        if num_waiting + num_requests <= self.limits.max_waiting:
            return None
        return Overloaded(
            f"{num_waiting} requests are waiting already",
            retry_after_s=self._departures.retry_after_s(num_waiting),
        )

    def _on_submit(self, event: Submit, now: float) -> None:
        assert event.request_id not in self.requests
        self.counters.submitted += 1
        if (error := self.refusal(1)) is not None:
            self.counters.refused += 1
            self._actions.append(Refuse(event.request_id, error))
            return
        self.requests[event.request_id] = RequestState(
            request_id=event.request_id,
            tokens=array("i", pack_tokens(event.token_ids)),
            num_prompt_tokens=len(event.token_ids),
            sampling=event.sampling,
            cache_salt=event.cache_salt,
            submitted_at=now,
            session=event.session,
            policy=event.policy,
        )
        self._queue.push(event.request_id, event.session)
        self.log.submitted(event.request_id, len(event.token_ids), now)

    def _place_queued(self, now: float) -> None:
        """Give workers to waiting requests in order, until one must wait."""
        while len(self._queue) and len(self.fleet):
            request = self.requests[self._queue.peek()]
            decision = self.scheduler.place(request, now)
            if decision is not None:
                self._queue.pop()
                self.log.placed(request.request_id, decision, now)
                self._assignments.start(request, decision, now)
                continue
            num_tokens = len(request.tokens)
            if any(blocks_for(num_tokens + 1, view.block_size) <= view.num_blocks for view in self.fleet):
                return
            self._refuse(request, EngineError(f"no worker's pool holds {num_tokens + 1} tokens"), now)

    # --- what workers say ---

    def _on_message(self, event: FromWorker, now: float) -> None:
        view, message = self.fleet.view_of(event), event.message
        if view is None:
            self.counters.stale += 1
            return
        match message:
            case StepOutputs():
                view.load = message.load
                self.scheduler.stepped(event.instance, len(message.outputs), now)
                for output in message.outputs:
                    self._on_output(event, output, now)
            case Prefilled():
                view.load = message.load
                self._on_prefilled(event, message, now)
            case Stored():
                _check_own(event, message.refs)
                self._on_stored(event, message, now)
            case Pulled():
                self._on_pulled(event, message, now)
            case PulledBack():
                self._on_pulled_back(event, message, now)
            case Removed():
                _check_own(event, message.refs, message.moved_to)
                self.counters.on_removed(message)
                self.scheduler.removed(message.refs, message.moved_to)
            case Failed():
                self._on_failed(event, message, now)
            case Heartbeat():
                view.load = message.load
            case _:
                logger.warning("%s sent an unexpected %s", event.instance, type(message).__name__)

    def _on_stored(self, event: FromWorker, stored: Stored, now: float) -> None:
        """Let the decode worker pull a finished chunk while the next is computed; note where its own are."""
        request = self._asked(stored.request_id, stored.attempt)
        is_there = stored.layers_from is None  # else they are only about to be computed
        sits = request is not None and (_sits(request.prefill, event) or _sits(request.decode, event))
        if request is not None and sits and is_there:
            self.scheduler.stored(request, stored.first_block, stored.refs, now)
        if request is not None and request.phase is Phase.PREFILLING and _sits(request.prefill, event):
            self._assignments.pull_ahead(request, stored)
        elif request is not None and request.stored is not None and _sits(request.decode, event):
            request.stored.add(stored.first_block, stored.refs)
        else:
            self.counters.stale += 1

    def _on_prefilled(self, event: FromWorker, done: Prefilled, now: float) -> None:
        request = self._asked(done.request_id, done.attempt)
        if request is None or request.phase is not Phase.PREFILLING or not _sits(request.prefill, event):
            # given up: the Cancel that went out then also frees the offer that this message carries
            self.counters.stale += 1
            return
        assert request.prefill is not None
        self.fleet.settle_prompt(request.prefill)
        refs = None if done.offer is None else done.offer.refs
        self.scheduler.computed(request, request.prefill, done.cached, now)
        self.scheduler.prefilled(request, request.prefill, done.cached, refs, now)
        output = Output(
            request_id=done.request_id,
            attempt=done.attempt,
            token_ids=(done.token_id,),
            logprobs=None if done.logprobs is None else (done.logprobs,),
            prompt_logprobs=done.prompt_logprobs,
            finish_reason=done.finish_reason,
            cached=done.cached,
            computing_ms=done.computing_ms,
        )
        if self._deliver(request, output, now):
            return
        request.offer, request.offer_attempt = done.offer, request.attempt
        if done.offer is not None:
            num_blocks = len(done.offer.refs.blocks) - (
                done.offer.num_tokens % self.fleet.views[event.instance].block_size > 0
            )
            request.origin = Origin(event.instance, event.incarnation, num_blocks)
        self._assignments.decode(request)

    def _on_pulled(self, event: FromWorker, pulled: Pulled, now: float) -> None:
        request = self._asked(pulled.request_id, pulled.attempt)
        if request is None or not (_sits(request.prefill, event) or _sits(request.decode, event)):
            self.counters.stale += 1
            return
        is_handoff = request.phase is Phase.HANDOFF and _sits(request.decode, event)
        num_pulled = pulled.num_tokens - pulled.num_cached_tokens
        self.counters.on_pulled(pulled, is_handoff=is_handoff)
        if pulled.failure is not None:
            logger.warning(
                "%s: %s has %d tokens of KV and recomputes the rest: %s",
                request.request_id,
                event.instance,
                pulled.num_tokens,
                pulled.failure,
            )
        if is_handoff:
            request.phase = Phase.DECODING
            detail = f"{pulled.num_tokens} tokens of KV at {event.instance}, {num_pulled} of them pulled"
            self.log.note(request.request_id, now, Happening.HANDED_OFF, detail)
            self._assignments.release_offer(request)
        elif request.salvage is not None:
            request.salvage = None
            self.counters.salvaged_tokens += num_pulled
            logger.info("%s: %d tokens of KV outlived their worker", request.request_id, num_pulled)

    def _on_pulled_back(self, event: FromWorker, answer: PulledBack, now: float) -> None:
        sent = self._pull_backs.pop(answer.request_id, None)
        if sent is not None and answer.failure is None:
            command = sent.message
            place = (event.instance, event.incarnation)
            self.scheduler.held(*place, command.cache_salt, command.token_ids, now)
        self.counters.on_pulled_back(answer)

    def _on_output(self, event: FromWorker, output: Output, now: float) -> None:
        request = self._asked(output.request_id, output.attempt)
        if request is None or request.phase not in _DRAWS or not _sits(request.decode, event):
            self.counters.stale += 1
            return
        seat = request.decode
        assert seat is not None
        if seat.outstanding_tokens:
            if output.cached is not None:
                self.scheduler.computed(request, seat, output.cached, now)
            self.fleet.settle_prompt(seat)
        self._deliver(request, output, now)

    def _on_failed(self, event: FromWorker, failed: Failed, now: float) -> None:
        request = self._asked(failed.request_id, failed.attempt)
        if request is None or not (_sits(request.prefill, event) or _sits(request.decode, event)):
            self.counters.stale += 1
            return
        logger.error("%s: failed on %s: %s", request.request_id, event.instance, failed.message)
        self._refuse(request, EngineError(failed.message), now)

    def _asked(self, request_id: str, attempt: int) -> RequestState | None:
        request = self.requests.get(request_id)
        return request if request is not None and request.attempt == attempt else None

    def _deliver(self, request: RequestState, output: Output, now: float) -> bool:
        """Pass tokens on to the client; True if they were the last."""
        if len(request.tokens) == request.num_prompt_tokens:
            self.log.first_token(request.request_id, output.cached, now, output.computing_ms)
        request.tokens.extend(output.token_ids)
        request.num_deaths_in_vain = 0
        if output.prompt_logprobs is not None:  # a replay must not ask for them again
            request.sampling = msgspec.structs.replace(request.sampling, prompt_logprobs=None)
        self._actions.append(Emit(request.request_id, output))
        if output.finish_reason is None:
            return False
        self.counters.finished += 1
        self.log.note(request.request_id, now, Happening.FINISHED, output.finish_reason.value)
        self._departures.note(now)
        self._forget(request, now)
        return True

    # --- ends ---

    def _on_abandon(self, event: Abandon, now: float) -> None:
        request = self.requests.get(event.request_id)
        if request is None:
            return
        self.counters.abandoned += 1
        self.log.note(request.request_id, now, Happening.ABANDONED)
        self._assignments.cancel(request)
        if request.phase is not Phase.QUEUED:
            self._departures.note(now)
        self._forget(request, now)

    def _on_tick(self, now: float) -> None:
        self.scheduler.tick(now)
        limit_s = self.limits.request_timeout_s
        for request in [r for r in self.requests.values() if now - r.submitted_at > limit_s]:
            error = RequestError(f"not done after {limit_s:g} s", status=504, code="timeout")
            self._refuse(request, error, now)

    def _refuse(self, request: RequestState, error: MemserveError, now: float) -> None:
        self.counters.refused += 1
        self.log.note(request.request_id, now, Happening.REFUSED, str(error))
        self._assignments.cancel(request)
        self._actions.append(Refuse(request.request_id, error))
        self._forget(request, now)

    def _forget(self, request: RequestState, now: float) -> None:
        self._assignments.drop_reservation(request)
        self._pull_back(request)
        self._assignments.leave(request, now)
        if request.phase is Phase.QUEUED:
            self._queue.remove(request.request_id)
        del self.requests[request.request_id]

    def _pull_back(self, request: RequestState) -> None:
        """What was generated goes back to where the prompt is cached, for the conversation's next turn."""
        if self.limits.pull_back and (sent := pull_back(request, self.fleet)) is not None:
            self.counters.pull_backs += 1
            self._pull_backs[request.request_id] = sent
            self._actions.append(Send(sent.instance, sent.incarnation, sent.message))

    # --- a worker dies ---

    def _on_worker_down(self, event: WorkerDown, now: float) -> None:
        dead = self.fleet.remove(event)
        if dead is None:
            return
        self.scheduler.leave(dead, now)
        self._pull_backs = {
            request_id: sent
            for request_id, sent in self._pull_backs.items()
            if sent.instance != dead.instance
        }
        hit = [r for r in self.requests.values() if _sits(r.prefill, dead) or _sits(r.decode, dead)]
        # youngest first: each goes to the head of the queue, so that the oldest ends up first
        for request in sorted(hit, key=lambda r: r.submitted_at, reverse=True):
            self._survive(request, dead, now)

    def _survive(self, request: RequestState, dead: WorkerView, now: float) -> None:
        """Go on without a worker. What it computed and the router has not seen is computed again."""
        if _sits(request.prefill, dead) and request.phase is not Phase.PREFILLING:
            # its offer may still be readable; if not, the decode worker recomputes. Nobody is left to
            # release it
            request.prefill, request.offer = None, None
            if not _sits(request.decode, dead):
                return
        elif _sits(request.decode, dead) and request.phase is Phase.PREFILLING:
            # only reserved: another is chosen when the first token is there
            request.decode, request.is_reserved = None, False
            if not _sits(request.prefill, dead):
                return
        request.num_deaths += 1
        request.num_deaths_in_vain += 1
        in_vain = request.num_deaths_in_vain > self.limits.max_deaths_in_vain
        if in_vain or request.num_deaths > self.limits.max_deaths:
            error = EngineError(
                f"request {request.request_id}: {request.num_deaths} workers died while they ran it"
            )
            logger.error("%s: given up: %s", request.request_id, error)
            self._refuse(request, error, now)
            return
        if not _sits(request.decode, dead):
            self._assignments.drop_reservation(request)
        request.salvage = what_is_left(request, dead)
        self.counters.replayed += 1
        self.log.note(request.request_id, now, Happening.REPLAYED, f"{dead.instance} died")
        num_tokens = len(request.tokens)
        logger.warning(
            "%s: replayed from token %d of the answer, %d with the prompt",
            request.request_id,
            num_tokens - request.num_prompt_tokens,
            num_tokens,
        )
        request.attempt += 1
        self._assignments.stop_decoding(request)
        if request.phase is Phase.HANDOFF and request.offer is not None:
            request.decode = None  # the offer still stands: only the decode side is lost
            self._assignments.decode(request)
        else:
            self._assignments.leave(request, now)
            request.phase = Phase.QUEUED
            self._queue.push_front(request.request_id)


def _sits(seat: Seat | None, place: FromWorker | WorkerView) -> bool:
    return seat is not None and seat.is_at(place)


def _check_own(event: FromWorker, *told: BlockRefs | None) -> None:
    """Of its own blocks a worker tells, and of no other's. Raises EngineError, whereupon it is fenced."""
    for refs in told:
        if refs is not None and (refs.instance, refs.incarnation) != (event.instance, event.incarnation):
            raise EngineError(f"{event.instance} told of blocks of {refs.instance}")
