"""A modelled worker: what a worker is but for the model and the memory, under a virtual clock.

    message ──► inbox ──► turn: messages → arrived pulls → schedule → a step, or a span of them ──► answers
                           ▲                                              │ ends when the cost model says
                           └──────────────────────────────────────────────┘

Scheduler, budget, hand-off, pull-backs and publisher are the real ones (workers/), the pool is modelled
(pool.py); here is only the loop, as in `workers.worker.Worker`, and what a step takes. It never sends to
anybody but the router.

Coarser than the real one:
  * Steps without a prompt are taken many at a time, up to the first that ends a request or meets a message.
    The blocks for such a span are taken when it begins.
  * The router hears of drawn tokens, and of the blocks that they fill, when a request ends (and of the first
    token when it is drawn), not step by step; so it does not correct its predictions of decode steps.
  * A step takes exactly what the cost model says; messages take no time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import numpy as np
from numpy.typing import NDArray

from memserve.messages import (
    NO_CACHED_TOKENS,
    Cancel,
    Decode,
    Failed,
    FinishReason,
    Load,
    Offer,
    Output,
    Prefill,
    Prefilled,
    PullAhead,
    PullBack,
    Release,
    Reserve,
    StepOutputs,
    ToRouter,
    ToWorker,
)
from memserve.model_config import blocks_for
from memserve.router.scheduling.cost_model import CostModel, StepShape, speed_of
from memserve.router.scheduling.predictor import Predictor
from memserve.simulate.pool import ModelledPool, Storage
from memserve.simulate.steps import Span, is_decode, step_ms
from memserve.workers.budget import StepBudget
from memserve.workers.handoff import OfferBook, Pulls
from memserve.workers.patience import Patience
from memserve.workers.publisher import Publisher
from memserve.workers.pull_backs import PullBacks
from memserve.workers.request import Request, RequestKind, RequestState
from memserve.workers.scheduler import Scheduler
from memserve.workers.steps import Chunk, StepPlan

Tokens = NDArray[np.int32]
_NO_LOAD = Load()
_NOTHING_MORE = StepOutputs((), _NO_LOAD)
# Far above any length: requests end by the tokens that they ask for.
_MAX_MODEL_LEN = 1 << 30
_WARM_UP_STEPS = 8


class ModelledWorker:
    """See the module.

    Args:
        name: of the instance.
        model: what its steps take.
        pool: its pool.
        answers: what each request draws, by id.
        send: takes what it says to the router.
        at: asks for a call at a time.
        clock: seconds.
    """

    def __init__(
        self,
        name: str,
        model: CostModel,
        pool: ModelledPool,
        max_running: int,
        answers: Mapping[str, Tokens],
        send: Callable[[ToRouter], None],
        at: Callable[[float, Callable[[], None]], None],
        clock: Callable[[], float],
    ) -> None:
        self.name = name
        self.pool = pool
        self.busy_ms = 0.0  # with steps that hold a prompt
        self._answers, self._send, self._at, self._clock = answers, send, at, clock
        self._model, self._predictor = model, Predictor(model)
        max_step_ms = model.budget.max_step_ms
        self._budget = StepBudget(model.budget.max_tokens, max_step_ms)
        if max_step_ms is not None:
            self._budget = StepBudget(model.budget.max_tokens, max_step_ms, speed_of(model).pair_rows or 5e-4)
            self._warm_up()
        self._patience = Patience(self._budget)
        self._scheduler = Scheduler(
            pool, pool.block_size, max_running, caches=True, patience=self._patience.seconds
        )
        # layers can be followed where computing is not only enqueued: on a CPU, whose steps have a time limit
        self._publisher = Publisher(pool, send, by_layer=max_step_ms is not None)
        self._pulls = Pulls(pool, pool.block_size)
        self._pull_backs = PullBacks(pool, name, clock)
        self._offers = OfferBook()
        self._requests: dict[str, Request] = {}
        self._told: dict[str, int] = {}  # tokens of each request that the router knows
        self._inbox: list[ToWorker] = []
        self._num_arrived = 0
        self._step: StepPlan | None = None
        self._span: Span | None = None
        self._num_steps = 0  # of the span, as planned
        self._ends_at = 0.0  # of the step or the span
        self._version = 0  # of what is to end then

    @property
    def storage(self) -> Storage:
        """Of its pool."""
        return self.pool.storage

    @property
    def is_idle(self) -> bool:
        """Whether it has nothing left of any request."""
        return not (self._requests or self._pulls or self._pull_backs or len(self._offers) or self._inbox)

    def step_end(self, step: int) -> float:
        """See `links.Source`."""
        return self._ends_at if self._step is not None and step == self.pool.progress.count else 0.0

    def receive(self, message: ToWorker) -> None:
        """A message came. It is read between two steps."""
        if not self._inbox:
            self._at(self._clock(), self.wake)
        self._inbox.append(message)

    def wake(self) -> None:
        """There is a message, or a copy has ended."""
        if self._step is not None:
            return  # it is looked at when the step ends
        if self._span is None:
            self._turn()
        elif self._cut_span(self._clock()):
            self._end_span()
            self._turn()

    def _ends(self, version: int) -> None:
        """A step or a span ends, if it was not cut since."""
        if version != self._version:
            return
        if self._step is not None:
            plan, self._step = self._step, None
            self._tell(plan)
        else:
            self._end_span()
        self._turn()

    def _end_at(self, time: float) -> None:
        self._version += 1
        self._ends_at = time
        self._at(time, partial(self._ends, self._version))

    # --- the loop ---

    def _turn(self) -> None:
        while True:
            inbox, self._inbox = self._inbox, []
            for message in inbox:
                self._handle(message)
            self._take_arrivals()
            for answer in self._pull_backs.poll():
                self._send(answer)
            tally = self._budget.open()
            plan = self._scheduler.schedule(tally, self._clock())
            self._publisher.tell_removed()
            for request, reason in plan.refused:
                self._finish(request)
                self._send(Failed(request.request_id, request.attempt, reason))
            for request in plan.pulls:
                self._pulls.begin(request)
            arrived = self._take_arrivals()
            for request in arrived:
                self._scheduler.join(request, plan, tally)
            if plan.chunks:
                break
            if not arrived and not (self._scheduler.is_stuck and self._pulls.make_room()):
                ends_at = self._scheduler.patience_ends
                if ends_at is not None and ends_at > self._clock():
                    self._at(ends_at, self.wake)
                return
        if all(is_decode(chunk) for chunk in plan.chunks):
            self._begin_span(plan.chunks)
            return
        self.pool.progress.count += 1
        self._step = plan
        took_ms = step_ms(self._model, plan.chunks)
        self._budget.observe(tally, took_ms)
        self.busy_ms += took_ms
        self._end_at(self._clock() + took_ms / 1e3)
        self._publisher.announce(plan.chunks)

    def _take_arrivals(self) -> list[Request]:
        arrived = []
        for request, num_tokens, pulled, num_timed_tokens in self._pulls.poll():
            self._patience.observe(num_timed_tokens, pulled.pull_ms)
            self._scheduler.pulled(request, num_tokens)
            self._publisher.publish(request)
            self._publisher.tell(request)
            self._send(pulled)
            arrived.append(request)
        return arrived

    def _warm_up(self) -> None:
        """A real worker has timed a few steps before it takes requests."""
        for _ in range(_WARM_UP_STEPS):
            tally = self._budget.open()
            num_tokens = tally.room(0)
            tally.add_chunk(num_tokens, 0)
            shape = StepShape(num_tokens, num_squares=num_tokens**2, has_chunk=True, num_logit_rows=1)
            self._budget.observe(tally, self._model.operators.step_ms(shape))

    # --- decode steps, many at a time ---

    def _begin_span(self, rows: list[Chunk]) -> None:
        requests = [row.request for row in rows]
        num_steps = min(self._num_left(request) for request in requests)
        lacking = self._lacking(requests, num_steps)
        while sum(lacking) > self.pool.num_available:
            num_steps = max(1, num_steps // 2)  # for one step the scheduler has seen to it
            lacking = self._lacking(requests, num_steps)
        block_ids = self.pool.alloc_mem(sum(lacking))
        assert block_ids is not None
        self._publisher.tell_removed()
        at = 0
        for request, count in zip(requests, lacking, strict=True):
            request.table.append(block_ids[at : at + count])
            at += count
        self._span = Span.of(rows, self._predictor, self._clock())
        self._num_steps = num_steps
        self._end_at(self._span.begins_at + self._span.lasts_s(num_steps))

    def _lacking(self, requests: list[Request], num_steps: int) -> list[int]:
        """Blocks that each needs to draw so many tokens: the last drawn has no KV yet."""
        size = self.pool.block_size
        return [
            max(0, blocks_for(request.num_tokens + num_steps - 1, size) - request.table.num_blocks)
            for request in requests
        ]

    def _num_left(self, request: Request) -> int:
        return request.sampling.max_tokens - len(request.output_ids)

    def _cut_span(self, now: float) -> bool:
        """End it with the step that goes on: something waits for the next one. True: there is none."""
        span = self._span
        assert span is not None
        num_steps = span.steps_until(now)
        if num_steps == 0:
            self._num_steps = 0
            self._version += 1
            return True
        if num_steps < self._num_steps:
            self._num_steps = num_steps
            self._end_at(span.begins_at + span.lasts_s(num_steps))
        return False

    def _end_span(self) -> None:
        span, self._span = self._span, None
        assert span is not None
        if not self._num_steps:
            return
        ending = []
        for request, _ in span.rows:
            if self._num_left(request) == self._num_steps:
                ending.append(request)
            request.num_computed_tokens += self._num_steps
            drawn = len(request.output_ids)
            assert drawn + self._num_steps <= request.sampling.max_tokens
            request.extend(self._answers[request.request_id][drawn : drawn + self._num_steps])
        for request in ending:
            self._tell_end(request)

    def _tell_end(self, request: Request) -> None:
        """All that was drawn since its first token. As the real one does: tokens before the blocks that they
        fill, and these before the last token.
        """
        told = self._told[request.request_id]
        drawn = tuple(request.tokens(told, request.num_tokens).tolist())
        self._publisher.publish(request)
        if len(drawn) > 1:
            self._send_output(request, drawn[:-1], None)
        self._publisher.tell(request)
        self._finish(request)
        self._send_output(request, drawn[-1:], FinishReason.LENGTH)

    # --- messages ---

    def _handle(self, message: ToWorker) -> None:
        match message:
            case Prefill() | Decode():
                self._num_arrived += 1
                request = Request.of(message, self._num_arrived)
                self._requests[request.request_id] = request
                self._told[request.request_id] = request.num_tokens
                self._pulls.claim(request)
                self._scheduler.add(request)
            case Reserve():
                self._pulls.reserve(message)
            case PullAhead():
                self._pulls.begin_ahead(message)
            case PullBack():
                answer = self._pull_backs.begin(message)
                if answer is not None:
                    self._send(answer)
            case Release() | Cancel():
                if isinstance(message, Cancel):
                    self._pulls.drop_ahead(message.request_id, message.attempt)
                table = self._offers.take(message.request_id, message.attempt)
                if table is not None:
                    self.pool.release(table)
            case _:
                raise AssertionError(f"no worker is sent a {type(message).__name__} here")

    def _tell(self, plan: StepPlan) -> None:
        """The end of a step with a prompt."""
        prefilled = []
        for chunk in plan.chunks:
            request, num_new = chunk
            goes_on = is_decode(chunk)
            request.num_computed_tokens += num_new
            if goes_on:
                self._draw(request)
                if not self._num_left(request):
                    self._tell_end(request)
                continue
            self._publisher.publish(request)
            is_done = request.num_computed_tokens == request.num_tokens
            if not is_done or request.kind is RequestKind.DECODE:
                self._publisher.tell(request)
            if not is_done:
                continue
            self._draw(request)
            if request.kind is RequestKind.PREFILL:
                prefilled.append(request)
            else:
                self._tell_first(request)
        for request in prefilled:
            self._tell_prefilled(request)

    def _draw(self, request: Request) -> None:
        request.append(int(self._answers[request.request_id][len(request.output_ids)]))

    def _tell_first(self, request: Request) -> None:
        """The first token of a request that was prefilled where it decodes."""
        reason = None if self._num_left(request) else FinishReason.LENGTH
        told = self._told[request.request_id]
        self._told[request.request_id] = request.num_tokens
        drawn = tuple(request.tokens(told, request.num_tokens).tolist())
        if reason is not None:
            self._finish(request)
        self._send_output(request, drawn, reason)

    def _tell_prefilled(self, request: Request) -> None:
        reason = None if self._num_left(request) else FinishReason.LENGTH
        offer = None
        if reason is None:
            table = request.table
            offer = Offer(self.pool.addresses(table.ids(table.num_blocks)), request.num_computed_tokens)
            self._scheduler.offer(request)
            self._offers.add(request, self._clock())
            del self._requests[request.request_id], self._told[request.request_id]
        else:
            self._finish(request)
        message = Prefilled(
            request_id=request.request_id,
            attempt=request.attempt,
            token_id=request.output_ids[-1],
            logprobs=None,
            prompt_logprobs=None,
            cached=request.take_cached() or NO_CACHED_TOKENS,
            finish_reason=reason,
            offer=offer,
            load=_NO_LOAD,
        )
        self._send(message)

    def _send_output(self, request: Request, drawn: tuple[int, ...], reason: FinishReason | None) -> None:
        cached = request.take_cached()
        output = Output(request.request_id, request.attempt, drawn, None, None, reason, cached)
        self._send(StepOutputs((output,), _NO_LOAD))
        self._send(_NOTHING_MORE)  # or the time until the next would be taken for that of one step

    def _finish(self, request: Request) -> None:
        del self._requests[request.request_id], self._told[request.request_id]
        self._pulls.unclaim(request)
        if request.state is not RequestState.FINISHED:
            self._scheduler.finish(request)
