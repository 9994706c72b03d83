"""What a GPU copies blocks from: a peer's arena on a GPU, opened here, or a peer's host tier, mapped.

Which of two GPUs' memory is opened on which is decided here, once for each peer: on our own GPU where it
reaches the peer's, which for the same GPU it does; else on the peer's, as far as this process may use it.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from memserve.cuda.driver import CudaDriver, CudaError
from memserve.cuda.memory import DeviceMemory, open_exported, ordinal_of, tensor_at
from memserve.messages import DeviceGrant, Tier
from memserve.pool.arena import PeerArena
from memserve.pool.lanes import Lanes

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Gpu:
    """The GPU of this worker: `device` is torch's name for `ordinal`."""

    driver: CudaDriver
    ordinal: int
    device: torch.device
    lanes: Lanes

    def at(self, ordinal: int) -> torch.device:
        """Torch's name for another."""
        return self.device if ordinal == self.ordinal else torch.device(self.device.type, ordinal)


class DeviceSource:
    """One tier of a peer: `blocks`, uint8 [num_blocks, block_bytes], which our GPU can copy from, its
    generations and progress in shared memory. `memory` is GPU memory, ours to close, or a mapping to keep.
    """

    def __init__(
        self,
        instance: str,
        tier: Tier,
        blocks: torch.Tensor,
        generations: NDArray[np.uint64],
        progress: NDArray[np.uint64],
        memory: DeviceMemory | PeerArena,
    ) -> None:
        assert len(blocks) == len(generations)
        self.instance = instance
        self.tier = tier
        self.blocks = blocks
        self.generations = generations
        self.progress = progress
        self.is_retired = False
        self._memory = memory

    @classmethod
    def open(cls, gpu: Gpu, grant: DeviceGrant, words: NDArray[np.uint64], fd: int | None) -> DeviceSource:
        """A peer's arena by its grant, whose descriptor is ours from now on, and the table that came with
        it. Raises CudaError if it cannot be opened.
        """
        assert grant.memory is not None
        num_bytes = grant.num_blocks * grant.block_bytes
        ordinal = ordinal_of(gpu.driver, grant.memory.gpu)
        if ordinal is not None and not gpu.driver.can_access(gpu.ordinal, ordinal):
            logger.warning(
                "GPU %d cannot read the memory of GPU %d, where %s is: its KV is staged through pinned host "
                "memory, at a fraction of the speed",
                gpu.ordinal,
                ordinal,
                grant.instance,
            )
            reader = ordinal
        else:  # also a GPU that is hidden from this process: its memory may be reached all the same
            reader = gpu.ordinal
        memory = open_exported(gpu.driver, reader, grant.memory, fd)
        if memory.num_bytes < num_bytes:
            memory.close()
            raise CudaError(f"{grant.instance} exported {memory.num_bytes} bytes for {num_bytes}")
        blocks = memory.tensor(gpu.at(reader))[:num_bytes].view(grant.num_blocks, grant.block_bytes)
        return cls(grant.instance, Tier.DEVICE, blocks, words[: grant.num_blocks], words[-1:], memory)

    @classmethod
    def of_host(cls, peer: PeerArena) -> DeviceSource:
        """A peer's host tier. Its pages are not pinned: to pin them would fill its holes."""
        address = peer.blocks.ctypes.data
        blocks = tensor_at(address, peer.blocks.nbytes, torch.device("cpu")).view(peer.blocks.shape)
        return cls(peer.instance, peer.tier, blocks, peer.generations, peer.progress, peer)

    def close(self) -> None:
        """Give the mapping back. No copy may be reading it any more."""
        if isinstance(self._memory, DeviceMemory):
            self._memory.close()
