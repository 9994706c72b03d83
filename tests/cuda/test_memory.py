"""Memory of a GPU from its allocation to its end, over a driver without a GPU; and the real driver's
bindings.
"""

from __future__ import annotations

import ctypes
import os

import pytest
import torch

from memserve.cuda import driver as cuda_driver
from memserve.cuda.driver import CudaError, LibCuda
from memserve.cuda.memory import allocate, open_exported, ordinal_of
from memserve.errors import MemoryError_
from tests.cuda.fake_driver import GRANULARITY, FakeDriver

CPU = torch.device("cpu")


@pytest.mark.parametrize("by_descriptor", [True, False])
def test_what_the_owner_writes_is_what_others_read(by_descriptor: bool) -> None:
    driver = FakeDriver(num_gpus=2, exports_descriptors=by_descriptor)
    # 1. the owner makes it, whole granules of it where they matter
    memory = allocate(driver, 1, 1000)
    assert memory.num_bytes == (GRANULARITY if by_descriptor else 1000)
    # 2. it is exported as often as somebody wants it, and names the GPU for the whole machine
    export, fd = memory.export()
    assert (fd is not None) == by_descriptor and bool(export.handle) != by_descriptor
    assert (export.gpu, export.num_bytes) == (driver.uuid(1), memory.num_bytes)
    assert ordinal_of(driver, export.gpu) == 1
    # 3. whoever opens it reads what is written from then on
    opened = open_exported(driver, 1, export, fd)
    memory.tensor(CPU)[3] = 42
    assert opened.tensor(CPU)[3] == 42 and len(opened.tensor(CPU)) == memory.num_bytes
    # 4. it outlives its owner where descriptors count the holders, and all is given back
    memory.close()
    if by_descriptor:
        assert opened.tensor(CPU)[3] == 42
    opened.close()
    opened.close()
    driver.assert_all_returned()


def test_a_kernel_without_descriptors_gets_handles(caplog: pytest.LogCaptureFixture) -> None:
    driver = FakeDriver(fails={"cuMemExportToShareableHandle"})
    memory = allocate(driver, 0, 1000)
    export, fd = memory.export()
    assert fd is None and len(export.handle) == cuda_driver.IPC_HANDLE_BYTES
    assert "shared by cudaIpc handles" in caplog.text
    memory.close()
    driver.assert_all_returned()


def test_memory_that_is_not_there_is_said_so_and_not_asked_for_otherwise() -> None:
    driver = FakeDriver(free_bytes=GRANULARITY)
    with pytest.raises(MemoryError_, match="the GPU's memory does not suffice"):
        allocate(driver, 0, GRANULARITY + 1)
    driver.assert_all_returned()


def test_a_driver_that_maps_nothing_read_only() -> None:
    driver = FakeDriver(maps_read_only=False)
    memory = allocate(driver, 0, 10)
    opened = open_exported(driver, 0, *memory.export())
    opened.close()
    memory.close()
    driver.assert_all_returned()


@pytest.mark.parametrize("fault", ["cuMemImportFromShareableHandle", "cuMemMap"])
def test_memory_that_cannot_be_opened_leaves_nothing_open(fault: str) -> None:
    driver = FakeDriver()
    memory = allocate(driver, 0, 10)
    export, fd = memory.export()
    assert fd is not None
    driver.fails = {fault}
    with pytest.raises(CudaError, match=f"{fault} failed"):
        open_exported(driver, 0, export, fd)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
    memory.close()
    driver.assert_all_returned()


def test_a_grant_without_a_descriptor_or_handle_is_an_error() -> None:
    driver = FakeDriver()
    memory = allocate(driver, 0, 10)
    export, fd = memory.export()
    assert fd is not None
    os.close(fd)
    with pytest.raises(CudaError, match="without a descriptor"):
        open_exported(driver, 0, export, None)
    memory.close()


def test_a_gpu_that_this_process_may_not_use() -> None:
    assert ordinal_of(FakeDriver(), "GPU-of-another") is None


def test_structs_have_the_sizes_of_cuda_h() -> None:
    sizes = {
        cuda_driver._AllocationProp: 32,
        cuda_driver._AccessDesc: 12,
        cuda_driver._Location: 8,
        cuda_driver._IpcHandle: 64,
        cuda_driver._Uuid: 16,
    }
    assert {struct: ctypes.sizeof(struct) for struct in sizes} == sizes
    assert cuda_driver._AllocationProp.location.offset == 8
    assert cuda_driver._AllocationProp.alloc_flags.offset == 24


def test_a_machine_without_a_driver_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", refuse)
    with pytest.raises(CudaError, match="no CUDA driver: libcuda.so.1"):
        LibCuda()


class Library:
    """Stands for libcuda.so.1: answers each call with a status, and keeps its arguments."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[object, ...]]] = []
        self.statuses: dict[str, int] = {}

    def __getattr__(self, name: str) -> object:
        if not name.startswith("cu"):
            raise AttributeError(name)

        def call(*arguments: object) -> int:
            self.calls.append((name, arguments))
            return self.statuses.get(name, 0)

        setattr(self, name, call)
        return call


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Library:
    made = Library()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: made)
    return made


def names(library: Library) -> list[str]:
    called = [name for name, _ in library.calls if name != "cuGetErrorName"]
    library.calls.clear()
    return called


def test_the_calls_behind_each_step(library: Library) -> None:
    driver = LibCuda()
    assert names(library) == ["cuInit"]
    # what a mapping gives access to is a context, which there may not be yet: the GPU's primary one is made
    retained = ["cuDeviceGet", "cuDevicePrimaryCtxRetain"]
    mapped = ["cuMemAddressReserve", "cuMemMap", "cuMemSetAccess"]
    driver.map(7, 4096, 1, writable=False)
    assert names(library) == [*retained, "cuCtxPushCurrent_v2", *mapped, "cuCtxPopCurrent_v2"]
    driver.unmap(4096, 4096)
    assert names(library) == ["cuMemUnmap", "cuMemAddressFree"]
    # calls that go by the thread's context are made in the GPU's primary one, retained once
    driver.allocate(0, 10)
    around = ["cuCtxPushCurrent_v2", "cuMemAlloc_v2", "cuCtxPopCurrent_v2"]
    assert names(library) == [*retained, *around]
    driver.free(0, 4096)
    assert names(library) == ["cuCtxPushCurrent_v2", "cuMemFree_v2", "cuCtxPopCurrent_v2"]
    driver.pin(0, 1 << 40, 8192)
    assert library.calls[1] == ("cuMemHostRegister_v2", (1 << 40, 8192, 0))
    assert names(library) == ["cuCtxPushCurrent_v2", "cuMemHostRegister_v2", "cuCtxPopCurrent_v2"]
    driver.unpin(0, 1 << 40)
    assert names(library)[1] == "cuMemHostUnregister"


@pytest.mark.parametrize(
    ("fault", "undone"),
    [
        ("cuMemMap", ["cuMemAddressFree"]),
        ("cuMemSetAccess", ["cuMemUnmap", "cuMemAddressFree"]),
    ],
)
def test_a_mapping_that_fails_halfway_is_undone(library: Library, fault: str, undone: list[str]) -> None:
    driver = LibCuda()
    library.statuses[fault] = 801
    with pytest.raises(CudaError, match=f"{fault} failed: .* \\(801\\)"):
        driver.map(7, 4096, 1, writable=False)
    assert names(library)[-len(undone) - 1 :] == [*undone, "cuCtxPopCurrent_v2"]


def test_a_full_gpu_is_told_from_a_broken_call(library: Library) -> None:
    driver = LibCuda()
    library.statuses["cuMemCreate"] = 2
    with pytest.raises(MemoryError_):
        driver.create(0, 1 << 21)
    library.statuses["cuMemCreate"] = 1
    with pytest.raises(CudaError):
        driver.create(0, 1 << 21)


def test_a_handle_of_another_size_is_refused(library: Library) -> None:
    with pytest.raises(CudaError, match="a CUDA IPC handle of 3 bytes, not 64"):
        LibCuda().open_ipc(0, b"abc")
