"""A fleet under a virtual clock: the router's own dispatcher, with modelled workers and clients.

    Clients ──Submit──► Dispatcher ──Send──► ModelledWorker
       ▲                 │      ▲               │ Prefilled, Stored, Removed, Pulled, StepOutputs …
       └──────Emit───────┘      └───────────────┘ at the times of the cost model

The dispatcher, with its scheduler, trees, policies and cost models, is the one that serves (router/); so are
the workers' schedulers and hand-offs. What is modelled is what a step and a copy take (worker.py, links.py).
What it leaves out: host tiers, failures, the time that the router itself takes (but for `overhead_ms`).
"""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import msgspec

from memserve.bench.workload import Session
from memserve.config import PolicyName, Role, Transfer
from memserve.messages import BlockRefs, Decode, Prefill, Prefilled, SamplingParams, StepOutputs, ToRouter
from memserve.model_config import blocks_for
from memserve.router.counters import DispatcherCounters
from memserve.router.dispatcher import Dispatcher, DispatcherLimits
from memserve.router.events import Action, Emit, Event, FromWorker, Refuse, Send, Submit, Tick, WorkerUp
from memserve.router.scheduling.cost_model import CostModel
from memserve.router.scheduling.global_scheduler import GlobalScheduler
from memserve.simulate.clients import Clients, Question
from memserve.simulate.links import Copy, Wires
from memserve.simulate.pool import ModelledPool, Storage
from memserve.simulate.traces import Ids, Trace
from memserve.simulate.worker import ModelledWorker

_TICK_S = 1.0
_INCARNATION = 1


@dataclass(frozen=True, slots=True)
class Setup:
    """What is simulated.

    Args:
        cache_tokens: KV that each worker's pool holds.
        overhead_ms: what a request takes before the router has it and after it has the first token, together:
            HTTP, tokenisation. A constant, to be measured.
        is_ideal: the bound: one cache of any size for all workers, transfers that take no time.
    """

    model: CostModel
    num_prefill: int
    num_decode: int
    num_colocated: int = 0
    policy: PolicyName = "prompt-tree"
    cache_tokens: int = 500_000
    max_running: int = 256
    transfer: Transfer = "layer"
    pull_back: bool = True
    overhead_ms: float = 0.0
    is_ideal: bool = False
    seed: int = 0


class Outcome(msgspec.Struct, frozen=True):
    """One request: times in ms, and where its prompt's tokens came from."""

    number: int
    session: str
    arrived_at: float
    ttft_ms: float
    jct_ms: float
    predicted_ttft_ms: float
    num_tokens: int
    num_cached_tokens: int
    num_pulled_tokens: int
    num_new_tokens: int


@dataclass(slots=True)
class _Asked:
    """A request on its way."""

    question: Question
    arrived_at: float
    predicted_ttft_ms: float | None = None
    first_token_at: float | None = None
    num_cached_tokens: int = 0
    num_pulled_tokens: int = 0


class Simulation:
    """One run; `run` once. Afterwards `outcomes`, `counters` and `workers` tell of it."""

    def __init__(self, setup: Setup, trace: Trace) -> None:
        self.setup = setup
        self.outcomes: list[Outcome] = []
        self.now = 0.0
        self.ended_at = 0.0  # when the last request ended
        self.num_alone = 0
        self._trace = trace
        self._clients = Clients(trace)
        self._asked: dict[str, _Asked] = {}
        self._answers: dict[str, Ids] = {}
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._serial = itertools.count()
        self._events: deque[Event] = deque()
        limits = DispatcherLimits(
            max_waiting=1 << 60,
            transfer=setup.transfer,
            pull_back=setup.pull_back,
            request_timeout_s=float("inf"),
        )
        scheduler = GlobalScheduler(setup.policy, seed=setup.seed)
        self.dispatcher = Dispatcher(limits=limits, scheduler=scheduler)
        self.workers: dict[str, ModelledWorker] = {}
        self._add_workers()

    @property
    def counters(self) -> DispatcherCounters:
        """The dispatcher's own."""
        return self.dispatcher.counters

    def run(self) -> list[Outcome]:
        """All requests to their end, in the order in which they ended."""
        for due, session in self._clients.arrivals():
            self._at(due, partial(self._begin, session))
        self._at(_TICK_S, self._tick)
        while self._due:
            self.now, _, happen = heapq.heappop(self._due)
            happen()
            while self._events:
                for action in self.dispatcher.on_event(self._events.popleft(), self.now):
                    self._do(action)
        assert not self._asked, "requests were left"
        return self.outcomes

    # --- the fleet ---

    def _add_workers(self) -> None:
        setup, trace, model = self.setup, self._trace, self.setup.model
        block_bytes = model.kv_token_bytes * trace.block_size
        link = model.links.from_device
        wires = Wires(self._clock, link.latency_ms, block_bytes / link.bytes_per_ms, block_bytes)
        num_blocks = max(1, setup.cache_tokens // trace.block_size)
        shared = None
        if setup.is_ideal:
            wires.latency_ms = wires.block_ms = 0.0
            num_blocks = 2 * sum(blocks_for(sum(pair), trace.block_size) + 1 for pair in trace.lengths())
            shared = Storage(trace.block_size, num_blocks)
        roles = {
            Role.PREFILL: setup.num_prefill,
            Role.DECODE: setup.num_decode,
            Role.COLOCATED: setup.num_colocated,
        }
        for role, count in roles.items():
            for index in range(count):
                name = f"{role.value}-{index}"
                storage = shared or Storage(trace.block_size, num_blocks)
                self.workers[name] = self._make_worker(name, storage, wires)
                wires.sources[name] = self.workers[name]
                up = WorkerUp(
                    instance=name,
                    role=role,
                    incarnation=_INCARNATION,
                    num_blocks=num_blocks,
                    block_size=trace.block_size,
                    max_running=setup.max_running,
                    kv_token_bytes=model.kv_token_bytes,
                    caches=True,
                )
                self.dispatcher.on_event(up, 0.0)
        self.dispatcher.scheduler.use(dict.fromkeys(self.workers, model))

    def _make_worker(self, name: str, storage: Storage, wires: Wires) -> ModelledWorker:
        def fetch(refs: BlockRefs, layers_from: int | None) -> Copy:
            copy = wires.begin(name, refs, layers_from)
            self._at(copy.ends_at, self.workers[name].wake)
            return copy

        def wake() -> None:
            self._at(self._clock(), self.workers[name].wake)

        return ModelledWorker(
            name,
            self.setup.model,
            ModelledPool(name, storage, self._clock, fetch, wake),
            self.setup.max_running,
            self._answers,
            partial(self._hear, name),
            self._at,
            self._clock,
        )

    def _clock(self) -> float:
        return self.now

    def _hear(self, name: str, message: ToRouter) -> None:
        if self.setup.is_ideal:
            self._share(message)
        self._events.append(FromWorker(name, _INCARNATION, message))

    # --- events and actions ---

    def _at(self, time: float, happen: Callable[[], None]) -> None:
        heapq.heappush(self._due, (time, next(self._serial), happen))

    def _tick(self) -> None:
        self._events.append(Tick())
        if self._due:
            due = self.now + _TICK_S
            if not self._asked:  # nobody would notice the ticks before the next session
                due = max(due, self._due[0][0] // _TICK_S * _TICK_S)
            self._at(due, self._tick)

    def _begin(self, session: Session) -> None:
        self._ask(self._clients.begin(session))

    def _ask(self, question: Question) -> None:
        """The client sends it; the router has it a little later."""
        if self.now > self._trace.duration_s:
            return
        request_id = str(question.number)
        self._asked[request_id] = _Asked(question, self.now)
        self._answers[request_id] = question.answer
        sampling = SamplingParams(max_tokens=len(question.answer), seed=0)
        submit = Submit(request_id, question.prompt, sampling, session=question.session)
        self._at(self.now + self.setup.overhead_ms / 1e3, partial(self._events.append, submit))

    def _do(self, action: Action) -> None:
        match action:
            case Send():
                if isinstance(action.message, Prefill | Decode):
                    self._note_placement(action.message.request_id)
                self.workers[action.instance].receive(action.message)
            case Emit():
                asked = self._asked[action.request_id]
                output = action.output
                if asked.first_token_at is None:
                    asked.first_token_at = self.now
                    if output.cached is not None:
                        asked.num_cached_tokens = output.cached.total
                        asked.num_pulled_tokens = output.cached.pulled
                if output.finish_reason is not None:
                    self._end(action.request_id)
            case Refuse():
                raise action.error

    def _note_placement(self, request_id: str) -> None:
        asked = self._asked[request_id]
        if asked.predicted_ttft_ms is None:
            request = self.dispatcher.requests[request_id]
            assert request.decision is not None
            waited_ms = (self.now - asked.arrived_at) * 1e3
            asked.predicted_ttft_ms = waited_ms + request.decision.predicted_ttft_ms
            self.num_alone += self.setup.num_decode > 0 and request.decision.placement.prefill is None

    def _end(self, request_id: str) -> None:
        asked = self._asked.pop(request_id)
        self.ended_at = self.now
        del self._answers[request_id]
        question = asked.question
        assert asked.first_token_at is not None and asked.predicted_ttft_ms is not None
        self.outcomes.append(
            Outcome(
                number=question.number,
                session=question.session,
                arrived_at=asked.arrived_at,
                ttft_ms=(asked.first_token_at - asked.arrived_at) * 1e3,
                jct_ms=(self.now - asked.arrived_at) * 1e3,
                predicted_ttft_ms=asked.predicted_ttft_ms,
                num_tokens=len(question.prompt),
                num_cached_tokens=asked.num_cached_tokens,
                num_pulled_tokens=asked.num_pulled_tokens,
                num_new_tokens=len(question.answer),
            )
        )
        then = self._clients.answered(question)
        if then is not None:
            delay_s, what = then
            go_on = partial(self._ask, what) if isinstance(what, Question) else partial(self._begin, what)
            self._at(self.now + delay_s, go_on)

    # --- the bound ---

    def _share(self, message: ToRouter) -> None:
        """What one worker has cached all have: the router is to know."""
        if isinstance(message, Prefilled):
            self._held_by_all(message.request_id, 0)
        elif isinstance(message, StepOutputs):
            for output in message.outputs:
                if output.finish_reason is not None:
                    self._held_by_all(output.request_id, len(self._answers[output.request_id]) - 1)

    def _held_by_all(self, request_id: str, num_drawn: int) -> None:
        prompt = self._asked[request_id].question.prompt.tobytes()
        tokens = prompt + self._answers[request_id][:num_drawn].tobytes()
        for name in self.workers:
            self.dispatcher.scheduler.held(name, _INCARNATION, "", tokens, self.now)
