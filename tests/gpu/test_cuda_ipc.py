"""On a GPU: memory that processes share, pulls out of it, layers as they are written, swaps beside steps."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from memserve import memfd
from memserve.cuda.driver import LibCuda
from memserve.cuda.memory import allocate, open_exported, ordinal_of
from memserve.doctor.gpus import PATTERN, lent_memory
from memserve.messages import DeviceGrant, Tier, generation_table_bytes, pack_tokens
from memserve.model_config import KVGeometry
from memserve.pool.arena import Arena
from memserve.pool.lanes import Lanes
from memserve.pool.mempool import MemPool
from memserve.pool.pinned import CudaPins
from memserve.pool.retention import HostArena, Retention
from memserve.pool.transports.base import Pull, PullResult
from memserve.pool.transports.by_peer import PeerTransfer
from memserve.pool.transports.cuda_ipc import CudaTransfer
from memserve.pool.transports.device_sources import Gpu
from memserve.workers.gpu_arena import make_arena, scatter_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU here"),
]

DEVICE = torch.device("cuda", 0)
GEOMETRY = KVGeometry(num_layers=4, num_kv_heads=2, block_size=16, head_dim=64, dtype="bfloat16")
NUM_BLOCKS = 64
TABLE_BYTES = generation_table_bytes(NUM_BLOCKS)


def wait_for(pull: Pull) -> PullResult:
    deadline = time.monotonic() + 30
    while (result := pull.poll()) is None:
        assert time.monotonic() < deadline, "pull never ended"
        time.sleep(1e-4)
    return result


class GpuPool:
    """A pool with all that a worker gives it, here: cuMem memory may be opened by its own maker."""

    def __init__(self, instance: str, host_blocks: int = 0) -> None:
        torch.cuda.set_device(DEVICE)
        self.instance = instance
        self.gpu = Gpu(LibCuda(), 0, DEVICE, Lanes.on(DEVICE, scatter_of(DEVICE)))
        self.table_fd = memfd.create_memfd("generations", TABLE_BYTES)
        self.arena = make_arena(self.gpu, GEOMETRY, NUM_BLOCKS, self.table_fd, NUM_BLOCKS, 0)
        retention, self.host = None, None
        if host_blocks:
            self.host, self.host_fds = Arena.create(f"{instance}-host", GEOMETRY, host_blocks)
            retention = Retention(host=HostArena(self.host, host_blocks, pins=CudaPins(DEVICE)))
        wake = threading.Event().set
        cuda = CudaTransfer(self.arena.as_bytes(), self.gpu, wake, num_layers=GEOMETRY.num_layers)
        self.pool = MemPool(
            self.arena,
            instance,
            0,
            wake,
            retention=retention,
            transfer=PeerTransfer(wake, None, cuda=cuda),
            lanes=self.gpu.lanes,
        )
        self.pool.populate()

    def grant_to(self, other: GpuPool) -> None:
        assert self.arena.memory is not None
        export, fd = self.arena.memory.export()
        if fd is None:
            pytest.skip("the driver shares memory by handles, which their maker cannot open")
        grant = DeviceGrant(self.instance, 0, NUM_BLOCKS, NUM_BLOCKS, GEOMETRY.block_bytes, export)
        other.pool.peers.add_device(grant, memfd.reopen_readonly(self.table_fd), fd)

    def fill(self, ids: np.ndarray, seed: int) -> torch.Tensor:
        """Random content of blocks, and a copy of it on the host."""
        shape = (len(ids), *self.pool.kv.shape[1:])
        content = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(self.pool.kv.dtype)
        self.pool.kv[torch.from_numpy(ids).to(DEVICE)] = content.to(DEVICE)
        return content

    def content(self, ids: np.ndarray) -> torch.Tensor:
        return self.pool.kv[torch.from_numpy(ids).to(DEVICE)].cpu()

    def close(self) -> None:
        self.pool.close()
        torch.cuda.synchronize(DEVICE)
        assert self.arena.memory is not None
        self.arena.memory.close()


@pytest.fixture
def pair() -> Iterator[tuple[GpuPool, GpuPool]]:
    source, receiver = GpuPool("source"), GpuPool("receiver")
    source.grant_to(receiver)
    yield source, receiver
    receiver.close()
    source.close()


def test_the_driver_knows_the_gpu_as_torch_does() -> None:
    driver = LibCuda()
    device = driver.device(0)
    assert driver.count() == torch.cuda.device_count()
    assert device.name == torch.cuda.get_device_name(0)
    assert device.uuid == f"GPU-{torch.cuda.get_device_properties(0).uuid}"
    assert ordinal_of(driver, device.uuid) == 0 and driver.can_access(0, 0)


def test_memory_of_another_process() -> None:
    driver = LibCuda()
    with lent_memory(0, 8 << 20) as (export, fd):
        memory = open_exported(driver, 0, export, fd)
        assert bool((memory.tensor(DEVICE)[: 8 << 20] == PATTERN).all())
        memory.close()


def test_memory_is_given_back() -> None:
    driver, size = LibCuda(), 1 << 30
    torch.cuda.synchronize(DEVICE)
    free, _ = torch.cuda.mem_get_info(DEVICE)
    memory = allocate(driver, 0, size)
    assert torch.cuda.mem_get_info(DEVICE)[0] <= free - size
    memory.close()
    assert torch.cuda.mem_get_info(DEVICE)[0] > free - size // 2


@pytest.mark.parametrize("order", ["run", "scattered"])
def test_blocks_arrive_as_they_are(pair: tuple[GpuPool, GpuPool], order: str) -> None:
    source, receiver = pair
    ids = source.pool.alloc_mem(40)
    assert ids is not None
    expected = source.fill(ids, 1)
    torch.cuda.synchronize(DEVICE)
    chosen = np.arange(40) if order == "run" else np.random.default_rng(0).permutation(40)
    into = receiver.pool.alloc_mem(40)
    assert into is not None
    result = wait_for(receiver.pool.fetch(source.pool.addresses(ids[chosen]), into))
    assert (result.num_blocks, result.failure) == (40, None)
    assert torch.equal(receiver.content(into), expected[torch.from_numpy(chosen)])


def test_a_copy_comes_after_what_was_launched_before(pair: tuple[GpuPool, GpuPool]) -> None:
    """The receiver's own long step still writes to what becomes the destination."""
    source, receiver = pair
    ids, into = source.pool.alloc_mem(8), receiver.pool.alloc_mem(8)
    assert ids is not None and into is not None
    expected = source.fill(ids, 2)
    torch.cuda.synchronize(DEVICE)
    torch.cuda._sleep(200_000_000)
    receiver.pool.kv[torch.from_numpy(into).to(DEVICE)] = 7.0
    assert wait_for(receiver.pool.fetch(source.pool.addresses(ids), into)).num_blocks == 8
    assert torch.equal(receiver.content(into), expected)


def test_layers_are_told_when_they_are_written(pair: tuple[GpuPool, GpuPool]) -> None:
    source, receiver = pair
    ids, into = source.pool.alloc_mem(8), receiver.pool.alloc_mem(8)
    assert ids is not None and into is not None
    content = torch.randn((8, *source.pool.kv.shape[1:]), device=DEVICE).to(source.pool.kv.dtype)
    rows = torch.from_numpy(ids).to(DEVICE)
    torch.cuda.synchronize(DEVICE)
    progress = source.pool.progress
    first = progress.count
    progress.follow(True)
    pull = receiver.pool.fetch(source.pool.addresses(ids), into, first)
    # launched at once, and computed later: a puller that went by the launch would copy zeros
    for layer in range(GEOMETRY.num_layers):
        torch.cuda._sleep(50_000_000)
        source.pool.kv[rows, layer] = content[:, layer]
        progress.advance()
    assert pull.poll() is None
    assert wait_for(pull).num_blocks == 8
    assert torch.equal(receiver.content(into), content.cpu())


def test_blocks_swapped_out_and_in_are_what_they_were() -> None:
    pool = GpuPool("pool", host_blocks=128)
    try:
        kept = {}
        for sequence in range(6):  # 96 blocks of 64
            ids = pool.pool.alloc_mem(16)
            assert ids is not None
            tokens = pack_tokens(list(range(sequence * 1000, sequence * 1000 + 16 * GEOMETRY.block_size)))
            kept[tokens] = pool.fill(ids, sequence)
            pool.pool.insert(tokens, ids)
        for tokens, expected in kept.items():
            table = pool.pool.acquire(tokens)
            assert table.num_blocks == 16
            assert torch.equal(pool.content(table.ids(16)), expected)
            pool.pool.release(table)
        assert pool.host is not None and len(pool.pool.addresses([0], Tier.HOST).blocks) == 1
    finally:
        pool.close()


@pytest.mark.parametrize("transfer", ["request", "chunk", "layer"])
def test_a_server_says_disaggregated_what_it_says_colocated(tmp_path: Path, transfer: str) -> None:
    from benchmarks.gpu_check import answers

    colocated = answers(["--colocated", "1", "--dtype", "float32"])
    found = answers(["--prefill", "1", "--decode", "1", "--dtype", "float32", "--transfer", transfer])
    assert [answer.text for answer in found] == [answer.text for answer in colocated]
    assert all(answer.pulled > 0 for answer in found)
