"""The asyncio shell around the dispatcher: it carries events in and actions out, and decides nothing.

    server: submit(), cancel()    ──► Submit, Abandon ─┐                      ┌─► Emit, Refuse ──► listeners
    supervisor.py: on_worker_*()  ──► FromWorker, …   ─┤  Dispatcher.on_event ├
    once a second                 ──► Tick            ─┘                      └─► Send ──► supervisor.send

Everything runs on the router's one loop, so that events are taken one at a time and in order. Requests are
taken from when every role has a worker (`ready`) until `drain`, or until the last instance is lost for good:
then all that wait are refused, and `all_lost` tells the owner that the run is over.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from memserve.config import WorkerConfig
from memserve.errors import MemserveError, Unavailable
from memserve.messages import (
    CacheCommand,
    CacheReport,
    CacheVerb,
    Heartbeat,
    LinkMessage,
    Load,
    Output,
    Ready,
    ToRouter,
    ToWorker,
)
from memserve.model_config import KVGeometry
from memserve.router.calibration.measurements import Measurements
from memserve.router.commands import Commands
from memserve.router.dispatcher import Dispatcher
from memserve.router.engine_api import (
    Delta,
    EngineStatus,
    GenerateRequest,
    InstanceState,
    InstanceStatus,
    Listener,
)
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
from memserve.router.request_log import Recent, RequestRecord
from memserve.router.supervision.link_relay import LinkRelay
from memserve.router.supervision.transports import peers_of

logger = logging.getLogger(__name__)

TICK_S = 1.0
# For a client that came while the server was starting or ending.
RETRY_AFTER_S = 2.0


class ServingEngine:
    """`Engine` for the server, `WorkerEvents` for the supervisor. See the module.

    Args:
        dispatcher: holds every request.
        plan: the instances there will be.
        clock: seconds, monotone.
        on_progress: told how the workers' start-up goes (instance, stage, fraction).

    `all_lost` is set when no instance is alive and none will come back. `measurements` are for workers that
    have no requests: set `is_calibrating` meanwhile, which keeps requests away. `fingerprint` is that of all
    workers' model and KV layout, "" before one is up.
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
        self._plan = tuple(plan)
        self._roles = {config.instance: config.role for config in plan}
        self._ways = {config.instance: tuple(peers_of(config, plan).items()) for config in plan}
        self._clock = clock
        self._on_progress = on_progress
        self._send: Callable[[str, ToWorker], object] | None = None
        self._listeners: dict[str, Listener] = {}  # of the sequences that have not ended
        self._alive: dict[str, int] = {}  # instance → incarnation
        self._last_incarnation: dict[str, int] = {}
        self._lost: set[str] = set()
        self._links = LinkRelay()
        self._num_restarts: Counter[str] = Counter()
        self._was_ready = False
        self._draining = False
        self._host_blocks: dict[str, int] = {}  # sizes of host tiers that were asked for since
        self._cache_commands: Commands[CacheCommand, CacheReport] = Commands(self._send_to)
        self.measurements = Measurements(self._send_to)
        self.is_calibrating = False
        self._is_settling = False
        self.fingerprint = ""
        self.all_lost = asyncio.Event()

    def connect(self, send: Callable[[str, ToWorker], object]) -> None:
        """Give the engine its way to the workers: `supervisor.send`."""
        self._send = send

    # --- Engine ---

    def submit(self, request: GenerateRequest, listener: Listener) -> None:
        """See `engine_api.Engine`."""
        if (reason := self._unavailable()) is not None:
            listener(Unavailable(reason, retry_after_s=RETRY_AFTER_S))
            return
        request_id = request.request_id
        assert request_id not in self._listeners, request_id
        self._listeners[request_id] = listener
        self._feed(
            Submit(
                request_id,
                request.token_ids,
                request.sampling,
                request.cache_salt,
                request.session,
                request.policy,
            )
        )

    def cancel(self, request_id: str) -> None:
        """See `engine_api.Engine`."""
        if self._listeners.pop(request_id, None) is not None:
            self._feed(Abandon(request_id))

    async def command_caches(self, commands: Mapping[str, CacheCommand]) -> Mapping[str, CacheReport | None]:
        """See `engine_api.Engine`."""
        for name, command in commands.items():
            if command.verb is CacheVerb.RESIZE:
                self._host_blocks[name] = command.num_host_blocks
        alive = {name: command for name, command in commands.items() if name in self._alive}
        return await self._cache_commands.ask(alive)

    def _unavailable(self) -> str | None:
        """Why no request can be taken, None if one can."""
        if self._draining:
            return "the server is shutting down"
        if self.all_lost.is_set():
            return "the server has lost its workers and is shutting down"
        return None if self._was_ready and not self.is_calibrating else "the server is starting"

    def check_room(self, num_sequences: int) -> None:
        """See `engine_api.Engine`."""
        if (reason := self._unavailable()) is not None:
            raise Unavailable(reason, retry_after_s=RETRY_AFTER_S)
        if (refusal := self._dispatcher.refusal(num_sequences)) is not None:
            self._dispatcher.counters.refused += num_sequences
            raise refusal

    def explain(self, request_id: str) -> RequestRecord | None:
        """See `engine_api.Engine`."""
        return self._dispatcher.log.get(request_id)

    def explain_all(self, prefix: str) -> Sequence[RequestRecord]:
        """See `engine_api.Engine`."""
        return self._dispatcher.log.of_prefix(prefix)

    def recent(self, limit: int) -> Recent:
        """See `engine_api.Engine`."""
        return self._dispatcher.log.recent(limit, self._clock())

    def ready(self) -> bool:
        """See `engine_api.Engine`. True when each role that was asked for has a live worker.

        Instances that are lost for good do not count: the others do their part.
        """
        return not self._draining and not self.is_calibrating and self._is_staffed()

    def _is_staffed(self) -> bool:
        wanted = {role for instance, role in self._roles.items() if instance not in self._lost}
        alive = {self._roles[instance] for instance in self._alive}
        return bool(wanted) and wanted <= alive

    def status(self) -> EngineStatus:
        """See `engine_api.Engine`."""
        dispatcher, counters = self._dispatcher, self._dispatcher.counters
        instances = map(self._instance_status, self._plan)
        return EngineStatus(
            instances=tuple(replace(status, pulls_from=self._ways[status.instance]) for status in instances),
            num_waiting=dispatcher.num_waiting,
            num_running=len(dispatcher.requests) - dispatcher.num_waiting,
            pulls_total=counters.pulls,
            pull_failures_total=counters.failed_pulls,
            pulled_bytes_total=counters.pulled_bytes,
            replays_total=counters.replayed,
            restarts_total=self._num_restarts.total(),
            pulled_tokens_total=counters.pulled_tokens,
            pull_ms_total=counters.pull_ms,
            refused_total=counters.refused,
            abandoned_total=counters.abandoned,
            stale_total=counters.stale,
            salvaged_tokens_total=counters.salvaged_tokens,
            pull_backs_total=counters.pull_backs,
            pull_backs_done_total=counters.pull_backs_done,
            pull_back_misses_total=counters.pull_back_misses,
            pulled_back_tokens_total=counters.pulled_back_tokens,
            pulled_back_bytes_total=counters.pulled_back_bytes,
            evicted_blocks_total=counters.evicted_blocks,
            swapped_out_blocks_total=counters.swapped_out_blocks,
            swapped_in_blocks_total=counters.swapped_in_blocks,
            prefill_pulls_total=counters.prefill_pulls,
            prefill_pull_failures_total=counters.failed_prefill_pulls,
            prefill_pulled_tokens_total=counters.prefill_pulled_tokens,
            prefill_pulled_bytes_total=counters.prefill_pulled_bytes,
            hindsight=dispatcher.log.hindsight.copy(),
        )

    def _instance_status(self, config: WorkerConfig) -> InstanceStatus:
        instance = config.instance
        view = self._dispatcher.fleet.views.get(instance)
        last = self._last_incarnation.get(instance)
        state = InstanceState.STARTING if last is None else InstanceState.DOWN
        return InstanceStatus(
            instance=instance,
            role=config.role,
            incarnation=last or 0,
            state=state if view is None else InstanceState.READY,
            load=Load() if view is None else view.load,
            num_blocks=0 if view is None else view.num_blocks,
            num_restarts=self._num_restarts[instance],
            block_bytes=KVGeometry.of(config.model, config.block_size, config.dtype).block_bytes,
            max_host_blocks=config.max_host_blocks,
        )

    # --- WorkerEvents ---

    def on_progress(self, instance: str, stage: str, fraction: float) -> None:
        """A worker's start-up got on."""
        if self._on_progress is not None:
            self._on_progress(instance, stage, fraction)

    def on_worker_up(self, config: WorkerConfig, incarnation: int, ready: Ready) -> None:
        """A worker takes requests."""
        instance = config.instance
        self._num_restarts[instance] += instance in self._last_incarnation
        self._alive[instance] = self._last_incarnation[instance] = incarnation
        self.fingerprint = ready.fingerprint
        self._was_ready = self._was_ready or self._is_staffed()
        self._feed(
            WorkerUp(
                instance=instance,
                role=config.role,
                incarnation=incarnation,
                num_blocks=ready.num_blocks,
                block_size=ready.block_size,
                max_running=config.max_running,
                kv_token_bytes=KVGeometry.of(config.model, config.block_size, config.dtype).token_bytes,
                caches=config.caches,
                max_host_blocks=config.max_host_blocks,
            )
        )

        if (num_blocks := self._host_blocks.get(instance)) is not None:  # as it was told in another life
            self._send_to(instance, CacheCommand(0, CacheVerb.RESIZE, num_host_blocks=num_blocks))

    def on_worker_message(self, instance: str, incarnation: int, message: ToRouter) -> None:
        """A worker said something: to the router, or to another worker by way of it."""
        if isinstance(message, CacheReport):
            if self._alive.get(instance) == incarnation:
                self._cache_commands.on_report(instance, message)
            return
        if self._alive.get(instance) == incarnation and self.measurements.take(instance, message):
            return
        event = FromWorker(instance, incarnation, message)
        if isinstance(message, LinkMessage):
            if (send := self._links.relay(event, message, self._alive)) is not None:
                self._carry_out([send])
            return
        self._feed(event)
        if isinstance(message, Heartbeat) and message.in_step_s > 5:
            logger.warning("%s has been in one step for %.1f s", instance, message.in_step_s)

    def on_worker_down(self, instance: str, incarnation: int, reason: str) -> None:
        """A worker is dead and waited for."""
        logger.warning("%s (incarnation %d) is down: %s", instance, incarnation, reason)
        self._alive.pop(instance, None)
        self._carry_out(self._links.on_worker_down(instance))
        self._cache_commands.on_down(instance)
        self.measurements.on_down(instance)
        self._feed(WorkerDown(instance, incarnation, reason))

    def on_instance_lost(self, instance: str) -> None:
        """An instance will not come back. With the last of them everything that waits is refused."""
        self._lost.add(instance)
        if self._lost != set(self._roles):
            return
        self.all_lost.set()
        error = Unavailable("the server has lost its workers", retry_after_s=RETRY_AFTER_S)
        for request_id in list(self._listeners):
            self._feed(Abandon(request_id))
            self._end(request_id, error)

    # --- the run ---

    def tick(self) -> None:
        """Feed the dispatcher the time: call it every `TICK_S`."""
        self._feed(Tick())

    async def drain(self, timeout_s: float) -> int:
        """Stop being ready; wait until nothing runs or time is up. Returns how many requests still run."""
        self._draining = True
        deadline = self._clock() + timeout_s
        while self._dispatcher.requests and self._clock() < deadline:
            await asyncio.sleep(0.05)
        if num_left := len(self._dispatcher.requests):
            logger.warning("%d requests were not done after %g s and are cut off", num_left, timeout_s)
        return num_left

    def _feed(self, event: Event) -> None:
        self._carry_out(self._dispatcher.on_event(event, self._clock()))
        if not self._is_settling and not self._dispatcher.is_settled:
            # Not before what was just sent, or is about to be written by who was told, is on its way: the
            # loop writes at the end of each round.
            self._is_settling = True
            loop = asyncio.get_running_loop()
            loop.call_soon(loop.call_soon, self._settle)

    def _settle(self) -> None:
        self._is_settling = False
        self._dispatcher.settle()

    def _carry_out(self, actions: Sequence[Action]) -> None:
        for action in actions:
            match action:
                case Emit(request_id=request_id, output=output):
                    self._tell(request_id, output)
                case Send(instance=instance, incarnation=incarnation, message=message):
                    if self._alive.get(instance) == incarnation:
                        self._send_to(instance, message)
                case Refuse(request_id=request_id, error=error):
                    self._end(request_id, error)

    def _send_to(self, instance: str, message: ToWorker) -> None:
        assert self._send is not None
        self._send(instance, message)

    def _tell(self, request_id: str, output: Output) -> None:
        ended = output.finish_reason is not None
        listener = self._listeners.pop(request_id, None) if ended else self._listeners.get(request_id)
        if listener is not None:
            listener(
                Delta(
                    output.token_ids,
                    output.logprobs,
                    output.prompt_logprobs,
                    output.finish_reason,
                    output.cached,
                )
            )

    def _end(self, request_id: str, error: MemserveError) -> None:
        listener = self._listeners.pop(request_id, None)
        if listener is not None:
            listener(error)
