"""Prefill → decode: offers on one side, pulls on the other (MemServe §MemPool API, transfer).

    prefill worker   OfferBook   blocks of a prefilled request, owned here until Release or Cancel
    decode worker    Pulls       copies under way into blocks of a PULLING request, or of one that will come

Only what the receiver's own pool lacks is copied: the delta. Blocks of a prompt that is still being computed
can be pulled *ahead*, chunk by chunk, before their `Decode` is there: a `Reserve` opens the account, and the
request claims it when it comes, so that only the last chunk is left to copy. A pull ends with a verified
prefix of the offer, perhaps none of it: what is lacking is a miss and is recomputed, counted and logged,
never silent. The blocks of a pull that was cancelled belong to `Pulls` until the copy has really stopped, and
only then go back to the pool.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from memserve.messages import BlockRefs, Offer, PullAhead, Pulled, Reserve, num_packed
from memserve.model_config import blocks_for
from memserve.pool.allocator import BlockIds
from memserve.pool.block_table import BlockTable
from memserve.pool.pending import Pending
from memserve.pool.transports.base import FailedPull, Pull, PullResult
from memserve.workers.following import MIN_FOLLOWED_TOKENS
from memserve.workers.request import Request

logger = logging.getLogger(__name__)


class Fetcher(Protocol):
    """What a hand-off needs of a `MemPool`."""

    def alloc_mem(self, num_blocks: int, /) -> BlockIds | None: ...
    def acquire(self, tokens: bytes, salt: str, /) -> BlockTable: ...
    def release(self, table: BlockTable, /) -> None: ...
    def expect(self, tokens: bytes, salt: str, /) -> Pending: ...
    def pending(self, tokens: bytes, salt: str, /, *, only_begun: bool = True) -> Pending | None: ...
    def fetch(self, refs: BlockRefs, into: BlockIds, layers_from: int | None = None, /) -> Pull: ...


class _Entry(NamedTuple):
    attempt: int
    table: BlockTable
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
        self._entries[request.request_id] = _Entry(request.attempt, request.take_table(), now)
        if self.oldest_at is None:
            self.oldest_at = now

    def take(self, request_id: str, attempt: int) -> BlockTable | None:
        """End the offer of this attempt or an older one: its blocks, now the caller's; None = no offer."""
        entry = self._entries.get(request_id)
        if entry is None or entry.attempt > attempt:
            return None
        del self._entries[request_id]
        self.oldest_at = next((e.offered_at for e in self._entries.values()), None)
        return entry.table

    def take_all(self) -> list[BlockTable]:
        """End every offer."""
        return [self._entries.pop(request_id).table for request_id in tuple(self._entries)]


class Arrival(NamedTuple):
    """A pull that ended: `num_tokens` of KV are there, and `message` tells the router. `num_timed_tokens` of
    them took its `pull_ms`: none where it failed, or where what was pulled ahead was in its way.
    """

    request: Request
    num_tokens: int
    message: Pulled
    num_timed_tokens: int


class _Part(NamedTuple):
    """One copy of several that make up a hand-off, in sequence order."""

    pull: Pull
    num_blocks: int


class _Running(NamedTuple):
    """`num_shared` blocks were the pool's own when it began; `parts` follow the first `num_here` blocks, and
    `num_ahead` of them were begun before the offer came.
    """

    request: Request
    offer: Offer
    num_shared: int
    num_here: int
    parts: tuple[_Part, ...]
    num_ahead: int
    pending: Pending
    num_bytes: int = 0


@dataclass(slots=True)
class _Ahead:
    """What was pulled of a request that has not come. Owner of the table."""

    attempt: int
    table: BlockTable
    pending: Pending
    parts: list[_Part] = field(default_factory=list)


class _Claimed(NamedTuple):
    """What was pulled ahead of a request that has come and waits."""

    pending: Pending
    parts: list[_Part]


class Pulls:
    """The pulls under way, cancelled ones and those ahead of their request included."""

    def __init__(self, pool: Fetcher, block_size: int) -> None:
        self._pool = pool
        self._block_size = block_size
        self._running: dict[Request, _Running] = {}
        self._ahead: dict[str, _Ahead] = {}
        self._claimed: dict[Request, _Claimed] = {}
        self._cancelled: list[tuple[Sequence[_Part], BlockTable]] = []

    def __bool__(self) -> bool:
        """Whether `poll` has anything to look at."""
        return bool(self._running or self._cancelled)

    # --- ahead of the request ---

    def reserve(self, message: Reserve) -> None:
        """A request will come: keep what the pool has of it, so that only the delta is pulled ahead.

        Nothing is pulled ahead where another pull, under way or reserved, brings much of the same: this one's
        `Decode` will find it, and pull what is left. Nobody waits for it before `begin_ahead`.
        """
        known = self._ahead.get(message.request_id)
        if known is not None:
            if known.attempt >= message.attempt:
                return
            self.drop_ahead(message.request_id, known.attempt)
        num_blocks = num_packed(message.token_ids) // self._block_size
        tokens = message.token_ids[: num_blocks * self._block_size * 4]
        self._open(message.request_id, message.attempt, tokens, message.cache_salt, only_begun=False)

    def begin_ahead(self, message: PullAhead) -> None:
        """Start on blocks of a request that will come. What does not fit or follow is left to its
        `Decode`, and so is what others have brought since the `Reserve`, or are about to.
        """
        ahead = self._ahead.get(message.request_id)
        if ahead is None or ahead.attempt != message.attempt:
            return
        if not ahead.parts:
            ahead = self._look_again(message.request_id, ahead)
            if ahead is None:
                return
        done = ahead.table.num_blocks - message.first_block
        if not 0 <= done < len(message.refs.blocks):
            return
        refs = message.refs.tail(done)
        block_ids = self._pool.alloc_mem(len(refs.blocks))
        if block_ids is None:
            return
        ahead.table.append(block_ids)
        ahead.parts.append(_Part(self._pool.fetch(refs, block_ids, message.layers_from), len(block_ids)))
        ahead.pending.begin()

    def claim(self, request: Request) -> None:
        """The request has come: what was pulled ahead for this attempt is its first blocks from now on."""
        ahead = self._ahead.get(request.request_id)
        if ahead is None or ahead.attempt != request.attempt:
            return
        offer = request.offer
        num_ahead = ahead.table.num_blocks
        # Without a block it comes like any other, which others' pulls may spare a pull of its own.
        if offer is None or offer.first_block or not 0 < num_ahead <= offer.num_blocks:
            self.drop_ahead(request.request_id, request.attempt)
            return
        del self._ahead[request.request_id]
        request.table = ahead.table
        self._claimed[request] = _Claimed(ahead.pending, ahead.parts)

    def drop_ahead(self, request_id: str, attempt: int) -> None:
        """No request will claim this attempt, or an older one: give the blocks back."""
        ahead = self._ahead.get(request_id)
        if ahead is not None and ahead.attempt <= attempt:
            del self._ahead[request_id]
            self._stop(ahead.parts, ahead.table, ahead.pending)

    def unclaim(self, request: Request) -> None:
        """A waiting request gives up what was pulled ahead for it; all of its offer is pulled when it
        runs.
        """
        claimed = self._claimed.pop(request, None)
        if claimed is not None:
            self._stop(claimed.parts, request.take_table(), claimed.pending)

    def drop_all_ahead(self) -> None:
        """Nothing will come any more."""
        for request_id, ahead in tuple(self._ahead.items()):
            self.drop_ahead(request_id, ahead.attempt)

    def make_room(self) -> bool:
        """Give up the last pull ahead: its blocks may be what an earlier request waits for. False = nothing
        can be given up, or what was has not stopped yet.
        """
        if self._cancelled:
            num_before = len(self._cancelled)
            self._reclaim_stopped()
            return len(self._cancelled) < num_before
        if self._ahead:
            request_id = next(reversed(self._ahead))
            self.drop_ahead(request_id, self._ahead[request_id].attempt)
        elif self._claimed:
            self.unclaim(next(reversed(self._claimed)))
        else:
            return False
        return True

    # --- with the request ---

    def begin(self, request: Request) -> None:
        """Start filling the blocks of a request that has just become PULLING. Never fails: `poll` tells."""
        offer = request.offer
        assert offer is not None
        num_shared = request.table.num_shared
        fault = self._fault_of(offer, request)
        claimed = self._claimed.pop(request, None)
        if claimed is None:
            num_expected = 0 if fault else offer.num_tokens // self._block_size * self._block_size
            claimed = _Claimed(
                self._pool.expect(request.token_bytes(0, num_expected), request.cache_salt), []
            )
        pending, parts = claimed
        pending.begin()
        num_ahead = len(parts)
        if fault is None:
            done = num_shared + sum(part.num_blocks for part in parts)
            parts += self._fetch(request, offer, done)
        else:  # nothing counts, but the copies of what was pulled ahead must have stopped all the same
            parts.insert(0, _Part(FailedPull(fault), 1))
            num_ahead = 0
        self._running[request] = _Running(
            request, offer, num_shared, num_shared, tuple(parts), num_ahead, pending
        )

    def poll(self) -> list[Arrival]:
        """The pulls that ended since the last call; frees the blocks of cancelled ones that have stopped."""
        arrivals: list[Arrival] = []
        for running in tuple(self._running.values()):
            results = [part.pull.poll() for part in running.parts]
            ended = [result for result in results if result is not None]
            if len(ended) < len(results):
                continue
            arrival = self._arrive(running, ended)
            if arrival is None:
                continue
            del self._running[running.request]
            running.pending.end()
            arrivals.append(arrival)
        self._reclaim_stopped()
        return arrivals

    def cancel(self, request: Request) -> None:
        """Give a pull up. Its blocks leave the request now and reach the pool when the copy has stopped."""
        running = self._running.pop(request)
        self._stop(running.parts, request.take_table(), running.pending)

    # --- inside ---

    def _open(self, request_id: str, attempt: int, tokens: bytes, salt: str, *, only_begun: bool) -> None:
        """An account of what is pulled ahead of a request, unless another pull brings much of it."""
        table = self._pool.acquire(tokens, salt)
        useful = table.num_shared * self._block_size + MIN_FOLLOWED_TOKENS
        other = self._pool.pending(tokens, salt, only_begun=only_begun)
        if other is not None and other.num_common(tokens) >= useful:
            self._pool.release(table)
            return
        self._ahead[request_id] = _Ahead(attempt, table, self._pool.expect(tokens, salt))

    def _look_again(self, request_id: str, ahead: _Ahead) -> _Ahead | None:
        """Open an account anew of which nothing has been pulled."""
        del self._ahead[request_id]
        pending = ahead.pending
        pending.end()
        self._open(request_id, ahead.attempt, pending.tokens, pending.salt, only_begun=True)
        self._pool.release(ahead.table)
        return self._ahead.get(request_id)

    def _fetch(self, request: Request, offer: Offer, start: int) -> list[_Part]:
        """Pull the offered blocks of a request from its block `start` on, each tier's by itself."""
        parts: list[_Part] = []
        for refs in offer.parts(start - offer.first_block):
            end = start + len(refs.blocks)
            into = request.table.ids(end)[start:].copy()
            parts.append(_Part(self._pool.fetch(refs, into), len(into)))
            start = end
        return parts

    def _arrive(self, running: _Running, results: Sequence[PullResult]) -> Arrival | None:
        """Parts count up to the first that lacks a block: what is verified is a prefix.

        None if that was a part pulled ahead: the offer stands, so the rest is pulled from it, once.
        """
        request, offer, num_shared, num_here, parts, num_ahead, _, num_bytes = running
        num_blocks = num_here
        num_bytes += sum(result.num_bytes for result in results)
        failure: str | None = None
        for index, (part, result) in enumerate(zip(parts, results, strict=True)):
            num_blocks += result.num_blocks
            if result.num_blocks < part.num_blocks:
                failure = result.failure or "blocks are lacking"
                if index < num_ahead:
                    logger.info("%s: pulled again from the offer: %s", request.request_id, failure)
                    again = tuple(self._fetch(request, offer, num_blocks))
                    self._running[request] = running._replace(
                        num_here=num_blocks, parts=again, num_ahead=0, num_bytes=num_bytes
                    )
                    return None
                break
        num_tokens = num_blocks * self._block_size
        if num_blocks > num_shared:
            num_tokens = min(num_tokens, offer.num_tokens)
        if failure is not None:
            logger.warning(
                "%s: has %d of the %d tokens offered by %s, recomputing the rest: %s",
                request.request_id,
                num_tokens,
                offer.num_tokens,
                offer.refs.instance,
                failure,
            )
        message = Pulled(
            request_id=request.request_id,
            attempt=request.attempt,
            num_tokens=num_tokens,
            num_cached_tokens=num_shared * self._block_size,
            num_bytes=num_bytes,
            pull_ms=max((result.elapsed_ms for result in results[num_ahead:]), default=0.0),
            failure=failure,
        )
        is_timed = failure is None and not num_ahead
        num_timed_tokens = max(0, num_tokens - num_here * self._block_size) if is_timed else 0
        return Arrival(request, num_tokens, message, num_timed_tokens)

    def _stop(self, parts: Sequence[_Part], table: BlockTable, pending: Pending) -> None:
        pending.end()
        for part in parts:
            part.pull.cancel()
        self._cancelled.append((parts, table))

    def _reclaim_stopped(self) -> None:
        if self._cancelled:
            self._cancelled = [entry for entry in self._cancelled if not self._reclaim(*entry)]

    def _reclaim(self, parts: Sequence[_Part], table: BlockTable) -> bool:
        if any(part.pull.poll() is None for part in parts):
            return False
        self._pool.release(table)
        return True

    def _fault_of(self, offer: Offer, request: Request) -> str | None:
        """Why an offer cannot be pulled at all, judged by its numbers alone."""
        num_blocks = blocks_for(offer.num_tokens, self._block_size) - offer.first_block
        if not 0 < offer.num_tokens < request.num_tokens:
            return f"an offer of {offer.num_tokens} tokens for a request of {request.num_tokens}"
        all_refs = (offer.refs, *offer.more)
        if offer.num_blocks != num_blocks or any(len(r.blocks) != len(r.generations) for r in all_refs):
            return f"an offer of {offer.num_blocks} blocks for {num_blocks}"
        if any(refs.instance != offer.refs.instance for refs in offer.more):
            return "an offer of several instances"
        if not 0 <= offer.first_block <= request.table.num_shared:
            return f"the offer begins at block {offer.first_block}, and those before it are not here"
        return None
