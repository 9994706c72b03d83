"""From a step's q, k and v to rotated queries and a filled arena, in one pass.

`rotate_and_store` does what the plain path does in four: q and k are normalised per head where the model
says so, rotated by their position, and k and v written into their slots. Keys are not kept elsewhere:
attention reads the step's own out of the arena. `store_kv` is the writing alone.

Rows with slot -1 (padding) store nothing. A row with a tail zeroes the slots behind its own, so that a block
that holds a token is finite all over: the Triton kernels mask what they load and need it not, the plain
path and peers do. Pairs to be rotated are adjacent (see `kernels.rotary`).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from memserve.kernels import norm
from memserve.kernels.rotary import rotate_

# Heads of one program, ~1024 elements.
_ELEMENTS = 1024


@triton.jit
def _store_kernel(
    qkv_ptr,  # [T, NUM_HEADS + 2 * KV_HEADS, HEAD_DIM], rows stride_row apart
    q_norm_ptr,  # [HEAD_DIM] if HAS_NORM
    k_norm_ptr,  # [HEAD_DIM] if HAS_NORM
    rotations_ptr,  # float32 [positions, HEAD_DIM], cosine and sine in turn
    positions_ptr,  # int64 [T]
    slots_ptr,  # int64 [T]
    tails_ptr,  # int32 [T]
    kv_ptr,  # [num_blocks, 2, KV_HEADS, BLOCK_SIZE, HEAD_DIM], one layer of the arena
    stride_row,
    stride_block,
    stride_kind,
    stride_head,
    stride_slot,
    eps,
    NUM_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROTATES: tl.constexpr,
    HAS_NORM: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    dims = tl.arange(0, BLOCK_D)
    inside = (heads < NUM_HEADS + 2 * KV_HEADS)[:, None] & (dims < HEAD_DIM)[None, :]
    at = qkv_ptr + row * stride_row + heads[:, None] * HEAD_DIM + dims[None, :]
    x = tl.load(at, mask=inside, other=0.0)
    if ROTATES:
        y = x
        if HAS_NORM:
            wide = x.to(tl.float32)
            inverse = 1.0 / tl.sqrt(tl.sum(wide * wide, axis=1) / HEAD_DIM + eps)
            q_norm = tl.load(q_norm_ptr + dims, mask=dims < HEAD_DIM, other=0.0).to(tl.float32)
            k_norm = tl.load(k_norm_ptr + dims, mask=dims < HEAD_DIM, other=0.0).to(tl.float32)
            weight = tl.where((heads < NUM_HEADS)[:, None], q_norm[None, :], k_norm[None, :])
            y = (wide * inverse[:, None] * weight).to(x.dtype)
        position = tl.load(positions_ptr + row)
        turns = tl.load(rotations_ptr + position * HEAD_DIM + dims, mask=dims < HEAD_DIM, other=0.0)
        cos, sin = tl.split(tl.reshape(turns, [BLOCK_D // 2, 2]))
        real, imaginary = tl.split(tl.reshape(y.to(tl.float32), [BLOCK_H, BLOCK_D // 2, 2]))
        turned = tl.interleave(
            real * cos[None, :] - imaginary * sin[None, :], real * sin[None, :] + imaginary * cos[None, :]
        )
        x = tl.where((heads < NUM_HEADS + KV_HEADS)[:, None], turned.to(x.dtype), x)
        tl.store(at, x, mask=inside & (heads < NUM_HEADS)[:, None])

    slot = tl.load(slots_ptr + row)
    if slot >= 0:
        kind = (heads - NUM_HEADS) // KV_HEADS
        base = kv_ptr + slot // BLOCK_SIZE * stride_block + slot % BLOCK_SIZE * stride_slot
        offsets = kind * stride_kind + (heads - NUM_HEADS) % KV_HEADS * stride_head
        target = base + offsets[:, None] + dims[None, :]
        stored = inside & (heads >= NUM_HEADS)[:, None]
        tl.store(target, x, mask=stored)
        tail = tl.load(tails_ptr + row)
        for behind in range(1, tail + 1):
            tl.store(target + behind * stride_slot, tl.zeros_like(x), mask=stored)


def rotate_and_store(
    qkv: Tensor,
    norms: tuple[Tensor, Tensor] | None,
    rotations: Tensor,
    positions: Tensor,
    slots: Tensor,
    tails: Tensor,
    kv: Tensor,
    layer: int,
    num_heads: int,
    eps: float,
) -> Tensor:
    """Normalise and rotate q and k, store k and v.

    Args:
        qkv: [T, num_heads + 2 * num_kv_heads, head_dim]: q heads, k heads, v heads; the q heads are
            overwritten, the others left as they are.
        norms: weights [head_dim] for q and k of models that normalise them, else None.
        rotations: complex64 [positions, head_dim / 2] (`kernels.rotary.rotation_table`).
        positions: int64 [T].
        slots: int64 [T], block * block_size + offset, or -1.
        tails: int32 [T], slots to zero behind each.
        kv: the arena [num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim].
        layer: which layer of it.
        num_heads: query heads.
        eps: of the norms.

    Returns:
        The queries [T, num_heads, head_dim], a view of `qkv`.
    """
    _launch(qkv, norms, (rotations, positions), slots, tails, kv, layer, num_heads, eps)
    return qkv[:, :num_heads]


def store_kv(new: Tensor, slots: Tensor, tails: Tensor, kv: Tensor, layer: int) -> None:
    """Write `new` [T, 2, num_kv_heads, head_dim] (keys, then values); the rest as `rotate_and_store`."""
    _launch(new.flatten(1, 2), None, None, slots, tails, kv, layer, 0, 0.0)


def rotate_and_store_torch(
    qkv: Tensor,
    norms: tuple[Tensor, Tensor] | None,
    rotations: Tensor,
    positions: Tensor,
    slots: Tensor,
    tails: Tensor,
    kv: Tensor,
    layer: int,
    num_heads: int,
    eps: float,
) -> Tensor:
    """The plain twin of `rotate_and_store`."""
    num_kv_heads = kv.shape[3]
    q, k = qkv[:, :num_heads], qkv[:, num_heads : num_heads + num_kv_heads].clone()
    if norms is not None:
        q.copy_(norm.rms_norm(q, norms[0], eps))
        k = norm.rms_norm(k, norms[1], eps)
    for rotated in (q, k):
        rotate_(rotated, rotations[positions].unsqueeze(1))
    new = torch.stack((k, qkv[:, num_heads + num_kv_heads :]), dim=1)
    store_kv_torch(new, slots, tails, kv, layer)
    return q


def store_kv_torch(new: Tensor, slots: Tensor, tails: Tensor, kv: Tensor, layer: int) -> None:
    """The plain twin of `store_kv`."""
    block_size = kv.shape[4]
    for row, (slot, tail) in enumerate(zip(slots.tolist(), tails.tolist(), strict=True)):
        if slot >= 0:
            block, offset = divmod(slot, block_size)
            kv[block, layer, :, :, offset] = new[row]
            kv[block, layer, :, :, offset + 1 : offset + 1 + tail] = 0.0


def _launch(
    qkv: Tensor,
    norms: tuple[Tensor, Tensor] | None,
    turns: tuple[Tensor, Tensor] | None,
    slots: Tensor,
    tails: Tensor,
    kv: Tensor,
    layer: int,
    num_heads: int,
    eps: float,
) -> None:
    _, _, _, num_kv_heads, block_size, head_dim = kv.shape
    num_rows, heads, _ = qkv.shape
    assert heads == num_heads + 2 * num_kv_heads and qkv.shape[2] == head_dim and qkv.dtype == kv.dtype
    assert qkv.stride(2) == 1 and qkv.stride(1) == head_dim and kv.stride(5) == 1 and head_dim % 2 == 0
    assert slots.shape == tails.shape == (num_rows,)
    if num_rows == 0:
        return
    block_d = triton.next_power_of_2(head_dim)
    block_h = min(triton.next_power_of_2(heads), max(_ELEMENTS // block_d, 1))
    q_norm, k_norm = norms or (qkv, qkv)
    rotations, positions = (qkv, slots) if turns is None else (torch.view_as_real(turns[0]), turns[1])
    assert turns is None or (rotations.is_contiguous() and rotations.shape[1] * 2 == head_dim)
    layer_kv = kv.select(1, layer)
    _store_kernel[(num_rows, triton.cdiv(heads, block_h))](
        qkv, q_norm, k_norm, rotations, positions, slots, tails, layer_kv,
        qkv.stride(0), *layer_kv.stride()[:4], eps,
        NUM_HEADS=num_heads, KV_HEADS=num_kv_heads, HEAD_DIM=head_dim, BLOCK_SIZE=block_size,
        BLOCK_H=block_h, BLOCK_D=block_d, ROTATES=turns is not None, HAS_NORM=norms is not None,
        num_warps=4,
    )  # fmt: skip
