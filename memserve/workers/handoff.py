"""Prefill → decode: offers on one side, pulls on the other (MemServe §MemPool API, transfer).

    prefill worker   OfferBook   blocks of a prefilled request, owned here until Release or Cancel
    decode worker    Pulls       copies under way into blocks of a PULLING request

A pull ends with a verified prefix of the offer, perhaps none of it: what is lacking is a miss and is
recomputed, counted and logged, never silent. The blocks of a pull that was cancelled belong to `Pulls`
until the copy has really stopped, and only then go back to the pool.
"""

from __future__ import annotations

import logging
from typing import NamedTuple, Protocol

from memserve.messages import BlockRefs, Offer, Pulled
from memserve.model_config import blocks_for
from memserve.pool.allocator import BlockIds
from memserve.pool.transports.base import FailedPull, Pull
from memserve.workers.request import Request

logger = logging.getLogger(__name__)


class Fetcher(Protocol):
    """What a hand-off needs of a `MemPool`."""

    def fetch(self, refs: BlockRefs, into: BlockIds, /) -> Pull: ...
    def free_mem(self, block_ids: BlockIds, /) -> None: ...


class _Entry(NamedTuple):
    attempt: int
    block_ids: BlockIds
    num_tokens: int
    offered_at: float


class OfferBook:
    """The offers that stand, in the order they were made; owner of their blocks."""

    def __init__(self) -> None:
        self._entries: dict[str, _Entry] = {}
        # Read by the heartbeat's thread, which must not walk a dict that changes.
        self.oldest_at: float | None = None

    def __len__(self) -> int:
        return len(self._entries)

    def attempt_of(self, request_id: str) -> int | None:
        """The attempt whose offer stands, or None."""
        entry = self._entries.get(request_id)
        return None if entry is None else entry.attempt

    def add(self, request: Request, now: float) -> None:
        """Take over the blocks of a request that has just been offered."""
        assert request.request_id not in self._entries
        num_tokens = request.num_computed_tokens
        entry = _Entry(request.attempt, request.take_blocks(), num_tokens, now)
        self._entries[request.request_id] = entry
        if self.oldest_at is None:
            self.oldest_at = now

    def take(self, request_id: str, attempt: int) -> BlockIds | None:
        """End the offer of this attempt or an older one: its blocks, now the caller's; None = no offer."""
        entry = self._entries.get(request_id)
        if entry is None or entry.attempt > attempt:
            return None
        del self._entries[request_id]
        self.oldest_at = next((e.offered_at for e in self._entries.values()), None)
        return entry.block_ids

    def take_all(self) -> list[BlockIds]:
        """End every offer."""
        return [self._entries.pop(request_id).block_ids for request_id in tuple(self._entries)]


class Arrival(NamedTuple):
    """A pull that ended: `num_tokens` of KV are there, and `message` tells the router."""

    request: Request
    num_tokens: int
    message: Pulled


class _Running(NamedTuple):
    request: Request
    offer: Offer
    pull: Pull


class Pulls:
    """The pulls under way, cancelled ones included."""

    def __init__(self, pool: Fetcher, block_size: int) -> None:
        self._pool = pool
        self._block_size = block_size
        self._running: dict[Request, _Running] = {}
        self._cancelled: list[tuple[Pull, BlockIds]] = []

    def __bool__(self) -> bool:
        """Whether `poll` has anything to look at."""
        return bool(self._running or self._cancelled)

    def begin(self, request: Request) -> None:
        """Start filling the blocks of a request that has just become PULLING. Never fails: `poll` tells."""
        offer = request.offer
        assert offer is not None
        fault = self._fault_of(offer, request)
        pull: Pull
        if fault is None:
            pull = self._pool.fetch(offer.refs, request.block_ids(len(offer.refs.blocks)))
        else:
            pull = FailedPull(fault)
        self._running[request] = _Running(request, offer, pull)

    def poll(self) -> list[Arrival]:
        """The pulls that ended since the last call; frees the blocks of cancelled ones that have stopped."""
        arrivals: list[Arrival] = []
        for request, offer, pull in tuple(self._running.values()):
            result = pull.poll()
            if result is None:
                continue
            del self._running[request]
            num_tokens = min(result.num_blocks * self._block_size, offer.num_tokens)
            if result.failure is not None:
                logger.warning(
                    "%s: pulled %d of %d tokens from %s, recomputing the rest: %s",
                    request.request_id,
                    num_tokens,
                    offer.num_tokens,
                    offer.refs.instance,
                    result.failure,
                )
            message = Pulled(
                request_id=request.request_id,
                attempt=request.attempt,
                num_tokens=num_tokens,
                num_bytes=result.num_bytes,
                pull_ms=result.elapsed_ms,
                failure=result.failure,
            )
            arrivals.append(Arrival(request, num_tokens, message))
        if self._cancelled:
            self._cancelled = [entry for entry in self._cancelled if not self._reclaim(*entry)]
        return arrivals

    def cancel(self, request: Request) -> None:
        """Give a pull up. Its blocks leave the request now and reach the pool when the copy has stopped."""
        running = self._running.pop(request)
        running.pull.cancel()
        self._cancelled.append((running.pull, request.take_blocks()))

    def _reclaim(self, pull: Pull, block_ids: BlockIds) -> bool:
        if pull.poll() is None:
            return False
        self._pool.free_mem(block_ids)
        return True

    def _fault_of(self, offer: Offer, request: Request) -> str | None:
        """Why an offer cannot be pulled at all, judged by its numbers alone."""
        num_blocks = blocks_for(offer.num_tokens, self._block_size)
        if not 0 < offer.num_tokens < request.num_tokens:
            return f"an offer of {offer.num_tokens} tokens for a request of {request.num_tokens}"
        if len(offer.refs.blocks) != num_blocks or len(offer.refs.generations) != num_blocks:
            return f"an offer of {len(offer.refs.blocks)} blocks for {offer.num_tokens} tokens"
        return None
