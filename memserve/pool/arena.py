"""The memory of a pool: an `Arena` its owner writes, a `PeerArena` that others read. Layout is decided here.

    arena        [num_blocks, num_layers, 2 (K, V), num_kv_heads, block_size, head_dim], contiguous
    generations  [num_blocks] uint64: version of each block's content, see allocator.py

A block holds the K and V of all layers (MemServe §Memory layout: block aggregation), so it is one run of
`block_bytes`, and neighbouring blocks are one longer run. On a CPU worker both parts are memfds that the
supervisor made: they outlive the worker, and a peer maps them read-only, so that nobody but the owner can
ever scribble on them.

A slot never written in its life holds zeros: attention may multiply what lies there by a weight of 0, which
would not be 0 for a NaN. Which block belongs to whom is allocator.py's concern; when copies happen, the
transports'.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from memserve import memfd
from memserve.messages import ArenaGrant
from memserve.model_config import KVGeometry
from memserve.torch_dtypes import TORCH_DTYPES

_GENERATION_BYTES = 8


class ArenaFds(NamedTuple):
    """Descriptors of an arena and its generation table, in the order of an `ArenaGrant`."""

    arena: int
    generations: int


@dataclass(frozen=True, slots=True)
class Arena:
    """The blocks of one pool, as their owner sees them.

    `kv` is the tensor of the layout above, on whatever device. `blocks` is the same memory as uint8
    [num_blocks, block_bytes], None where the host cannot address it. Memory is given back when the last
    view is gone.
    """

    geometry: KVGeometry
    kv: torch.Tensor
    blocks: NDArray[np.uint8] | None
    generations: NDArray[np.uint64]

    @classmethod
    def map(cls, geometry: KVGeometry, num_blocks: int, fds: ArenaFds) -> Arena:
        """Map the memfds of this pool for writing; `fds` stay the caller's.

        Raises MemoryError_ if they are smaller than the pool.
        """
        data = memfd.map_bytes(fds.arena, num_blocks * geometry.block_bytes, writable=True)
        table = memfd.map_bytes(fds.generations, num_blocks * _GENERATION_BYTES, writable=True)
        kv = torch.from_numpy(data).view(TORCH_DTYPES[geometry.dtype]).view(_shape(geometry, num_blocks))
        return cls(geometry, kv, data.reshape(num_blocks, geometry.block_bytes), table.view(np.uint64))

    @classmethod
    def on_device(cls, geometry: KVGeometry, num_blocks: int, device: torch.device) -> Arena:
        """One zeroed allocation on `device`, which no other process can map."""
        kv = torch.zeros(_shape(geometry, num_blocks), dtype=TORCH_DTYPES[geometry.dtype], device=device)
        return cls(geometry, kv, None, np.zeros(num_blocks, dtype=np.uint64))

    @property
    def num_blocks(self) -> int:
        """Blocks in all."""
        return len(self.generations)


@dataclass(frozen=True, slots=True)
class PeerArena:
    """Another instance's arena, mapped read-only: `blocks` uint8 [num_blocks, block_bytes], `generations`.

    Both change under the reader; `generations` tells which blocks did.
    """

    instance: str
    blocks: NDArray[np.uint8]
    generations: NDArray[np.uint64]

    @classmethod
    def map(cls, grant: ArenaGrant, fds: ArenaFds) -> PeerArena:
        """Map what the grant came with; `fds` stay the caller's.

        Raises MemoryError_ if they are smaller than the grant says.
        """
        data = memfd.map_bytes(fds.arena, grant.num_blocks * grant.block_bytes, writable=False)
        table = memfd.map_bytes(fds.generations, grant.num_blocks * _GENERATION_BYTES, writable=False)
        return cls(grant.instance, data.reshape(grant.num_blocks, grant.block_bytes), table.view(np.uint64))


def _shape(geometry: KVGeometry, num_blocks: int) -> tuple[int, ...]:
    return (num_blocks, geometry.num_layers, 2, geometry.num_kv_heads, geometry.block_size, geometry.head_dim)
