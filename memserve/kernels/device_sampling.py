"""Drawing tokens where the logits are, without the host's knowing: what a GPU's step ends with.

`sample` (sampling.py) reads results back while it goes, to do no more than each row needs. Here the host
decides by what was asked for alone, so that nothing waits for the device: `Draws` holds the parameters of
all rows, goes to the device with whatever else a step needs there, and `draw` only enqueues. The tokens are
those that `sample` draws: the same race, of the same hashes. Rows that ask for more than temperature,
truncation and a seed are sample's (`is_plain`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from memserve.kernels.sampling import GREEDY_BELOW, argmax, race, row_hashes
from memserve.messages import SamplingParams

# Elements of probabilities that are sorted at once: [64, 128k].
_SORT_ELEMENTS = 1 << 23


def is_plain(params: SamplingParams) -> bool:
    """Whether `draw` does all that these ask of a row, `min_tokens` aside."""
    return not (
        params.logit_bias
        or params.logprobs is not None
        or params.repetition_penalty != 1.0
        or params.presence_penalty
        or params.frequency_penalty
    )


class RowArrays(NamedTuple):
    """Of the rows drawn at random, in their order; N of R. Hosts have NumPy arrays, devices tensors.

    `rows` int64: which rows of the logits. `hashes` int64: `row_hashes`. `top_k` int64: 0 = all.
    """

    rows: NDArray[np.int64]
    hashes: NDArray[np.int64]
    top_p: NDArray[np.float64]
    top_k: NDArray[np.int64]
    temperature: NDArray[np.float32]
    min_p: NDArray[np.float32]


class RowTensors(NamedTuple):
    """`RowArrays` on a device."""

    rows: Tensor
    hashes: Tensor
    top_p: Tensor
    top_k: Tensor
    temperature: Tensor
    min_p: Tensor


@dataclass(frozen=True, slots=True)
class Draws:
    """How the rows of a step's logits are drawn. `arrays` is None if all are greedy."""

    num_rows: int
    arrays: RowArrays | None
    is_truncated: bool

    @classmethod
    def of(cls, rows: Sequence[tuple[SamplingParams, int]], vocab_size: int) -> Draws:
        """Of rows of (parameters, absolute position of the token to be drawn)."""
        chosen = [i for i, (params, _) in enumerate(rows) if params.temperature >= GREEDY_BELOW]
        if not chosen:
            return cls(len(rows), None, False)
        params = [rows[i][0] for i in chosen]
        top_k = [p.top_k if 0 < p.top_k < vocab_size else 0 for p in params]
        arrays = RowArrays(
            rows=np.array(chosen, dtype=np.int64),
            hashes=row_hashes((p.seed for p in params), (rows[i][1] for i in chosen)).numpy(),
            top_p=np.array([p.top_p for p in params], dtype=np.float64),
            top_k=np.array(top_k, dtype=np.int64),
            temperature=np.array([p.temperature for p in params], dtype=np.float32),
            min_p=np.array([p.min_p for p in params], dtype=np.float32),
        )
        is_truncated = any(k or p.top_p < 1 or p.min_p > 0 for k, p in zip(top_k, params, strict=True))
        return cls(len(rows), arrays, is_truncated)


def draw(logits: Tensor, draws: Draws, tensors: RowTensors | None) -> tuple[Tensor, Tensor]:
    """Enqueue one draw for each row of `logits`, float32 [R, V], left as they are.

    Args:
        logits: on any device.
        draws: what was asked for.
        tensors: `draws.arrays` on that device.

    Returns:
        Token ids int64 [R], and int64 [R] that is 1 where the row was one of numbers, else 0, with token 0.
    """
    assert logits.dtype == torch.float32 and len(logits) == draws.num_rows
    best, token_ids = argmax(logits)
    if tensors is not None:
        is_all = len(tensors.rows) == len(logits)
        chosen = logits if is_all else logits.index_select(0, tensors.rows)
        probs = torch.softmax(chosen / tensors.temperature.unsqueeze(1), dim=-1)
        if draws.is_truncated:
            probs = _truncate(probs, tensors)
        drawn = race(probs, tensors.hashes)
        token_ids = drawn if is_all else token_ids.index_copy(0, tensors.rows, drawn)
    is_finite = torch.isfinite(best)
    return torch.where(is_finite, token_ids, 0), is_finite.long()


def _truncate(probs: Tensor, tensors: RowTensors) -> Tensor:
    """`probs` [N, V] with 0 where min_p, top_k or top_p cut, as sampling.py says what is cut."""
    step = max(1, _SORT_ELEMENTS // probs.shape[1])
    parts = [
        _truncate_part(probs[start : start + step], *(t[start : start + step] for t in tensors))
        for start in range(0, len(probs), step)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _truncate_part(
    probs: Tensor, _: Tensor, __: Tensor, top_p: Tensor, top_k: Tensor, ___: Tensor, min_p: Tensor
) -> Tensor:
    # Of equals those of the lowest ids come first, and so stay.
    descending, ids = probs.sort(dim=1, descending=True, stable=True)
    kth = descending.gather(1, (top_k - 1).clamp(min=0).unsqueeze(1)).squeeze(1)
    floor = torch.maximum(descending[:, 0] * min_p, torch.where(top_k > 0, kth, 0.0))
    is_cut = (top_k > 0) | (min_p > 0)
    descending = torch.where(descending >= floor.unsqueeze(1), descending, 0.0)
    sums = descending.cumsum(dim=1, dtype=torch.float64)
    mass = torch.where(top_p < 1, top_p * torch.where(is_cut, sums[:, -1], 1.0), torch.inf)
    is_kept = sums - descending < mass.unsqueeze(1)
    is_kept[:, 0] = True
    return torch.zeros_like(probs).scatter_(1, ids, torch.where(is_kept, descending, 0.0))
