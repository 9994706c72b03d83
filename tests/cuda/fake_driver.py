"""A `CudaDriver` whose GPUs are memfds: what is exported as a descriptor really passes between processes."""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
from collections import Counter
from dataclasses import dataclass, field

from memserve.cuda.driver import CudaError, DeviceInfo
from memserve.errors import MemoryError_

GRANULARITY = 1 << 16


@dataclass
class FakeDriver:
    """`num_gpus` GPUs. What of it is missing, and what fails, is set by the test; `open` counts what was
    not given back: handles, mappings, allocations, opened ones, pins.
    """

    num_gpus: int = 1
    exports_descriptors: bool = True
    maps_read_only: bool = True
    free_bytes: int = 1 << 40
    peers: bool = True
    fails: set[str] = field(default_factory=set)
    open: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._handles: dict[int, int] = {}
        self._maps: dict[int, mmap.mmap] = {}
        self._allocations: dict[int, tuple[int, mmap.mmap]] = {}
        self._next = 1
        self._lock = threading.Lock()

    def _check(self, call: str) -> None:
        if call in self.fails:
            raise CudaError(f"{call} failed: CUDA_ERROR_NOT_SUPPORTED (801)")

    def count(self) -> int:
        return self.num_gpus

    def uuid(self, ordinal: int) -> str:
        return f"GPU-{ordinal:08d}-fake"

    def device(self, ordinal: int) -> DeviceInfo:
        return DeviceInfo(
            ordinal=ordinal,
            uuid=self.uuid(ordinal),
            name="Fake",
            total_bytes=self.free_bytes,
            capability=(9, 0),
            exports_descriptors=self.exports_descriptors,
            pins_host_memory=True,
            num_copy_engines=2,
            compute_mode=0,
            under_mps=False,
        )

    def can_access(self, ordinal: int, other: int) -> bool:
        return ordinal == other or self.peers

    # --- cuMem ---

    def granularity(self, ordinal: int) -> int:
        return GRANULARITY

    def create(self, ordinal: int, num_bytes: int) -> int:
        self._check("cuMemCreate")
        assert num_bytes % GRANULARITY == 0
        if num_bytes > self.free_bytes:
            raise MemoryError_("the GPU's memory does not suffice (cuMemCreate: CUDA_ERROR_OUT_OF_MEMORY)")
        fd = os.memfd_create("gpu", os.MFD_CLOEXEC)
        os.ftruncate(fd, num_bytes)
        return self._handle(fd)

    def export_descriptor(self, handle: int) -> int:
        self._check("cuMemExportToShareableHandle")
        return os.dup(self._handles[handle])

    def import_descriptor(self, fd: int) -> int:
        self._check("cuMemImportFromShareableHandle")
        return self._handle(os.dup(fd))

    def map(self, handle: int, num_bytes: int, ordinal: int, *, writable: bool) -> int:
        self._check("cuMemMap")
        if not writable and not self.maps_read_only:
            raise CudaError("cuMemSetAccess failed: CUDA_ERROR_NOT_SUPPORTED (801)")
        assert num_bytes % GRANULARITY == 0
        # Copy-on-write stands for read-only: ctypes finds no address of memory that it cannot write.
        flags = mmap.MAP_SHARED if writable else mmap.MAP_PRIVATE
        mapped = mmap.mmap(self._handles[handle], num_bytes, flags=flags)
        return self._keep(mapped, "mappings")

    def unmap(self, address: int, num_bytes: int) -> None:
        with self._lock:
            self._maps.pop(address)
            self.open["mappings"] -= 1

    def release(self, handle: int) -> None:
        with self._lock:
            os.close(self._handles.pop(handle))
            self.open["handles"] -= 1

    # --- cudaIpc: within this process, which the real one refuses ---

    def allocate(self, ordinal: int, num_bytes: int) -> int:
        self._check("cuMemAlloc")
        fd = os.memfd_create("gpu", os.MFD_CLOEXEC)
        os.ftruncate(fd, num_bytes)
        mapped = mmap.mmap(fd, num_bytes)
        address = self._keep(mapped, "allocations")
        self._allocations[address] = (fd, mapped)
        return address

    def free(self, ordinal: int, address: int) -> None:
        with self._lock:
            os.close(self._allocations.pop(address)[0])
            self._maps.pop(address)
            self.open["allocations"] -= 1

    def ipc_handle(self, ordinal: int, address: int) -> bytes:
        self._check("cuIpcGetMemHandle")
        fd, mapped = self._allocations[address]
        return f"{fd} {len(mapped)}".encode().ljust(64, b"\0")

    def open_ipc(self, ordinal: int, handle: bytes) -> int:
        self._check("cuIpcOpenMemHandle")
        fd, num_bytes = map(int, handle.rstrip(b"\0").split())
        return self._keep(mmap.mmap(fd, num_bytes), "opened")

    def close_ipc(self, ordinal: int, address: int) -> None:
        with self._lock:
            self._maps.pop(address)
            self.open["opened"] -= 1

    # --- memory of the host ---

    def pin(self, ordinal: int, address: int, num_bytes: int) -> None:
        self._check("cuMemHostRegister")
        self.open["pins"] += 1

    def unpin(self, ordinal: int, address: int) -> None:
        self.open["pins"] -= 1

    # --- inside ---

    def _handle(self, fd: int) -> int:
        with self._lock:
            handle, self._next = self._next, self._next + 1
            self._handles[handle] = fd
            self.open["handles"] += 1
            return handle

    def _keep(self, mapped: mmap.mmap, kind: str) -> int:
        address = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
        with self._lock:
            self._maps[address] = mapped
            self.open[kind] += 1
        return address

    def assert_all_returned(self) -> None:
        """Nothing is held any more."""
        assert not +self.open and not -self.open, self.open
