"""Sampling of one step on a GPU: what the rows ask for, sent in one copy, and tokens that stay there.

    rows ──build_sampling_step──► SamplingStep (device) ──sample_step(logits)──► token ids, bad rows (device)

The results may feed the next step before the host has seen them (`PagedStep.token_ids`), and come to the host
with a copy that whoever wants them enqueues. Penalties look at a row's past as the host knows it when the
step is built: a row with penalties or min_tokens must not be built before its last token is known.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from memserve.kernels.logit_edits import (
    DeviceEdits,
    DeviceEntries,
    SamplingRow,
    collect_edits,
    edit_logits,
)
from memserve.kernels.sampling import GREEDY_BELOW
from memserve.kernels.triton.sampling import DrawParams, draw
from memserve.messages import SamplingParams
from memserve.models.paged_step import Staging

_PARAM_TYPES = (np.float32, np.float64, np.float32, np.int32, np.int64, np.int64)
_TORCH = {
    np.float32: torch.float32,
    np.float64: torch.float64,
    np.int32: torch.int32,
    np.int64: torch.int64,
}
_ALIGNMENT = 16


@dataclass(frozen=True, slots=True)
class SamplingStep:
    """Parameters of R rows, on the device. `edits`: None where no row asks for any."""

    params: DrawParams
    edits: DeviceEdits | None
    any_truncated: bool


class SampledTensors(NamedTuple):
    """`token_ids` int64 [R], -1 in bad rows; `is_bad` bool [R], rows without a distribution to draw from."""

    token_ids: Tensor
    is_bad: Tensor


def is_truncated(params: SamplingParams) -> bool:
    """Whether top_p, top_k or min_p can cut anything of a random row."""
    cuts = params.top_p < 1 or params.top_k > 0 or params.min_p > 0
    return cuts and params.temperature >= GREEDY_BELOW


def looks_back(params: SamplingParams) -> bool:
    """Whether a draw depends on the tokens before it otherwise than through the model."""
    penalties = params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1.0
    return bool(penalties) or params.min_tokens > 0


def build_sampling_step(rows: Sequence[SamplingRow], vocab_size: int, staging: Staging) -> SamplingStep:
    """Send what the rows ask for. `vocab_size`: columns of the logits."""
    params = [row.params for row in rows]
    columns = (
        [p.temperature for p in params],
        [p.top_p for p in params],
        [p.min_p for p in params],
        [min(p.top_k, vocab_size) for p in params],
        np.array([p.seed & 0xFFFFFFFFFFFFFFFF for p in params], dtype=np.uint64).view(np.int64),
        [row.position for row in rows],
    )
    edits = collect_edits(rows, vocab_size)
    arrays = [np.asarray(column, dtype=dtype) for column, dtype in zip(columns, _PARAM_TYPES, strict=True)]
    if not edits.is_empty:
        arrays += [array for entries in edits for array in entries.arrays()]
    sizes = [-(-array.nbytes // _ALIGNMENT) * _ALIGNMENT for array in arrays]
    starts = np.cumsum([0, *sizes]).tolist()
    buffer = staging.write(starts[-1])
    for array, start in zip(arrays, starts, strict=False):
        buffer[start : start + array.nbytes] = array.view(np.uint8)
    sent = staging.send(starts[-1])
    tensors = [
        sent[start : start + array.nbytes].view(_TORCH[array.dtype.type])
        for array, start in zip(arrays, starts, strict=False)
    ]
    device_edits = None
    if not edits.is_empty:
        pairs = zip(tensors[6::2], tensors[7::2], strict=True)
        device_edits = DeviceEdits(*(DeviceEntries(flat, values) for flat, values in pairs))
    return SamplingStep(DrawParams(*tensors[:6]), device_edits, any(is_truncated(p) for p in params))


def sample_step(logits: Tensor, step: SamplingStep) -> SampledTensors:
    """Draw one token for each row of `logits`, float32 [R, V], which are left as they are."""
    edited = logits if step.edits is None else edit_logits(logits, step.edits)
    return SampledTensors(*draw(edited, step.params, step.any_truncated))
