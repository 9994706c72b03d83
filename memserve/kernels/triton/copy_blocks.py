"""Copies of whole blocks, or of some layers' part of them, between two arenas that one GPU can address.

An arena is an address, so it may be the GPU's own, a peer's mapped through CUDA IPC, or pinned host memory
(whose address on the device is what `torch` or `cudaHostGetDevicePointer` gives). A block is one run of
bytes, and so is a layer's part of it; both are copied in vectors of 16 bytes. One launch copies any number of
blocks, scattered or in runs, and waits for nothing; the memory must stay mapped until it is over. Who may
write where is not looked at here.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

VECTOR_BYTES = 16
# Words of 8 bytes that one program copies: 128 threads, 8 vectors each, all loaded before any is stored.
_WORDS = 2048


class BlockMemory(NamedTuple):
    """`num_blocks` blocks of `block_bytes` from `address` on, as the copying GPU sees it."""

    address: int
    num_blocks: int
    block_bytes: int

    @classmethod
    def of(cls, arena: Tensor) -> BlockMemory:
        """The memory of a contiguous arena [num_blocks, …]; the tensor must outlive what is enqueued."""
        assert arena.is_contiguous()
        return cls(arena.data_ptr(), len(arena), arena[0].numel() * arena.element_size())


class BlockPart(NamedTuple):
    """Bytes of each block: `num_bytes` from `first_byte` on."""

    first_byte: int
    num_bytes: int

    @classmethod
    def of_layers(cls, layers: range, num_layers: int, block_bytes: int) -> BlockPart:
        """K and V of consecutive layers; of a block these are one run."""
        layer_bytes = block_bytes // num_layers
        assert layer_bytes * num_layers == block_bytes and layers.step == 1
        assert 0 <= layers.start <= layers.stop <= num_layers
        return cls(layers.start * layer_bytes, len(layers) * layer_bytes)


@triton.jit(do_not_specialize=("programs_each",))
def _copy_kernel(
    source,  # address of the first block's part
    target,  # address of the first block's part
    source_ids_ptr,  # int64 [N]
    target_ids_ptr,  # int64 [N]
    source_stride,  # bytes from block to block
    target_stride,
    num_words,  # of 8 bytes, of each block's part
    programs_each,  # programs of a block
    WORDS: tl.constexpr,
):
    pair = tl.program_id(0) // programs_each
    words = tl.program_id(0) % programs_each * WORDS + tl.arange(0, WORDS)
    from_address = source + tl.load(source_ids_ptr + pair) * source_stride
    to_address = target + tl.load(target_ids_ptr + pair) * target_stride
    from_ptr = tl.multiple_of(from_address.to(tl.pointer_type(tl.int64)), 16)
    to_ptr = tl.multiple_of(to_address.to(tl.pointer_type(tl.int64)), 16)
    inside = words < num_words
    tl.store(to_ptr + words, tl.load(from_ptr + words, mask=inside), mask=inside)


def copy_blocks(
    source: BlockMemory,
    target: BlockMemory,
    source_ids: Tensor,
    target_ids: Tensor,
    part: BlockPart | None = None,
) -> None:
    """Copy block `source_ids[i]` of `source` to block `target_ids[i]` of `target`, for each i.

    Args:
        source: where from; the blocks of both sides are of one size and layout.
        target: where to; disjoint from what is read.
        source_ids: int64 [N], on the GPU that copies.
        target_ids: int64 [N], likewise; no block twice.
        part: which bytes of each block; None = all.
    """
    part = part or BlockPart(0, source.block_bytes)
    count = len(source_ids)
    assert source_ids.dtype == target_ids.dtype == torch.int64 and target_ids.shape == (count,)
    assert source_ids.is_contiguous() and target_ids.is_contiguous()
    assert source.block_bytes == target.block_bytes >= part.first_byte + part.num_bytes
    sizes = (source.address, target.address, source.block_bytes, *part)
    assert all(size % VECTOR_BYTES == 0 for size in sizes), "blocks are copied in vectors of 16 bytes"
    if count == 0 or part.num_bytes == 0:
        return
    num_words = part.num_bytes // 8
    programs_each = triton.cdiv(num_words, _WORDS)
    _copy_kernel[(count * programs_each,)](
        source.address + part.first_byte, target.address + part.first_byte, source_ids, target_ids,
        source.block_bytes, target.block_bytes, num_words, programs_each, WORDS=_WORDS, num_warps=4,
    )  # fmt: skip


def copy_blocks_torch(
    source: Tensor, target: Tensor, source_ids: Tensor, target_ids: Tensor, layers: range | None = None
) -> None:
    """The plain twin, of arenas [num_blocks, num_layers, …] as tensors."""
    chosen = slice(None) if layers is None else slice(layers.start, layers.stop)
    target[target_ids, chosen] = source[source_ids, chosen]
