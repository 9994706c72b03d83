"""RMS normalisation, with the residual sum where there is one. Plain twins: `kernels.norm` and below."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from memserve.kernels import norm


@triton.jit
def _rms_norm_kernel(
    x_ptr,  # [T, N], rows stride_x apart
    residual_ptr,  # [T, N], rows stride_residual apart; read and written if HAS_RESIDUAL
    weight_ptr,  # [N]
    out_ptr,  # [T, N], contiguous
    stride_x,
    stride_residual,
    eps,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < N
    x = tl.load(x_ptr + row * stride_x + columns, mask=inside, other=0.0)
    if HAS_RESIDUAL:
        residual = residual_ptr + row * stride_residual + columns
        # Rounded before it is normalised: what the next layer adds to is what was normalised here.
        x = (x.to(tl.float32) + tl.load(residual, mask=inside, other=0.0).to(tl.float32)).to(x.dtype)
        tl.store(residual, x, mask=inside)
    wide = x.to(tl.float32)
    inverse = 1.0 / tl.sqrt(tl.sum(wide * wide, axis=0) / N + eps)
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * N + columns, (wide * inverse * weight).to(x.dtype), mask=inside)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`x / rms(x) * weight` of rows x [T, N]; the mean square is taken in float32. A new tensor [T, N]."""
    return _launch(x, None, weight, eps)


def add_rms_norm_(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`residual += x` in place, both [T, N]; then `rms_norm(residual)`, as a new tensor."""
    assert residual.shape == x.shape and residual.dtype == x.dtype and residual.stride(1) == 1
    return _launch(x, residual, weight, eps)


def add_rms_norm_torch_(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The plain twin of `add_rms_norm_`."""
    return norm.rms_norm(residual.add_(x), weight, eps)


def _launch(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    num_rows, size = x.shape
    assert x.stride(1) == 1 and weight.shape == (size,) and weight.is_contiguous()
    out = torch.empty((num_rows, size), dtype=x.dtype, device=x.device)
    if num_rows == 0:
        return out
    block = triton.next_power_of_2(size)
    other = x if residual is None else residual
    _rms_norm_kernel[(num_rows,)](
        x, other, weight, out, x.stride(0), other.stride(0), eps,
        N=size, BLOCK=block, HAS_RESIDUAL=residual is not None,
        num_warps=min(max(block // 512, 1), 16),
    )  # fmt: skip
    return out
