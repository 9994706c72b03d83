"""How many tokens fit in a step: a fixed bound, and on a CPU also a bound on time.

A CPU step must stay near `max_step_ms`, or a cancel and the running decodes wait for a long prefill
(DESIGN "Failure"). What a token costs depends on the model, the machine and the context it attends to, so
it is measured:

    step_ms ≈ per_token * num_tokens + per_pair * num_pairs      pairs = (query, key) pairs attended

fitted to the steps that held prefill, older ones counting less. Pure: times come as arguments.

A `StepTally` is one step being filled. It always leaves room for one chunk of MIN_CHUNK_TOKENS, so that
decodes, which all run in every step, cannot starve a prefill.
"""

from __future__ import annotations

import math

MIN_CHUNK_TOKENS = 16

# Weight of the past at each new observation: some ten steps are remembered, a long prompt's worth, so that the
# costs of tokens and of pairs can be told apart by its short and its long contexts.
_FORGETTING = 0.9


class StepBudget:
    """The bound on a step's tokens, learned from the steps observed."""

    def __init__(self, max_tokens: int, max_step_ms: float | None) -> None:
        self.max_tokens = max_tokens
        self.max_step_ms = max_step_ms
        # Before anything is measured a step takes one minimal chunk.
        self._per_token_ms = (max_step_ms or 0.0) / MIN_CHUNK_TOKENS
        self._per_pair_ms = 0.0
        # Of the observations x = pairs per token, y = ms per token: the sums of 1, x, x², y, xy.
        self._sums = [0.0] * 5

    def open(self) -> StepTally:
        """An empty step."""
        return StepTally(self)

    def cost_ms(self, num_tokens: int, num_pairs: float) -> float:
        """Predicted time of a step."""
        return self._per_token_ms * num_tokens + self._per_pair_ms * num_pairs

    def observe(self, tally: StepTally, step_ms: float) -> None:
        """Learn from a step that was run. Steps without prefill say nothing about chunks and are skipped."""
        if self.max_step_ms is None or tally.num_chunk_tokens < MIN_CHUNK_TOKENS:
            return
        x = tally.num_pairs / tally.num_tokens
        y = step_ms / tally.num_tokens
        for index, value in enumerate((1.0, x, x * x, y, x * y)):
            self._sums[index] = self._sums[index] * _FORGETTING + value
        self._fit()

    def fitting_tokens(self, context_len: int, left_ms: float) -> int:
        """The largest chunk, after `context_len` tokens, predicted to take at most `left_ms`."""
        if left_ms <= 0:
            return 0
        # n tokens attend to n * context_len + n^2 / 2 pairs: solve half * n^2 + linear * n = left_ms.
        half = self._per_pair_ms / 2
        linear = self._per_token_ms + self._per_pair_ms * context_len
        root = linear + math.sqrt(linear * linear + 4 * half * left_ms)
        return self.max_tokens if root == 0 else int(min(self.max_tokens, 2 * left_ms / root))

    def _fit(self) -> None:
        """The line y = per_token + per_pair * x through the observations, with both costs non-negative."""
        weight, x, xx, y, xy = self._sums
        spread = weight * xx - x * x
        # All at one context: it cannot be told apart what is the tokens' and what the pairs' cost.
        slope = (weight * xy - x * y) / spread if spread > 1e-6 * weight * xx else 0.0
        self._per_pair_ms = min(max(slope, 0.0), xy / xx)
        self._per_token_ms = max((y - self._per_pair_ms * x) / weight, 0.0)


class StepTally:
    """What one step holds so far."""

    __slots__ = ("_budget", "num_chunk_tokens", "num_pairs", "num_tokens")

    def __init__(self, budget: StepBudget) -> None:
        self._budget = budget
        self.num_tokens = 0
        self.num_pairs = 0.0
        self.num_chunk_tokens = 0

    def add_decode(self, context_len: int) -> None:
        """One decode token with `context_len` tokens before it."""
        self.num_tokens += 1
        self.num_pairs += context_len + 1

    def add_chunk(self, num_tokens: int, context_len: int) -> None:
        """A chunk of prefill after `context_len` tokens."""
        self.num_tokens += num_tokens
        self.num_chunk_tokens += num_tokens
        self.num_pairs += num_tokens * (context_len + num_tokens / 2)

    def room(self, context_len: int) -> int:
        """How many tokens a chunk after `context_len` tokens may have; 0 = the step is full."""
        budget = self._budget
        room = budget.max_tokens - self.num_tokens
        if budget.max_step_ms is not None:
            left_ms = budget.max_step_ms - budget.cost_ms(self.num_tokens, self.num_pairs)
            room = min(room, budget.fitting_tokens(context_len, left_ms))
        if room >= MIN_CHUNK_TOKENS:
            return room
        # A sliver costs a step's overhead for little: full, unless nothing was prefilled yet.
        return 0 if self.num_chunk_tokens else MIN_CHUNK_TOKENS
