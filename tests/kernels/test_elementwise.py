"""Norm, rotation and activation against their definitions."""

from __future__ import annotations

import math

import pytest
import torch

from memserve.kernels.activation import silu_and_mul
from memserve.kernels.norm import rms_norm
from memserve.kernels.rotary import pair_adjacent, rotate_, rotation_table
from memserve.model_config import RopeConfig

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm(dtype: torch.dtype) -> None:
    x, weight = torch.randn(5, 3, 48).to(dtype), torch.randn(48).to(dtype)
    wide = x.double()
    expected = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    assert torch.allclose(rms_norm(x, weight, 1e-5).double(), expected, atol=tolerance, rtol=tolerance)


def test_silu_and_mul() -> None:
    gate, up = torch.randn(2, 7, 12).unbind()
    expected = gate * torch.sigmoid(gate) * up
    assert torch.allclose(silu_and_mul(torch.cat((gate, up), -1)), expected, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [2, 64, 80, 96, 128])
def test_rotation(head_dim: int, dtype: torch.dtype) -> None:
    """On permuted elements it is the published rotation of halves, permuted."""
    rope, positions = RopeConfig(theta=500.0), torch.tensor([0, 1, 7, 1000])
    heads = torch.randn(4, 3, head_dim).to(dtype)
    angles = positions[:, None].double() * 500.0 ** (-torch.arange(0, head_dim, 2).double() / head_dim)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    first, second = heads.double().chunk(2, -1)
    expected = torch.cat((first * cos - second * sin, second * cos + first * sin), -1)

    def permuted(x: torch.Tensor) -> torch.Tensor:
        return pair_adjacent(x.reshape(-1, head_dim).flatten(), head_dim).view(x.shape)

    wide = torch.zeros(4, 5, head_dim, dtype=dtype)  # a view into wider rows, as in the model
    wide[:, 1:4] = permuted(heads)
    rotate_(wide[:, 1:4], rotation_table(rope, head_dim, 1001, CPU).index_select(0, positions)[:, None])
    tolerance = 1e-3 if dtype == torch.float32 else 3e-2
    assert (wide[:, 1:4].double() - permuted(expected)).abs().max() < tolerance
    assert not wide[:, [0, 4]].any()


def test_scaled_frequencies() -> None:
    def frequencies(rope: RopeConfig) -> torch.Tensor:
        return rotation_table(rope, 64, 2, CPU)[1].angle()

    plain = frequencies(RopeConfig())
    linear = frequencies(RopeConfig(kind="linear", factor=4.0))
    assert torch.allclose(linear, plain / 4, rtol=1e-4)
    rope = RopeConfig(kind="llama3", factor=8.0, original_max_position_embeddings=256)
    llama3 = frequencies(rope)
    wavelengths = 2 * math.pi / plain
    short, long = wavelengths < 256 / 4, wavelengths > 256
    assert torch.allclose(llama3[short], plain[short], rtol=1e-4)
    assert torch.allclose(llama3[long], plain[long] / 8, rtol=1e-3)
    between = ~short & ~long
    assert between.any()
    assert ((llama3 <= plain * 1.0001) & (llama3 >= plain / 8.001))[between].all()
