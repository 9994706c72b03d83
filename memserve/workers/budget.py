"""How many tokens fit in a step: a fixed bound, and on a CPU also a bound on time.

A CPU step must stay near `max_step_ms`, or a cancel and the running decodes wait for a long prefill
(DESIGN "Failure"). What a token costs depends on the model, the machine and the context it attends to, so
it is measured:

    step_ms ≈ speed * (num_tokens + pair_cost * num_pairs)      pairs = (query, key) pairs attended

`pair_cost` is the shape of the curve: it belongs to the model and its kernels, starts as what arithmetic says
(`pair_cost`) and is corrected by many steps. `speed` belongs to the moment: the median of the last few steps,
so that one slow step changes nothing, and a machine that has become slower is noticed after three.

A `StepTally` is one step being filled. Both bounds are for prefill: decodes all run in every step, and where
they leave no room a chunk of MIN_CHUNK_TOKENS is still taken, so that they cannot starve a prefill. A worker
whose `max_batch_tokens` is at least `max_running + MIN_CHUNK_TOKENS` never exceeds its bound on tokens.

Pure: times come as arguments.
"""

from __future__ import annotations

import math
from collections import deque

import numpy as np
from numpy.typing import NDArray

from memserve.model_config import ModelConfig
from memserve.step_memory import MAX_LOGIT_ROWS
from memserve.step_shapes import whole_rows

MIN_CHUNK_TOKENS = 16

# Share of `max_step_ms` that is aimed at: a step's time scatters by about 15 % on a machine that does other
# things beside.
_AIM = 0.88
# Steps whose median is the speed, and steps by which the cost of a pair is corrected: several prompts' worth,
# because it shows in the difference between short and long contexts.
_SPEED_STEPS = 5
_SHAPE_STEPS = 24
# Candidates for the cost of a pair, as factors of its first guess, 19 % apart; and how much better (in the
# sum of the relative errors of all steps) a candidate must be for each such step away from the guess.
_FACTORS: NDArray[np.float64] = 2.0 ** (np.arange(-40, 41) / 4)
_RELUCTANCE = np.abs(np.arange(-40, 41)) * 0.02
# A step shorter than this share of the bound is mostly overhead, and says little about large chunks.
_SHORT_STEP = 1 / 8


def pair_cost(model: ModelConfig) -> float:
    """A first guess at what one (query, key) pair costs, in tokens without any context.

    By the multiplications of a layer; attention does three quarters as many in a second as the matrices (2
    threads, bfloat16).
    """
    q, kv = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    matrices = model.hidden_size * (2 * q + 2 * kv + 3 * model.intermediate_size)
    return 2 * q / matrices / 0.75


class StepBudget:
    """The bound on a step's tokens, learned from the steps observed.

    Args:
        max_tokens: of one step.
        max_step_ms: time that a step with prefill should not exceed; None = only tokens count.
        pair_cost: see `pair_cost`.
    """

    def __init__(self, max_tokens: int, max_step_ms: float | None, pair_cost: float = 5e-4) -> None:
        self.max_tokens = max_tokens
        self.max_step_ms = max_step_ms
        self._candidates = pair_cost * _FACTORS
        self._pair_cost = pair_cost
        # Before anything is measured a step takes one minimal chunk.
        self._speed_ms = (max_step_ms or 0.0) / MIN_CHUNK_TOKENS
        # Observations: pairs per token, ms per token, weight.
        self._steps: deque[tuple[float, float, int]] = deque(maxlen=_SHAPE_STEPS)

    def open(self) -> StepTally:
        """An empty step."""
        return StepTally(self)

    def cost_ms(self, num_tokens: int, num_pairs: float) -> float:
        """Predicted time of a step."""
        return self._speed_ms * (num_tokens + self._pair_cost * num_pairs)

    def observe(self, tally: StepTally, step_ms: float) -> None:
        """Learn from a step that was run. Steps without prefill say nothing about chunks and are skipped."""
        if self.max_step_ms is None or tally.num_chunk_tokens < MIN_CHUNK_TOKENS:
            return
        short_ms = self.max_step_ms * _SHORT_STEP
        if step_ms < 2 * short_ms and self.cost_ms(tally.num_tokens, tally.num_pairs) < short_ms:
            return
        # Overhead counts more in small steps, so they say less.
        weight = min(tally.num_tokens, 16 * MIN_CHUNK_TOKENS)
        self._steps.append((tally.num_pairs / tally.num_tokens, step_ms / tally.num_tokens, weight))
        self._fit()

    def fitting_tokens(self, context_len: int, left_ms: float) -> int:
        """The largest chunk, after `context_len` tokens, predicted to take at most `left_ms`."""
        if left_ms <= 0:
            return 0
        # n tokens attend to n * context_len + n^2 / 2 pairs: solve half * n^2 + linear * n = left_ms.
        half = self._speed_ms * self._pair_cost / 2
        linear = self._speed_ms * (1 + self._pair_cost * context_len)
        root = linear + math.sqrt(linear * linear + 4 * half * left_ms)
        return self.max_tokens if root == 0 else int(min(self.max_tokens, 2 * left_ms / root))

    def _fit(self) -> None:
        """The cost of a pair for which the steps agree best on a speed; then the speed by the last few."""
        pairs, times, weights = np.array(self._steps).T
        # [candidate, step]: the logarithm of the speed that each step shows.
        speeds = np.log(times) - np.log1p(self._candidates[:, None] * pairs)
        scatter = np.abs(speeds - np.median(speeds, axis=1, keepdims=True)) @ (weights / weights.sum())
        best = int((scatter + _RELUCTANCE / len(times)).argmin())
        self._pair_cost = float(self._candidates[best])
        self._speed_ms = math.exp(_weighted_median(speeds[best, -_SPEED_STEPS:], weights[-_SPEED_STEPS:]))


class StepTally:
    """What one step holds so far."""

    __slots__ = ("_budget", "num_chunk_tokens", "num_logit_rows_left", "num_pairs", "num_tokens")

    def __init__(self, budget: StepBudget) -> None:
        self._budget = budget
        self.num_tokens = 0
        self.num_pairs = 0.0
        self.num_chunk_tokens = 0
        self.num_logit_rows_left = MAX_LOGIT_ROWS

    def add_decode(self, context_len: int) -> None:
        """One decode token with `context_len` tokens before it."""
        self.num_tokens += 1
        self.num_pairs += context_len + 1

    def add_chunk(self, num_tokens: int, context_len: int) -> None:
        """A chunk of prefill after `context_len` tokens."""
        self.num_tokens += num_tokens
        self.num_chunk_tokens += num_tokens
        self.num_pairs += num_tokens * (context_len + num_tokens / 2)

    def add_logit_rows(self, num_rows: int) -> None:
        """Rows of a chunk that all want logits; at most `num_logit_rows_left`."""
        assert num_rows <= self.num_logit_rows_left
        self.num_logit_rows_left -= num_rows

    def room(self, context_len: int) -> int:
        """How many tokens a chunk after `context_len` tokens may have; 0 = the step is full. A chunk of so
        many makes a step that needs no filler (`step_shapes`).
        """
        room = self._budget.max_tokens - self.num_tokens
        if self._budget.max_step_ms is not None:
            room = min(room, self._room_in_time(context_len, self._budget.max_step_ms))
        room = whole_rows(self.num_tokens + room) - self.num_tokens
        if room >= MIN_CHUNK_TOKENS:
            return room
        # A sliver costs a step's overhead for little: full, unless nothing was prefilled yet.
        return 0 if self.num_chunk_tokens else MIN_CHUNK_TOKENS

    def _room_in_time(self, context_len: int, max_step_ms: float) -> int:
        spent_ms = self._budget.cost_ms(self.num_tokens, self.num_pairs)
        return self._budget.fitting_tokens(context_len, _AIM * max_step_ms - spent_ms)


def _weighted_median(values: NDArray[np.float64], weights: NDArray[np.float64]) -> float:
    order = np.argsort(values)
    reached = np.cumsum(weights[order])
    return float(values[order][np.searchsorted(reached, reached[-1] / 2)])
