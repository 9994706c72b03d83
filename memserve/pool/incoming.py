"""The receiver's side of a transfer (MemServe §MemPool API, transfer and transfer_with_insert).

    match what is here ─► allocate what is lacking ─► pull, verified ─► publish ─► visible to `match`

In this order, so that nobody finds what is not there yet. While another pull under way brings blocks of the
same prefix, this one waits for its end, holding nothing, and pulls what then is lacking (pending.py). Where
the source had freed or rewritten something meanwhile, the verified beginning counts and the rest is a miss.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np

from memserve.messages import BlockRefs, Transfer
from memserve.pool.allocator import BlockIds
from memserve.pool.block_table import BlockTable
from memserve.pool.index import Match
from memserve.pool.pending import Pending
from memserve.pool.transports.base import FailedPull, Pull
from memserve.radix_tree import TOKEN_BYTES

_MAX_WAITS = 3  # pulls, one after another, that a transfer waits for before it goes by itself


@dataclass(frozen=True, slots=True)
class Received:
    """How a transfer ended. `num_blocks` more are here, `blocks` hold what was asked for, in order: the
    receiver's own, or the index's with an insert (good while they stay cached). `failure` says why some
    are lacking.
    """

    num_blocks: int
    num_bytes: int
    blocks: BlockIds
    failure: str | None


class Incoming:
    """One transfer under way. Polled until it has ended, also after `cancel`: others may wait for it.

    Args:
        pull: of what is lacking; None = the end is known already.
        finish: given the verified blocks, the bytes and a failure, what came of it; called once.
    """

    def __init__(
        self,
        pull: Pull | None,
        finish: Callable[[int, int, str | None], Received],
        failure: str | None = None,
    ) -> None:
        self._pull = pull
        self._finish = finish
        self._received = None if pull is not None else finish(0, 0, failure)
        self._leader: Pending | None = None
        self._begin: Callable[[], Incoming] | None = None

    @classmethod
    def after(cls, leader: Pending, begin: Callable[[], Incoming]) -> Incoming:
        """One that begins when the leader's pull has ended."""
        incoming = cls(FailedPull("it waits"), _nothing)
        incoming._leader, incoming._begin = leader, begin
        return incoming

    @property
    def is_waiting(self) -> bool:
        """Whether it has not begun, as another's pull brings the same."""
        return self._leader is not None

    def poll(self) -> Received | None:
        """How it ended, or None while it goes on. What was verified is published by then."""
        if self._leader is not None:
            if not self._leader.is_over:
                return None
            assert self._begin is not None
            begun = self._begin()
            self._pull, self._finish, self._received = begun._pull, begun._finish, begun._received
            self._leader, self._begin = begun._leader, begun._begin
            return self._received  # one that could not begin has ended; what has begun rings the bell
        if self._received is None:
            assert self._pull is not None
            result = self._pull.poll()
            if result is not None:
                self._received = self._finish(result.num_blocks, result.num_bytes, result.failure)
        return self._received

    def cancel(self) -> None:
        """Ask it to stop; it is still polled until it has."""
        if self._leader is not None:
            self._leader = self._begin = None
            self._received = _nothing(0, 0, "cancelled")
        elif self._received is None and self._pull is not None:
            self._pull.cancel()


class Pool(Protocol):
    """What is needed of a `MemPool`."""

    @property
    def block_size(self) -> int: ...
    @property
    def num_available(self) -> int: ...
    def alloc_mem(self, num_blocks: int, /) -> BlockIds | None: ...
    def free_mem(self, ids: BlockIds, /) -> None: ...
    def match(self, tokens: bytes, salt: str, /) -> Match: ...
    def expect(self, tokens: bytes, salt: str, /) -> Pending: ...
    def pending(self, tokens: bytes, salt: str, /) -> Pending | None: ...
    def acquire(self, tokens: bytes, salt: str, /) -> BlockTable: ...
    def publish(self, table: BlockTable, tokens: bytes, /) -> None: ...
    def release(self, table: BlockTable, /) -> None: ...
    def fetch(self, refs: BlockRefs, into: BlockIds, /) -> Pull: ...


def begin_transfer(pool: Pool, offered: Transfer, spare: int) -> Incoming:
    """See `MemPool.receive`."""
    return _with_insert(pool, offered, spare) if offered.tokens else _blocks_alone(pool, offered, spare)


def _with_insert(pool: Pool, offered: Transfer, spare: int, num_waits: int = 0) -> Incoming:
    refs, step = offered.refs, TOKEN_BYTES * pool.block_size
    num_blocks = len(offered.tokens) // step
    failure: str | None = None
    if offered.first_block + len(refs.blocks) != num_blocks:
        failure = f"{len(refs.blocks)} blocks from {offered.first_block} for {num_blocks}"
    elif spare and len(pool.match(offered.tokens, offered.salt).host_blocks):
        failure = "the prefix before it is swapped out"  # too cold to push others out for
    if failure is not None:
        return Incoming(None, _nothing, failure)
    leader = pool.pending(offered.tokens, offered.salt)
    if leader is not None and num_waits < _MAX_WAITS:
        num_expected = leader.num_common(offered.tokens) // pool.block_size * pool.block_size
        if num_expected > pool.match(offered.tokens, offered.salt).num_tokens:
            return Incoming.after(leader, partial(_with_insert, pool, offered, spare, num_waits + 1))
    table = pool.acquire(offered.tokens, offered.salt)
    num_shared = (
        table.num_shared
    )  # of a swapped out prefix perhaps less than is cached: what there is room for
    num_lacking = num_blocks - num_shared
    if num_shared < offered.first_block:
        failure = "the prefix before it is no longer cached"
    elif num_lacking and pool.num_available - num_lacking < spare:
        failure = "no room"
    if failure is not None:
        pool.release(table)
        return Incoming(None, _nothing, failure)

    def finish(num_verified: int, num_bytes: int, failure: str | None) -> Received:
        stop = num_shared + num_verified
        pool.publish(table, offered.tokens[num_shared * step : stop * step])
        if pending is not None:
            pending.end()  # those who wait for it find what was just published
        blocks = table.ids(table.num_shared).copy()
        pool.release(table)
        return Received(num_verified, num_bytes, blocks, failure)

    pending: Pending | None = None
    if num_shared == num_blocks:
        return Incoming(None, finish)
    pending = pool.expect(offered.tokens, offered.salt)
    pending.begin()
    ids = pool.alloc_mem(num_lacking)
    assert ids is not None
    table.append(ids)
    return Incoming(pool.fetch(refs.tail(num_shared - offered.first_block), ids), finish)


def _nothing(num_verified: int, num_bytes: int, failure: str | None) -> Received:
    return Received(0, 0, np.empty(0, dtype=np.int64), failure)


def _blocks_alone(pool: Pool, offered: Transfer, spare: int) -> Incoming:
    count = len(offered.refs.blocks)
    ids: BlockIds | None = None
    failure = "no room"
    if offered.into is None:
        if pool.num_available - count >= spare:
            ids = pool.alloc_mem(count)
    elif len(offered.into) == count:
        ids = np.array(offered.into, dtype=np.int64)
    else:
        failure = f"{count} blocks into {len(offered.into)}"
    into = np.empty(0, dtype=np.int64) if ids is None else ids

    def finish(num_verified: int, num_bytes: int, failure: str | None) -> Received:
        if offered.into is None:
            pool.free_mem(into[num_verified:])
        return Received(num_verified, num_bytes, into[:num_verified], failure)

    return Incoming(None, finish, failure) if ids is None else Incoming(pool.fetch(offered.refs, ids), finish)
