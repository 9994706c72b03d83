"""Decode → prefill: a prefill worker pulls back what was generated from its prompts, so that the next turn of
a conversation finds it (MemServe §Context caching, PD-Caching-3).

Low priority: nobody waits for it, it takes only blocks that are plentiful, and a source that has evicted or
rewritten its blocks meanwhile is no failure, only a miss. The prefix before it must still be cached here.
One that finds its blocks on their way by another pull waits for that one, but not for ever: it would keep
others out.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import NamedTuple, Protocol

from memserve.messages import PullBack, PulledBack, Transfer
from memserve.pool.incoming import Incoming, Received

logger = logging.getLogger(__name__)

# This share of the pool stays untouched: running requests come first.
_SPARE = 1 / 16
# At most so many at once.
_MAX_RUNNING = 64
_MAX_WAIT_S = 5.0


class Pool(Protocol):
    """What is needed of a `MemPool`."""

    @property
    def num_blocks(self) -> int: ...
    @property
    def block_size(self) -> int: ...
    def receive(self, offered: Transfer, /, *, spare: int) -> Incoming: ...


class _Running(NamedTuple):
    message: PullBack
    incoming: Incoming
    waits_until: float


class PullBacks:
    """Those under way at one instance. `clock`: seconds."""

    def __init__(self, pool: Pool, instance: str, clock: Callable[[], float]) -> None:
        self._pool = pool
        self._instance = instance
        self._clock = clock
        self._running: list[_Running] = []

    def __bool__(self) -> bool:
        """Whether `poll` has anything to look at."""
        return bool(self._running)

    @property
    def patience_ends(self) -> float | None:
        """When `poll` must be called though nothing has ended; None if it need not."""
        waiting = [running.waits_until for running in self._running if running.incoming.is_waiting]
        return min(waiting, default=None)

    def begin(self, message: PullBack) -> PulledBack | None:
        """Start a pull; the answer if there is nothing to be pulled, or no room."""
        if len(self._running) >= _MAX_RUNNING:
            return PulledBack(message.request_id, 0, 0, f"{_MAX_RUNNING} are under way already")
        offered = Transfer(
            self._instance, message.refs, message.token_ids, message.cache_salt, message.first_block
        )
        incoming = self._pool.receive(offered, spare=int(self._pool.num_blocks * _SPARE))
        received = incoming.poll()
        if received is not None:
            return self._answer(message, received)
        self._running.append(_Running(message, incoming, self._clock() + _MAX_WAIT_S))
        return None

    def poll(self) -> list[PulledBack]:
        """The answers of those that ended since the last call. What is verified is cached by then."""
        answers: list[PulledBack] = []
        going_on: list[_Running] = []
        now = self._clock()
        for running in self._running:
            received = running.incoming.poll()
            if received is None and running.incoming.is_waiting and now >= running.waits_until:
                running.incoming.cancel()
                failure = f"another pull has not brought it in {_MAX_WAIT_S:g} s"
                answers.append(PulledBack(running.message.request_id, 0, 0, failure))
            elif received is None:
                going_on.append(running)
            else:
                answers.append(self._answer(running.message, received))
        self._running = going_on
        return answers

    def cancel_all(self) -> None:
        """Stop them; each is still polled until its copy has ended."""
        for running in self._running:
            running.incoming.cancel()

    def _answer(self, message: PullBack, received: Received) -> PulledBack:
        num_tokens = received.num_blocks * self._pool.block_size
        logger.debug("%s: %d tokens came back, %s", message.request_id, num_tokens, received.failure)
        return PulledBack(message.request_id, num_tokens, received.num_bytes, received.failure)
