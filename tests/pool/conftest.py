"""Pools over real memfds for the tests of memserve/pool."""

from __future__ import annotations

import contextlib
import gc
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from memserve import memfd
from memserve.messages import ArenaGrant, Tier
from memserve.model_config import KVGeometry
from memserve.pool.arena import Arena, ArenaFds
from memserve.pool.mempool import MemPool
from memserve.pool.retention import HostArena, Retention
from memserve.pool.transports.base import Pull, PullResult
from memserve.pool.transports.by_peer import PeerTransfer
from memserve.pool.transports.shm import Copy, ShmTransfer, copy_bytes

POISON = 0x5A


@dataclass
class PoolUnderTest:
    """A pool, the descriptors a supervisor would hold for it, and the wake-ups it gave."""

    pool: MemPool
    arena: Arena
    fds: ArenaFds
    instance: str
    woken: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    host: Arena | None = None
    host_fds: ArenaFds | None = None

    def grant_to(self, other: PoolUnderTest) -> None:
        """Let `other` pull from here, as the supervisor does: read-only descriptors, given away."""
        block_bytes = self.arena.geometry.block_bytes
        for tier, arena, fds in ((Tier.DEVICE, self.arena, self.fds), (Tier.HOST, self.host, self.host_fds)):
            if arena is not None and fds is not None:
                grant = ArenaGrant(self.instance, 1, tier, arena.num_blocks, block_bytes)
                other.pool.peers.add_mapped(grant, *map(memfd.reopen_readonly, fds))

    def fill(self, ids: np.ndarray, first: int = 1) -> None:
        """Give each of `ids` a content of its own."""
        assert self.arena.blocks is not None
        for value, block in enumerate(ids, start=first):
            self.arena.blocks[block] = value % 251

    def content(self, ids: np.ndarray, tier: Tier = Tier.DEVICE) -> list[int]:
        """The value each of `ids` was filled with; fails on a block of mixed content."""
        arena = self.arena if tier is Tier.DEVICE else self.host
        assert arena is not None and arena.blocks is not None
        blocks = arena.blocks[ids]
        assert (blocks == blocks[:, :1]).all()
        return [int(value) for value in blocks[:, 0]]

    def finish(self, pull: Pull) -> PullResult:
        """Wait for the end of a pull as the loop does: by its wake-up."""
        deadline_s = time.monotonic() + 30
        while (result := pull.poll()) is None:
            assert self.woken.acquire(timeout=max(0.0, deadline_s - time.monotonic())), "pull never ended"
        return result


def shared_memory() -> tuple[int, int]:
    """How many memfds this process has open, and how many mappings of memfds."""
    num_fds = 0
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the descriptor of the listing itself
            num_fds += "/memfd:" in os.readlink(f"/proc/self/fd/{name}")
    return num_fds, Path("/proc/self/maps").read_text().count("/memfd:")


class Ticks:
    """A clock that goes on by a second whenever it is looked at."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1
        return self.now


def poison(arena: Arena) -> Callable[[np.ndarray], None]:
    """Spoils the content of blocks."""

    def spoil(ids: np.ndarray) -> None:
        assert arena.blocks is not None
        arena.blocks[ids] = POISON

    return spoil


MakePool = Callable[..., PoolUnderTest]


@pytest.fixture
def make_pool() -> Iterator[MakePool]:
    """Makes pools that poison what is freed; at the end all must be idle, and every descriptor back."""
    if any(shared_memory()):
        gc.collect()  # what other tests have left in cycles would go in the middle of this
    before = shared_memory()
    made: list[PoolUnderTest] = []

    def make(
        instance: str = "pool",
        *,
        num_blocks: int = 64,
        block_size: int = 4,
        copy: Copy = copy_bytes,
        caches: bool = False,
        host_blocks: int | None = None,
        max_host_blocks: int = 64,
        **retention: object,
    ) -> PoolUnderTest:
        """`host_blocks` of `max_host_blocks` make a host tier; `retention` are further fields of one."""
        geometry = KVGeometry(
            num_layers=2, num_kv_heads=2, block_size=block_size, head_dim=8, dtype="float32"
        )
        arena, fds = Arena.create(instance, geometry, num_blocks)
        host = host_fds = keeps = None
        if host_blocks is not None:
            host, host_fds = Arena.create(f"{instance}-host", geometry, max_host_blocks)
            retention["host"] = HostArena(host, host_blocks, poison(host))
        if caches or host is not None:
            keeps = Retention(**retention)
        woken = threading.Semaphore(0)
        shm = ShmTransfer(arena.blocks, woken.release, num_layers=geometry.num_layers, copy=copy)
        pool = MemPool(
            arena,
            instance,
            1,
            woken.release,
            retention=keeps,
            clock=Ticks(),
            on_free=poison(arena),
            transfer=PeerTransfer(woken.release, shm),
        )
        made.append(PoolUnderTest(pool, arena, fds, instance, woken, host, host_fds))
        return made[-1]

    yield make
    while made:
        under_test = made.pop()
        under_test.pool.close()
        under_test.pool.assert_idle()
        for fd in (*under_test.fds, *(under_test.host_fds or ())):
            os.close(fd)
        del under_test
    if shared_memory() != before:
        gc.collect()  # a failed test's frames, say
    assert shared_memory() == before
