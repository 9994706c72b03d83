"""One step's input: the tokens of all its sequences in one flat batch, with everything the layers share.

`build_step` works out, once and in NumPy, where each token's KV goes and where each query finds its keys;
the layers then only run kernels. The last layer is special: past its keys and values, only the rows whose
logits are wanted matter, so it has a plan of its own (`final`), in which the last token of a prefill is a
decode of one query.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from memserve.kernels.attention import joins
from memserve.kernels.attention_plan import AttentionPlan, Paging, SequenceSlice, plan_attention
from memserve.kernels.kv_cache import StorePlan, plan_store
from memserve.model_config import ModelConfig
from memserve.step_shapes import padded_rows

__all__ = ["LogitRows", "SequenceSlice", "StepTensors", "build_step"]


class LogitRows(Enum):
    """Which of a sequence's new tokens want logits."""

    NONE = "none"
    LAST = "last"
    ALL = "all"


@dataclass(frozen=True, slots=True)
class StepTensors:
    """Input of `Transformer.forward`, on its device. T = tokens of the step, R = rows with logits, both with
    filler behind them up to a size that comes again (`step_shapes`), whose KV and logits are dropped.

    Attributes:
        token_ids: int64 [T].
        positions: int64 [T], counted from the start of each sequence.
        logit_rows: int64 [R], ascending, the filler aside.
        num_logits: rows with logits, the filler aside.
        takes_all: every token wants logits: `logit_rows` are all rows in order.
        store: where the new KV goes.
        plans: attention of each distinct window (None = unlimited) in all layers but the last.
        final: attention of the last layer's R rows; None when R = 0. The queries are rows of `logit_rows`.
    """

    token_ids: Tensor
    positions: Tensor
    logit_rows: Tensor
    num_logits: int
    takes_all: bool
    store: StorePlan
    plans: dict[int | None, AttentionPlan]
    final: AttentionPlan | None


def build_step(
    sequences: Sequence[tuple[NDArray[np.int32] | NDArray[np.int64], SequenceSlice, LogitRows]],
    model: ModelConfig,
    block_size: int,
    device: torch.device,
    dtype: torch.dtype,
) -> StepTensors:
    """Lay out one step.

    Args:
        sequences: per sequence its new token ids [num_new], its slice and the logits wanted. The slices'
            rows follow one another without gaps, from 0.
        model: shapes and windows.
        block_size: tokens of a block of the arena.
        device: where the step runs.
        dtype: of the model and the arena.
    """
    pieces = tuple(piece for _, piece, _ in sequences)
    group = model.num_heads // model.num_kv_heads
    paging = Paging(
        model.num_layers, model.num_kv_heads, block_size, device, dtype, joins(device, dtype), group
    )
    lengths = np.array([piece.num_new for piece in pieces], dtype=np.int64)
    contexts = np.array([piece.context_len for piece in pieces], dtype=np.int64)
    ends = np.cumsum(lengths)
    assert [piece.start for piece in pieces] == (ends - lengths).tolist(), "rows must follow one another"

    positions = np.arange(ends[-1], dtype=np.int64) + np.repeat(contexts - (ends - lengths), lengths)
    token_ids = np.concatenate([ids for ids, _, _ in sequences]).astype(np.int64)
    block_counts = -(-(contexts + lengths) // block_size)
    slots, tails = _slots(pieces, positions, block_counts, lengths, block_size)
    rows, queries = _final_queries(sequences)

    limit = int((contexts + lengths).max())
    windows = {_effective(window, limit) for window in model.sliding_window[:-1]}
    every = [(piece.start, piece) for piece in pieces]
    plans = {window: plan_attention(every, window, paging) for window in windows}
    last_window = _effective(model.sliding_window[-1], limit)
    if len(rows) == len(token_ids) and last_window in plans:
        final: AttentionPlan | None = plans[last_window]
    else:
        final = plan_attention(queries, last_window, paging) if queries else None

    def to_device(values: NDArray[np.int64]) -> Tensor:
        filled = np.zeros(padded_rows(len(values)), dtype=np.int64)
        filled[: len(values)] = values
        return torch.from_numpy(filled).to(device, non_blocking=True)

    return StepTensors(
        token_ids=to_device(token_ids),
        positions=to_device(positions),
        logit_rows=to_device(rows),
        num_logits=len(rows),
        takes_all=len(rows) == len(token_ids),
        store=plan_store(slots, tails, model.num_layers, model.num_kv_heads, block_size, device),
        plans={window: plans[_effective(window, limit)] for window in set(model.sliding_window[:-1])},
        final=final,
    )


def _effective(window: int | None, limit: int) -> int | None:
    """A window that no sequence outgrows is none."""
    return None if window is None or window >= limit else window


def _slots(
    pieces: tuple[SequenceSlice, ...],
    positions: NDArray[np.int64],
    block_counts: NDArray[np.int64],
    lengths: NDArray[np.int64],
    block_size: int,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Slot of each token; and the slots behind the last token of each block that this step enters last."""
    counts = block_counts.tolist()
    table = np.concatenate([piece.block_ids[:count] for piece, count in zip(pieces, counts, strict=True)])
    starts = np.cumsum(block_counts) - block_counts
    assert len(table) == starts[-1] + block_counts[-1], "a sequence has fewer blocks than tokens need"
    slots = table[np.repeat(starts, lengths) + positions // block_size] * block_size + positions % block_size
    tails = [
        np.arange(slots[piece.start + piece.num_new - 1] + 1, (table[start + count - 1] + 1) * block_size)
        for piece, start, count in zip(pieces, starts.tolist(), counts, strict=True)
        if (count - 1) * block_size >= piece.context_len and (piece.context_len + piece.num_new) % block_size
    ]
    return slots, np.concatenate(tails) if tails else slots[:0]


def _final_queries(
    sequences: Sequence[tuple[NDArray[np.int32] | NDArray[np.int64], SequenceSlice, LogitRows]],
) -> tuple[NDArray[np.int64], list[tuple[int, SequenceSlice]]]:
    """The rows with logits, and the last layer's queries: (row among those rows, slice)."""
    rows: list[int] = []
    queries = []
    for _, piece, wanted in sequences:
        first = piece.start
        if wanted is LogitRows.NONE:
            continue
        if wanted is LogitRows.LAST and piece.num_new > 1:
            first += piece.num_new - 1
            piece = SequenceSlice(first, 1, piece.context_len + piece.num_new - 1, piece.block_ids)
        queries.append((len(rows), piece))
        rows.extend(range(first, first + piece.num_new))
    return np.array(rows, dtype=np.int64), queries
