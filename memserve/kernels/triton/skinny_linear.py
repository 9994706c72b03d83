"""Matrix products of few rows, as decode steps have them: bound by reading the matrix once.

Each program reads some rows of the matrix whole, in tiles that run ahead of the product, so that all of the
chip reads at once; the few rows of x are padded to the 16 a matrix unit takes. The gated form takes the same
rows of the gate's and the up half at once and ends in silu(gate) * up, which saves a kernel and a trip
through memory. Sums are taken in float32 and rounded once. From some number of rows on, which the tuning
says (0 = never), the library's own products are quicker. Plain twins: `F.linear`, `kernels.activation`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from memserve.kernels.triton.tuning import SkinnyConfig

# More would need more shared memory than there is, and are no longer bound by reading the matrix.
MAX_ROWS = 32


@triton.jit(do_not_specialize=("num_rows",))
def _skinny_kernel(
    x_ptr,  # [M, K], rows stride_x apart
    weight_ptr,  # [N, K], or [2 * N, K] if GATED: gate, then up; contiguous
    bias_ptr,  # [N], or [2 * N], if HAS_BIAS
    out_ptr,  # [M, N], contiguous
    num_rows,
    stride_x,
    N,
    K,
    GATED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    rows = tl.arange(0, BLOCK_M)
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    steps = tl.arange(0, BLOCK_K)
    is_row, is_column = rows < num_rows, columns < N
    x_at = x_ptr + rows[:, None] * stride_x + steps[None, :]
    weight_at = weight_ptr + columns[:, None].to(tl.int64) * K + steps[None, :]
    up_at = weight_at
    if GATED:
        up_at = weight_at + N.to(tl.int64) * K
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    acc_up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in range(0, K, BLOCK_K):
        exists = (first + steps < K)[None, :]
        x = tl.load(x_at + first, mask=is_row[:, None] & exists, other=0.0)
        weight = tl.load(weight_at + first, mask=is_column[:, None] & exists, other=0.0)
        acc = tl.dot(x, tl.trans(weight), acc, input_precision=PRECISION)
        if GATED:
            up = tl.load(up_at + first, mask=is_column[:, None] & exists, other=0.0)
            acc_up = tl.dot(x, tl.trans(up), acc_up, input_precision=PRECISION)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + columns, mask=is_column, other=0.0).to(tl.float32)[None, :]
    if GATED:
        if HAS_BIAS:
            acc_up += tl.load(bias_ptr + N + columns, mask=is_column, other=0.0).to(tl.float32)[None, :]
        acc = acc / (1.0 + tl.exp(-acc)) * acc_up
    out_at = out_ptr + rows[:, None].to(tl.int64) * N + columns[None, :]
    tl.store(out_at, acc.to(out_ptr.dtype.element_ty), mask=is_row[:, None] & is_column[None, :])


def skinny_linear(x: Tensor, weight: Tensor, bias: Tensor | None, config: SkinnyConfig) -> Tensor:
    """`x W^T + b` of x [M, K], at most MAX_ROWS, W [N, K] and b [N]. A new tensor [M, N]."""
    return _launch(x, weight, bias, False, config)


def skinny_gated(x: Tensor, weight: Tensor, bias: Tensor | None, config: SkinnyConfig) -> Tensor:
    """`silu(x G^T) * (x U^T)` of W [2 * N, K] holding G, then U, and their biases. A new tensor [M, N]."""
    return _launch(x, weight, bias, True, config)


def _launch(x: Tensor, weight: Tensor, bias: Tensor | None, is_gated: bool, config: SkinnyConfig) -> Tensor:
    num_rows, depth = x.shape
    size = weight.shape[0] // 2 if is_gated else weight.shape[0]
    assert weight.shape[1] == depth and weight.is_contiguous() and x.stride(1) == 1 and num_rows <= MAX_ROWS
    assert bias is None or (bias.shape == weight.shape[:1] and bias.is_contiguous())
    out = torch.empty((num_rows, size), dtype=x.dtype, device=x.device)
    if num_rows == 0:
        return out
    block_n = config.block_n // 2 if is_gated else config.block_n
    _skinny_kernel[(triton.cdiv(size, block_n),)](
        x, weight, weight if bias is None else bias, out, num_rows, x.stride(0), size, depth,
        GATED=is_gated, HAS_BIAS=bias is not None, PRECISION="ieee" if x.dtype == torch.float32 else "tf32",
        BLOCK_M=max(triton.next_power_of_2(num_rows), 16), BLOCK_N=block_n, BLOCK_K=config.block_k,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return out
