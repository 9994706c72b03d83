"""What a request's parameters do to its logits before anything is drawn, in two halves.

`collect_edits` (NumPy) says which entries of [R, V] change and by how much; `edit_logits` (torch, any device)
does it. In between the entries travel, so a GPU's path can send them with the rest of a step. The order is
that of vLLM: logit_bias, min_tokens, repetition, presence and frequency penalty.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from memserve.messages import SamplingParams


@dataclass(frozen=True, slots=True)
class SamplingRow:
    """What is known of the sequence behind one row of logits.

    `position` is the absolute position of the token to be drawn. `prompt_ids` and `output_ids` are its
    past, which penalties look at; ids that the logits have no column for are ignored.
    """

    params: SamplingParams
    position: int
    prompt_ids: NDArray[np.int32]
    output_ids: Sequence[int]


class DeviceEntries(NamedTuple):
    """`flat` int64 [N], indices into the flattened logits, and `values` float32 [N]."""

    flat: Tensor
    values: Tensor


class DeviceEdits(NamedTuple):
    """The entries on the logits' device; each kind may be empty."""

    bias: DeviceEntries
    masked: DeviceEntries
    repetition: DeviceEntries
    presence: DeviceEntries


class Entries:
    """Entries (row, id, value) of a [R, V] tensor, collected row by row for one scatter."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._flat: list[NDArray[np.int64]] = []
        self._values: list[NDArray[np.float32]] = []

    def add(self, row: int, ids: NDArray[np.int64], values: NDArray[np.float32] | float) -> None:
        """Ids that the logits have no column for are left out."""
        known = (ids >= 0) & (ids < self._vocab_size)
        self._flat.append(ids[known] + row * self._vocab_size)
        self._values.append(np.broadcast_to(np.asarray(values, dtype=np.float32), ids.shape)[known])

    def __bool__(self) -> bool:
        return bool(self._flat)

    def arrays(self) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Indices into the flattened tensor, and the values."""
        if not self._flat:
            return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.float32)
        return np.concatenate(self._flat), np.concatenate(self._values)


class Edits(NamedTuple):
    """What is added, set to -inf, divided or multiplied, and added afterwards."""

    bias: Entries
    masked: Entries
    repetition: Entries
    presence: Entries

    @property
    def is_empty(self) -> bool:
        """Nothing of the kind is asked for."""
        return not any(self)

    def on(self, device: torch.device) -> DeviceEdits:
        """As tensors on `device`, entry by entry."""
        moved = []
        for entries in self:
            flat, values = entries.arrays()
            moved.append(
                DeviceEntries(torch.from_numpy(flat).to(device), torch.from_numpy(values).to(device))
            )
        return DeviceEdits(*moved)


def collect_edits(rows: Sequence[SamplingRow], vocab_size: int) -> Edits:
    """The entries that the rows' parameters and pasts ask for."""
    edits = Edits(*(Entries(vocab_size) for _ in range(4)))
    for i, row in enumerate(rows):
        params = row.params
        if params.logit_bias:
            biased, amounts = zip(*params.logit_bias, strict=True)
            edits.bias.add(i, np.array(biased, dtype=np.int64), np.array(amounts, dtype=np.float32))
        if len(row.output_ids) < params.min_tokens and params.stop_token_ids:
            edits.masked.add(i, np.array(params.stop_token_ids, dtype=np.int64), -np.inf)
        if params.repetition_penalty != 1.0:
            seen = np.concatenate((row.prompt_ids, row.output_ids)).astype(np.int64)
            edits.repetition.add(i, seen, params.repetition_penalty)
        if (params.presence_penalty or params.frequency_penalty) and len(row.output_ids):
            ids, counts = np.unique(np.asarray(row.output_ids, dtype=np.int64), return_counts=True)
            edits.presence.add(i, ids, -(params.presence_penalty + params.frequency_penalty * counts))
    return edits


def edit_logits(logits: Tensor, edits: DeviceEdits) -> Tensor:
    """A new tensor: `logits` [R, V] with the edits made. Enqueues only; nothing here waits for a GPU."""
    edited = logits.clone(memory_format=torch.contiguous_format)
    flat_logits = edited.view(-1)
    if len(edits.bias.flat):
        flat_logits.index_add_(0, edits.bias.flat, edits.bias.values)  # an id given twice counts twice
    if len(edits.masked.flat):
        flat_logits.index_put_((edits.masked.flat,), edits.masked.values)
    if len(edits.repetition.flat):
        flat, values = edits.repetition
        old = flat_logits[flat]  # a token seen twice is written twice, with the same value
        flat_logits.index_put_((flat,), torch.where(old > 0, old / values, old * values))
    if len(edits.presence.flat):
        flat_logits.index_add_(0, edits.presence.flat, edits.presence.values)
    return edited
