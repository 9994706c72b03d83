"""Paged attention of one query a sequence, its keys split over several programs (split-KV).

All query heads that share a key head are one tile, padded to the 16 rows a matrix unit takes, so each key and
value is read once. Decode is bound by that reading: the split makes enough programs to keep every SM at it
whatever the batch, and a second kernel joins the parts by their logsumexp. The number of splits follows from
host figures alone (batch, an upper bound of the lengths), so that a CUDA graph can be replayed over other
lengths; how many keys a split takes is worked out on the device from the true ones.

    keys of a sequence:  |window begins … |split 0      |split 1      |split 2   |
                                          whole tiles of BLOCK_N       up to key_lens

Scores are kept times log2(e), because exp2 is one instruction.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from memserve.kernels.triton.tuning import Tuning

MAX_SPLITS = 64
# Rows of the matrix unit's smallest tile.
_MIN_ROWS = 16


# Nothing that differs between steps is specialised on: a kernel compiled anew would stall the step.
@triton.jit(
    do_not_specialize=("window", "stride_table"),
    do_not_specialize_on_alignment=("tables_ptr", "sequences_ptr", "lens_ptr"),
)
def _decode_kernel(
    q_ptr,  # [B, KV_HEADS * GROUP, HEAD_DIM]
    kv_ptr,  # [num_blocks, 2, KV_HEADS, BLOCK_SIZE, HEAD_DIM], one layer of the arena
    tables_ptr,  # int32 [S, W], rows stride_table apart
    sequences_ptr,  # int32 [B], rows of the tables, if HAS_SEQUENCES; else query i has row i
    lens_ptr,  # int32 [B], keys of each query; 0 = none
    out_ptr,  # [B, heads, HEAD_DIM], contiguous; written unless IS_SPLIT
    partial_ptr,  # float32 [B, heads, splits, HEAD_DIM], otherwise
    lse_ptr,  # float32 [B, heads, splits]: base-2 logsumexp, -inf of a split without keys
    scale_log2,
    window,
    stride_q,
    stride_block,
    stride_kind,
    stride_head,
    stride_slot,
    stride_table,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SEQUENCES: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    kv_head, batch, split = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    num_heads, num_splits = tl.num_programs(0) * GROUP, tl.num_programs(2)
    rows, dims = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    heads = kv_head * GROUP + rows
    is_head = rows < GROUP
    out_rows = batch * num_heads + heads

    num_keys = tl.load(lens_ptr + batch)
    begin = 0
    if HAS_WINDOW:
        begin = tl.maximum(num_keys - window, 0)
    aligned = begin // BLOCK_N * BLOCK_N
    tiles_each = tl.cdiv(tl.cdiv(num_keys - aligned, BLOCK_N), num_splits)
    start = aligned + split * tiles_each * BLOCK_N
    stop = tl.minimum(start + tiles_each * BLOCK_N, num_keys)
    if start >= stop:
        if IS_SPLIT:
            tl.store(
                lse_ptr + out_rows * num_splits + split,
                tl.full([BLOCK_M], float("-inf"), tl.float32),
                mask=is_head,
            )
        else:
            zeros = tl.zeros([BLOCK_M, BLOCK_D], dtype=out_ptr.dtype.element_ty)
            inside = is_head[:, None] & (dims < HEAD_DIM)[None, :]
            tl.store(out_ptr + out_rows[:, None] * HEAD_DIM + dims[None, :], zeros, mask=inside)
        return

    q_mask = is_head[:, None] & (dims < HEAD_DIM)[None, :]
    q = tl.load(q_ptr + batch * stride_q + heads[:, None] * HEAD_DIM + dims[None, :], mask=q_mask, other=0.0)
    sequence = batch
    if HAS_SEQUENCES:
        sequence = tl.load(sequences_ptr + batch).to(tl.int64)
    table = tables_ptr + sequence * stride_table
    keys_ptr = kv_ptr + kv_head.to(tl.int64) * stride_head
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    # The table is read a tile ahead: loads that wait for another of their tile are pipelined half as deep.
    keys = start + tl.arange(0, BLOCK_N)
    blocks = tl.load(table + keys // BLOCK_SIZE, mask=keys < stop, other=0).to(tl.int64)
    for first in range(start, stop, BLOCK_N):
        keys = first + tl.arange(0, BLOCK_N)
        exists = keys < stop
        at = keys_ptr + (blocks * stride_block + keys % BLOCK_SIZE * stride_slot)[:, None] + dims[None, :]
        kv_mask = exists[:, None]
        if HEAD_DIM != BLOCK_D:
            kv_mask = kv_mask & (dims < HEAD_DIM)[None, :]
        k = tl.load(at, mask=kv_mask, other=0.0)
        v = tl.load(at + stride_kind, mask=kv_mask, other=0.0)
        seen = exists
        if HAS_WINDOW:
            seen = seen & (keys >= begin)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2
        scores = tl.where(seen[None, :], scores, float("-inf"))
        # Each tile has a key that is seen, so `above` is a number.
        above = tl.maximum(top, tl.max(scores, axis=1))
        weights = tl.exp2(scores - above[:, None])
        fade = tl.exp2(top - above)
        total = total * fade + tl.sum(weights, axis=1)
        acc = tl.dot(weights.to(v.dtype), v, acc * fade[:, None], input_precision=PRECISION)
        top = above
        keys += BLOCK_N
        blocks = tl.load(table + keys // BLOCK_SIZE, mask=keys < stop, other=0).to(tl.int64)

    found = acc / total[:, None]
    if IS_SPLIT:
        places = out_rows * num_splits + split
        tl.store(partial_ptr + places[:, None] * HEAD_DIM + dims[None, :], found, mask=q_mask)
        tl.store(lse_ptr + places, top + tl.log2(total), mask=is_head)
    else:
        out = out_ptr + out_rows[:, None] * HEAD_DIM + dims[None, :]
        tl.store(out, found.to(out_ptr.dtype.element_ty), mask=q_mask)


@triton.jit
def _join_kernel(
    partial_ptr,  # float32 [B, heads, NUM_SPLITS, HEAD_DIM]; not written where lse is -inf
    lse_ptr,  # float32 [B, heads, NUM_SPLITS]
    out_ptr,  # [B, heads, HEAD_DIM], contiguous
    HEAD_DIM: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    splits, dims = tl.arange(0, NUM_SPLITS), tl.arange(0, BLOCK_D)
    lse = tl.load(lse_ptr + row * NUM_SPLITS + splits)
    top = tl.max(lse, axis=0)
    # A query without any key (padding) gets zeros.
    shares = tl.where(lse > float("-inf"), tl.exp2(lse - tl.maximum(top, -1e30)), 0.0)
    inside = (lse > float("-inf"))[:, None] & (dims < HEAD_DIM)[None, :]
    places = (row * NUM_SPLITS + splits)[:, None] * HEAD_DIM + dims[None, :]
    partial = tl.load(partial_ptr + places, mask=inside, other=0.0)
    found = tl.sum(partial * shares[:, None], axis=0) / tl.maximum(tl.sum(shares, axis=0), 1e-30)
    tl.store(out_ptr + row * HEAD_DIM + dims, found.to(out_ptr.dtype.element_ty), mask=dims < HEAD_DIM)


def decode_attention(
    q: Tensor,
    kv: Tensor,
    layer: int,
    tables: Tensor,
    sequences: Tensor | None,
    key_lens: Tensor,
    scale: float,
    window: int | None,
    max_key_len: int,
    tuning: Tuning,
    out: Tensor | None = None,
) -> Tensor:
    """Attention of one layer.

    Args:
        q: [B, num_heads, head_dim] rotated queries; heads and elements contiguous.
        kv: the arena [num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim].
        layer: which layer of it.
        tables: int32 [S, W], the sequences' blocks.
        sequences: int32 [B], each query's row of `tables`; None = row i is query i's.
        key_lens: int32 [B], how many keys there are for each, the query's own with them; 0 gives zeros.
        scale: factor of the scores.
        window: of those the last so many are seen; None = all.
        max_key_len: at least the largest of `key_lens`; only how the work is split depends on it.
        tuning: tile shapes.
        out: [B, num_heads, head_dim], contiguous; None = a new tensor.

    Returns:
        `out`.
    """
    batch, num_heads, head_dim = q.shape
    _, _, _, num_kv_heads, block_size, _ = kv.shape
    assert num_heads % num_kv_heads == 0 and head_dim == kv.shape[5] and q.dtype == kv.dtype
    assert q.stride(2) == 1 and q.stride(1) == head_dim and kv.stride(5) == 1 and tables.stride(1) == 1
    assert key_lens.shape == (batch,) and (sequences is None or sequences.shape == (batch,))
    if out is None:
        out = torch.empty((batch, num_heads, head_dim), dtype=q.dtype, device=q.device)
    assert out.is_contiguous() and out.shape == q.shape
    if batch == 0:
        return out
    block_d = max(triton.next_power_of_2(head_dim), 16)
    config = tuning.decode(q.element_size(), block_d)
    longest = max_key_len if window is None else min(max_key_len, window + config.block_n)
    splits = num_splits(
        batch * num_kv_heads, longest, config.block_n, config.programs_per_sm * tuning.num_sms
    )
    group = num_heads // num_kv_heads
    if splits == 1:
        partial = lse = out
    else:
        partial = torch.empty((batch, num_heads, splits, head_dim), dtype=torch.float32, device=q.device)
        lse = torch.empty((batch, num_heads, splits), dtype=torch.float32, device=q.device)
    layer_kv = kv.select(1, layer)
    _decode_kernel[(num_kv_heads, batch, splits)](
        q, layer_kv, tables, key_lens if sequences is None else sequences, key_lens, out, partial, lse,
        scale * math.log2(math.e), window or 0, q.stride(0), *layer_kv.stride()[:4], tables.stride(0),
        GROUP=group, HEAD_DIM=head_dim, BLOCK_SIZE=block_size, IS_SPLIT=splits > 1,
        HAS_WINDOW=window is not None, HAS_SEQUENCES=sequences is not None,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        BLOCK_M=max(triton.next_power_of_2(group), _MIN_ROWS), BLOCK_N=config.block_n, BLOCK_D=block_d,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    if splits > 1:
        _join_kernel[(batch * num_heads,)](
            partial, lse, out, HEAD_DIM=head_dim, NUM_SPLITS=splits, BLOCK_D=block_d, num_warps=4
        )
    return out


def num_splits(num_programs: int, max_key_len: int, block_n: int, wanted: int) -> int:
    """A power of two: for `wanted` programs in all, but at least two tiles each where keys are so many."""
    most = min(max(max_key_len // (2 * block_n), 1), MAX_SPLITS, max(wanted // num_programs, 1))
    return 1 << (most.bit_length() - 1)


def decode_attention_torch(
    q: Tensor,
    kv: Tensor,
    layer: int,
    tables: Tensor,
    sequences: Tensor | None,
    key_lens: Tensor,
    scale: float,
    window: int | None,
) -> Tensor:
    """The plain twin, query by query, in float64. Shapes as `decode_attention`."""
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    group = q.shape[1] // kv.shape[3]
    places = range(len(q)) if sequences is None else sequences.tolist()
    for row, (sequence, length) in enumerate(zip(places, key_lens.tolist(), strict=True)):
        if length == 0:
            continue
        first = 0 if window is None else max(length - window, 0)
        k, v = gather(kv, layer, tables[sequence], length)[:, first:].double().repeat_interleave(group, 2)
        scores = torch.einsum("hd,khd->hk", q[row].double(), k) * scale
        out[row] = torch.einsum("hk,khd->hd", scores.softmax(-1), v).to(q.dtype)
    return out


def gather(kv: Tensor, layer: int, table: Tensor, num_keys: int) -> Tensor:
    """Keys and values of a sequence out of the arena: [2, num_keys, num_kv_heads, head_dim]."""
    block_size = kv.shape[4]
    blocks = kv[table[: -(-num_keys // block_size)].long(), layer]
    return blocks.permute(1, 0, 3, 2, 4).flatten(1, 2)[:, :num_keys]
