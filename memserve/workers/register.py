"""The requests of a worker, from arrival to end: where each is, and how it leaves.

    take ──► scheduler's queues ◄──► Pulls      ──┬──► finish, fail, drop: blocks historical or free
                                                  └──► offer ──► OfferBook ──► release

A request is in one place at a time: the scheduler's queues, `Pulls`, or the `OfferBook`; the register finds
those of the first two by id. A request leaves through `finish`, `drop` or the book, and its blocks with it,
so that with no request left the pool is idle. What a step draws for it is told elsewhere (telling.py).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

from memserve.config import WorkerConfig
from memserve.messages import Decode, Failed, Offer, Prefill, Pulled
from memserve.pool.mempool import MemPool
from memserve.workers.handoff import OfferBook, Pulls
from memserve.workers.request import Request, RequestKind, RequestState
from memserve.workers.scheduler import Scheduler

logger = logging.getLogger(__name__)


class Register:
    """See the module.

    Args:
        scheduler, pulls, offers: the places where requests are.
        send: takes what is to be said of a request that does not come to its end by steps.
    """

    def __init__(
        self,
        config: WorkerConfig,
        pool: MemPool,
        scheduler: Scheduler,
        pulls: Pulls,
        offers: OfferBook,
        send: Callable[[Failed | Pulled], None],
    ) -> None:
        self._config = config
        self._pool = pool
        self._scheduler = scheduler
        self._pulls = pulls
        self._offers = offers
        self._send = send
        self._requests: dict[str, Request] = {}
        self._arrivals = 0

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Request]:
        return iter(tuple(self._requests.values()))

    def get(self, request_id: str) -> Request | None:
        """The request of this id, unless it has ended or is an offer by now."""
        return self._requests.get(request_id)

    # --- arrival ---

    def take(self, message: Prefill | Decode) -> None:
        """A new request, unless it is known already; a newer attempt replaces an older one."""
        known = self._requests.get(message.request_id)
        if known is not None:
            if known.attempt >= message.attempt:
                return
            self.drop(known)
        self._arrivals += 1
        request = Request.of(message, self._arrivals)
        if request.kind is RequestKind.PREFILL:
            if self._offers.attempt_of(request.request_id) == request.attempt:
                return
            self.release(request.request_id, request.attempt)
        fault = request.fault(self._config.max_model_len, self._config.model.vocab_size)
        if fault is not None:
            self._pulls.drop_ahead(request.request_id, request.attempt)
            self._send(Failed(request.request_id, request.attempt, fault))
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
        self._send(pulled)

    # --- end ---

    def finish(self, request: Request) -> None:
        """It has come to its end, or was refused."""
        del self._requests[request.request_id]
        self._pulls.unclaim(request)
        if request.state is not RequestState.FINISHED:  # the scheduler has let go of a refused one
            self._scheduler.finish(request)

    def offer(self, request: Request, now: float) -> Offer:
        """A prefill is done: its blocks are kept for whoever pulls them, until `release`."""
        table, num_tokens = request.table, request.num_computed_tokens
        offer = Offer(self._pool.addresses(table.ids(table.num_blocks)), num_tokens)
        self._scheduler.offer(request)
        self._offers.add(request, now)
        del self._requests[request.request_id]
        return offer

    def release(self, request_id: str, attempt: int) -> None:
        """The offer of this attempt is not wanted any more. Unknown ids are ignored."""
        table = self._offers.take(request_id, attempt)
        if table is not None:
            self._pool.release(table)

    def cancel(self, request_id: str, attempt: int) -> None:
        """Forget this attempt wherever it is. Unknown ids are ignored."""
        request = self._requests.get(request_id)
        if request is not None and request.attempt <= attempt:
            self.drop(request)
        self._pulls.drop_ahead(request_id, attempt)
        self.release(request_id, attempt)

    def fail(self, request: Request, message: str) -> None:
        """It cannot be run here, and the router is told why."""
        self.finish(request)
        self.tell_failed(request.request_id, request.attempt, message)

    def fail_and_forget(self, request: Request, message: str) -> None:
        """It could not be computed, perhaps for what it found or its first chunks have stored: nobody shall
        find that.
        """
        block_size = self._config.block_size
        # The block of which it has a copy is none that it shares.
        found = request.token_bytes(0, request.num_computed_tokens // block_size * block_size)
        shared = request.token_bytes(0, request.table.num_shared * block_size)
        self.fail(request, message)
        for tokens in (found, shared):
            if tokens:
                self._pool.delete(tokens, request.cache_salt)

    def tell_failed(self, request_id: str, attempt: int, message: str) -> None:
        """Tell the router that an attempt of which nothing is left here has failed."""
        logger.error("%s: %s", request_id, message)
        self._send(Failed(request_id, attempt, message))

    def drop(self, request: Request) -> None:
        """Forget a request in whatever phase it is; nothing is told."""
        if request.state is RequestState.PULLING:
            del self._requests[request.request_id]
            self._scheduler.abandon_pull(request)
            self._pulls.cancel(request)
        else:
            self.finish(request)

    def drop_all(self) -> None:
        """Forget all of them, offers too; nothing is told. Pulls under way keep their blocks, as their copies
        may still write to them.
        """
        for request in self:
            self.drop(request)
        self._pulls.drop_all_ahead()
        for table in self._offers.take_all():
            self._pool.release(table)
