"""The gated activation of the MLP. Plain twin: `kernels.activation.silu_and_mul`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024


@triton.jit
def _silu_and_mul_kernel(
    gate_up_ptr,  # [T, 2 * N], rows `stride` apart: gate, then up
    out_ptr,  # [T, N], contiguous
    stride,
    N,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < N
    base = gate_up_ptr + row * stride + columns
    gate = tl.load(base, mask=inside, other=0.0)
    up = tl.load(base + N, mask=inside, other=0.0)
    wide = gate.to(tl.float32)
    # Rounded between, as the twin does.
    silu = (wide / (1.0 + tl.exp(-wide))).to(gate.dtype)
    out = silu.to(tl.float32) * up.to(tl.float32)
    tl.store(out_ptr + row * N + columns, out.to(gate.dtype), mask=inside)


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """`silu(gate) * up` of [T, 2 * N] holding gate, then up. A new tensor [T, N]."""
    num_rows, width = gate_up.shape
    assert width % 2 == 0 and gate_up.stride(1) == 1
    out = torch.empty((num_rows, width // 2), dtype=gate_up.dtype, device=gate_up.device)
    if num_rows == 0:
        return out
    grid = (num_rows, triton.cdiv(width // 2, _BLOCK))
    _silu_and_mul_kernel[grid](gate_up, out, gate_up.stride(0), width // 2, BLOCK=_BLOCK, num_warps=4)
    return out
