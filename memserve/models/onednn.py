"""oneDNN's packed matrices as bytes: pack, describe, and rebuild over memory that several processes map.

A packed tensor is opaque to torch's Python side, but not to the C interface that torch's ahead-of-time
compiler links
against: `aoti_torch_create_tensor_from_blob_v2` makes a tensor of any layout over a given address, from the
serialised description that `_get_mkldnn_serialized_md` yields. The layout depends on the CPU, so it never
leaves the machine. All of this is found by trying (`probe`), never by version.
"""

from __future__ import annotations

import ctypes
import logging
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

logger = logging.getLogger(__name__)

# The row count a layout is chosen for: a large one, which measured as well at 1 row as one chosen for 1.
_ROWS_HINT = 512


@dataclass(frozen=True, slots=True)
class PackedBytes:
    """Where a packed matrix lies and how it is laid out; valid while the tensor it describes lives."""

    address: int
    num_bytes: int
    description: bytes


def pack(weight: Tensor) -> Tensor:
    """`weight` [out, in] in oneDNN's layout, for `linear.OnednnLinear`. A new tensor."""
    return torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS_HINT)  # type: ignore[no-any-return]


def packed_bytes(packed: Tensor) -> PackedBytes:
    """The bytes of a packed tensor."""
    description = torch.ops.mkldnn._get_mkldnn_serialized_md(packed)
    return PackedBytes(
        address=torch.ops.mkldnn.data_ptr(packed),
        num_bytes=torch.ops.mkldnn._nbytes(packed),
        description=bytes(description.numpy()),
    )


class Mapper:
    """Packed tensors over foreign memory. Raises OSError or AttributeError where torch cannot do it."""

    def __init__(self) -> None:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        self._create = library.aoti_torch_create_tensor_from_blob_v2
        self._create.restype = ctypes.c_int32
        self._layout = _constant(library, "aoti_torch_layout__mkldnn")
        self._device = _constant(library, "aoti_torch_device_type_cpu")
        self._dtypes = {
            torch.bfloat16: _constant(library, "aoti_torch_dtype_bfloat16"),
            torch.float32: _constant(library, "aoti_torch_dtype_float32"),
        }
        self._capsule = ctypes.pythonapi.PyCapsule_New
        self._capsule.restype = ctypes.py_object
        self._capsule.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
        self._steal = torch._C._aoti.alloc_tensor_by_stealing_from_void_ptr

    def map(self, address: int, shape: tuple[int, int], dtype: torch.dtype, description: bytes) -> Tensor:
        """The packed matrix of `shape` at `address`, without a copy; the memory must outlive the tensor."""
        rows, columns = shape
        handle = ctypes.c_void_p()
        status = self._create(
            ctypes.c_void_p(address),
            ctypes.c_int64(2),
            (ctypes.c_int64 * 2)(rows, columns),
            (ctypes.c_int64 * 2)(columns, 1),
            ctypes.c_int64(0),
            ctypes.c_int32(self._dtypes[dtype]),
            ctypes.c_int32(self._device),
            ctypes.c_int32(0),
            ctypes.byref(handle),
            ctypes.c_int32(self._layout),
            description,
            ctypes.c_int64(len(description)),
        )
        if status != 0:
            raise OSError(f"torch could not map a packed matrix of {rows} x {columns} (status {status})")
        return self._steal(self._capsule(handle, None, None))


def probe(dtype: torch.dtype) -> bool:
    """Whether matrices of `dtype` can be packed, mapped and multiplied here, with the right result."""
    if dtype not in (torch.bfloat16, torch.float32):
        return False
    try:
        weight = (torch.arange(96 * 64).reshape(96, 64) % 13 - 6).to(dtype)
        x = (torch.arange(3 * 64).reshape(3, 64) % 7 - 3).to(dtype)
        packed = pack(weight)
        data = packed_bytes(packed)
        copy = (ctypes.c_uint8 * data.num_bytes)()
        ctypes.memmove(copy, data.address, data.num_bytes)
        mapped = Mapper().map(ctypes.addressof(copy), (96, 64), dtype, data.description)
        # Small whole numbers: every product and sum is exact, so the results must be equal.
        plain = F.linear(x.float(), weight.float()).to(dtype)
        return torch.equal(torch.ops.mkldnn._linear_pointwise(x, mapped, None, "none", [], ""), plain)
    except (AttributeError, OSError, RuntimeError, NotImplementedError) as error:
        logger.info("packed matrices are not available: %s", error)
        return False


def _constant(library: ctypes.CDLL, name: str) -> int:
    function = getattr(library, name)
    function.restype = ctypes.c_int32
    return int(function())
