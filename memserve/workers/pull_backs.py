"""Decode → prefill: a prefill worker pulls back what was generated from its prompts, so that the next turn of
a conversation finds it (MemServe §Context caching, PD-Caching-3).

Low priority: nobody waits for it, it takes only blocks that are plentiful, and a source that has evicted or
rewritten its blocks meanwhile is no failure, only a miss. The prefix before it must still be cached here.
"""

from __future__ import annotations

import logging
from typing import NamedTuple, Protocol

from memserve.messages import BlockRefs, PullBack, PulledBack
from memserve.pool.allocator import BlockIds
from memserve.pool.block_table import BlockTable
from memserve.pool.transports.base import Pull, PullResult

logger = logging.getLogger(__name__)

# This share of the pool stays untouched: running requests come first.
_SPARE = 1 / 16
# At most so many at once.
_MAX_RUNNING = 64


class Pool(Protocol):
    """What is needed of a `MemPool`."""

    @property
    def num_blocks(self) -> int: ...
    @property
    def num_available(self) -> int: ...
    def alloc_mem(self, num_blocks: int, /) -> BlockIds | None: ...
    def acquire(self, tokens: bytes, salt: str, /) -> BlockTable: ...
    def publish(self, table: BlockTable, tokens: bytes, /) -> None: ...
    def release(self, table: BlockTable, /) -> None: ...
    def fetch(self, refs: BlockRefs, into: BlockIds, /) -> Pull: ...


class _Running(NamedTuple):
    message: PullBack
    table: BlockTable
    pull: Pull


class PullBacks:
    """Those under way; owner of their tables."""

    def __init__(self, pool: Pool, block_size: int) -> None:
        self._pool = pool
        self._block_bytes = block_size * 4
        self._block_size = block_size
        self._running: list[_Running] = []

    def __bool__(self) -> bool:
        """Whether `poll` has anything to look at."""
        return bool(self._running)

    def begin(self, message: PullBack) -> PulledBack | None:
        """Start a pull; the answer if there is nothing to be pulled, or no room."""
        table = self._pool.acquire(message.token_ids, message.cache_salt)
        failure = self._start(message, table)
        if failure is None:
            return None
        self._pool.release(table)
        return PulledBack(message.request_id, 0, 0, failure or None)

    def poll(self) -> list[PulledBack]:
        """The answers of those that ended since the last call. What is verified is cached by then."""
        answers: list[PulledBack] = []
        going_on: list[_Running] = []
        for running in self._running:
            result = running.pull.poll()
            if result is None:
                going_on.append(running)
            else:
                answers.append(self._arrive(running, result))
        self._running = going_on
        return answers

    def cancel_all(self) -> None:
        """Stop them; each is still polled until its copy has ended."""
        for running in self._running:
            running.pull.cancel()

    def _start(self, message: PullBack, table: BlockTable) -> str | None:
        """None if a pull has begun, "" if nothing is lacking, else why it cannot."""
        num_blocks = len(message.token_ids) // self._block_bytes
        if message.first_block + len(message.refs.blocks) != num_blocks:
            return f"{len(message.refs.blocks)} blocks from {message.first_block} for {num_blocks}"
        done = table.num_shared
        if done == num_blocks:
            return ""
        if done < message.first_block:
            return "the prefix before it is no longer cached"
        num_lacking = num_blocks - done
        spare = int(self._pool.num_blocks * _SPARE)
        if len(self._running) >= _MAX_RUNNING or self._pool.num_available - num_lacking < spare:
            return "no room"
        block_ids = self._pool.alloc_mem(num_lacking)
        assert block_ids is not None
        table.append(block_ids)
        skip = done - message.first_block
        refs = message.refs
        lacking = BlockRefs(
            refs.instance, refs.incarnation, refs.tier, refs.blocks[skip:], refs.generations[skip:]
        )
        self._running.append(_Running(message, table, self._pool.fetch(lacking, block_ids)))
        return None

    def _arrive(self, running: _Running, result: PullResult) -> PulledBack:
        message, table, _ = running
        start = table.num_shared * self._block_bytes
        stop = start + result.num_blocks * self._block_bytes
        self._pool.publish(table, message.token_ids[start:stop])
        self._pool.release(table)
        num_tokens = result.num_blocks * self._block_size
        logger.debug("%s: %d tokens came back, %s", message.request_id, num_tokens, result.failure)
        return PulledBack(message.request_id, num_tokens, result.num_bytes, result.failure)
