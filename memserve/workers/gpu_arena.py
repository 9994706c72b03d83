"""A GPU worker's device tier at start-up: made by the worker, known to its peers by an export.

    granted its generation table ─► arena, zeroed ─► … ─► export on the grants socket ─► Ready

The memory dies with the process, so there is nothing to give back here. A replacement may find that its peers
still hold what its predecessor had exported: they let go when the supervisor has told them, so it waits.
"""

from __future__ import annotations

import os
import time

import numpy as np
import torch

from memserve.config import WorkerConfig
from memserve.cuda.driver import CudaDriver, LibCuda
from memserve.cuda.memory import DeviceMemory, allocate
from memserve.errors import MemoryError_
from memserve.memfd import map_bytes
from memserve.messages import ArenaExport, generation_table_bytes
from memserve.model_config import KVGeometry
from memserve.pool.arena import Arena
from memserve.pool.lanes import Lanes, Scatter, as_words
from memserve.pool.transports.device_sources import Gpu
from memserve.workers.channel import GrantSocket

_FREED_WITHIN_S = 20.0
_FREED_LOOK_S = 0.1


def gpu_of(config: WorkerConfig, device: torch.device) -> Gpu | None:
    """The worker's GPU, if its memory is to be shared. The calling thread computes there from now on. Raises
    CudaError.
    """
    if "cuda_ipc" not in config.transports:
        return None
    torch.cuda.set_device(device)
    return Gpu(LibCuda(), device.index, device, Lanes.on(device, scatter_of(device)))


def scatter_of(device: torch.device) -> Scatter:
    """The kernel for copies of scattered blocks; where their bytes do not suit it, its plain twin."""
    from memserve.kernels.triton.copy_blocks import VECTOR_BYTES, BlockMemory, BlockPart, copy_blocks

    def scatter(
        to: torch.Tensor,
        to_ids: torch.Tensor,
        source: torch.Tensor,
        source_ids: torch.Tensor,
        first_byte: int,
        num_bytes: int,
    ) -> None:
        memories = BlockMemory.of(source), BlockMemory.of(to)
        sizes = (*(each.address for each in memories), memories[0].block_bytes, first_byte, num_bytes)
        if all(size % VECTOR_BYTES == 0 for size in sizes):
            copy_blocks(*memories, source_ids, to_ids, BlockPart(first_byte, num_bytes))
            return
        width = to.element_size()
        columns = slice(first_byte // width, (first_byte + num_bytes) // width)
        to[to_ids, columns] = source[source_ids, columns]

    return scatter


def make_arena(
    gpu: Gpu, geometry: KVGeometry, num_blocks: int, table_fd: int, max_blocks: int, incarnation: int
) -> Arena:
    """The arena over the table of `max_blocks` that was granted; the descriptor stays the caller's. Raises
    MemoryError_, CudaError.
    """
    num_blocks = min(num_blocks, max_blocks)
    wait_s = 0.0 if incarnation == 0 else _FREED_WITHIN_S
    memory = allocate_in_time(gpu.driver, gpu.ordinal, num_blocks * geometry.block_bytes, wait_s)
    table = map_bytes(table_fd, generation_table_bytes(max_blocks), writable=True)
    arena = Arena.on_gpu(geometry, num_blocks, memory, gpu.device, table.view(np.uint64))
    # A block onto itself, so that the kernel is compiled by now: the first pull would wait a second for that.
    words, first = as_words(arena.as_bytes(), geometry.num_layers), np.zeros(1, dtype=np.int64)
    gpu.lanes.pull.copy_blocks(words, first, words, first, slice(0, words.shape[1]))
    if gpu.device.type == "cuda":
        torch.cuda.synchronize(gpu.device)
    return arena


def allocate_in_time(driver: CudaDriver, ordinal: int, num_bytes: int, wait_s: float) -> DeviceMemory:
    """`allocate`, tried for so long while the memory is not free. Raises as it does."""
    give_up_at = time.monotonic() + wait_s
    while True:
        try:
            return allocate(driver, ordinal, num_bytes)
        except MemoryError_:
            if time.monotonic() >= give_up_at:
                raise
        time.sleep(_FREED_LOOK_S)


def export_arena(arena: Arena, grants: GrantSocket) -> None:
    """Hand the arena over to the supervisor, which grants it to the peers once the worker is ready."""
    if arena.memory is None:
        return
    export, fd = arena.memory.export()
    try:
        grants.send(ArenaExport(arena.num_blocks, arena.geometry.block_bytes, export), fd)
    finally:
        if fd is not None:
            os.close(fd)
