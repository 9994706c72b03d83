"""A pull that waits in a queue for a thread: what the loop and the thread share of it, over any transport.

queued ─ start ─► started ─ end ─► result        `cancel` ends a queued one at once; a started one is ended
   └─────────── cancel ──────────► result        by the thread, once it has seen `is_cancelled`

What a pull brought counts up to the first block whose generation is not that asked for: `num_same`.
"""

from __future__ import annotations

import threading
import time

import numpy as np
from numpy.typing import NDArray

from memserve.messages import BlockRefs
from memserve.pool.allocator import BlockIds
from memserve.pool.transports.base import PullResult


class QueuedPull:
    """`poll` and `cancel` are the loop's, the rest the thread's."""

    def __init__(self, refs: BlockRefs, into: BlockIds, num_blocks_there: int) -> None:
        """`refs` came over a socket: raises ValueError or OverflowError if they cannot be."""
        self.blocks = np.array(refs.blocks, dtype=np.int64)
        self.generations = np.array(refs.generations, dtype=np.uint64)
        self.tier = refs.tier
        self.into = into
        if self.blocks.shape != self.generations.shape:
            raise ValueError(f"{len(self.blocks)} blocks with {len(self.generations)} generations")
        if len(self.blocks) and not 0 <= self.blocks.min() <= self.blocks.max() < num_blocks_there:
            raise ValueError(f"no such block among {num_blocks_there}")
        self._began_s = time.monotonic()
        self._lock = threading.Lock()
        self._started = False
        self.is_cancelled = False
        self._result: PullResult | None = None

    def poll(self) -> PullResult | None:
        """See `Pull.poll`."""
        return self._result

    def cancel(self) -> None:
        """See `Pull.cancel`: one being copied ends after what of it is under way."""
        with self._lock:
            self.is_cancelled = True
            if not self._started and self._result is None:
                self.end(0, 0, "cancelled")

    def start(self) -> bool:
        """Whether it was not cancelled before; if so, only `end` ends it from now on."""
        with self._lock:
            self._started = self._result is None
        return self._started

    def end(self, num_blocks: int, num_bytes: int, failure: str | None) -> None:
        """From now on its blocks are written to no more."""
        elapsed_ms = (time.monotonic() - self._began_s) * 1e3
        self._result = PullResult(num_blocks, num_bytes, elapsed_ms, failure)


def num_same(found: NDArray[np.uint64], expected: NDArray[np.uint64]) -> int:
    """How many generations, from the first on, are those expected. Both [num_blocks]."""
    changed = found != expected
    return int(changed.argmax()) if changed.any() else len(expected)


def gone(num_verified: int, num_wanted: int, when: str) -> str:
    """The failure of a pull whose source has used blocks anew."""
    return f"{num_wanted - num_verified} of {num_wanted} blocks were gone {when} the copy"
