"""What was believed of requests when they were placed, against what then came: how good the predicted times
to the first token are, and what becomes of cached tokens on their way.

    available   the most of a prompt that any worker asked was believed to hold (by the prompt trees)
    expected    what the decision counted on, with what it would pull
    captured    what the worker really did not have to compute
    delivered   what the client was told; counted where it is told (metrics.py)

Pure. One call a sequence, at its first token: nothing here is done for every token.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field, replace

from memserve.messages import CachedTokens
from memserve.router.scheduling.policies.decision import Decision

# Bounds of the buckets of |predicted - measured| / measured.
ERROR_BOUNDS = (0.02, 0.05, 0.1, 0.15, 0.25, 0.5, 1.0, 2.0, 5.0)


@dataclass(slots=True)
class Hindsight:
    """Sums over the sequences whose first token came. `error_counts` by bucket, one more than bounds."""

    prompt_tokens: int = 0
    available_tokens: int = 0
    expected_tokens: int = 0
    captured_tokens: int = 0
    predicted_ms: float = 0.0
    measured_ms: float = 0.0
    error_sum: float = 0.0
    error_counts: list[int] = field(default_factory=lambda: [0] * (len(ERROR_BOUNDS) + 1))

    def cached(self, decision: Decision, num_prompt_tokens: int, cached: CachedTokens) -> None:
        """A prompt was computed where `decision` had sent it, which was the last placement before that."""
        self.prompt_tokens += num_prompt_tokens
        self.available_tokens += available_tokens(decision, num_prompt_tokens)
        self.expected_tokens += decision.prefill.num_cached_tokens
        self.captured_tokens += cached.total

    def predicted(self, predicted_ms: float, measured_ms: float) -> None:
        """A first token came that long after its placement."""
        self.predicted_ms += predicted_ms
        self.measured_ms += measured_ms
        if measured_ms > 0.0:
            error = abs(predicted_ms - measured_ms) / measured_ms
            self.error_sum += error
            self.error_counts[bisect_left(ERROR_BOUNDS, error)] += 1

    def copy(self) -> Hindsight:
        """As it is now."""
        return replace(self, error_counts=list(self.error_counts))


def available_tokens(decision: Decision, num_prompt_tokens: int) -> int:
    """What the best of the workers in a decision's table was believed to hold of the prompt; its last token
    is always computed.
    """
    best = max([row.num_cached_tokens for row in decision.prefills])
    moved = min([row.num_moved_tokens for row in decision.decodes], default=num_prompt_tokens)
    return min(max(best, num_prompt_tokens - moved), num_prompt_tokens - 1)
