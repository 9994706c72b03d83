"""Memory of a GPU that several processes use: made by its owner, exported once, opened by others read-only.

    owner    allocate ─► tensor            export ─► (DeviceExport, descriptor or None)
                                                          │ a message and SCM_RIGHTS
    others                                 open_exported ─► tensor ─► close

One dedicated allocation each, made by the driver and not by torch's allocator: so nothing of torch's
settings (`expandable_segments`) decides whether it can be exported, no offset is needed, and no files with
names are left, as torch's own sharing leaves them.

Two ways, of which the first that works is taken. A **cuMem descriptor** passes through a unix socket like a
memfd: nobody who was not given it can open the memory, others map it read-only, the exporting process can
open it too, and the driver counts the holders: the memory lives as long as its last handle, descriptor or
mapping. Where the GPU or the kernel under it has no such descriptors, a **cudaIpc handle**, 64 bytes:
whoever has these can map the memory for writing too.

A tensor does not own its memory here: whoever made the `DeviceMemory` closes it when no tensor is used any
more.
"""

from __future__ import annotations

import logging
import os
import threading
from typing import TYPE_CHECKING

import msgspec

from memserve.cuda.driver import CudaDriver, CudaError
from memserve.errors import MemserveError

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)


class DeviceExport(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """How another process opens `num_bytes` of the GPU `gpu`, a UUID: with the descriptor that comes along,
    or by a cudaIpc `handle`, if that is not empty.
    """

    gpu: str
    num_bytes: int
    handle: bytes = b""


class DeviceMemory:
    """`num_bytes` at `address`, as the GPU `ordinal` addresses them. From `allocate` or `open_exported`."""

    def __init__(
        self,
        driver: CudaDriver,
        ordinal: int,
        address: int,
        num_bytes: int,
        *,
        handle: int | None = None,
        is_mapping: bool,
        is_ours: bool,
    ) -> None:
        self.ordinal = ordinal
        self.address = address
        self.num_bytes = num_bytes
        self._driver = driver
        self._handle = handle  # of cuMem, kept while it may be exported
        self._is_mapping = is_mapping
        self._is_ours = is_ours
        self._is_closed = False
        self._lock = threading.Lock()

    def tensor(self, device: torch.device) -> torch.Tensor:
        """All of it as uint8 on `device`, which is `cuda:ordinal`. Not to be used after `close`."""
        return tensor_at(self.address, self.num_bytes, device)

    def export(self) -> tuple[DeviceExport, int | None]:
        """What others open it with; a descriptor in it is the caller's. Raises CudaError."""
        assert self._is_ours and not self._is_closed
        gpu = self._driver.uuid(self.ordinal)
        if self._handle is not None:
            return DeviceExport(gpu, self.num_bytes), self._driver.export_descriptor(self._handle)
        handle = self._driver.ipc_handle(self.ordinal, self.address)
        return DeviceExport(gpu, self.num_bytes, handle), None

    def close(self) -> None:
        """Give it back, once: nothing of the GPU's may read or write there any more. From any thread."""
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
        if self._is_mapping:
            self._driver.unmap(self.address, self.num_bytes)
            if self._handle is not None:
                self._driver.release(self._handle)
        elif self._is_ours:
            self._driver.free(self.ordinal, self.address)
        else:
            self._driver.close_ipc(self.ordinal, self.address)


def allocate(driver: CudaDriver, ordinal: int, num_bytes: int) -> DeviceMemory:
    """At least `num_bytes` of the GPU that can be exported, with whatever was there before. Raises
    MemoryError_ if they are not free, CudaError.
    """
    assert num_bytes > 0
    if driver.device(ordinal).exports_descriptors:
        try:
            return _create(driver, ordinal, num_bytes)
        except CudaError as error:
            logger.warning("GPU memory is shared by cudaIpc handles, not by descriptors: %s", str(error))
    address = driver.allocate(ordinal, num_bytes)
    return DeviceMemory(driver, ordinal, address, num_bytes, is_mapping=False, is_ours=True)


def open_exported(driver: CudaDriver, ordinal: int, export: DeviceExport, fd: int | None) -> DeviceMemory:
    """Another process's memory, as `ordinal` reads it; the descriptor is ours from now on and is closed,
    whatever happens. Where the driver maps nothing read-only, writing is only forbidden, not prevented.
    Raises CudaError, also if `ordinal` cannot reach that GPU.
    """
    try:
        if export.handle:
            address = driver.open_ipc(ordinal, export.handle)
            return DeviceMemory(driver, ordinal, address, export.num_bytes, is_mapping=False, is_ours=False)
        if fd is None:
            raise CudaError("memory of a GPU was granted without a descriptor or a handle")
        handle = driver.import_descriptor(fd)
    finally:
        if fd is not None:
            os.close(fd)
    try:
        try:
            address = driver.map(handle, export.num_bytes, ordinal, writable=False)
        except CudaError as error:
            logger.info("the driver maps no GPU memory read-only: %s", str(error))
            address = driver.map(handle, export.num_bytes, ordinal, writable=True)
    finally:
        driver.release(handle)  # the mapping keeps the memory
    return DeviceMemory(driver, ordinal, address, export.num_bytes, is_mapping=True, is_ours=False)


def tensor_at(address: int, num_bytes: int, device: torch.device) -> torch.Tensor:
    """Memory that somebody else keeps, as uint8 [num_bytes] on `device`, which must be able to address it."""
    import torch

    empty = torch.empty(0, dtype=torch.uint8, device=device)
    storage = torch._C._construct_storage_from_data_pointer(address, empty.device, num_bytes)
    return empty.set_(storage, 0, (num_bytes,), (1,))


def ordinal_of(driver: CudaDriver, gpu: str) -> int | None:
    """The GPU of that UUID, as this process counts; None if it may not use it."""
    return next((ordinal for ordinal in range(driver.count()) if driver.uuid(ordinal) == gpu), None)


def _create(driver: CudaDriver, ordinal: int, num_bytes: int) -> DeviceMemory:
    granularity = driver.granularity(ordinal)
    num_bytes = -(-num_bytes // granularity) * granularity
    handle = driver.create(ordinal, num_bytes)
    try:
        os.close(driver.export_descriptor(handle))  # a kernel under us may allow everything but this
        address = driver.map(handle, num_bytes, ordinal, writable=True)
    except MemserveError:
        driver.release(handle)
        raise
    return DeviceMemory(driver, ordinal, address, num_bytes, handle=handle, is_mapping=True, is_ours=True)
