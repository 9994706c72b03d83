"""The memory of a pool: an `Arena` its owner writes, a `PeerArena` that others read. Layout is decided here.

    arena        [num_blocks, num_layers, 2 (K, V), num_kv_heads, block_size, head_dim], contiguous
    generations  [num_blocks] uint64: version of each block's content, see allocator.py
    progress     one uint64 behind them: how far the owner's computing has got, layer by layer

A block holds the K and V of all layers (MemServe §Memory layout: block aggregation), so it is one run of
`block_bytes`, and neighbouring blocks are one longer run. On a CPU worker both parts are memfds that the
supervisor made: they outlive the worker, and a peer maps them read-only, so that nobody but the owner can
ever scribble on them. On a GPU the arena is memory that the worker makes, exports and takes with it when it
dies; its generations and progress are a memfd like those of a CPU worker, and go on in the next life.

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
from memserve.cuda.memory import DeviceMemory
from memserve.messages import ArenaGrant, Tier, generation_table_bytes
from memserve.model_config import KVGeometry
from memserve.torch_dtypes import TORCH_DTYPES

_PROGRESS_BITS = 40


class ArenaFds(NamedTuple):
    """Descriptors of an arena and its generation table, in the order of an `ArenaGrant`."""

    arena: int
    generations: int


class Progress:
    """The owner's count of layers whose K and V are written, in shared memory, for those who pull a
    chunk while it is being computed.

        word = incarnation << 40 | layers written in this incarnation, of all steps together

    Chunks of a step are written layer by layer together, so one word tells of all of them: layer l of a step
    that began at count c can be read from count c + l + 1 on. A step that fails leaves its count behind; what
    was promised of it must be freed or renewed, so that no reader verifies it. The word is stored after
    K and V by a plain store, which x86 keeps in order; elsewhere it would need a barrier.
    """

    def __init__(self, word: NDArray[np.uint64], incarnation: int) -> None:
        assert word.shape == (1,)
        self._word = word
        self._base = incarnation << _PROGRESS_BITS
        self._count = 0
        word[0] = self._base

    def follow(self, is_followed: bool) -> None:
        """Whether somebody is told of the step that is about to begin."""

    def close(self) -> None:
        """Nothing is told any more."""

    @property
    def count(self) -> int:
        """Layers written so far."""
        return self._count

    def advance(self) -> None:
        """One layer more."""
        self._count += 1
        self._tell(self._count)

    def _tell(self, count: int) -> None:
        self._word[0] = self._base | count


@dataclass(frozen=True, slots=True)
class Arena:
    """The blocks of one pool, as their owner sees them.

    `kv` is the tensor of the layout above, on whatever device. `blocks` is the same memory as uint8
    [num_blocks, block_bytes], None where the host cannot address it. Memory is given back when the last
    view is gone; `memory`, of a GPU, by whoever made it.
    """

    geometry: KVGeometry
    kv: torch.Tensor
    blocks: NDArray[np.uint8] | None
    generations: NDArray[np.uint64]
    progress: NDArray[np.uint64]
    memory: DeviceMemory | None = None

    @classmethod
    def create(cls, name: str, geometry: KVGeometry, num_blocks: int) -> tuple[Arena, ArenaFds]:
        """A new arena in shared memory, and its descriptors, which are the caller's: others may map it by
        them. Raises MemoryError_.
        """
        data = memfd.create_memfd(f"{name}-arena", num_blocks * geometry.block_bytes)
        fds = ArenaFds(data, memfd.create_memfd(f"{name}-generations", generation_table_bytes(num_blocks)))
        return cls.map(geometry, num_blocks, fds), fds

    @classmethod
    def map(cls, geometry: KVGeometry, num_blocks: int, fds: ArenaFds) -> Arena:
        """Map the memfds of this pool for writing; `fds` stay the caller's.

        Raises MemoryError_ if they are smaller than the pool.
        """
        data = memfd.map_bytes(fds.arena, num_blocks * geometry.block_bytes, writable=True)
        table = memfd.map_bytes(fds.generations, generation_table_bytes(num_blocks), writable=True)
        kv = torch.from_numpy(data).view(TORCH_DTYPES[geometry.dtype]).view(_shape(geometry, num_blocks))
        words, blocks = table.view(np.uint64), data.reshape(num_blocks, geometry.block_bytes)
        return cls(geometry, kv, blocks, words[:num_blocks], words[num_blocks:])

    @classmethod
    def on_device(cls, geometry: KVGeometry, num_blocks: int, device: torch.device) -> Arena:
        """One zeroed allocation on `device`, which no other process can map."""
        kv = torch.zeros(_shape(geometry, num_blocks), dtype=TORCH_DTYPES[geometry.dtype], device=device)
        words = np.zeros(num_blocks + 1, dtype=np.uint64)
        return cls(geometry, kv, None, words[:num_blocks], words[num_blocks:])

    @classmethod
    def on_gpu(
        cls,
        geometry: KVGeometry,
        num_blocks: int,
        memory: DeviceMemory,
        device: torch.device,
        words: NDArray[np.uint64],
    ) -> Arena:
        """Exportable GPU memory, which stays the caller's to close, zeroed. `words` are a table for at least
        so many blocks, perhaps of an earlier life: what that life held is gone with its memory, so none of
        its addresses verifies any more.
        """
        generations, progress = words[:-1], words[-1:]
        assert len(generations) >= num_blocks
        generations[generations % 2 == 1] += 1
        data = memory.tensor(device)[: num_blocks * geometry.block_bytes]
        kv = data.zero_().view(TORCH_DTYPES[geometry.dtype]).view(_shape(geometry, num_blocks))
        return cls(geometry, kv, None, generations[:num_blocks], progress, memory)

    @property
    def num_blocks(self) -> int:
        """Blocks in all."""
        return len(self.generations)

    def as_bytes(self) -> torch.Tensor:
        """`kv` as uint8 [num_blocks, block_bytes]. A view."""
        return self.kv.view(-1).view(torch.uint8).view(self.num_blocks, self.geometry.block_bytes)


@dataclass(frozen=True, slots=True)
class PeerArena:
    """Another instance's arena, mapped read-only: `blocks` uint8 [num_blocks, block_bytes], `generations`,
    `progress`.

    All change under the reader; `generations` tells which blocks did.
    """

    instance: str
    tier: Tier
    blocks: NDArray[np.uint8]
    generations: NDArray[np.uint64]
    progress: NDArray[np.uint64]

    @classmethod
    def map(cls, grant: ArenaGrant, fds: ArenaFds) -> PeerArena:
        """Map what the grant came with; `fds` stay the caller's.

        Raises MemoryError_ if they are smaller than the grant says.
        """
        data = memfd.map_bytes(fds.arena, grant.num_blocks * grant.block_bytes, writable=False)
        table = memfd.map_bytes(fds.generations, generation_table_bytes(grant.num_blocks), writable=False)
        words, blocks = table.view(np.uint64), data.reshape(grant.num_blocks, grant.block_bytes)
        return cls(grant.instance, grant.tier, blocks, words[: grant.num_blocks], words[grant.num_blocks :])

    def layers_written(self, incarnation: int) -> int | None:
        """See the function of that name."""
        return layers_written(self.progress, incarnation)


def layers_written(progress: NDArray[np.uint64], incarnation: int) -> int | None:
    """`Progress.count` of that life of the word's owner; None once another has begun."""
    life, count = divmod(int(progress[0]), 1 << _PROGRESS_BITS)
    return count if life == incarnation else None


def _shape(geometry: KVGeometry, num_blocks: int) -> tuple[int, ...]:
    return (num_blocks, geometry.num_layers, 2, geometry.num_kv_heads, geometry.block_size, geometry.head_dim)
