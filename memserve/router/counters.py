"""What happened to requests and their KV since the start, for metrics. Numbers only ever grow."""

from __future__ import annotations

from dataclasses import dataclass

from memserve.messages import Pulled, PulledBack, Removed, Tier


@dataclass(slots=True)
class DispatcherCounters:
    """See the module."""

    submitted: int = 0
    finished: int = 0
    refused: int = 0
    abandoned: int = 0
    replayed: int = 0
    stale: int = 0
    pulls: int = 0
    failed_pulls: int = 0
    pulled_tokens: int = 0
    pulled_bytes: int = 0
    pull_ms: float = 0.0
    salvaged_tokens: int = 0
    pull_backs: int = 0
    pull_backs_done: int = 0
    pull_back_misses: int = 0
    pulled_back_tokens: int = 0
    pulled_back_bytes: int = 0
    evicted_blocks: int = 0
    swapped_out_blocks: int = 0
    swapped_in_blocks: int = 0
    prefill_pulls: int = 0
    failed_prefill_pulls: int = 0
    prefill_pulled_tokens: int = 0
    prefill_pulled_bytes: int = 0

    def on_pulled(self, pulled: Pulled, *, is_handoff: bool) -> None:
        """KV was pulled for a request: handed off, or for its prefill."""
        num_tokens = pulled.num_tokens - pulled.num_cached_tokens
        has_failed = pulled.failure is not None
        self.pulls += 1
        self.failed_pulls += has_failed
        self.pulled_tokens += num_tokens
        self.pulled_bytes += pulled.num_bytes
        self.pull_ms += pulled.pull_ms
        if not is_handoff:
            self.prefill_pulls += 1
            self.failed_prefill_pulls += has_failed
            self.prefill_pulled_tokens += num_tokens
            self.prefill_pulled_bytes += pulled.num_bytes

    def on_pulled_back(self, answer: PulledBack) -> None:
        """A worker did what it could to pull what was generated back."""
        self.pull_backs_done += 1
        self.pulled_back_tokens += answer.num_tokens
        self.pulled_back_bytes += answer.num_bytes
        self.pull_back_misses += answer.failure is not None

    def on_removed(self, removed: Removed) -> None:
        """Blocks of a worker are gone, or in its other tier."""
        num_blocks, moved_to = len(removed.refs.blocks), removed.moved_to
        if moved_to is None:
            self.evicted_blocks += num_blocks
        elif removed.refs.tier is Tier.DEVICE:
            self.swapped_out_blocks += num_blocks
        elif moved_to.tier is Tier.DEVICE:
            self.swapped_in_blocks += num_blocks
