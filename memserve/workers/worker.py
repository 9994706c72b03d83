"""The loop of a worker: drain messages → take arrived pulls → schedule → compute → tell.

Colocated or disaggregated is a matter of which messages come: `Prefill` ends in an offer, `Decode` runs
to the end, with an offer to pull from or without. Nothing here waits but the idle loop on its doorbell;
every step is bounded (`budget`), so a message is never far from being read.

A runner that overlaps steps (a GPU's) gets the next one while the one before, the *flight*, still runs, with
its draws as pending tokens (`request`). It lands, its tokens are told, after the next has begun:

    plan n+1 ──► begin n+1 ──► land n: tell its tokens ──► plan n+2 ...      n+1 computes meanwhile

That a token ends its request is then seen one step late, and the surplus token is dropped; an end by length
is known ahead. Blocks freed while a flight writes to them may go to the next step, which the device computes
after it, but not to a pull that the pool does not order so: then the flight lands first. It does so too
where requests may have to be preempted, or look at what they have drawn. Other runners' steps land at once.

A request is in one place at a time: the scheduler's queues, `Pulls`, or the `OfferBook`; `_requests`
finds those of the first two by id. A request leaves through `_finish`, `_drop` or the book, and its
blocks with it, so that with no request left the pool is idle.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Sequence

import msgspec

from memserve.config import WorkerConfig
from memserve.errors import EngineError, MemserveError
from memserve.messages import (
    NO_CACHED_TOKENS,
    Accept,
    ArenaGrant,
    CacheCommand,
    Cancel,
    Connect,
    Decode,
    DeviceGrant,
    Failed,
    FinishReason,
    Load,
    Measure,
    Offer,
    Output,
    PeerGrant,
    Prefill,
    Prefilled,
    PullAhead,
    PullBack,
    Pulled,
    Refuse,
    Release,
    Reserve,
    RevokeGrant,
    Shutdown,
    StepOutputs,
    ToWorker,
)
from memserve.pool.mempool import MemPool
from memserve.workers.budget import StepBudget, StepTally, pair_cost
from memserve.workers.cache_admin import CacheAdmin
from memserve.workers.channel import Channel, Doorbell, GrantSource, MessageTooLong, ReceivedGrant
from memserve.workers.executor import Executor, Flight
from memserve.workers.gauges import Gauges
from memserve.workers.handoff import OfferBook, Pulls
from memserve.workers.measurer import Measurer
from memserve.workers.patience import Patience
from memserve.workers.publisher import Publisher
from memserve.workers.pull_backs import PullBacks
from memserve.workers.request import Request, RequestKind, RequestState
from memserve.workers.scheduler import Scheduler
from memserve.workers.steps import Chunk, Drawn, Runner, StepPlan

logger = logging.getLogger(__name__)

# How often a step looks for pulls that have begun with it, and how long it does at least and at most.
ARRIVAL_LOOK_S = 0.00025
ARRIVAL_LEAST_S = 0.002
ARRIVAL_MOST_S = 0.01
# How often within a time to live it is looked what is over it.
EXPIRY_LOOKS = 4
# How often an idle loop looks whether what it has to tell is true by now: a GPU rings no doorbell.
HELD_LOOK_S = 2e-4
# A worker that has had nothing to do for so long says what its load is.
REST_S = 0.02


class Worker:
    """One instance's requests from arrival to end."""

    def __init__(
        self,
        config: WorkerConfig,
        channel: Channel,
        grants: GrantSource,
        pool: MemPool,
        runner: Runner,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config = config
        self._channel = channel
        self._grants = grants
        self._pool = pool
        self._executor = Executor(runner, pool, config.max_model_len)
        self._overlaps = runner.overlaps
        self._flight: Flight | None = None
        self._publisher = Publisher(
            pool, channel.send, by_layer=pool.tells_layers, swaps_mark=pool.swaps_mark
        )
        self._clock = clock
        self.budget = StepBudget(config.max_batch_tokens, config.max_step_ms, pair_cost(config.model))
        self._patience = Patience(self.budget)
        self._scheduler = Scheduler(
            pool,
            config.block_size,
            config.max_running,
            caches=config.caches,
            patience=self._patience.seconds,
        )
        self._pulls = Pulls(pool, config.block_size)
        self._pull_backs = PullBacks(pool, config.instance, clock)
        self._cache_admin = CacheAdmin(pool)
        self._measurer = Measurer(config, pool, runner)
        self._offers = OfferBook()
        self.gauges = Gauges(self._scheduler, self._offers, pool, clock)
        self._requests: dict[str, Request] = {}
        self._arrivals = 0
        self._step_s = 0.0  # of the last step
        self._stopping = False
        self._expires_at = 0.0
        self._told_load = Load()
        self._rests_since: float | None = None

    # --- the loop ---

    def run(self, doorbell: Doorbell) -> None:
        """Step until `Shutdown`. Raises ChannelClosed (no router) or EngineError (steps keep failing)."""
        while not self._stopping:
            if self.step():
                self._rests_since = None
            elif not self._stopping:
                self._receive_grants()
                self._rest(doorbell)

    def _rest(self, doorbell: Doorbell) -> None:
        """Sleep until there is something to do, or to look at. What came of the last steps is told once the
        loop has rested for a moment, not only with the next heartbeat: where blocks are free again, requests
        may be waiting for them.
        """
        now = self._clock()
        if self._rests_since is None:
            self._rests_since = now
        rest_s = self._rest_s
        rests = [] if rest_s is None else [rest_s]
        if not self._load_is_told:
            left_s = self._rests_since + REST_S - now
            if left_s > 0:
                rests.append(left_s)
            else:
                beat = self.gauges.heartbeat()
                self._told_load = beat.load
                self._channel.send(beat)
        if doorbell.wait(min(rests, default=None)):
            self._rests_since = None

    @property
    def _load_is_told(self) -> bool:
        """Whether the last report at rest still holds, but for the time that goes by."""
        told = self._told_load
        return msgspec.structs.replace(self.gauges.load(), oldest_offer_s=told.oldest_offer_s) == told

    @property
    def _rest_s(self) -> float | None:
        """How long the loop may sleep at most."""
        rests: list[float] = [HELD_LOOK_S] if self._publisher.is_holding else []
        if self._config.cache_ttl_s is not None:
            rests.append(self._config.cache_ttl_s / EXPIRY_LOOKS)
        for patience_ends in (self._scheduler.patience_ends, self._pull_backs.patience_ends):
            if patience_ends is not None:
                rests.append(max(0.0, patience_ends - self._clock()))
        return min(rests, default=None)

    def step(self) -> bool:
        """One turn of the loop. False = there is nothing to do until the doorbell rings."""
        if self._config.device != "cpu":
            self._receive_grants()  # a peer that died keeps its memory until we let go of it
            self._publisher.flush()
        for message in self._channel.receive():
            self._handle(message)
        for control in self._pool.take_control():
            self._channel.send(control)
        if self._pulls:
            self._take_arrivals()
        if self._pull_backs:
            for answer in self._pull_backs.poll():
                self._channel.send(answer)
        if self._stopping:
            return False
        self._pool.poll()
        if self._measurer:
            self._land()
            self._measure()
            return True
        self._expire()
        if self._flight is not None and (self._flight.looks_back or self._scheduler.may_preempt):
            self._land()
        tally = self.budget.open()
        plan = self._scheduler.schedule(tally, self._clock())
        self._publisher.tell_removed()  # before it is told what is in those blocks now
        for request, reason in plan.refused:
            self._fail(request, reason)
        if plan.pulls:
            self._before_pulls()
            for request in plan.pulls:
                self._pulls.begin(request)
            if plan.chunks:
                self._await_arrivals(plan, tally)
        chunks = [chunk for chunk in plan.chunks if chunk.request.state is RequestState.RUNNING]
        if chunks:
            self._run(chunks, tally)
            return True
        if self._flight is not None:
            self._land()
            return True
        if plan.pulls:
            return True  # one that could not begin has ended already, and rings no bell
        return self._scheduler.is_stuck and self._pulls.make_room()

    def _run(self, chunks: Sequence[Chunk], tally: StepTally) -> None:
        """Begin a step; then the one before it lands, or itself."""
        self._pool.progress.follow(self._publisher.announce(chunks))
        now = self._clock()
        for request, _ in chunks:
            if request.began_at is None:
                request.began_at = now
        self.gauges.begin_step()
        flight = self._executor.begin(chunks, tally)
        self.gauges.count_step(chunks)
        self._land(flight)
        self._executor.advance(flight)
        self._flight = flight
        if not self._overlaps or flight.step is None:
            self._land()

    def _land(self, following: Flight | None = None) -> None:
        """Wait for the step in flight, if there is one, and tell what it drew; `following` has begun."""
        flight, self._flight = self._flight, None
        if flight is None:
            return
        drawn = self._executor.finish(flight, following)
        step_ms, tally = self.gauges.step_ms, flight.tally
        self._step_s = step_ms / 1e3
        self.budget.observe(tally, step_ms)
        logger.debug(
            "step of %d tokens, %d of them prefill: %.1f ms",
            tally.num_tokens,
            tally.num_chunk_tokens,
            step_ms,
        )
        self._tell(flight.chunks, drawn)
        self.gauges.end_step(next_began=following is not None)

    def _measure(self) -> None:
        """One repeat of what is to be measured, if it is undisturbed; then messages are read again."""
        self._receive_grants()
        self.gauges.begin_step()
        answer = self._measurer.turn(self._is_idle)
        self.gauges.end_step()
        if answer is not None:
            self._channel.send(answer)

    @property
    def _is_idle(self) -> bool:
        return not (self._requests or self._pulls or self._pull_backs or len(self._offers))

    def _expire(self) -> None:
        """Forget what was not used for its time to live. Looked at now and then: it walks all ends."""
        ttl_s = self._config.cache_ttl_s
        if ttl_s is None:
            return
        now = self._clock()
        if now >= self._expires_at:
            self._expires_at = now + ttl_s / EXPIRY_LOOKS
            self._pool.expire(now - ttl_s)

    def _take_arrivals(self) -> list[Request]:
        """Pulls that ended: their requests run from now on."""
        arrived: list[Request] = []
        for request, num_tokens, pulled, num_timed_tokens in self._pulls.poll():
            self._patience.observe(num_timed_tokens, pulled.pull_ms)
            self._scheduler.pulled(request, num_tokens)
            self._publisher.publish(request)
            self._publisher.tell(request)
            self._channel.send(pulled)
            arrived.append(request)
        return arrived

    def _await_arrivals(self, plan: StepPlan, tally: StepTally) -> None:
        """Pulls that have just begun mostly end in some milliseconds, or were done ahead: wait so long for
        them rather than let them miss the step that is about to run. At most for as long as they should
        take, and the step before took: then who waits for them loses less than they would.
        """
        num_tokens = sum(request.offer.num_tokens for request in plan.pulls if request.offer is not None)
        expected_s = ARRIVAL_LEAST_S + self._patience.pull_s(num_tokens)
        wait_s = max(ARRIVAL_LEAST_S, min(expected_s, self._step_s, ARRIVAL_MOST_S))
        for _ in range(math.ceil(wait_s / ARRIVAL_LOOK_S)):
            for request in self._take_arrivals():
                self._scheduler.join(request, plan, tally)
            if not any(request.state is RequestState.PULLING for request in plan.pulls):
                return
            time.sleep(ARRIVAL_LOOK_S)

    def take_grant(self, received: ReceivedGrant) -> None:
        """Learn of a peer's arena or of its end; owns the descriptors. Not to be mapped = a miss later."""
        grant, fds = received
        match grant:
            case ArenaGrant() if grant.instance != self._config.instance and len(fds) == 2:
                try:
                    self._pool.add_peer(grant, *fds)
                except MemserveError as error:
                    logger.error("cannot map the arena of %s: %s", grant.instance, error)
            case PeerGrant() if not fds:
                try:
                    self._pool.add_sending_peer(grant)
                except MemserveError as error:
                    logger.error("cannot pull from %s: %s", grant.instance, error)
            case DeviceGrant() if grant.instance != self._config.instance and 0 < len(fds) <= 2:
                try:
                    self._pool.add_device_peer(grant, *fds)
                except MemserveError as error:
                    logger.error("cannot open the arena of %s: %s", grant.instance, error)
            case RevokeGrant():
                self._pool.remove_peer(grant.instance, grant.tier)
            case _:
                logger.error("an unexpected %s with %d descriptors", type(grant).__name__, len(fds))
                for fd in fds:
                    os.close(fd)

    def close(self) -> None:
        """Drop every request and give its blocks back; nothing is told. The pool is to be closed after it.

        The blocks of a pull that was under way stay with it, as its copy may still write to them.
        """
        if self._flight is not None:
            self._executor.abandon(self._flight)
            self._flight = None
        for request in tuple(self._requests.values()):
            self._drop(request)
        self._pulls.drop_all_ahead()
        self._pull_backs.cancel_all()
        self._measurer.close()
        for table in self._offers.take_all():
            self._pool.release(table)

    # --- messages ---

    def _handle(self, message: ToWorker) -> None:
        match message:
            case Prefill() | Decode():
                self._take(message)
            case Reserve():
                self._pulls.reserve(message)
            case PullAhead():
                self._before_pulls()
                self._pulls.begin_ahead(message)
            case PullBack():
                self._before_pulls()
                answer = self._pull_backs.begin(message)
                if answer is not None:
                    self._channel.send(answer)
            case CacheCommand():
                self._channel.send(self._cache_admin.obey(message))
            case Measure():
                self._measurer.add(message)
            case Cancel():
                self._cancel(message.request_id, message.attempt)
            case Release():
                self._release(message.request_id, message.attempt)
            case Connect() | Accept() | Refuse():
                self._pool.on_control(message)
            case Shutdown():
                self._stopping = True
            case _:
                raise EngineError(f"the router sent a second {type(message).__name__}")

    def _take(self, message: Prefill | Decode) -> None:
        """A new request, unless it is known already; a newer attempt replaces an older one."""
        known = self._requests.get(message.request_id)
        if known is not None:
            if known.attempt >= message.attempt:
                return
            self._drop(known)
        self._arrivals += 1
        request = Request.of(message, self._arrivals)
        if request.kind is RequestKind.PREFILL:
            if self._offers.attempt_of(request.request_id) == request.attempt:
                return
            self._release(request.request_id, request.attempt)
        fault = request.fault(self._config.max_model_len, self._config.model.vocab_size)
        if fault is not None:
            self._pulls.drop_ahead(request.request_id, request.attempt)
            self._channel.send(Failed(request.request_id, request.attempt, fault))
            return
        self._requests[request.request_id] = request
        offer = request.offer
        is_own = offer is not None and offer.refs.instance == self._config.instance
        if offer is not None and is_own and request.kind is RequestKind.DECODE:
            self._take_own_offer(request, offer)
        else:
            self._pulls.claim(request)
            self._scheduler.add(request)

    def _take_own_offer(self, request: Request, offer: Offer) -> None:
        """Decode where the prefill was: the offered blocks change hands, nothing moves.

        To wait for room and copy would never end in a pool whose blocks the offer itself holds.
        """
        request.offer = None
        table = self._offers.take(request.request_id, request.attempt)
        failure: str | None = None
        num_tokens = offer.num_tokens
        stands = table is not None and tuple(table.ids(table.num_blocks).tolist()) == offer.refs.blocks
        if stands and num_tokens == request.num_tokens - 1:
            assert table is not None
            self._scheduler.adopt(request, table)
        else:
            failure, num_tokens = "the offer does not stand any more", 0
            if table is not None:
                self._pool.release(table)
            self._scheduler.add(request)
        pulled = Pulled(request.request_id, request.attempt, num_tokens, num_tokens, 0, 0.0, failure)
        self._channel.send(pulled)

    def _cancel(self, request_id: str, attempt: int) -> None:
        request = self._requests.get(request_id)
        if request is not None and request.attempt <= attempt:
            self._drop(request)
        self._pulls.drop_ahead(request_id, attempt)
        self._release(request_id, attempt)

    def _release(self, request_id: str, attempt: int) -> None:
        table = self._offers.take(request_id, attempt)
        if table is not None:
            self._pool.release(table)

    def _receive_grants(self) -> None:
        """Peers that came or went. Read before every pull and when idle: only pulls need them."""
        for received in self._grants.receive():
            self.take_grant(received)

    def _before_pulls(self) -> None:
        """The blocks of a pull may be those that the flight still writes to: unless the pool orders the one
        after the other, it lands first.
        """
        self._receive_grants()
        if not self._pool.orders_pulls:
            self._land()

    # --- telling ---

    def _tell(self, chunks: Sequence[Chunk], drawn: Sequence[Drawn]) -> None:
        """Take the drawn tokens and tell the router: one message for all decodes, one for each prefill."""
        if not self._overlaps and all(result.token_id is None for result in drawn):
            # A token that is here came out of the step on the same stream, after all that the step has
            # written. Without one the step may have yet to run, unless it was waited for.
            self._publisher.hold(self._pool.compute_mark())
        outputs: list[Output] = []
        prefilled: list[tuple[Request, Drawn, FinishReason | None]] = []
        for (request, _), result in zip(chunks, drawn, strict=True):
            if request.state is not RequestState.RUNNING:
                continue  # it has ended meanwhile
            if result.prompt_logprobs:
                request.add_prompt_logprobs(result.prompt_logprobs)
            if result.error is not None:
                self._fail_and_forget(request, result.error)
                continue
            self._publisher.publish(request)
            token_id = result.token_id
            if token_id is None or request.kind is RequestKind.DECODE:
                self._publisher.tell(request)  # a prefill that is done tells of all its blocks in its offer
            if token_id is None:
                continue
            request.settle(token_id)
            reason = request.finish_reason(self._config.max_model_len)
            if request.kind is RequestKind.PREFILL:
                prefilled.append((request, result, reason))
                continue
            if reason is not None:
                self._finish(request)
            logprobs = None if result.logprobs is None else (result.logprobs,)
            prompt_logprobs = request.take_prompt_logprobs()
            outputs.append(
                Output(
                    request_id=request.request_id,
                    attempt=request.attempt,
                    token_ids=(token_id,),
                    logprobs=logprobs,
                    prompt_logprobs=prompt_logprobs,
                    finish_reason=reason,
                    cached=(cached := request.take_cached()),
                    computing_ms=None if cached is None else self._computing_ms(request),
                )
            )
        if outputs:
            self._send_outputs(outputs)
        for request, result, reason in prefilled:
            self._tell_prefilled(request, result, reason)

    def _send_outputs(self, outputs: Sequence[Output]) -> None:
        """One message, or as many as it takes: prompt logprobs can be long. Too long for one is a failure."""
        try:
            self._channel.send(StepOutputs(tuple(outputs), self.gauges.load()))
        except MessageTooLong as error:
            if len(outputs) > 1:
                for output in outputs:
                    self._send_outputs((output,))
                return
            (output,) = outputs
            request = self._requests.get(output.request_id)
            if request is not None:
                self._finish(request)
            self._tell_failed(output.request_id, output.attempt, f"its answer is too long: {error}")

    def _tell_prefilled(self, request: Request, drawn: Drawn, reason: FinishReason | None) -> None:
        assert drawn.token_id is not None
        offer = None
        if reason is None:
            table, num_tokens = request.table, request.num_computed_tokens
            offer = Offer(self._pool.addresses(table.ids(table.num_blocks)), num_tokens)
            self._scheduler.offer(request)
            self._offers.add(request, self._clock())
            del self._requests[request.request_id]
        else:
            self._finish(request)
        message = Prefilled(
            request_id=request.request_id,
            attempt=request.attempt,
            token_id=drawn.token_id,
            logprobs=drawn.logprobs,
            prompt_logprobs=request.take_prompt_logprobs(),
            cached=request.take_cached() or NO_CACHED_TOKENS,
            finish_reason=reason,
            offer=offer,
            load=self.gauges.load(),
            computing_ms=self._computing_ms(request),
        )
        try:
            self._channel.send(message)
        except MessageTooLong as error:
            self._release(request.request_id, request.attempt)
            self._tell_failed(request.request_id, request.attempt, f"its answer is too long: {error}")

    def _computing_ms(self, request: Request) -> float:
        assert request.began_at is not None
        return (self._clock() - request.began_at) * 1e3

    # --- ends ---

    def _finish(self, request: Request) -> None:
        del self._requests[request.request_id]
        self._pulls.unclaim(request)
        if request.state is not RequestState.FINISHED:  # the scheduler has let go of a refused one
            self._scheduler.finish(request)

    def _fail(self, request: Request, message: str) -> None:
        self._finish(request)
        self._tell_failed(request.request_id, request.attempt, message)

    def _fail_and_forget(self, request: Request, message: str) -> None:
        """It could not be computed, perhaps for what its first chunks have stored: nobody shall find that."""
        tokens = request.token_bytes(0, request.table.num_shared * self._config.block_size)
        self._fail(request, message)
        if tokens:
            self._pool.delete(tokens, request.cache_salt)

    def _tell_failed(self, request_id: str, attempt: int, message: str) -> None:
        logger.error("%s: %s", request_id, message)
        self._channel.send(Failed(request_id, attempt, message))

    def _drop(self, request: Request) -> None:
        """Forget a request in whatever phase it is."""
        if request.state is RequestState.PULLING:
            del self._requests[request.request_id]
            self._scheduler.abandon_pull(request)
            self._pulls.cancel(request)
        else:
            self._finish(request)
