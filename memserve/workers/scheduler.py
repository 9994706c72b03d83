"""Which requests take part in the next step, and with how many tokens. Pure: no clock, tensors or sockets.

Every step takes all decodes, one token each, then fills what the budget leaves with chunks of prefills,
in order of arrival. Blocks:

- A waiting request is admitted when there are blocks for all the tokens it has, and one for each running
  request to grow by; it gets them at once, so that only a decode that crosses a block boundary can find
  the pool empty. What the pool has cached of its tokens it shares, and computes only the rest.
- While another computes or pulls a long prefix that it needs too, it waits for it, holding nothing, and
  those behind it may pass (following.py): a burst on one cold prefix computes it once. For a pull, and with
  an offer of its own for anything, it waits no longer than `patience` says (patience.py).
- If a decode finds the pool empty, the youngest running request is preempted: it waits again at its place of
  arrival, and what the pool no longer has of it by then is recomputed. The oldest running request is never
  preempted for another, so there is always progress.
- Pulling and offered requests keep their blocks: a copy may be reading or writing them. If those alone
  stand in the way, the request waits: pulls end by themselves, offers by the router's Release.
- A request that does not fit the whole pool is refused.

Owner of the tables of WAITING (empty, or pulled ahead), RUNNING and PULLING requests; a pull cancelled in
flight and an offer take theirs over (`handoff`).
"""

from __future__ import annotations

import math
from bisect import insort
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import msgspec

from memserve.messages import CachedTokens
from memserve.model_config import blocks_for
from memserve.pool.allocator import BlockIds
from memserve.pool.block_table import BlockTable
from memserve.pool.index import Match
from memserve.pool.pending import Pending
from memserve.workers.budget import MIN_CHUNK_TOKENS, StepTally
from memserve.workers.following import Following
from memserve.workers.request import Request, RequestState
from memserve.workers.steps import Chunk, Refusal, StepPlan


class BlockSource(Protocol):
    """What the scheduler needs of a `MemPool`."""

    @property
    def num_blocks(self) -> int: ...
    @property
    def num_available(self) -> int: ...
    def alloc_mem(self, num_blocks: int, /) -> BlockIds | None: ...
    def match(self, tokens: bytes, salt: str, /) -> Match: ...
    def acquire(self, tokens: bytes, salt: str, /) -> BlockTable: ...
    def release(self, table: BlockTable, /) -> None: ...
    def copy_last(self, tokens: bytes, salt: str, into: int, /) -> bool: ...
    def pending(self, tokens: bytes, salt: str, /) -> Pending | None: ...


def _no_limit(request: Request, num_cached: int, num_tokens: int) -> float:
    return math.inf


def _arrival(request: Request) -> int:
    return request.arrival


class Scheduler:
    """Queues of the requests that are not finished or offered; each list is in order of arrival.

    Args:
        pool: where blocks come from.
        block_size: tokens of one.
        max_running: seats, of running and pulling requests together.
        caches: whether the pool keeps what was computed, so that it is worth waiting for.
        patience: how many seconds a request waits for a pull that brings its first so many tokens, of which
            so many are here.
    """

    def __init__(
        self,
        pool: BlockSource,
        block_size: int,
        max_running: int,
        *,
        caches: bool = False,
        patience: Callable[[Request, int, int], float] = _no_limit,
    ) -> None:
        self._pool = pool
        self._block_size = block_size
        self._max_running = max_running
        self._caches = caches
        self._following = Following(pool, block_size, patience)
        self._looked_at = -math.inf
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.pulling: list[Request] = []
        self.num_preemptions = 0

    # --- transitions ---

    def add(self, request: Request) -> None:
        """A new request waits for its turn. It may bring blocks that were pulled ahead for it
        (`Pulls.claim`).
        """
        assert request.state is RequestState.WAITING
        assert request.table.num_blocks == 0 or request.offer is not None
        insort(self.waiting, request, key=_arrival)

    def pulled(self, request: Request, num_tokens: int) -> None:
        """PULLING → RUNNING: the KV of the first `num_tokens` tokens is there, the rest is to be computed."""
        self.pulling.remove(request)
        offer, request.offer = request.offer, None
        request.num_computed_tokens = min(num_tokens, request.num_tokens - 1)
        assert offer is not None and request.cached is not None
        num_pulled = request.num_computed_tokens - request.cached.total
        if num_pulled > 0:
            request.cached = msgspec.structs.replace(
                request.cached, pulled=num_pulled, pulled_from=offer.refs.instance
            )
        request.state = RequestState.RUNNING
        insort(self.running, request, key=_arrival)

    def join(self, request: Request, plan: StepPlan, tally: StepTally) -> None:
        """Let a request whose pull has ended into the step that is about to run, if it only decodes."""
        num_computed = request.num_computed_tokens
        if request.num_tokens - num_computed == 1:
            plan.chunks.append(Chunk(request, 1))
            tally.add_decode(num_computed)

    def adopt(self, request: Request, table: BlockTable) -> None:
        """WAITING → RUNNING of a new request, with blocks that hold the KV of all its tokens but the last."""
        assert request.state is RequestState.WAITING and request.table.num_blocks == 0
        request.table = table
        request.num_computed_tokens = request.num_tokens - 1
        request.state = RequestState.RUNNING
        insort(self.running, request, key=_arrival)

    def offer(self, request: Request) -> None:
        """RUNNING → OFFERED: the request leaves, and whoever keeps the offer owns its blocks."""
        self.running.remove(request)
        request.state = RequestState.OFFERED

    def finish(self, request: Request) -> None:
        """WAITING or RUNNING → FINISHED: its blocks are free."""
        if request.state is RequestState.RUNNING:
            self.running.remove(request)
            self._pool.release(request.table)
        else:
            assert request.state is RequestState.WAITING
            self.waiting.remove(request)
        request.state = RequestState.FINISHED

    def abandon_pull(self, request: Request) -> None:
        """PULLING → FINISHED: the caller frees the blocks when the copy into them has stopped."""
        self.pulling.remove(request)
        request.state = RequestState.FINISHED

    # --- planning ---

    @property
    def is_stuck(self) -> bool:
        """Asked when a step has nothing to compute: whether requests want blocks, as running ones that cannot
        grow do too, and none here will give any back.
        """
        wants_blocks = self.running or any(request.pending is None for request in self.waiting)
        return bool(wants_blocks) and not self.pulling

    @property
    def may_preempt(self) -> bool:
        """Whether the next step could find the pool empty."""
        return self._pool.num_available < len(self.running)

    @property
    def patience_ends(self) -> float | None:
        """When the next request that waits for a pull will do so no more; None if none does. One whose time
        was up when it was last looked at is held up by something else.
        """
        ends = [
            request.patience_ends
            for request in self.waiting
            if request.pending or (request.leader and request.leader.state is RequestState.PULLING)
        ]
        ends = [end for end in ends if end > self._looked_at]
        end = min(ends, default=math.inf)
        return None if end == math.inf else end

    def schedule(self, tally: StepTally, now: float = 0.0) -> StepPlan:
        """Fill `tally` with the next step, at `now` seconds. Takes and frees blocks; the caller then runs the
        plan's chunks.

        The step before may still run, its draws pending, unless `may_preempt`: a request is preempted only
        when all of its tokens are known.
        """
        self._looked_at = now
        plan = StepPlan()
        prefilling = self._plan_decodes(plan, tally)
        if prefilling:
            self._plan_chunks(prefilling, plan, tally)
        if self.waiting:
            self._admit(plan, tally, now)
        return plan

    def _plan_decodes(self, plan: StepPlan, tally: StepTally) -> list[Request]:
        """Plan every request with one token to compute; return the others, whose prefill goes on."""
        prefilling: list[Request] = []
        block_size = self._block_size
        chunks = plan.chunks
        for request in tuple(self.running):
            if request.state is not RequestState.RUNNING:
                continue  # preempted by an older one just now
            if request.is_drawing and request.is_at_end:
                continue
            num_computed = request.num_computed_tokens
            if request.num_tokens - num_computed > 1:
                prefilling.append(request)
            elif request.num_tokens <= request.table.num_blocks * block_size or self._grow(request, plan):
                chunks.append(Chunk(request, 1))
                tally.add_decode(num_computed)
        # The youngest may have been preempted after it was put in the list.
        return [request for request in prefilling if request.state is RequestState.RUNNING]

    def _grow(self, request: Request, plan: StepPlan) -> bool:
        """Give a decode its next block, preempting from the youngest down. False = it sits this step out."""
        if request.table.num_blocks == self._pool.num_blocks:
            self.finish(request)
            plan.refused.append(Refusal(request, self._too_long(request)))
            return False
        while (block_ids := self._pool.alloc_mem(1)) is None:
            youngest = self.running[-1]
            if youngest is request:
                if len(self.running) > 1:
                    self._preempt(request)
                return False  # alone: pulls hold the rest, and end or give way; or offers, which end
            self._preempt(youngest)
        request.table.append(block_ids)
        return True

    def _preempt(self, request: Request) -> None:
        self.running.remove(request)
        self._pool.release(request.table)
        request.restart()
        request.state = RequestState.WAITING
        insort(self.waiting, request, key=_arrival)
        self.num_preemptions += 1

    def _plan_chunks(self, requests: Sequence[Request], plan: StepPlan, tally: StepTally) -> bool:
        """Plan a chunk of each request while the budget lasts. False = the step is full."""
        for request in requests:
            context_len = request.num_computed_tokens
            room = tally.room(context_len)
            if room == 0:
                return False
            num_new = min(request.num_tokens - context_len, room)
            if request.prompt_logprobs is not None:
                if tally.num_logit_rows_left < min(num_new, MIN_CHUNK_TOKENS):
                    continue  # others may go on; this one has its turn when those before it are done
                num_new = min(num_new, tally.num_logit_rows_left)
                tally.add_logit_rows(num_new)
            plan.chunks.append(Chunk(request, num_new))
            tally.add_chunk(num_new, context_len)
        return True

    def _admit(self, plan: StepPlan, tally: StepTally, now: float) -> None:
        """Let waiting requests in, in order of arrival, until the step, the blocks or the seats are full."""
        for request in tuple(self.waiting):
            if len(self.running) + len(self.pulling) >= self._max_running:
                return
            if request.offer is None and tally.room(0) == 0:
                return
            if self._caches and self._following.follows(request, self._producers(), now):
                continue
            if blocks_for(request.num_tokens, self._block_size) > self._pool.num_blocks:
                self.finish(request)
                plan.refused.append(Refusal(request, self._too_long(request)))
                continue
            if not self._take_blocks(request):
                return
            self.waiting.remove(request)
            if request.offer is None:
                request.state = RequestState.RUNNING
                insort(self.running, request, key=_arrival)
                self._plan_chunks((request,), plan, tally)
            else:
                request.state = RequestState.PULLING
                self.pulling.append(request)
                plan.pulls.append(request)

    def _take_blocks(self, request: Request) -> bool:
        """Blocks for all the tokens that a waiting request has, cached ones first. False = not now."""
        is_new = request.table.num_blocks == 0
        if is_new:
            self._pool.release(request.table)  # what was reserved may have found nothing then
            request.table = self._pool.acquire(request.cacheable(self._block_size), request.cache_salt)
        num_lacking = blocks_for(request.num_tokens, self._block_size) - request.table.num_blocks
        if self._pool.num_available < num_lacking + len(self.running):
            if is_new:
                self._pool.release(request.table)
            return False
        if num_lacking:
            block_ids = self._pool.alloc_mem(num_lacking)
            assert block_ids is not None
            request.table.append(block_ids)
        num_cached = request.table.num_shared * self._block_size
        if request.offer is None:
            num_cached += self._copy_last(request)
            request.num_computed_tokens = num_cached
        if request.cached is None:
            host = request.table.num_swapped_in * self._block_size
            request.cached = CachedTokens(num_cached - host, host)
        return True

    def _copy_last(self, request: Request) -> int:
        """A request of whole blocks whose last one is cached too takes a copy of that, as its last token is
        still to be computed, and nobody writes to a shared block. Returns the tokens that are spared.
        """
        block_size, num_tokens = self._block_size, request.num_tokens
        num_blocks = num_tokens // block_size
        is_last = request.table.num_shared == num_blocks - 1 and num_tokens % block_size == 0
        if not is_last or block_size == 1 or request.prompt_logprobs is not None:
            return 0
        into = int(request.table.ids(num_blocks)[-1])
        is_copied = self._pool.copy_last(request.token_bytes(0, num_tokens), request.cache_salt, into)
        return block_size - 1 if is_copied else 0

    def _producers(self) -> Iterator[Request]:
        """Requests whose prompt is being computed or pulled."""
        yield from self.pulling
        yield from (r for r in self.running if r.num_tokens - r.num_computed_tokens > 1)

    def _too_long(self, request: Request) -> str:
        capacity = self._pool.num_blocks * self._block_size
        return f"the request needs KV for {request.num_tokens} tokens, but the pool holds {capacity}"
