"""A GPU worker's arena from its grant to that of its peers, without a GPU: over a supervisor's sockets."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator

import msgspec
import numpy as np
import pytest
import torch

from memserve.cuda.memory import allocate, open_exported
from memserve.errors import MemoryError_
from memserve.messages import DeviceGrant
from memserve.model_config import KVGeometry
from memserve.pool.transports.device_sources import Gpu
from memserve.router.supervision.shared_memory import SharedMemory
from memserve.workers import gpu_arena
from memserve.workers.channel import GrantSocket
from memserve.workers.gpu_arena import allocate_in_time, export_arena, make_arena
from tests.cuda.fake_driver import GRANULARITY, FakeDriver
from tests.pool.fake_lanes import FakeGpu
from tests.workers.conftest import make_worker_config

CPU = torch.device("cpu")


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, GrantSocket]]:
    """The supervisor's end of a grants socket, and the worker's."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        ours.setblocking(False)
        yield ours, GrantSocket(theirs)


@pytest.mark.parametrize("by_descriptor", [True, False])
def test_from_the_grant_of_a_table_to_the_grant_of_the_memory(ends, by_descriptor: bool) -> None:
    ours, grants = ends
    config = make_worker_config(
        instance="prefill-0", device="cuda:0", num_blocks=None, max_blocks=50, transports=("cuda_ipc",)
    )
    driver = FakeDriver(exports_descriptors=by_descriptor)
    geometry = KVGeometry.of(config.model, config.block_size, config.dtype)
    memory = SharedMemory([config])
    try:
        # 1. the worker is granted its table, and makes an arena that it has room for
        memory.grant_own(ours, "prefill-0", 0)
        (received,) = grants.receive()
        assert isinstance(received.grant, DeviceGrant) and received.grant.memory is None
        gpu = Gpu(driver, 0, CPU, FakeGpu().lanes)
        arena = make_arena(gpu, geometry, 60, received.fds[0], received.grant.max_blocks, 0)
        assert arena.num_blocks == 50 and not arena.kv.any()
        # 2. it exports it; nobody is granted anything before that was read
        export_arena(arena, grants)
        memory.grant_device(ours, "prefill-0", 0)
        assert grants.receive() == []
        memory.take_exports(ours, "prefill-0", "cuda:0")
        memory.grant_device(ours, "prefill-0", 0)
        (granted,) = grants.receive()
        assert isinstance(granted.grant, DeviceGrant) and granted.grant.memory is not None
        assert len(granted.fds) == (2 if by_descriptor else 1)
        # 3. a peer opens it by that
        opened = open_exported(driver, 0, granted.grant.memory, granted.fds[1] if by_descriptor else None)
        arena.kv.fill_(1.0)
        shown = opened.tensor(CPU)[: 50 * geometry.block_bytes].view(arena.kv.dtype)
        assert bool((shown == 1.0).all())
        # 4. the worker is dead: there was something to revoke, once
        assert memory.forget_exports("prefill-0") and not memory.forget_exports("prefill-0")
        memory.grant_device(ours, "prefill-0", 0)
        assert grants.receive() == []
        opened.close()
        assert arena.memory is not None
        arena.memory.close()
        for fd in (*received.fds, granted.fds[0]):
            os.close(fd)
    finally:
        memory.close()
    driver.assert_all_returned()


@pytest.mark.parametrize("body", [b"", b"\xc1garbage", msgspec.msgpack.encode(["ArenaExport", 1])])
def test_what_no_worker_sends_is_refused_with_its_descriptors(ends, body: bytes) -> None:
    ours, grants = ends
    config = make_worker_config(instance="p", device="cuda:0", max_blocks=5, transports=("cuda_ipc",))
    memory = SharedMemory([config])
    num_fds = len(os.listdir("/proc/self/fd"))
    fd = os.memfd_create("gpu")
    socket.send_fds(grants._socket, [body or b"\x90"], [fd])
    os.close(fd)
    with pytest.raises(ValueError):
        memory.take_exports(ours, "p", "cuda:0")
    assert len(os.listdir("/proc/self/fd")) == num_fds
    memory.close()


def test_a_replacement_waits_for_the_memory_of_the_life_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_arena, "_FREED_LOOK_S", 1e-3)
    driver = FakeDriver(free_bytes=0)

    def let_go() -> None:
        time.sleep(0.02)
        driver.free_bytes = GRANULARITY

    peer = threading.Thread(target=let_go)
    peer.start()
    memory = allocate_in_time(driver, 0, 100, wait_s=20.0)
    peer.join()
    memory.close()
    # the first life has nothing to wait for
    driver.free_bytes = 0
    with pytest.raises(MemoryError_):
        allocate_in_time(driver, 0, 100, wait_s=0.0)
    driver.free_bytes = 1 << 30
    allocate(driver, 0, 100).close()
    assert np.all([count == 0 for count in driver.open.values()])
