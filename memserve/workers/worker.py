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

Here is when things are done, in which order. Which requests there are and how each leaves is the register's
(register.py), what is said of their tokens telling.py's, which peers there are peers.py's.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence

import msgspec

from memserve.config import WorkerConfig
from memserve.errors import EngineError
from memserve.messages import (
    Accept,
    CacheCommand,
    Cancel,
    Connect,
    Decode,
    Load,
    Measure,
    Prefill,
    PullAhead,
    PullBack,
    Refuse,
    Release,
    Reserve,
    Shutdown,
    ToWorker,
)
from memserve.pool.mempool import MemPool
from memserve.workers.budget import StepBudget, StepTally, pair_cost
from memserve.workers.cache_admin import CacheAdmin
from memserve.workers.channel import Channel, Doorbell, GrantSource, ReceivedGrant
from memserve.workers.executor import Executor, Flight
from memserve.workers.gauges import Gauges
from memserve.workers.handoff import OfferBook, Pulls
from memserve.workers.measurer import Measurer
from memserve.workers.patience import Patience
from memserve.workers.peers import PeerGrants
from memserve.workers.publisher import Publisher
from memserve.workers.pull_backs import PullBacks
from memserve.workers.register import Register
from memserve.workers.request import Request, RequestState
from memserve.workers.scheduler import Scheduler
from memserve.workers.steps import Chunk, Runner, StepPlan
from memserve.workers.telling import Telling

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
        self._peer_grants = PeerGrants(config.instance, grants, pool.peers)
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
        self._register = Register(config, pool, self._scheduler, self._pulls, self._offers, channel.send)
        self._telling = Telling(
            channel, self._register, self._publisher, config.max_model_len, self.gauges.load, clock
        )
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
                self._peer_grants.receive()
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
            self._peer_grants.receive()  # a peer that died keeps its memory until we let go of it
            self._publisher.flush()
        for message in self._channel.receive():
            self._handle(message)
        for control in self._pool.peers.take_control():
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
            self._register.fail(request, reason)
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
        if not self._overlaps and all(result.token_id is None for result in drawn):
            # A token that is here came out of the step on the same stream, after all that the step has
            # written. Without one the step may have yet to run, unless it was waited for.
            self._publisher.hold(self._pool.compute_mark())
        self._telling.tell(flight.chunks, drawn)
        self.gauges.end_step(next_began=following is not None)

    def _measure(self) -> None:
        """One repeat of what is to be measured, if it is undisturbed; then messages are read again."""
        self._peer_grants.receive()
        self.gauges.begin_step()
        answer = self._measurer.turn(self._is_idle)
        self.gauges.end_step()
        if answer is not None:
            self._channel.send(answer)

    @property
    def _is_idle(self) -> bool:
        return not (len(self._register) or self._pulls or self._pull_backs or len(self._offers))

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
        """Take a grant that was not read by the loop: see `PeerGrants.take`."""
        self._peer_grants.take(received)

    def close(self) -> None:
        """Drop every request and give its blocks back; nothing is told. The pool is to be closed after it.

        The blocks of a pull that was under way stay with it, as its copy may still write to them.
        """
        if self._flight is not None:
            self._executor.abandon(self._flight)
            self._flight = None
        self._register.drop_all()
        self._pull_backs.cancel_all()
        self._measurer.close()

    # --- messages ---

    def _handle(self, message: ToWorker) -> None:
        match message:
            case Prefill() | Decode():
                self._register.take(message)
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
                self._register.cancel(message.request_id, message.attempt)
            case Release():
                self._register.release(message.request_id, message.attempt)
            case Connect() | Accept() | Refuse():
                self._pool.peers.on_control(message)
            case Shutdown():
                self._stopping = True
            case _:
                raise EngineError(f"the router sent a second {type(message).__name__}")

    def _before_pulls(self) -> None:
        """The blocks of a pull may be those that the flight still writes to: unless the pool orders the one
        after the other, it lands first.
        """
        self._peer_grants.receive()
        if not self._pool.orders_pulls:
            self._land()
