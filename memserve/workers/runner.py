"""One step's computation: chunks of requests → tensors → logits → tokens.

Stateless between steps: everything a step needs is in the requests and in the arena. Leaves what the
numbers mean to the models and kernels, and what happens with the tokens to the loop.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate

import numpy as np
import torch
from numpy.typing import NDArray

from memserve.kernels.sampling import SamplingRow, sample, token_logprobs
from memserve.messages import TokenLogprobs
from memserve.model_config import blocks_for
from memserve.models.step import LogitRows, SequenceSlice, build_step
from memserve.models.transformer import Transformer
from memserve.workers.request import Request
from memserve.workers.steps import Chunk, Computed, Drawn

NOT_DRAWN = Drawn()
NOT_A_NUMBER = Drawn(error="the model's output is not a number")

Piece = tuple[NDArray[np.int32], SequenceSlice, LogitRows]


class ModelRunner:
    """Runs chunks through a transformer over the arena `kv`, whose blocks hold `block_size` tokens.

    `on_layer` is told after each layer's K and V of a step are written.
    """

    def __init__(
        self,
        transformer: Transformer,
        kv: torch.Tensor,
        block_size: int,
        on_layer: Callable[[], None] = lambda: None,
    ) -> None:
        self._on_layer = on_layer
        self._transformer = transformer
        self._kv = kv
        self._block_size = block_size

    @property
    def overlaps(self) -> bool:
        """No: every step is computed at once."""
        return False

    def begin(self, chunks: Sequence[Chunk]) -> Computed:
        """See `Runner`."""
        return Computed(self.execute(chunks))

    @torch.inference_mode()
    def execute(self, chunks: Sequence[Chunk]) -> list[Drawn]:
        """See `Runner`. A row whose logits are not finite numbers is an error of its request alone."""
        pieces, num_rows = lay_out(chunks, self._block_size)
        transformer = self._transformer
        step = build_step(pieces, transformer.model, self._block_size, transformer.device, transformer.dtype)
        logits = transformer.forward(step, self._kv, self._on_layer)
        return draw(chunks, num_rows, logits)


def lay_out(chunks: Sequence[Chunk], block_size: int) -> tuple[list[Piece], list[int]]:
    """The pieces of the step's tensors, and how many rows of logits each chunk gets."""
    pieces: list[Piece] = []
    num_rows: list[int] = []
    start = 0
    for chunk in chunks:
        request, num_new = chunk
        context_len = request.num_computed_tokens
        stop = context_len + num_new
        if request.reports_prompt:
            wanted, rows = LogitRows.ALL, num_new
        elif draws(chunk):
            wanted, rows = LogitRows.LAST, 1
        else:
            wanted, rows = LogitRows.NONE, 0
        block_ids = request.table.ids(blocks_for(stop, block_size))
        piece = SequenceSlice(start, num_new, context_len, block_ids)
        pieces.append((request.tokens(context_len, stop), piece, wanted))
        num_rows.append(rows)
        start += num_new
    return pieces, num_rows


def draws(chunk: Chunk) -> bool:
    """Whether a chunk that does not count as computed yet reaches its request's last token."""
    return chunk.request.num_computed_tokens + chunk.num_new == chunk.request.num_tokens


def draw(chunks: Sequence[Chunk], num_rows: Sequence[int], logits: torch.Tensor) -> list[Drawn]:
    """Logits → what each chunk has drawn. Must be called before the chunks count as computed."""
    ends = list(accumulate(num_rows))
    drawing = [index for index, chunk in enumerate(chunks) if draws(chunk)]
    drawn = [NOT_DRAWN] * len(chunks)
    if drawing:
        rows = [sampling_row(chunks[index].request) for index in drawing]
        if len(drawing) < len(logits):
            last_rows = torch.tensor([ends[index] - 1 for index in drawing], device=logits.device)
            sampled = sample(logits.index_select(0, last_rows), rows)
        else:
            sampled = sample(logits, rows)
        for index, token_id, logprobs in zip(drawing, sampled.token_ids, sampled.logprobs, strict=True):
            drawn[index] = Drawn(token_id, logprobs)
        for row in sampled.bad_rows:
            drawn[drawing[row]] = NOT_A_NUMBER
    for index, (request, num_new) in enumerate(chunks):
        if request.reports_prompt:
            rows_of_prompt = logits[ends[index] - num_rows[index] : ends[index]]
            reported = _prompt_logprobs(request, num_new, rows_of_prompt)
            drawn[index] = drawn[index]._replace(prompt_logprobs=reported)
    return drawn


def sampling_row(request: Request) -> SamplingRow:
    """What is known of the sequence behind the row that draws a request's next token."""
    return SamplingRow(request.sampling, request.num_tokens, request.prompt_ids, request.output_ids)


def _prompt_logprobs(request: Request, num_new: int, logits: torch.Tensor) -> list[TokenLogprobs]:
    """Of the prompt tokens that follow the chunk's tokens; the row at the prompt's end predicts none."""
    first = request.num_computed_tokens + 1
    targets = request.tokens(first, min(first + num_new, request.num_prompt_tokens))
    top = request.sampling.prompt_logprobs
    assert top is not None
    target_ids = torch.from_numpy(targets.astype(np.int64)).to(logits.device)
    return token_logprobs(logits[: len(targets)], target_ids, top)
