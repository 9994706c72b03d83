"""What a prompt will take on an instance, by stepping the scheduler's own chunks beside its running decodes
(the paper's `exec(x, y)`); and how far predictions are corrected by what is seen.

Every step takes all decodes and fills the rest with a chunk (workers/scheduler.py), so a decode batch makes a
prompt slower by its own time in each step and by the room that it takes: interference needs no term of its
own.
"""

from __future__ import annotations

import math
from enum import IntEnum, auto
from typing import NamedTuple

from memserve.router.scheduling.cost_model import FAR_CONTEXT, CostModel, room, speed_of

_MEMO_SIZE = 65_536
# How finely decode batches are told apart, so that predictions are found again: 2**(1/6) is 12 %.
_GRAIN = 6
# What one observation moves a factor by, and how far off a factor may go.
_RATE = 0.1
_MAX_FACTOR = 4.0


class Batch(NamedTuple):
    """Decodes that run on an instance: how many, and the tokens that they attend to."""

    num_rows: int = 0
    num_context: int = 0


IDLE = Batch()


class Phase(IntEnum):
    """What is predicted. (Numbers, as they hash ten times quicker than other members.)"""

    PREFILL = auto()
    DECODE = auto()
    TRANSFER = auto()


class Correction:
    """One factor for each phase, alone or beside other work, by which predictions are multiplied.

    Each observation moves it by a tenth of the way (of the logarithms), so what was seen long ago is
    forgotten; it stays within a factor of 4.
    """

    def __init__(self) -> None:
        self._logs: dict[tuple[Phase, bool], float] = {}
        self._factors: dict[tuple[Phase, bool], float] = {}

    def factor(self, phase: Phase, is_beside: bool) -> float:
        """What to multiply a raw prediction by; 1 until something was observed."""
        return self._factors.get((phase, is_beside), 1.0) if self._factors else 1.0

    def observe(self, phase: Phase, is_beside: bool, raw_ms: float, measured_ms: float) -> None:
        """A raw prediction (not corrected), and what it was in truth."""
        if raw_ms <= 0 or measured_ms <= 0:
            return
        bound = math.log(_MAX_FACTOR)
        seen = min(bound, max(-bound, math.log(measured_ms / raw_ms)))
        log = self._logs.get((phase, is_beside), 0.0)
        log += _RATE * (seen - log)
        self._logs[phase, is_beside], self._factors[phase, is_beside] = log, math.exp(log)


class Predictor:
    """A cost model ready for use: tables by rows, and a memory of prompts stepped before.

    Predictions are raw: `Correction` is the caller's to apply.
    """

    def __init__(self, model: CostModel) -> None:
        self.model = model
        self._speed = None if model.budget.max_step_ms is None else speed_of(model)
        operators = model.operators
        self._rows_ms = [
            operators.fixed_ms + operators.rows.ms(n) for n in range(model.budget.max_tokens + 1)
        ]
        self._decode_row_ms = operators.decode_row_ms + operators.logit_row_ms
        self._context_ms = operators.context_ms
        pull = model.links.from_device
        self._pull_latency_ms, self._pull_token_ms = pull.latency_ms, model.kv_token_bytes / pull.bytes_per_ms
        self._memo: dict[tuple[int, int, int, int], float] = {}

    def prefill_ms(self, num_tokens: int, num_cached: int, batch: Batch = IDLE) -> float:
        """Time to compute a prompt of which the first tokens are cached, to its first drawn token."""
        num_rows, num_context = _coarse(batch.num_rows), _coarse(batch.num_context)
        key = (num_tokens, num_cached, num_rows, num_context)
        known = self._memo.get(key)
        if known is None:
            if len(self._memo) >= _MEMO_SIZE:
                self._memo.clear()
            known = self._memo[key] = self._step_through(num_tokens, num_cached, num_rows, num_context)
        return known

    def decode_ms(self, num_rows: int, num_context: int) -> float:
        """Time of a step in which so many requests, attending to so many tokens, draw one each."""
        rows_ms = self._rows_ms
        ms = rows_ms[num_rows] if num_rows < len(rows_ms) else self._many_rows_ms(num_rows)
        draw_ms = self.model.operators.draw_ms if num_rows else 0.0
        return ms + draw_ms + num_rows * self._decode_row_ms + num_context * self._context_ms

    def pull_ms(self, num_tokens: int) -> float:
        """Time to pull the KV of so many tokens from another instance's device tier."""
        return self._pull_latency_ms + num_tokens * self._pull_token_ms if num_tokens else 0.0

    def pull_host_ms(self, num_tokens: int) -> float:
        """The same out of its host tier."""
        link = self.model.links.from_host
        size = num_tokens * self.model.kv_token_bytes
        return link.latency_ms + size / link.bytes_per_ms if num_tokens else 0.0

    def _step_through(self, num_tokens: int, num_cached: int, num_rows: int, num_context: int) -> float:
        operators, budget, speed = self.model.operators, self.model.budget, self._speed
        rows_ms = self._rows_ms
        at = min(num_cached, num_tokens - 1)
        num_steps, num_chunks, ms = 0, 0, 0.0
        num_pairs, num_far_pairs, num_squares, num_gathered = 0, 0, 0, 0
        held_pairs = num_context + num_rows
        while at < num_tokens:
            chunk = min(num_tokens - at, room(budget, speed, num_rows, held_pairs, at, is_first=True))
            step_rows = chunk + num_rows
            ms += rows_ms[step_rows] if step_rows < len(rows_ms) else self._many_rows_ms(step_rows)
            num_pairs += chunk * at
            num_far_pairs += chunk * max(0, at - FAR_CONTEXT)
            num_squares += chunk * chunk
            num_gathered += at
            num_chunks += chunk > 1
            num_steps += 1
            at += chunk
        ms += operators.pair_ms * num_pairs + operators.square_ms * num_squares
        ms += (
            operators.chunk_ms * num_chunks
            + operators.gather_ms * num_gathered
            + operators.far_pair_ms * num_far_pairs
        )
        if num_rows:
            ms += num_steps * (operators.mixed_ms + operators.draw_ms)
            ms += num_steps * (self._decode_row_ms * num_rows + self._context_ms * num_context)
        else:
            ms += operators.draw_ms
        return ms + operators.logit_row_ms + self.model.request_ms

    def _many_rows_ms(self, num_rows: int) -> float:
        """More decodes than the budget has room for."""
        return self.model.operators.fixed_ms + self.model.operators.rows.ms(num_rows)


def _coarse(count: int) -> int:
    """The nearest of a geometric series; exact where that is finer."""
    if count <= 8:
        return count
    return round(2 ** (round(math.log2(count) * _GRAIN) / _GRAIN))
