"""The receiver's side of a transfer (MemServe §MemPool API, transfer and transfer_with_insert).

    match what is here ─► allocate what is lacking ─► pull, verified ─► publish ─► visible to `match`

In this order, so that nobody finds what is not there yet. Where the source had freed or rewritten something
meanwhile, the verified beginning counts and the rest is a miss.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from memserve.messages import BlockRefs
from memserve.pool.allocator import BlockIds
from memserve.pool.transports.base import Pull


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
    """One transfer under way.

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

    def poll(self) -> Received | None:
        """How it ended, or None while it goes on. What was verified is published by then."""
        if self._received is None:
            assert self._pull is not None
            result = self._pull.poll()
            if result is not None:
                self._received = self._finish(result.num_blocks, result.num_bytes, result.failure)
        return self._received

    def cancel(self) -> None:
        """Ask it to stop; it is still polled until it has."""
        if self._received is None and self._pull is not None:
            self._pull.cancel()


def tail(refs: BlockRefs, start: int) -> BlockRefs:
    """The addresses from the `start`th on."""
    return msgspec.structs.replace(refs, blocks=refs.blocks[start:], generations=refs.generations[start:])
