"""The asyncio shell around the dispatcher: it carries events in and actions out, and decides nothing.

    server.py: generate()         ──► Submit, Abandon ─┐                      ┌─► Emit, Refuse ──► streams
    supervisor.py: on_worker_*()  ──► FromWorker, …   ─┤  Dispatcher.on_event ├
    once a second                 ──► Tick            ─┘                      └─► Send ──► supervisor.send

Everything runs on the router's one loop, so that events are taken one at a time and in order.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections import Counter, deque
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field

from memserve.config import Role, WorkerConfig
from memserve.errors import MemserveError, RequestError
from memserve.messages import Heartbeat, Load, Output, Ready, ToRouter, ToWorker
from memserve.router.dispatcher import Dispatcher
from memserve.router.engine_api import Delta, EngineStatus, GenerateRequest, InstanceState, InstanceStatus
from memserve.router.events import (
    Abandon,
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

logger = logging.getLogger(__name__)

TICK_S = 1.0


@dataclass(slots=True)
class _Stream:
    """What a client has not taken yet. Bounded by the request's max_tokens."""

    outputs: deque[Output] = field(default_factory=deque)
    error: MemserveError | None = None
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    num_cached_tokens: int | None = None

    def take(self) -> Delta:
        """Everything that waits, as one delta: a slow reader gets fewer, larger ones."""
        outputs = list(self.outputs)
        self.outputs.clear()
        self.changed.clear()
        if self.num_cached_tokens is None:
            self.num_cached_tokens = outputs[0].num_cached_tokens
        logprobs = [entry for output in outputs for entry in output.logprobs or ()]
        prompt_logprobs = next((o.prompt_logprobs for o in outputs if o.prompt_logprobs is not None), None)
        return Delta(
            token_ids=tuple(token for output in outputs for token in output.token_ids),
            logprobs=tuple(logprobs) if outputs[0].logprobs is not None else None,
            prompt_logprobs=prompt_logprobs,
            finish_reason=outputs[-1].finish_reason,
            num_cached_tokens=self.num_cached_tokens,
        )


class ServingEngine:
    """`Engine` for the server, `WorkerEvents` for the supervisor. See the module.

    Args:
        dispatcher: holds every request.
        plan: the instances there will be.
        clock: seconds, monotone.
        on_progress: told how the workers' start-up goes (instance, stage, fraction).
    """

    def __init__(
        self,
        dispatcher: Dispatcher,
        plan: Sequence[WorkerConfig],
        *,
        clock: Callable[[], float] = time.monotonic,
        on_progress: Callable[[str, str, float], None] | None = None,
    ) -> None:
        self._dispatcher = dispatcher
        self._roles = {config.instance: config.role for config in plan}
        self._clock = clock
        self._on_progress = on_progress
        self._send: Callable[[str, ToWorker], object] | None = None
        self._streams: dict[str, _Stream] = {}
        self._starts: Counter[str] = Counter()
        self._suffix = itertools.count(1)
        self._draining = False

    def connect(self, send: Callable[[str, ToWorker], object]) -> None:
        """Give the engine its way to the workers: `supervisor.send`."""
        self._send = send

    # --- Engine ---

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Delta, None]:
        """See `engine_api.Engine`."""
        if self._draining:
            raise RequestError("the server is shutting down", status=503, code="unavailable")
        request_id = request.request_id
        if request_id in self._streams:  # a client may repeat its x-request-id
            request_id = f"{request_id}~{next(self._suffix)}"
        stream = self._streams[request_id] = _Stream()
        ended = False
        try:
            self._feed(Submit(request_id, request.token_ids, request.sampling, request.cache_salt))
            while not ended:
                await stream.changed.wait()
                if stream.outputs:
                    delta = stream.take()
                    ended = delta.finish_reason is not None
                    yield delta
                if stream.error is not None:
                    ended = True
                    raise stream.error
        finally:
            del self._streams[request_id]
            if not ended:
                self._feed(Abandon(request_id))

    def ready(self) -> bool:
        """See `engine_api.Engine`. True when each role that was asked for has a live worker."""
        alive = {view.role for view in self._dispatcher.fleet}
        return not self._draining and bool(self._roles) and set(self._roles.values()) <= alive

    def status(self) -> EngineStatus:
        """See `engine_api.Engine`."""
        dispatcher, counters = self._dispatcher, self._dispatcher.counters
        return EngineStatus(
            instances=tuple(self._instance_status(name, role) for name, role in self._roles.items()),
            num_waiting=dispatcher.num_waiting,
            num_running=len(dispatcher.requests) - dispatcher.num_waiting,
            pulls_total=counters.pulls,
            pull_failures_total=counters.failed_pulls,
            pulled_bytes_total=counters.pulled_bytes,
            replays_total=counters.replayed,
            restarts_total=sum(max(0, starts - 1) for starts in self._starts.values()),
        )

    def _instance_status(self, instance: str, role: Role) -> InstanceStatus:
        view = self._dispatcher.fleet.views.get(instance)
        if view is not None:
            return InstanceStatus(instance, role, view.incarnation, InstanceState.READY, view.load)
        state = InstanceState.DOWN if self._starts[instance] else InstanceState.STARTING
        return InstanceStatus(instance, role, self._starts[instance], state, Load())

    # --- WorkerEvents ---

    def on_progress(self, instance: str, stage: str, fraction: float) -> None:
        """A worker's start-up got on."""
        if self._on_progress is not None:
            self._on_progress(instance, stage, fraction)

    def on_worker_up(self, config: WorkerConfig, incarnation: int, ready: Ready) -> None:
        """A worker takes requests."""
        self._starts[config.instance] += 1
        self._feed(
            WorkerUp(
                instance=config.instance,
                role=config.role,
                incarnation=incarnation,
                num_blocks=ready.num_blocks,
                block_size=ready.block_size,
                max_running=config.max_running,
            )
        )

    def on_worker_message(self, instance: str, incarnation: int, message: ToRouter) -> None:
        """A worker said something."""
        self._feed(FromWorker(instance, incarnation, message))
        if isinstance(message, Heartbeat) and message.in_step_s > 5:
            logger.warning("%s has been in one step for %.1f s", instance, message.in_step_s)

    def on_worker_down(self, instance: str, incarnation: int, reason: str) -> None:
        """A worker is dead and waited for."""
        logger.warning("%s (incarnation %d) is down: %s", instance, incarnation, reason)
        self._feed(WorkerDown(instance, incarnation, reason))

    # --- the run ---

    async def tick_forever(self) -> None:
        """Feed the dispatcher the time; cancelled at the end."""
        while True:
            await asyncio.sleep(TICK_S)
            self._feed(Tick())

    async def drain(self, timeout_s: float) -> int:
        """Stop being ready, wait until nothing runs or the time is up; returns how many requests still
        run.
        """
        self._draining = True
        deadline = self._clock() + timeout_s
        while self._dispatcher.requests and self._clock() < deadline:
            await asyncio.sleep(0.05)
        return len(self._dispatcher.requests)

    def _feed(self, event: Event) -> None:
        for action in self._dispatcher.on_event(event, self._clock()):
            match action:
                case Emit(request_id=request_id, output=output):
                    stream = self._streams.get(request_id)
                    if stream is not None:
                        stream.outputs.append(output)
                        stream.changed.set()
                case Send(instance=instance, message=message):
                    assert self._send is not None
                    self._send(instance, message)
                case Refuse(request_id=request_id, error=error):
                    stream = self._streams.get(request_id)
                    if stream is not None:
                        stream.error = error
                        stream.changed.set()
