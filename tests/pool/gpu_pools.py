"""Pools of GPU workers without a GPU: a driver over memfds, lanes whose work is done when the test says."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch

from memserve import memfd
from memserve.cuda.memory import DeviceMemory, allocate
from memserve.messages import ArenaGrant, DeviceGrant, Tier, generation_table_bytes
from memserve.model_config import KVGeometry
from memserve.pool.arena import Arena
from memserve.pool.mempool import MemPool
from memserve.pool.retention import HostArena, Retention
from memserve.pool.transports.base import Pull, PullResult
from memserve.pool.transports.by_peer import PeerTransfer
from memserve.pool.transports.cuda_ipc import CudaTransfer
from memserve.pool.transports.device_sources import Gpu
from tests.cuda.fake_driver import FakeDriver
from tests.pool.fake_lanes import FakeGpu

CPU = torch.device("cpu")
MAX_BLOCKS = 80


class FakePins:
    """What is pinned, by address; `most` bytes can be."""

    def __init__(self, most: int = 1 << 40) -> None:
        self.most = most
        self.pinned: dict[int, int] = {}

    def pin(self, address: int, num_bytes: int) -> None:
        if sum(self.pinned.values()) + num_bytes > self.most:
            raise RuntimeError("out of memory")
        self.pinned[address] = num_bytes

    def unpin(self, address: int) -> None:
        del self.pinned[address]


@dataclass
class GpuPool:
    """A pool of a GPU worker in its life `incarnation`, and what its supervisor holds for it."""

    instance: str
    driver: FakeDriver
    lanes: FakeGpu
    pool: MemPool
    arena: Arena
    memory: DeviceMemory
    table_fd: int
    incarnation: int
    ordinal: int
    woken: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    host: Arena | None = None
    host_fds: tuple[int, int] | None = None

    def grant_to(self, other: GpuPool) -> None:
        export, fd = self.memory.export()
        block_bytes = self.arena.geometry.block_bytes
        num_blocks = self.arena.num_blocks
        grant = DeviceGrant(self.instance, self.incarnation, MAX_BLOCKS, num_blocks, block_bytes, export)
        other.pool.peers.add_device(grant, memfd.reopen_readonly(self.table_fd), fd)
        if self.host is not None and self.host_fds is not None:
            of_host = ArenaGrant(
                self.instance, self.incarnation, Tier.HOST, self.host.num_blocks, block_bytes
            )
            other.pool.peers.add_mapped(of_host, *map(memfd.reopen_readonly, self.host_fds))

    def fill(self, ids: np.ndarray, first: int = 1) -> None:
        """Give each block a content of its own, on the compute lane, as a step would."""
        blocks = self.arena.as_bytes()
        for value, block in enumerate(ids, start=first):
            self.lanes.compute.put(lambda block=block, value=value: blocks[block].fill_(value % 251))

    def content(self, ids: np.ndarray) -> list[int]:
        blocks = self.arena.as_bytes()[torch.from_numpy(np.asarray(ids))]
        assert (blocks == blocks[:, :1]).all()
        return blocks[:, 0].tolist()

    def finish(self, pull: Pull) -> PullResult:
        """Wait for the end of a pull as the loop does: by its wake-up."""
        deadline = time.monotonic() + 20
        while (result := pull.poll()) is None:
            assert self.woken.acquire(timeout=max(0.0, deadline - time.monotonic())), "pull never ended"
        return result


def gpu_pools() -> Iterator[Callable[..., GpuPool]]:
    """Makes pools on one driver; at the end they are idle, and everything of the driver is given back."""
    made: list[GpuPool] = []
    drivers: list[FakeDriver] = []

    def make(
        instance: str,
        *,
        driver: FakeDriver | None = None,
        ordinal: int = 0,
        num_blocks: int = 64,
        block_size: int = 4,
        incarnation: int = 1,
        is_free: bool = True,
        after: GpuPool | None = None,
        host_blocks: int = 0,
        max_host_blocks: int = 0,
    ) -> GpuPool:
        """`after`: the life before, whose generations go on."""
        if driver is None:
            driver = drivers[0] if drivers else FakeDriver(num_gpus=2)
        if driver not in drivers:
            drivers.append(driver)
        geometry = KVGeometry(
            num_layers=2, num_kv_heads=2, block_size=block_size, head_dim=8, dtype="float32"
        )
        table_bytes = generation_table_bytes(MAX_BLOCKS)
        table_fd = memfd.create_memfd("generations", table_bytes) if after is None else os.dup(after.table_fd)
        words = memfd.map_bytes(table_fd, table_bytes, writable=True).view(np.uint64)
        memory = allocate(driver, ordinal, num_blocks * geometry.block_bytes)
        arena = Arena.on_gpu(geometry, num_blocks, memory, CPU, words)
        lanes, woken = FakeGpu(is_free=is_free), threading.Semaphore(0)
        host = host_fds = retention = None
        if host_blocks:
            host, host_fds = Arena.create(f"{instance}-host", geometry, max(host_blocks, max_host_blocks))
            pins = FakePins()
            retention = Retention(host=HostArena(host, host_blocks, pins=pins), tells_removals=True)
        gpu = Gpu(driver, ordinal, CPU, lanes.lanes)
        cuda = CudaTransfer(arena.as_bytes(), gpu, woken.release, num_layers=geometry.num_layers)
        pool = MemPool(
            arena,
            instance,
            incarnation,
            woken.release,
            retention=retention,
            transfer=PeerTransfer(woken.release, None, cuda=cuda),
            lanes=lanes.lanes,
        )
        made.append(
            GpuPool(
                instance,
                driver,
                lanes,
                pool,
                arena,
                memory,
                table_fd,
                incarnation,
                ordinal,
                woken,
                host,
                host_fds,
            )
        )
        return made[-1]

    yield make
    for each in made:
        each.lanes.is_free = True
        each.pool.close()
        each.pool.assert_idle()
        each.memory.close()
        for fd in (each.table_fd, *(each.host_fds or ())):
            os.close(fd)
    for driver in drivers:
        driver.assert_all_returned()
