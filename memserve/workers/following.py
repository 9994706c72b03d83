"""Which waiting requests had better wait for what others are about to have: a burst on one cold prefix
computes it once.

    a request computes or pulls a prefix              ──► the `leader` of those that need much of it too
    a pull brings one, with no such request (yet)     ──► their `pending` (pool/pending.py)

A request follows one or the other, holding no blocks, until the other is so far, ends, or is not worth the
time any more (patience.py); after a few it goes by itself. Pure; what it knows of a request stands in the
request.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol

import numpy as np

from memserve.pool.index import Match
from memserve.pool.pending import Pending
from memserve.workers.request import Request, RequestState

# A common prefix shorter than this is computed twice rather than waited for.
MIN_FOLLOWED_TOKENS = 64
# How many leaders a request waits for, one after another, before it goes by itself.
MAX_FOLLOWS = 3


class Cache(Protocol):
    """What is needed of a `MemPool`."""

    def match(self, tokens: bytes, salt: str, /) -> Match: ...
    def pending(self, tokens: bytes, salt: str, /) -> Pending | None: ...


class Following:
    """See the module.

    Args:
        pool: what is here, and what is being pulled.
        block_size: tokens of a block.
        patience: how many seconds a request waits for a pull that brings its first so many tokens, of which
            so many are here.
    """

    def __init__(self, pool: Cache, block_size: int, patience: Callable[[Request, int, int], float]) -> None:
        self._pool = pool
        self._block_size = block_size
        self._patience = patience

    def follows(self, request: Request, producers: Iterable[Request], now: float) -> bool:
        """Whether another is about to have much of what this one needs, so that it is better to wait.

        It waits for one that runs or pulls, and so gets on, and a few times at most. `producers` are the
        requests whose prompt is being computed or pulled.
        """
        if request.prompt_logprobs is not None or request.table.num_blocks:
            return False
        leader, request.leader = request.leader, None
        pending, request.pending = request.pending, None
        if leader is not None and self._is_behind(leader, request.num_common_tokens):
            runs = leader.state is RequestState.RUNNING
            if (runs and request.offer is None) or now < request.patience_ends:
                request.leader = leader
                return True
            request.num_follows = MAX_FOLLOWS
        elif pending is not None and not pending.is_over:
            if now < request.patience_ends:
                request.pending = pending
                return True
            request.num_follows = MAX_FOLLOWS
        if request.num_follows == MAX_FOLLOWS:
            return False
        for other in producers:
            if other.cache_salt != request.cache_salt:
                continue
            num_common = self._common_tokens(request, other)
            if num_common - self._progress(other) < MIN_FOLLOWED_TOKENS:
                continue
            if self._begins(request, num_common, now):
                request.leader = other
                return True
        tokens = request.cacheable(self._block_size)
        pending = self._pool.pending(tokens, request.cache_salt)
        if pending is not None:
            num_common = pending.num_common(tokens) // self._block_size * self._block_size
            if self._begins(request, num_common, now):
                request.pending = pending
                return True
        return False

    def _begins(self, request: Request, num_common: int, now: float) -> bool:
        """Whether what another will have is much beside what is here; then it waits, not for ever."""
        tokens = request.cacheable(self._block_size)
        num_cached = self._pool.match(tokens, request.cache_salt).num_tokens
        if num_common - num_cached < MIN_FOLLOWED_TOKENS:
            return False
        request.num_common_tokens = num_common
        request.num_follows += 1
        request.patience_ends = now + self._patience(request, num_cached, num_common)
        return True

    def _is_behind(self, leader: Request, num_tokens: int) -> bool:
        """Whether it gets on, and has not got so far yet."""
        at_work = leader.state is RequestState.RUNNING or leader.state is RequestState.PULLING
        return at_work and self._progress(leader) < num_tokens

    def _progress(self, request: Request) -> int:
        """Tokens of it that others can find."""
        return request.table.num_shared * self._block_size

    def _common_tokens(self, request: Request, other: Request) -> int:
        """Length of the common prefix that `other` will publish and `request` can use: whole blocks."""
        size = min(request.num_tokens - 1, other.num_tokens - 1)
        differ = request.tokens(0, size) != other.tokens(0, size)
        first = int(np.argmax(differ)) if size else 0
        num_common = first if size and differ[first] else size
        return num_common // self._block_size * self._block_size
