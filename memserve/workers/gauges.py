"""What a worker is doing, in numbers: counted by the loop, read by the loop and by the heartbeat's thread.

Every number is one attribute, written by the loop alone, so that a reader on another thread sees each of
them whole, if not all of the same instant.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from memserve.messages import Heartbeat, Load
from memserve.pool.retention import PoolStats
from memserve.workers.handoff import OfferBook
from memserve.workers.scheduler import Scheduler
from memserve.workers.steps import Chunk


class HasStats(Protocol):
    """What the gauges need of a `MemPool`."""

    def stats(self) -> PoolStats: ...


class Gauges:
    """Counters of the steps, beside the queues and the pool they report on."""

    def __init__(
        self, scheduler: Scheduler, offers: OfferBook, pool: HasStats, clock: Callable[[], float]
    ) -> None:
        self._scheduler = scheduler
        self._offers = offers
        self._pool = pool
        self._clock = clock
        self._step_began_at: float | None = None
        self._num_steps = 0
        self._num_prefill_tokens = 0
        self._num_decode_tokens = 0

    def begin_step(self) -> None:
        """A step is about to be computed, or to wait for the one before it."""
        if self._step_began_at is None:
            self._step_began_at = self._clock()

    def count_step(self, chunks: Sequence[Chunk]) -> None:
        """A step was begun, and its chunks do not count as computed yet."""
        self._num_steps += 1
        for request, num_new in chunks:
            # the last token of a prompt may be computed alone
            if num_new > 1 or request.num_computed_tokens < request.num_prompt_tokens:
                self._num_prefill_tokens += num_new
            else:
                self._num_decode_tokens += 1

    @property
    def step_ms(self) -> float:
        """How long the step has been computed that was begun first and has not ended."""
        assert self._step_began_at is not None
        return (self._clock() - self._step_began_at) * 1e3

    def end_step(self, *, next_began: bool = False) -> None:
        """The step is over; nothing is being computed, or the next one from now on."""
        self._step_began_at = self._clock() if next_began else None

    def heartbeat(self) -> Heartbeat:
        """The state now; from any thread."""
        began_at = self._step_began_at
        in_step_s = 0.0 if began_at is None else self._clock() - began_at
        return Heartbeat(num_steps=self._num_steps, in_step_s=in_step_s, load=self.load())

    def load(self) -> Load:
        """The load now; from any thread."""
        scheduler, oldest_at, stats = self._scheduler, self._offers.oldest_at, self._pool.stats()
        return Load(
            num_waiting=len(scheduler.waiting),
            num_running=len(scheduler.running),
            num_pulling=len(scheduler.pulling),
            num_offers=len(self._offers),
            oldest_offer_s=0.0 if oldest_at is None else self._clock() - oldest_at,
            num_free_blocks=stats.free,
            num_active_blocks=stats.active,
            num_historical_blocks=stats.historical,
            num_preemptions=scheduler.num_preemptions,
            num_steps=self._num_steps,
            num_prefill_tokens=self._num_prefill_tokens,
            num_decode_tokens=self._num_decode_tokens,
            num_host_blocks=stats.num_host,
            num_host_historical_blocks=stats.host_historical,
        )
