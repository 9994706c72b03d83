"""Rotary position embedding as one complex multiplication.

The published form rotates element i of a head together with element i + head_dim/2. The loader permutes the
rows of the query and key matrices (`pair_adjacent`) so that the two lie side by side: attention's dot
products do not notice, and (x, y) becomes the complex number x + iy, to be multiplied by e^(i * position *
frequency).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from memserve.model_config import RopeConfig


def pair_adjacent(rows: Tensor, head_dim: int) -> Tensor:
    """Dimension 0, heads of `head_dim`, in the order 0, n, 1, n+1, … (n = head_dim / 2). A new tensor."""
    heads = rows.view(-1, 2, head_dim // 2, *rows.shape[1:])
    return heads.transpose(1, 2).reshape(rows.shape)


def rotation_table(rope: RopeConfig, head_dim: int, num_positions: int, device: torch.device) -> Tensor:
    """e^(i * position * frequency), complex64 [num_positions, head_dim / 2]."""
    frequencies = _frequencies(rope, head_dim)
    angles = torch.outer(torch.arange(num_positions, dtype=torch.float32), frequencies)
    return torch.polar(torch.ones_like(angles), angles).to(device)


def rotate_(x: Tensor, rotations: Tensor) -> None:
    """Rotate `x` [T, heads, head_dim], in place, by `rotations` complex64 [T, 1, head_dim / 2].

    The product is taken in float32 and rounded once.
    """
    pairs = x.view(*x.shape[:-1], -1, 2)
    if x.dtype == torch.float32:
        torch.view_as_complex(pairs).mul_(rotations)
    else:
        wide = torch.view_as_complex(pairs.float()).mul_(rotations)
        pairs.copy_(torch.view_as_real(wide))


def _frequencies(rope: RopeConfig, head_dim: int) -> Tensor:
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    frequencies = 1.0 / (rope.theta**exponents)
    if rope.kind == "linear":
        return frequencies / rope.factor
    if rope.kind == "llama3":
        # Llama 3.1: wavelengths longer than the original context are slowed by `factor`, short ones stay, and
        # those between are interpolated.
        original = rope.original_max_position_embeddings
        wavelengths = 2 * math.pi / frequencies
        low, high = rope.low_freq_factor, rope.high_freq_factor
        smooth = ((original / wavelengths - low) / (high - low)).clamp(0.0, 1.0)
        return (1 - smooth) * frequencies / rope.factor + smooth * frequencies
    return frequencies
