"""What a transport is: `begin → poll → cancel`. No loop ever waits for one.

A pull copies blocks out of another instance's arena into blocks of ours, verified (DESIGN "Moving KV"): the
source's generations are compared with the addresses before and after the copy, and only the longest prefix
for which both agree counts. So a pull may bring less than was asked for; the rest is a miss, to be
recomputed, with a reason.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from memserve.messages import BlockRefs
from memserve.pool.allocator import BlockIds


@dataclass(frozen=True, slots=True)
class PullResult:
    """How a pull ended: the first `num_blocks` of what was asked for are here and verified.

    `num_bytes` were copied (also those that then failed verification), in `elapsed_ms` from `begin` to the
    end. `failure` says why blocks are lacking; None when none is.
    """

    num_blocks: int
    num_bytes: int
    elapsed_ms: float
    failure: str | None


class Pull(Protocol):
    """One pull under way. Its end, however early, is followed by a wake-up of the loop."""

    def poll(self) -> PullResult | None:
        """How it ended, or None while it goes on. Until then the destination blocks may be written to."""

    def cancel(self) -> None:
        """Ask it to stop. Its blocks may be reused only once `poll` has a result, which comes soon."""


class Transfer(Protocol):
    """A way to reach other arenas. Everything is called from one thread, and nothing blocks but `close`."""

    def begin(self, refs: BlockRefs, into: BlockIds, layers_from: int | None = None) -> Pull:
        """Pull blocks `refs` into our blocks `into`, in this order. Never raises: a failure is a result.

        With `layers_from` the source is computing them (see `messages.Stored`); a transport that cannot
        follow it refuses.
        """

    def close(self) -> None:
        """Cancel every pull and wait until none writes any more."""


@dataclass(frozen=True, slots=True)
class FailedPull:
    """A pull that could not even begin."""

    failure: str

    def poll(self) -> PullResult:
        """The failure, at once."""
        return PullResult(num_blocks=0, num_bytes=0, elapsed_ms=0.0, failure=self.failure)

    def cancel(self) -> None:
        """Nothing to stop."""
