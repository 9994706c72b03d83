"""What a modelled worker's steps take by its cost model: one with a prompt, or a span of decodes. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from memserve.router.scheduling.cost_model import FAR_CONTEXT, CostModel, StepShape
from memserve.router.scheduling.predictor import Predictor
from memserve.workers.steps import Chunk


class Span(NamedTuple):
    """Decode steps in a row, of unchanging rows: the first takes `step_s`, each `growth_s` more than the one
    before.
    """

    begins_at: float
    step_s: float
    growth_s: float
    rows: Sequence[Chunk]

    def lasts_s(self, num_steps: int) -> float:
        """So many steps."""
        return num_steps * self.step_s + self.growth_s * num_steps * (num_steps - 1) / 2

    def steps_until(self, now: float) -> int:
        """Steps that are over when the one that goes on at `now` is over."""
        left_s = now - self.begins_at
        linear = self.step_s - self.growth_s / 2
        if self.growth_s * left_s < 1e-9 * linear * linear:
            num_steps = left_s / linear
        else:
            num_steps = ((linear**2 + 2 * self.growth_s * left_s) ** 0.5 - linear) / self.growth_s
        return math.ceil(num_steps - 1e-9)

    @classmethod
    def of(cls, rows: Sequence[Chunk], predictor: Predictor, now: float) -> Span:
        """That begins now."""
        num_context = sum(request.num_computed_tokens for request, _ in rows)
        growth_ms = predictor.model.operators.context_ms * len(rows)
        return cls(now, predictor.decode_ms(len(rows), num_context) / 1e3, growth_ms / 1e3, rows)


def step_ms(model: CostModel, chunks: Sequence[Chunk]) -> float:
    """A step with a prompt in it, and what each prompt that ends takes beside it."""
    num_rows = num_pairs = num_far = num_squares = num_gathered = 0
    num_decodes = num_context = num_ending = 0
    has_chunk = False
    for chunk in chunks:
        request, num_new = chunk
        before = request.num_computed_tokens
        num_rows += num_new
        if is_decode(chunk):
            num_decodes += 1
            num_context += before
            continue
        num_pairs += num_new * before
        num_far += num_new * max(0, before - FAR_CONTEXT)
        num_squares += num_new * num_new
        num_gathered += before
        has_chunk |= num_new > 1
        num_ending += before + num_new == request.num_tokens
    shape = StepShape(
        num_rows=num_rows,
        num_pairs=num_pairs,
        num_squares=num_squares,
        num_decodes=num_decodes,
        num_context=num_context,
        num_logit_rows=num_decodes + num_ending,
        num_gathered=num_gathered,
        is_mixed=num_decodes > 0,
        num_far_pairs=num_far,
        has_chunk=has_chunk,
    )
    return model.operators.step_ms(shape) + num_ending * model.request_ms


def is_decode(chunk: Chunk) -> bool:
    """Whether it goes on with an answer, so that its next step is like the one before."""
    request, num_new = chunk
    return num_new == 1 and bool(request.output_ids) and request.num_tokens - request.num_computed_tokens == 1
