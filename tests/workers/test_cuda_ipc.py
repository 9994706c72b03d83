"""Whole requests between workers on GPUs, without a GPU: the dispatcher, real workers and pools, memory of a
driver over memfds, and lanes whose work is done when somebody asks for it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from memserve import memfd
from memserve.config import Role
from memserve.cuda.memory import allocate
from memserve.messages import (
    ArenaGrant,
    DeviceGrant,
    Removed,
    RevokeGrant,
    Stored,
    Tier,
    generation_table_bytes,
)
from memserve.model_config import KVGeometry
from memserve.pool.arena import Arena, ArenaFds
from memserve.pool.mempool import MemPool
from memserve.pool.retention import HostArena, Retention
from memserve.pool.transports.by_peer import PeerTransfer
from memserve.pool.transports.cuda_ipc import CudaTransfer
from memserve.pool.transports.device_sources import Gpu
from memserve.router.dispatcher import DispatcherLimits
from memserve.workers.channel import ReceivedGrant
from memserve.workers.publisher import Publisher
from memserve.workers.worker import Worker
from tests.cuda.fake_driver import FakeDriver
from tests.pool.fake_lanes import FakeGpu, FakeMark
from tests.pool.gpu_pools import FakePins
from tests.workers.cluster import Cluster, Gate, Life
from tests.workers.conftest import FakeChannel, FakeGrants, HashRunner, Rig, make_fds, make_worker_config

CPU = torch.device("cpu")


class GpuCluster(Cluster):
    """A `Cluster` whose workers are on one GPU of `driver`."""

    def __init__(self, roles: dict[str, Role], **options) -> None:
        self.driver = FakeDriver()
        self._tables: dict[str, int] = {}
        self._memories: dict[int, object] = {}
        super().__init__(roles, transport="cuda_ipc", **options)

    def _make_life(self, instance: str, incarnation: int) -> Life:
        config = make_worker_config(
            instance=instance, role=self.roles[instance], **{"device": "cuda:0", **self._worker_fields}
        )
        geometry = KVGeometry.of(config.model, config.block_size, config.dtype)
        assert config.num_blocks is not None
        table_bytes = generation_table_bytes(config.num_blocks)
        if instance not in self._tables:
            self._tables[instance] = memfd.create_memfd("generations", table_bytes)
            if config.host_blocks is not None:
                self._host_fds[instance] = make_fds(config.max_host_blocks, geometry)
        words = memfd.map_bytes(self._tables[instance], table_bytes, writable=True).view(np.uint64)
        memory = allocate(self.driver, 0, config.num_blocks * geometry.block_bytes)
        self._memories[incarnation] = memory
        arena = Arena.on_gpu(geometry, config.num_blocks, memory, CPU, words)
        lanes = FakeGpu()
        host = None
        if instance in self._host_fds:
            host_arena = Arena.map(geometry, config.max_host_blocks, self._host_fds[instance])
            host = HostArena(host_arena, config.host_blocks, pins=FakePins())
        gpu = Gpu(self.driver, 0, CPU, lanes.lanes)
        cuda = CudaTransfer(arena.as_bytes(), gpu, lambda: None, num_layers=geometry.num_layers)
        pool = MemPool(
            arena,
            instance,
            incarnation,
            lambda: None,
            retention=Retention(host=host, tells_removals=True),
            clock=self._clock,
            transfer=PeerTransfer(lambda: None, None, cuda=cuda),
            lanes=lanes.lanes,
        )
        channel, grants = FakeChannel(), FakeGrants()
        runner = HashRunner(pool.kv, config.block_size)

        def layer() -> None:
            # The hash model computes on the host: what a step before it has put on the lanes comes first.
            lanes.run()
            pool.progress.advance()

        runner.on_layer = layer
        worker = Worker(config, channel, grants, pool, runner, self._clock)
        fds = ArenaFds(-1, self._tables[instance])
        rig = Rig(
            config, worker, channel, grants, pool, runner, self._clock, fds, self._host_fds.get(instance)
        )
        return Life(instance, config.role, incarnation, rig, Gate())

    def _introduce(self, life: Life, other: Life) -> None:
        export, fd = self._memories[life.incarnation].export()
        pool = life.rig.pool
        block_bytes = pool._arena.geometry.block_bytes
        grant = DeviceGrant(
            life.instance, life.incarnation, pool.num_blocks, pool.num_blocks, block_bytes, export
        )
        fds = (memfd.reopen_readonly(self._tables[life.instance]), fd)
        other.rig.grants.inbox.append(ReceivedGrant(grant, fds))
        if life.rig.host_fds is not None:
            of_host = ArenaGrant(life.instance, life.incarnation, Tier.HOST, pool.host_capacity, block_bytes)
            fds = tuple(map(memfd.reopen_readonly, life.rig.host_fds))
            other.rig.grants.inbox.append(ReceivedGrant(of_host, fds))

    def kill(self, instance: str, *, in_step: bool = False) -> Life:
        life = super().kill(instance, in_step=in_step)
        for other in self.lives.values():
            other.rig.grants.inbox.append(ReceivedGrant(RevokeGrant(instance, Tier.DEVICE), ()))
        return life

    def _close(self, life: Life) -> None:
        Cluster._close(life)
        self._memories.pop(life.incarnation).close()

    def close(self) -> None:
        super().close()
        for fd in self._tables.values():
            os.close(fd)
        self.driver.assert_all_returned()


@pytest.fixture
def make_cluster() -> Iterator[type[GpuCluster]]:
    made: list[GpuCluster] = []

    def make(transfer: str, **options) -> GpuCluster:
        roles = {"prefill-0": Role.PREFILL, "decode-0": Role.DECODE}
        limits = DispatcherLimits(transfer=transfer, pull_back=True)
        made.append(GpuCluster(roles, limits=limits, **{"num_blocks": 64, "block_size": 4, **options}))
        return made[-1]

    yield make
    for cluster in made:
        cluster.close()


def prompt(first: int, length: int) -> list[int]:
    return [(first * 31 + 7 * index) % 250 for index in range(length)]


@pytest.mark.parametrize("block_size", [1, 4, 16])
@pytest.mark.parametrize("transfer", ["request", "chunk", "layer"])
def test_what_a_prefill_computed_a_decode_goes_on_from(make_cluster, transfer: str, block_size: int) -> None:
    cluster = make_cluster(transfer, block_size=block_size, num_blocks=512 // block_size, max_batch_tokens=24)
    # 1. prompts of one chunk and of several, together
    for index, length in enumerate((3, 16, 40, 70)):
        cluster.submit(f"r{index}", prompt(index, length))
    cluster.run_out()
    # 2. the tokens are the hash model's, which reads every block: nothing was computed a second time
    cluster.assert_done()
    computed = cluster.lives["decode-0"].rig.worker.gauges.load().num_prefill_tokens
    assert computed == 0 if block_size == 1 else computed <= 4
    # 3. what was told by way of a GPU's marks is all told
    assert not any(life.rig.worker._publisher.is_holding for life in cluster.lives.values())


def test_more_than_the_device_tier_holds(make_cluster) -> None:
    cluster = make_cluster("request", num_blocks=24, host_blocks=64, max_host_blocks=64)
    for turn in range(2):
        for index in range(6):
            cluster.submit(f"r{turn}{index}", prompt(index, 30))
            cluster.run_out()
    cluster.assert_done()
    host = cluster.lives["prefill-0"].rig.pool._host
    assert host is not None and host.num_stored > 0


@pytest.mark.parametrize("instance", ["prefill-0", "decode-0"])
@pytest.mark.parametrize("in_step", [False, True])
def test_a_worker_that_dies_takes_its_memory_and_no_request(
    make_cluster, instance: str, in_step: bool
) -> None:
    cluster = make_cluster("layer", max_batch_tokens=24)
    for index in range(3):
        cluster.submit(f"r{index}", prompt(index, 40))
    for _ in range(4):
        cluster.turn()
    # 1. it is gone, and with it what it had exported: two arenas are mapped, of the other and nobody's
    cluster.kill(instance, in_step=in_step)
    # 2. its next life has memory of its own, and the requests end as if nothing had been
    cluster.up(instance)
    cluster.run_out()
    cluster.assert_done()


# --- what is told when ---


class Marked:
    """A pool whose swaps are done when the test says."""

    block_size = 4

    def __init__(self) -> None:
        self.removed: list[Removed] = []

    def take_removed(self) -> list[Removed]:
        taken, self.removed = self.removed, []
        return taken


def test_what_follows_something_untrue_is_told_after_it() -> None:
    said: list[Stored | Removed] = []
    publisher = Publisher(Marked(), said.append, by_layer=True)  # type: ignore[arg-type]
    world = FakeGpu(is_free=False)
    first, second = FakeMark(world), FakeMark(world)
    messages = [Stored(f"r{index}", 0, 0, None) for index in range(3)]  # type: ignore[arg-type]
    # 1. nothing is held: told at once
    publisher.hold(None)
    publisher._post(messages[0])
    assert said == messages[:1]
    # 2. two steps are under way, each with a block to tell of
    publisher.hold(first)
    publisher._post(messages[1])
    publisher.hold(second)
    publisher._post(messages[2])
    assert said == messages[:1]
    # 3. the later one's mark alone lets nothing pass
    second.reached = True
    publisher.flush()
    assert said == messages[:1] and publisher.is_holding
    first.reached = True
    publisher.flush()
    assert said == messages and not publisher.is_holding
