"""Paged attention of several queries a sequence: causal, over the cached prefix and the step's own keys.

The keys all lie in the arena by then, so prefix and own keys are one stretch. A tile is BLOCK_M rows: as many
queries as fit with all query heads that share a key head (row = query * GROUP + head), so a chunk of few
queries still fills the matrix unit, and keys are read once for the group. The programs are numbered through
all sequences without a list from the host: sequence i's tiles begin at `queries before it // BLOCK_Q + i`, a
number that each program searches for its own; some programs at the end of a sequence have nothing to do.
Later tiles see more keys, so they start first.

    keys of a tile:  |lo … |mid0                          … |mid1       … |hi
                     masked  whole tiles, seen by every row   masked (diagonal)
                     (window)
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from memserve.kernels.triton.decode_attention import gather
from memserve.kernels.triton.tuning import Tuning


@triton.jit
def _attend(
    q,  # [BLOCK_M, BLOCK_D]
    positions,  # [BLOCK_M] of the rows' queries
    acc,
    top,
    total,
    kv_ptr,
    table,
    begin,
    end,
    num_keys,
    scale_log2,
    window,
    stride_block,
    stride_kind,
    stride_slot,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Take the keys from `begin`, a multiple of BLOCK_N, up to `end` into the running softmax."""
    dims = tl.arange(0, BLOCK_D)
    for first in range(begin, end, BLOCK_N):
        keys = first + tl.arange(0, BLOCK_N)
        if MASKED:
            blocks = tl.load(table + keys // BLOCK_SIZE, mask=keys < num_keys, other=0).to(tl.int64)
        else:
            blocks = tl.load(table + keys // BLOCK_SIZE).to(tl.int64)
        at = kv_ptr + (blocks * stride_block + keys % BLOCK_SIZE * stride_slot)[:, None] + dims[None, :]
        if MASKED:
            kv_mask = (keys < num_keys)[:, None] & (dims < HEAD_DIM)[None, :]
            k = tl.load(at, mask=kv_mask, other=0.0)
            v = tl.load(at + stride_kind, mask=kv_mask, other=0.0)
        elif HEAD_DIM != BLOCK_D:
            k = tl.load(at, mask=(dims < HEAD_DIM)[None, :], other=0.0)
            v = tl.load(at + stride_kind, mask=(dims < HEAD_DIM)[None, :], other=0.0)
        else:
            k = tl.load(at)
            v = tl.load(at + stride_kind)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if MASKED:
            seen = keys[None, :] <= positions[:, None]
            if HAS_WINDOW:
                seen = seen & (keys[None, :] > positions[:, None] - window)
            scores = tl.where(seen, scores, float("-inf"))
        above = tl.maximum(top, tl.max(scores, axis=1) * scale_log2)
        shift = above
        if MASKED:
            # A row may have seen nothing yet; -inf less -inf is not a number.
            shift = tl.where(above == float("-inf"), 0.0, above)
        weights = tl.exp2(scores * scale_log2 - shift[:, None])
        fade = tl.exp2(top - shift)
        total = total * fade + tl.sum(weights, axis=1)
        acc = tl.dot(weights.to(v.dtype), v, acc * fade[:, None], input_precision=PRECISION)
        top = above
    return acc, top, total


# Nothing that differs between steps is specialised on: a kernel compiled anew would stall the step.
@triton.jit(
    do_not_specialize=("num_sequences", "window", "stride_table"),
    do_not_specialize_on_alignment=("tables_ptr", "starts_ptr", "lens_ptr"),
)
def _prefill_kernel(
    q_ptr,  # [T, KV_HEADS * GROUP, HEAD_DIM], rows stride_q apart
    kv_ptr,  # [num_blocks, 2, KV_HEADS, BLOCK_SIZE, HEAD_DIM], one layer of the arena
    tables_ptr,  # int32 [S, W], rows stride_table apart
    starts_ptr,  # int32 [S + 1], first row of each sequence in q and out, ascending
    lens_ptr,  # int32 [S], keys of each sequence, its new ones with them
    out_ptr,  # [T, heads, HEAD_DIM], rows stride_out apart
    num_sequences,
    scale_log2,
    window,
    stride_q,
    stride_out,
    stride_block,
    stride_kind,
    stride_head,
    stride_slot,
    stride_table,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    BLOCK_Q: tl.constexpr = BLOCK_M // GROUP
    kv_head = tl.program_id(0)
    tile = tl.num_programs(1) - 1 - tl.program_id(1)

    # The last sequence whose tiles begin at or before this one.
    origin = tl.load(starts_ptr)
    low, high = tl.full((), 0, tl.int32), num_sequences
    while high - low > 1:
        middle = (low + high) // 2
        if (tl.load(starts_ptr + middle) - origin) // BLOCK_Q + middle <= tile:
            low = middle
        else:
            high = middle
    row_start = tl.load(starts_ptr + low)
    num_new = tl.load(starts_ptr + low + 1) - row_start
    first_query = (tile - (row_start - origin) // BLOCK_Q - low) * BLOCK_Q
    if first_query >= num_new:
        return

    rows, dims = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    queries = first_query + rows // GROUP
    inside = ((rows < BLOCK_Q * GROUP) & (queries < num_new))[:, None] & (dims < HEAD_DIM)[None, :]
    heads = kv_head * GROUP + rows % GROUP
    query_rows = (row_start + queries).to(tl.int64)
    q_at = q_ptr + query_rows[:, None] * stride_q + heads[:, None] * HEAD_DIM + dims[None, :]
    q = tl.load(q_at, mask=inside, other=0.0)

    num_keys = tl.load(lens_ptr + low)
    context = num_keys - num_new
    positions = context + queries
    first_position = context + first_query
    last_position = context + tl.minimum(first_query + BLOCK_Q, num_new) - 1
    hi = last_position + 1
    lo, mid0 = 0, 0
    if HAS_WINDOW:
        lo = tl.maximum(first_position - window + 1, 0) // BLOCK_N * BLOCK_N
        mid0 = tl.cdiv(tl.maximum(last_position - window + 1, 0), BLOCK_N) * BLOCK_N
    mid1 = tl.maximum((first_position + 1) // BLOCK_N * BLOCK_N, mid0)

    table = tables_ptr + low.to(tl.int64) * stride_table
    keys_ptr = kv_ptr + kv_head.to(tl.int64) * stride_head
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    if HAS_WINDOW:
        acc, top, total = _attend(
            q, positions, acc, top, total, keys_ptr, table, lo, tl.minimum(mid0, hi), hi, scale_log2, window,
            stride_block, stride_kind, stride_slot,
            HEAD_DIM, BLOCK_SIZE, HAS_WINDOW, True, PRECISION, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    acc, top, total = _attend(
        q, positions, acc, top, total, keys_ptr, table, mid0, mid1, hi, scale_log2, window,
        stride_block, stride_kind, stride_slot,
        HEAD_DIM, BLOCK_SIZE, HAS_WINDOW, False, PRECISION, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    acc, top, total = _attend(
        q, positions, acc, top, total, keys_ptr, table, mid1, hi, hi, scale_log2, window,
        stride_block, stride_kind, stride_slot,
        HEAD_DIM, BLOCK_SIZE, HAS_WINDOW, True, PRECISION, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    out_at = out_ptr + query_rows[:, None] * stride_out + heads[:, None] * HEAD_DIM + dims[None, :]
    total = tl.where(total > 0.0, total, 1.0)  # of rows that are none
    tl.store(out_at, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=inside)


def prefill_attention(
    q: Tensor,
    kv: Tensor,
    layer: int,
    tables: Tensor,
    query_starts: Tensor,
    key_lens: Tensor,
    scale: float,
    window: int | None,
    tuning: Tuning,
    out: Tensor,
    num_queries: int,
) -> Tensor:
    """Attention of one layer.

    Args:
        q: [T, num_heads, head_dim] rotated queries; heads and elements contiguous.
        kv: the arena; the keys and values of the queries' own tokens are in it.
        layer: which layer of it.
        tables: int32 [S, W], the sequences' blocks.
        query_starts: int32 [S + 1], each sequence's first row in `q` and `out`, and the end; need not begin
            at 0. A sequence may be empty.
        key_lens: int32 [S], keys of each sequence; its queries are the last of them.
        scale: factor of the scores.
        window: the last so many keys are seen, a query's own with them; None = all.
        tuning: tile shapes.
        out: [T, num_heads, head_dim], heads and elements contiguous; the sequences' rows are written.
        num_queries: rows of all the sequences together.

    Returns:
        `out`.
    """
    _, num_heads, head_dim = q.shape
    _, _, _, num_kv_heads, block_size, _ = kv.shape
    num_sequences = len(key_lens)
    assert num_heads % num_kv_heads == 0 and head_dim == kv.shape[5] and q.dtype == kv.dtype
    assert q.stride(2) == 1 and q.stride(1) == head_dim and kv.stride(5) == 1 and tables.stride(1) == 1
    assert out.shape == q.shape and out.stride(2) == 1 and out.stride(1) == head_dim
    assert len(query_starts) == num_sequences + 1 and len(tables) == num_sequences
    if num_queries == 0:
        return out
    block_d = max(triton.next_power_of_2(head_dim), 16)
    config = tuning.prefill(q.element_size(), block_d)
    group = num_heads // num_kv_heads
    block_m = max(config.block_m, triton.next_power_of_2(group))
    num_tiles = num_queries // (block_m // group) + num_sequences
    layer_kv = kv.select(1, layer)
    _prefill_kernel[(num_kv_heads, num_tiles)](
        q, layer_kv, tables, query_starts, key_lens, out, num_sequences,
        scale * math.log2(math.e), window or 0, q.stride(0), out.stride(0), *layer_kv.stride()[:4],
        tables.stride(0),
        GROUP=group, HEAD_DIM=head_dim, BLOCK_SIZE=block_size, HAS_WINDOW=window is not None,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        BLOCK_M=block_m, BLOCK_N=config.block_n, BLOCK_D=block_d,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return out


def prefill_attention_torch(
    q: Tensor,
    kv: Tensor,
    layer: int,
    tables: Tensor,
    query_starts: Tensor,
    key_lens: Tensor,
    scale: float,
    window: int | None,
    out: Tensor,
) -> Tensor:
    """The plain twin, sequence by sequence, in float64. Arguments as `prefill_attention`."""
    group, starts = q.shape[1] // kv.shape[3], query_starts.tolist()
    for sequence, num_keys in enumerate(key_lens.tolist()):
        rows = slice(starts[sequence], starts[sequence + 1])
        num_new = rows.stop - rows.start
        if num_new == 0:
            continue
        k, v = gather(kv, layer, tables[sequence], num_keys).double().repeat_interleave(group, 2)
        positions = torch.arange(num_keys - num_new, num_keys, device=q.device)[:, None]
        keys = torch.arange(num_keys, device=q.device)[None]
        hidden = keys > positions
        if window is not None:
            hidden |= keys <= positions - window
        scores = torch.einsum("qhd,khd->hqk", q[rows].double(), k) * scale
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        out[rows] = torch.einsum("hqk,khd->qhd", weights, v).to(out.dtype)
    return out
