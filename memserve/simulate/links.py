"""Copies of KV between modelled workers: when they are there, and whether what they copied still stood.

An instance sends one copy at a time and receives one at a time, in the order in which they were begun. Blocks
that are still being computed (by-layer) are there a layer's copy after the step that computes them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from memserve.messages import BlockRefs
from memserve.pool.transports.base import PullResult
from memserve.simulate.pool import Storage

# What is left to copy of a chunk when its last layer is computed, as a share of the whole.
_LAST_LAYER = 1 / 32


class Source(Protocol):
    """A worker that blocks are pulled from."""

    @property
    def storage(self) -> Storage: ...

    def step_end(self, step: int, /) -> float:
        """When its step of that number ends or has ended, in seconds; in the past if it is over."""


@dataclass(slots=True)
class Copy:
    """A `pool.transports.base.Pull` whose end is known when it begins. Verified when it ends."""

    clock: Callable[[], float]
    source: Storage
    refs: BlockRefs
    begun_at: float
    ends_at: float
    num_bytes: int
    _result: PullResult | None = None

    def poll(self) -> PullResult | None:
        """See `Pull`."""
        if self._result is None and self.clock() >= self.ends_at:
            num_blocks = self.source.verified(self.refs)
            failure = None if num_blocks == len(self.refs.blocks) else "rewritten at its source"
            ms = (self.ends_at - self.begun_at) * 1e3
            self._result = PullResult(num_blocks, self.num_bytes, ms, failure)
        return self._result

    def cancel(self) -> None:
        """It ends when it would have."""


@dataclass(slots=True)
class Wires:
    """How long each instance is busy with copies.

    Args:
        latency_ms, block_ms: of each copy, and of each of its blocks; 0 = copies take no time.
        block_bytes: of one.
    """

    clock: Callable[[], float]
    latency_ms: float
    block_ms: float
    block_bytes: int
    sources: dict[str, Source] = field(default_factory=dict)
    _sending_until: dict[str, float] = field(default_factory=dict)
    _receiving_until: dict[str, float] = field(default_factory=dict)

    def begin(self, target: str, refs: BlockRefs, layers_from: int | None) -> Copy:
        """Copy blocks to `target`. The caller sees to it that somebody looks when it ends."""
        now, source = self.clock(), self.sources[refs.instance]
        num_blocks = len(refs.blocks)
        copy_s = num_blocks * self.block_ms / 1e3
        start = max(now, self._sending_until.get(refs.instance, 0.0), self._receiving_until.get(target, 0.0))
        ends_at = start + self.latency_ms / 1e3 + copy_s
        self._sending_until[refs.instance] = self._receiving_until[target] = ends_at
        if layers_from is not None:
            last_s = copy_s * _LAST_LAYER + self.latency_ms / 1e3
            ends_at = max(ends_at, source.step_end(layers_from) + last_s)
        return Copy(self.clock, source.storage, refs, now, ends_at, num_blocks * self.block_bytes)
