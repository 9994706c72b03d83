"""Copies of blocks between arenas, under Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from memserve.kernels.triton.copy_blocks import BlockMemory, BlockPart, copy_blocks, copy_blocks_torch

SHAPE = (3, 2, 2, 4, 64)  # layers, K and V, heads, slots, elements: 12 KiB in float32, no multiple of 16 KiB


@pytest.mark.parametrize("layers", [None, range(3), range(1, 2), range(1, 3), range(2, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_copies(layers: range | None, dtype: torch.dtype) -> None:
    source = torch.randn(9, *SHAPE).to(dtype)
    target = torch.full((12, *SHAPE), float("nan"), dtype=dtype)
    twin = target.clone()
    source_ids, target_ids = torch.tensor([8, 0, 3, 4, 5]), torch.tensor([1, 11, 4, 5, 6])
    memory = BlockMemory.of(source)
    part = None if layers is None else BlockPart.of_layers(layers, 3, memory.block_bytes)
    copy_blocks(memory, BlockMemory.of(target), source_ids, target_ids, part)
    copy_blocks_torch(source, twin, source_ids, target_ids, layers)
    assert torch.equal(target.isnan(), twin.isnan())
    assert torch.equal(target.nan_to_num(), twin.nan_to_num())


def test_large_blocks_and_none() -> None:
    """Blocks of several programs each; and no blocks at all."""
    source, target = torch.randn(3, 1, 2, 8, 16, 70), torch.zeros(3, 1, 2, 8, 16, 70)
    none = torch.empty(0, dtype=torch.int64)
    copy_blocks(BlockMemory.of(source), BlockMemory.of(target), none, none)
    assert not target.any()
    copy_blocks(BlockMemory.of(source), BlockMemory.of(target), torch.tensor([2, 0]), torch.tensor([0, 1]))
    assert torch.equal(target[:2], source[[2, 0]]) and not target[2].any()


def test_only_whole_vectors() -> None:
    odd = BlockMemory.of(torch.zeros(2, 3))
    with pytest.raises(AssertionError, match="vectors"):
        copy_blocks(odd, odd, torch.tensor([0]), torch.tensor([1]))
