"""Writing a step's keys and values into the arena, and the views that reading needs.

Invariant: once a block holds a token, all of its slots are finite. Decode attention reads whole blocks and
masks the unused slots, and a mask does not hide NaN (0 * NaN = NaN). So the step that first writes into a
block zeroes the slots behind its tokens (`tail_slots`); copies between arenas move whole blocks and keep it
so.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True, slots=True)
class StorePlan:
    """Rows of `head_dim` elements, at layer 0, that a step writes.

    Attributes:
        rows: int64 [T * 2 * num_kv_heads] in the order [T, 2, num_kv_heads].
        zero_rows: int64, the unused slots of blocks entered in this step; None when there are none.
    """

    rows: Tensor
    zero_rows: Tensor | None


def plan_store(
    slots: NDArray[np.int64],
    tail_slots: NDArray[np.int64],
    num_layers: int,
    num_kv_heads: int,
    block_size: int,
    device: torch.device,
) -> StorePlan:
    """Where the tokens of `slots` (block * block_size + offset, [T]) go, and what is zeroed behind them."""

    def rows(slots: NDArray[np.int64]) -> Tensor:
        blocks, offsets = np.divmod(slots, block_size)
        heads = np.arange(2 * num_kv_heads, dtype=np.int64) * block_size
        first = blocks * (num_layers * 2 * num_kv_heads * block_size) + offsets
        return torch.from_numpy((first[:, None] + heads).reshape(-1)).to(device, non_blocking=True)

    return StorePlan(rows=rows(slots), zero_rows=rows(tail_slots) if len(tail_slots) else None)


def block_rows(kv: Tensor, layer: int) -> Tensor:
    """The arena as rows of block_size * head_dim elements, `layer`'s where a plan has layer 0's. A view."""
    _, _, two, heads, block_size, head_dim = kv.shape
    return kv.view(-1, block_size * head_dim)[layer * two * heads :]


def store_kv(kv: Tensor, layer: int, new: Tensor, plan: StorePlan) -> None:
    """Write `new` [T or more, 2, num_kv_heads, head_dim] (keys, then values) into the arena's layer `layer`;
    what lies behind the plan's T tokens is left out.
    """
    _, _, two, heads, block_size, head_dim = kv.shape
    rows = kv.view(-1, head_dim)[layer * two * heads * block_size :]
    rows.index_copy_(0, plan.rows, new.reshape(-1, head_dim)[: len(plan.rows)])
    if plan.zero_rows is not None:
        rows.index_fill_(0, plan.zero_rows, 0.0)
