"""Norm, activation, rotation and store under Triton's interpreter against their plain twins."""

from __future__ import annotations

import pytest
import torch

from memserve.kernels import activation as plain_activation
from memserve.kernels import norm as plain_norm
from memserve.kernels.rotary import rotation_table
from memserve.kernels.triton.activation import silu_and_mul
from memserve.kernels.triton.kv_store import (
    rotate_and_store,
    rotate_and_store_torch,
    store_kv,
    store_kv_torch,
)
from memserve.kernels.triton.norm import add_rms_norm_, add_rms_norm_torch_, rms_norm
from memserve.model_config import RopeConfig

torch.set_num_threads(1)
CPU = torch.device("cpu")
TOLERANCES = {torch.float32: 2e-6, torch.float16: 2e-3}
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    tolerance = TOLERANCES[found.dtype]
    return torch.allclose(found, expected, atol=tolerance, rtol=tolerance)


@dtypes
@pytest.mark.parametrize(("rows", "size"), [(0, 64), (1, 64), (3, 80), (5, 1000)])
def test_rms_norm(rows: int, size: int, dtype: torch.dtype) -> None:
    x = torch.randn(rows, size + 3).to(dtype)[:, :size]  # rows that are not adjacent
    weight = torch.randn(size).to(dtype)
    assert close(rms_norm(x, weight, 1e-5), plain_norm.rms_norm(x, weight, 1e-5))

    residual = torch.randn(rows, size).to(dtype)
    sums = residual.clone()
    expected = add_rms_norm_torch_(x, sums, weight, 1e-5)
    found = add_rms_norm_(x, residual, weight, 1e-5)
    assert torch.equal(residual, sums)  # what is passed on is not only near
    assert close(found, expected)


@dtypes
@pytest.mark.parametrize(("rows", "size"), [(0, 8), (1, 1), (3, 112), (2, 1500)])
def test_silu_and_mul(rows: int, size: int, dtype: torch.dtype) -> None:
    gate_up = (torch.randn(rows, 2 * size) * 4).to(dtype)
    assert close(silu_and_mul(gate_up), plain_activation.silu_and_mul(gate_up))


# Slot of each row in blocks of 4, and how many behind it are zeroed: a first token, one inside a block that
# was begun before, padding, the last of a block, and a chunk's last.
SLOTS = torch.tensor([8, 5, -1, 15, 21])
TAILS = torch.tensor([3, 0, 0, 0, 2], dtype=torch.int32)


@dtypes
@pytest.mark.parametrize("has_norms", [False, True])
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim"), [(4, 4, 64), (4, 1, 80), (8, 1, 96), (6, 2, 128), (2, 1, 2)]
)
def test_rotate_and_store(
    num_heads: int, num_kv_heads: int, head_dim: int, has_norms: bool, dtype: torch.dtype
) -> None:
    qkv = torch.randn(5, num_heads + 2 * num_kv_heads, head_dim).to(dtype)
    norms = (torch.randn(head_dim).to(dtype), torch.randn(head_dim).to(dtype)) if has_norms else None
    rotations = rotation_table(RopeConfig(theta=500.0), head_dim, 64, CPU)
    positions = torch.tensor([0, 63, 7, 3, 30])
    kv = torch.full((6, 3, 2, num_kv_heads, 4, head_dim), float("nan"), dtype=dtype)
    twin_qkv, twin_kv = qkv.clone(), kv.clone()
    rest = (norms, rotations, positions, SLOTS, TAILS)
    found = rotate_and_store(qkv, *rest, kv, 1, num_heads, 1e-5)
    expected = rotate_and_store_torch(twin_qkv, *rest, twin_kv, 1, num_heads, 1e-5)
    assert found.data_ptr() == qkv.data_ptr() and found.shape == (5, num_heads, head_dim)
    assert close(found, expected)
    assert torch.equal(kv.isnan(), twin_kv.isnan())
    assert close(kv.nan_to_num(), twin_kv.nan_to_num())


@pytest.mark.parametrize("block_size", [1, 4, 16])
@pytest.mark.parametrize("head_dim", [64, 80])
def test_store(head_dim: int, block_size: int) -> None:
    slots = torch.tensor([5 * block_size, -1, 3 * block_size + block_size - 1])
    tails = torch.tensor([block_size - 1, 0, 0], dtype=torch.int32)
    new = torch.randn(3, 2, 2, head_dim)
    kv = torch.full((6, 3, 2, 2, block_size, head_dim), float("nan"))
    twin = kv.clone()
    store_kv(new, slots, tails, kv, 2)
    store_kv_torch(new, slots, tails, twin, 2)
    assert torch.equal(kv.isnan(), twin.isnan())
    assert torch.equal(kv.nan_to_num(), twin.nan_to_num())
    assert kv[5, 2].isfinite().all() and kv[:, :2].isnan().all()
