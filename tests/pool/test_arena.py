"""Layout of an arena, and what its owner and its peers may do with it."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

from memserve import memfd
from memserve.errors import MemoryError_
from memserve.messages import ArenaGrant, Tier
from memserve.model_config import KVGeometry
from memserve.pool.arena import Arena, ArenaFds, PeerArena


def make_fds(geometry: KVGeometry, num_blocks: int) -> ArenaFds:
    return ArenaFds(
        memfd.create_memfd("arena", num_blocks * geometry.block_bytes),
        memfd.create_memfd("generations", (num_blocks + 1) * 8),
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("block_size", [1, 4, 16])
def test_a_block_is_one_run_of_bytes(dtype: str, block_size: int) -> None:
    geometry = KVGeometry(num_layers=3, num_kv_heads=2, block_size=block_size, head_dim=8, dtype=dtype)
    fds = make_fds(geometry, 5)
    arena = Arena.map(geometry, 5, fds)
    grant = ArenaGrant("peer", 1, Tier.DEVICE, 5, geometry.block_bytes)
    peer = PeerArena.map(grant, fds)
    for fd in fds:
        os.close(fd)

    assert arena.kv.shape == (5, 3, 2, 2, block_size, 8) and arena.kv.is_contiguous()
    assert arena.kv.dtype == getattr(torch, dtype)
    assert not arena.kv.any(), "a slot that was never written must be harmless to attention"
    arena.kv[3] = torch.randn(arena.kv[3].shape)
    expected = arena.kv[3].contiguous().view(torch.uint8).numpy().reshape(-1)
    for blocks in (arena.blocks, peer.blocks):
        assert blocks is not None and blocks.shape == (5, geometry.block_bytes)
        assert np.array_equal(blocks[3], expected)
        assert not blocks[[0, 1, 2, 4]].any()
    arena.generations[2] = 2**63 + 1
    assert peer.generations.tolist() == [0, 0, 2**63 + 1, 0, 0]


def test_a_peer_cannot_write() -> None:
    geometry = KVGeometry(num_layers=1, num_kv_heads=1, block_size=4, head_dim=8, dtype="float32")
    fds = make_fds(geometry, 2)
    peer = PeerArena.map(ArenaGrant("peer", 1, Tier.DEVICE, 2, geometry.block_bytes), fds)
    for array in (peer.blocks, peer.generations):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1
    for fd in fds:
        os.close(fd)


def test_descriptors_smaller_than_the_pool_are_refused() -> None:
    geometry = KVGeometry(num_layers=1, num_kv_heads=1, block_size=4, head_dim=8, dtype="float32")
    fds = make_fds(geometry, 2)
    with pytest.raises(MemoryError_):
        Arena.map(geometry, 3, fds)
    with pytest.raises(MemoryError_):
        PeerArena.map(ArenaGrant("peer", 1, Tier.DEVICE, 3, geometry.block_bytes), fds)
    for fd in fds:
        os.close(fd)


def test_an_arena_of_its_own_memory_is_zeroed_and_cannot_be_mapped() -> None:
    geometry = KVGeometry(num_layers=2, num_kv_heads=1, block_size=4, head_dim=8, dtype="bfloat16")
    arena = Arena.on_device(geometry, 6, torch.device("cpu"))
    assert arena.kv.shape == (6, 2, 2, 1, 4, 8) and not arena.kv.any()
    assert arena.blocks is None and arena.num_blocks == 6
