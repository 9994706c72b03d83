"""The calls of CUDA's driver that memory shared between processes needs, typed; nothing else of CUDA.

`CudaDriver` is the seam: `LibCuda` is libcuda.so.1 behind ctypes, opened when it is made and not before, so
that machines without a GPU never look for it; tests have a driver over plain memory instead. Every call is
thread-safe and raises CudaError, or MemoryError_ where the GPU is full. What is built of the calls is
memory.py's concern; copies, streams and events are torch's.

Signatures, structs and numbers are those of cuda.h 13.0; the driver keeps them for older and newer callers.
A device is given by its ordinal in this process, as torch counts (`cuda:ordinal`); what is to mean the same
GPU in another process is given by UUID.
"""

from __future__ import annotations

import ctypes
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import POINTER, Structure, byref, c_char, c_char_p, c_int, c_size_t, c_uint, c_ulonglong, c_void_p
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from memserve.errors import EngineError, MemoryError_

IPC_HANDLE_BYTES = 64

_OUT_OF_MEMORY = 2
_POSIX_FD = 1  # CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
_PINNED = 1  # CU_MEM_ALLOCATION_TYPE_PINNED
_ON_DEVICE = 1  # CU_MEM_LOCATION_TYPE_DEVICE
_READ, _READ_WRITE = 1, 3  # CU_MEM_ACCESS_FLAGS_PROT_*
_GRANULARITY_RECOMMENDED = 1
_LAZY_PEER_ACCESS = 1  # CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS

# CUdevice_attribute
_COMPUTE_MODE = 20
_NUM_COPY_ENGINES = 40
_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76
_HOST_REGISTER = 99
_VIRTUAL_MEMORY = 102
_POSIX_FD_EXPORT = 103
_MPS = 133


class CudaError(EngineError):
    """A call of the driver failed, or there is no driver. `str(error)` names the call and the error."""


@dataclass(frozen=True, slots=True)
class DeviceInfo:
    """One GPU. `exports_descriptors`: memory can be shared as descriptors (cuMem), not only by cudaIpc
    handles. `compute_mode`: 0 is CUDA's default; in the others a second process is refused, or all of them.
    """

    ordinal: int
    uuid: str
    name: str
    total_bytes: int
    capability: tuple[int, int]
    exports_descriptors: bool
    pins_host_memory: bool
    num_copy_engines: int
    compute_mode: int
    under_mps: bool


class CudaDriver(Protocol):
    """See the module. Handles and addresses are plain numbers, the caller's until given back."""

    def count(self) -> int:
        """GPUs that this process may use."""

    def device(self, ordinal: int) -> DeviceInfo:
        """What a GPU is."""

    def uuid(self, ordinal: int) -> str:
        """Names the GPU on the whole machine, as nvidia-smi does: "GPU-…"."""

    def can_access(self, ordinal: int, other: int) -> bool:
        """Whether one GPU can read another's memory directly."""

    # --- cuMem: physical memory apart from addresses, shared as descriptors ---

    def granularity(self, ordinal: int) -> int:
        """Sizes of `create` and `map` are multiples of this."""

    def create(self, ordinal: int, num_bytes: int) -> int:
        """Memory that can be exported; a handle to `release`. Not zeroed."""

    def export_descriptor(self, handle: int) -> int:
        """A new descriptor of it, the caller's. The memory lives as long as any handle, mapping or
        descriptor.
        """

    def import_descriptor(self, fd: int) -> int:
        """A handle of exported memory; `fd` stays the caller's."""

    def map(self, handle: int, num_bytes: int, ordinal: int, *, writable: bool) -> int:
        """An address at which `ordinal` reads, or also writes, the memory. The handle may go then."""

    def unmap(self, address: int, num_bytes: int) -> None:
        """End a `map`. Nothing may be reading there any more."""

    def release(self, handle: int) -> None:
        """Give a handle back."""

    # --- cudaIpc: one plain allocation, shared by a handle of 64 bytes ---

    def allocate(self, ordinal: int, num_bytes: int) -> int:
        """The address of a new allocation. Not zeroed."""

    def free(self, ordinal: int, address: int) -> None:
        """End an `allocate`."""

    def ipc_handle(self, ordinal: int, address: int) -> bytes:
        """What another process opens an allocation with."""

    def open_ipc(self, ordinal: int, handle: bytes) -> int:
        """An address of it for `ordinal`, in another process than the exporter's."""

    def close_ipc(self, ordinal: int, address: int) -> None:
        """End an `open_ipc`. Nothing may be reading there any more."""

    # --- memory of the host ---

    def pin(self, ordinal: int, address: int, num_bytes: int) -> None:
        """Pin host memory, so that GPUs copy from and to it on their own."""

    def unpin(self, ordinal: int, address: int) -> None:
        """End a `pin`. Nothing may be copied there any more."""


# --- structs of cuda.h -------------------------------------------------------------------------------------


class _Uuid(Structure):
    _fields_: ClassVar = [("bytes", c_char * 16)]


class _Location(Structure):
    _fields_: ClassVar = [("type", c_int), ("id", c_int)]


class _AllocFlags(Structure):
    _fields_: ClassVar = [
        ("compression_type", ctypes.c_ubyte),
        ("gpu_direct_rdma_capable", ctypes.c_ubyte),
        ("usage", ctypes.c_ushort),
        ("reserved", ctypes.c_ubyte * 4),
    ]


class _AllocationProp(Structure):
    _fields_: ClassVar = [
        ("type", c_int),
        ("requested_handle_types", c_int),
        ("location", _Location),
        ("win32_handle_meta_data", c_void_p),
        ("alloc_flags", _AllocFlags),
    ]


class _AccessDesc(Structure):
    _fields_: ClassVar = [("location", _Location), ("flags", c_int)]


class _IpcHandle(Structure):
    _fields_: ClassVar = [("reserved", c_char * IPC_HANDLE_BYTES)]


# Each function's arguments; all return a CUresult (int). `_v2` is what cuda.h makes of the plain name.
_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "cuInit": (c_uint,),
    "cuGetErrorName": (c_int, POINTER(c_char_p)),
    "cuDeviceGetCount": (POINTER(c_int),),
    "cuDeviceGet": (POINTER(c_int), c_int),
    "cuDeviceGetName": (c_char_p, c_int, c_int),
    "cuDeviceGetUuid_v2": (POINTER(_Uuid), c_int),
    "cuDeviceTotalMem_v2": (POINTER(c_size_t), c_int),
    "cuDeviceGetAttribute": (POINTER(c_int), c_int, c_int),
    "cuDeviceCanAccessPeer": (POINTER(c_int), c_int, c_int),
    "cuDevicePrimaryCtxRetain": (POINTER(c_void_p), c_int),
    "cuCtxPushCurrent_v2": (c_void_p,),
    "cuCtxPopCurrent_v2": (POINTER(c_void_p),),
    "cuMemGetAllocationGranularity": (POINTER(c_size_t), POINTER(_AllocationProp), c_int),
    "cuMemCreate": (POINTER(c_ulonglong), c_size_t, POINTER(_AllocationProp), c_ulonglong),
    "cuMemExportToShareableHandle": (c_void_p, c_ulonglong, c_int, c_ulonglong),
    "cuMemImportFromShareableHandle": (POINTER(c_ulonglong), c_void_p, c_int),
    "cuMemAddressReserve": (POINTER(c_ulonglong), c_size_t, c_size_t, c_ulonglong, c_ulonglong),
    "cuMemAddressFree": (c_ulonglong, c_size_t),
    "cuMemMap": (c_ulonglong, c_size_t, c_size_t, c_ulonglong, c_ulonglong),
    "cuMemSetAccess": (c_ulonglong, c_size_t, POINTER(_AccessDesc), c_size_t),
    "cuMemUnmap": (c_ulonglong, c_size_t),
    "cuMemRelease": (c_ulonglong,),
    "cuMemAlloc_v2": (POINTER(c_ulonglong), c_size_t),
    "cuMemFree_v2": (c_ulonglong,),
    "cuIpcGetMemHandle": (POINTER(_IpcHandle), c_ulonglong),
    "cuIpcOpenMemHandle_v2": (POINTER(c_ulonglong), _IpcHandle, c_uint),
    "cuIpcCloseMemHandle": (c_ulonglong,),
    "cuMemHostRegister_v2": (c_void_p, c_size_t, c_uint),
    "cuMemHostUnregister": (c_void_p,),
}


class LibCuda:
    """The `CudaDriver` of this machine. Raises CudaError if it has none, or none that works."""

    def __init__(self) -> None:
        try:
            self._lib = ctypes.CDLL("libcuda.so.1")
            for name, arguments in _SIGNATURES.items():
                function = getattr(self._lib, name)
                function.argtypes, function.restype = arguments, c_int
        except (OSError, AttributeError) as error:
            raise CudaError(f"no CUDA driver: {error}") from error
        self._contexts: dict[int, c_void_p] = {}
        self._call("cuInit", 0)

    # --- devices ---

    def count(self) -> int:
        """See `CudaDriver`, here and below."""
        return self._int("cuDeviceGetCount")

    def device(self, ordinal: int) -> DeviceInfo:
        device = self._int("cuDeviceGet", ordinal)
        name = ctypes.create_string_buffer(256)
        self._call("cuDeviceGetName", name, len(name), device)
        total = c_size_t()
        self._call("cuDeviceTotalMem_v2", byref(total), device)
        return DeviceInfo(
            ordinal=ordinal,
            uuid=self.uuid(ordinal),
            name=name.value.decode(errors="replace"),
            total_bytes=total.value,
            capability=(
                self._attribute(device, _CAPABILITY_MAJOR),
                self._attribute(device, _CAPABILITY_MINOR),
            ),
            exports_descriptors=bool(
                self._attribute(device, _VIRTUAL_MEMORY) and self._attribute(device, _POSIX_FD_EXPORT)
            ),
            pins_host_memory=bool(self._attribute(device, _HOST_REGISTER)),
            num_copy_engines=self._attribute(device, _NUM_COPY_ENGINES),
            compute_mode=self._attribute(device, _COMPUTE_MODE),
            under_mps=bool(self._attribute(device, _MPS, default=0)),
        )

    def uuid(self, ordinal: int) -> str:
        found = _Uuid()
        self._call("cuDeviceGetUuid_v2", byref(found), self._int("cuDeviceGet", ordinal))
        return f"GPU-{uuid.UUID(bytes=ctypes.string_at(byref(found), 16))}"

    def can_access(self, ordinal: int, other: int) -> bool:
        if ordinal == other:
            return True
        devices = self._int("cuDeviceGet", ordinal), self._int("cuDeviceGet", other)
        return bool(self._int("cuDeviceCanAccessPeer", *devices))

    # --- cuMem ---

    def granularity(self, ordinal: int) -> int:
        size = c_size_t()
        self._call(
            "cuMemGetAllocationGranularity", byref(size), byref(_shareable(ordinal)), _GRANULARITY_RECOMMENDED
        )
        return size.value

    def create(self, ordinal: int, num_bytes: int) -> int:
        handle = c_ulonglong()
        with self._current(ordinal):
            self._call("cuMemCreate", byref(handle), num_bytes, byref(_shareable(ordinal)), 0)
        return handle.value

    def export_descriptor(self, handle: int) -> int:
        fd = c_int(-1)
        self._call("cuMemExportToShareableHandle", byref(fd), handle, _POSIX_FD, 0)
        return fd.value

    def import_descriptor(self, fd: int) -> int:
        handle = c_ulonglong()
        self._call("cuMemImportFromShareableHandle", byref(handle), c_void_p(fd), _POSIX_FD)
        return handle.value

    def map(self, handle: int, num_bytes: int, ordinal: int, *, writable: bool) -> int:
        with self._current(ordinal):  # a GPU without any context has no addresses to give access at
            return self._map(handle, num_bytes, ordinal, writable)

    def _map(self, handle: int, num_bytes: int, ordinal: int, writable: bool) -> int:
        address = c_ulonglong()
        self._call("cuMemAddressReserve", byref(address), num_bytes, 0, 0, 0)
        try:
            self._call("cuMemMap", address.value, num_bytes, 0, handle, 0)
            try:
                flags = _READ_WRITE if writable else _READ
                access = _AccessDesc(_Location(_ON_DEVICE, ordinal), flags)
                self._call("cuMemSetAccess", address.value, num_bytes, byref(access), 1)
            except BaseException:
                self._call("cuMemUnmap", address.value, num_bytes)
                raise
        except BaseException:
            self._call("cuMemAddressFree", address.value, num_bytes)
            raise
        return address.value

    def unmap(self, address: int, num_bytes: int) -> None:
        self._call("cuMemUnmap", address, num_bytes)
        self._call("cuMemAddressFree", address, num_bytes)

    def release(self, handle: int) -> None:
        self._call("cuMemRelease", handle)

    # --- cudaIpc ---

    def allocate(self, ordinal: int, num_bytes: int) -> int:
        address = c_ulonglong()
        with self._current(ordinal):
            self._call("cuMemAlloc_v2", byref(address), num_bytes)
        return address.value

    def free(self, ordinal: int, address: int) -> None:
        with self._current(ordinal):
            self._call("cuMemFree_v2", address)

    def ipc_handle(self, ordinal: int, address: int) -> bytes:
        handle = _IpcHandle()
        with self._current(ordinal):
            self._call("cuIpcGetMemHandle", byref(handle), address)
        return ctypes.string_at(byref(handle), IPC_HANDLE_BYTES)  # it may hold zeros

    def open_ipc(self, ordinal: int, handle: bytes) -> int:
        if len(handle) != IPC_HANDLE_BYTES:
            raise CudaError(f"a CUDA IPC handle of {len(handle)} bytes, not {IPC_HANDLE_BYTES}")
        address = c_ulonglong()
        with self._current(ordinal):
            opened = _IpcHandle.from_buffer_copy(handle)
            self._call("cuIpcOpenMemHandle_v2", byref(address), opened, _LAZY_PEER_ACCESS)
        return address.value

    def close_ipc(self, ordinal: int, address: int) -> None:
        with self._current(ordinal):
            self._call("cuIpcCloseMemHandle", address)

    # --- memory of the host ---

    def pin(self, ordinal: int, address: int, num_bytes: int) -> None:
        with self._current(ordinal):
            self._call("cuMemHostRegister_v2", address, num_bytes, 0)

    def unpin(self, ordinal: int, address: int) -> None:
        with self._current(ordinal):
            self._call("cuMemHostUnregister", address)

    # --- inside ---

    @contextmanager
    def _current(self, ordinal: int) -> Iterator[None]:
        """The GPU's primary context, which is torch's too, for calls that go by the thread's context."""
        context = self._contexts.get(ordinal)
        if context is None:
            context = c_void_p()
            self._call("cuDevicePrimaryCtxRetain", byref(context), self._int("cuDeviceGet", ordinal))
            self._contexts[ordinal] = context  # retained until the process ends
        self._call("cuCtxPushCurrent_v2", context)
        try:
            yield
        finally:
            self._call("cuCtxPopCurrent_v2", byref(c_void_p()))

    def _attribute(self, device: int, attribute: int, default: int | None = None) -> int:
        value = c_int()
        try:
            self._call("cuDeviceGetAttribute", byref(value), attribute, device)
        except CudaError:  # a driver older than the attribute
            if default is None:
                raise
            return default
        return value.value

    def _int(self, function: str, *arguments: int) -> int:
        """A function whose first argument takes an int out."""
        value = c_int()
        self._call(function, byref(value), *arguments)
        return value.value

    def _call(self, function: str, *arguments: Any) -> None:
        status: int = getattr(self._lib, function)(*arguments)
        if status == 0:
            return
        name = c_char_p()
        self._lib.cuGetErrorName(status, byref(name))
        text = (name.value or b"an unknown error").decode()
        if status == _OUT_OF_MEMORY:
            raise MemoryError_(f"the GPU's memory does not suffice ({function}: {text})")
        raise CudaError(f"{function} failed: {text} ({status})")


def _shareable(ordinal: int) -> _AllocationProp:
    return _AllocationProp(
        type=_PINNED, requested_handle_types=_POSIX_FD, location=_Location(_ON_DEVICE, ordinal)
    )
