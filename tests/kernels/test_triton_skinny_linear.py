"""Products of few rows under Triton's interpreter, and where they are used."""

from __future__ import annotations

import msgspec
import pytest
import torch
import torch.nn.functional as F

from memserve.kernels.activation import silu_and_mul
from memserve.kernels.triton.skinny_linear import skinny_gated, skinny_linear
from memserve.kernels.triton.tuning import SkinnyConfig, Tuning, read_configs

CONFIG = SkinnyConfig(max_rows=32, block_n=32, block_k=64, num_warps=4, num_stages=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(("rows", "size", "depth"), [(0, 8, 16), (1, 48, 100), (17, 33, 64), (32, 5, 130)])
def test_products(rows: int, size: int, depth: int, has_bias: bool, dtype: torch.dtype) -> None:
    x = torch.randn(rows, depth + 4).to(dtype)[:, :depth]
    weight, bias = torch.randn(2 * size, depth).to(dtype), torch.randn(2 * size).to(dtype)
    expected = F.linear(x.double(), weight.double(), bias.double() if has_bias else None)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    found = skinny_linear(x, weight, bias if has_bias else None, CONFIG)
    assert torch.allclose(found.double(), expected, atol=tolerance, rtol=tolerance)
    found = skinny_gated(x, weight, bias if has_bias else None, CONFIG)
    assert torch.allclose(found.double(), silu_and_mul(expected), atol=10 * tolerance, rtol=tolerance)


def test_where_they_are_used() -> None:
    default = read_configs("default")
    assert Tuning(4, default).skinny(1, 2) is None  # nothing is known of a GPU without a file
    tuned = Tuning(4, msgspec.structs.replace(default, skinny=msgspec.structs.replace(CONFIG, max_rows=8)))
    assert tuned.skinny(8, 2) is tuned.configs.skinny
    assert tuned.skinny(9, 2) is None and tuned.skinny(1, 4) is None
