"""A model's weights: laid out once in shared memory for all CPU workers, or once in a buffer on a GPU.

    folder ──write_weights──► buffer (memfd) + manifest ──map_weights──► Weights of each process, no copy
    folder ──fill_device_weights──► buffer on a GPU ──view_device_weights──► Weights, of one process or more

The layout differs from the published one: q, k and v are one matrix, rows of q and k are permuted for
`rotary`, and on a CPU matrices are packed for oneDNN where that works. `_recipe` is the one place that says
so; a manifest says what lies where. N workers cost one copy of the weights; the loader's peak above it is
one matrix, in two forms.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import torch
from torch import Tensor

from memserve.config import LoadFormat
from memserve.errors import MemoryError_
from memserve.kernels.rotary import pair_adjacent
from memserve.model_config import WEIGHT_ALIGNMENT, ModelConfig, packed_bytes_bound
from memserve.models import onednn
from memserve.models.carrier import Carrier
from memserve.models.checkpoint import (
    DummySource,
    SafetensorsSource,
    Shape,
    TensorSource,
    tensor_shapes,
)
from memserve.models.linear import (
    FusedGate,
    GatedLinear,
    Linear,
    OnednnLinear,
    SplitGate,
    StridedLinear,
)
from memserve.torch_dtypes import TORCH_DTYPES

Progress = Callable[[float], None]
Buffer = memoryview | mmap.mmap


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One layer, in the order of its use. `q_norm` and `k_norm` are None in models without them."""

    input_norm: Tensor
    qkv: Linear
    q_norm: Tensor | None
    k_norm: Tensor | None
    o: Linear
    post_norm: Tensor
    gate_up: GatedLinear
    down: Linear


@dataclass(frozen=True, slots=True)
class Weights:
    """All weights of one process, read-only. `memory` keeps alive what they lie in."""

    embed_tokens: Tensor
    layers: tuple[LayerWeights, ...]
    norm: Tensor
    lm_head: Linear
    memory: object


class _Entry(msgspec.Struct, frozen=True, array_like=True):
    """One tensor in the buffer; `description` is oneDNN's of a packed matrix, None of a plain tensor."""

    key: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int
    description: bytes | None


class _Manifest(msgspec.Struct, frozen=True, array_like=True):
    dtype: str
    entries: tuple[_Entry, ...]


class _Piece(msgspec.Struct, frozen=True):
    """One tensor of our layout: published tensors stacked along dimension 0."""

    key: str
    sources: tuple[str, ...]
    is_matrix: bool = False


def write_weights(
    model: ModelConfig,
    folder: Path,
    dtype: str,
    load_format: LoadFormat,
    seed: int,
    buffer: Buffer,
    progress: Progress,
) -> bytes:
    """Read the weights, convert them to `dtype` and lay them out in `buffer` for CPU workers.

    Args:
        model: the model that the folder's weights must fit.
        folder: where the safetensors files are; not read if load_format is "dummy".
        dtype: of the weights in memory.
        load_format: "dummy" makes random weights from the config alone.
        seed: of the dummy weights.
        buffer: writable, at least `weights_bytes_upper_bound(model, dtype)` bytes, page-aligned.
        progress: told fractions from 0 to 1.

    Returns:
        The manifest for `map_weights`.

    Raises:
        ModelError: the files are missing, broken, or not this model's.
        MemoryError_: the buffer is too small.
    """
    torch_dtype = TORCH_DTYPES[dtype]
    packable = onednn.probe(torch_dtype)
    base, size = _address(buffer), len(buffer)
    entries: list[_Entry] = []
    end = 0
    for piece, tensor in _pieces(model, folder, torch_dtype, load_format, seed, packable, progress):
        packed = _packed(tensor) if packable and piece.is_matrix else None
        if packed is None:
            address, num_bytes, description = tensor.data_ptr(), tensor.nbytes, None
        else:
            data = onednn.packed_bytes(packed)
            address, num_bytes, description = data.address, data.num_bytes, data.description
        offset = -(-end // WEIGHT_ALIGNMENT) * WEIGHT_ALIGNMENT
        end = offset + num_bytes
        if end > size:
            raise MemoryError_(f"the weights need more than the {size} bytes set aside for them")
        ctypes.memmove(base + offset, address, num_bytes)
        entries.append(_Entry(piece.key, tuple(tensor.shape), offset, num_bytes, description))
    return msgspec.msgpack.encode(_Manifest(dtype, tuple(entries)))


def map_weights(model: ModelConfig, manifest: bytes, buffer: Buffer) -> Weights:
    """Weights over `buffer`, as `write_weights` filled it; no copy, and read-only memory will do."""
    layout = msgspec.msgpack.decode(manifest, type=_Manifest)
    dtype = TORCH_DTYPES[layout.dtype]
    base, size = _address(buffer), len(buffer)
    mapper = onednn.Mapper() if any(entry.description for entry in layout.entries) else None
    tensors: dict[str, Tensor] = {}
    linears: dict[str, Linear] = {}
    for entry in layout.entries:
        assert entry.offset + entry.num_bytes <= size, entry.key
        address = base + entry.offset
        if entry.description is not None:
            assert mapper is not None
            rows, columns = entry.shape
            packed = mapper.map(address, (rows, columns), dtype, entry.description)
            linears[entry.key] = OnednnLinear(packed, tensors.get(f"{entry.key}.bias"))
        else:
            # A ctypes array over the address: torch takes it as writable and neither copies nor warns.
            # Nothing here ever writes to weights, and a write to a read-only mapping would fault at once.
            memory = (ctypes.c_uint8 * entry.num_bytes).from_address(address)
            tensors[entry.key] = torch.frombuffer(memory, dtype=dtype).view(entry.shape)
    return _assemble(model, tensors, linears, buffer)


def load_weights_to_device(
    model: ModelConfig,
    folder: Path,
    dtype: str,
    device: torch.device,
    load_format: LoadFormat,
    seed: int,
    progress: Progress,
) -> Weights:
    """Read the weights onto `device`. Arguments and errors as `write_weights`."""
    buffer = torch.empty(device_weights_bytes(model, dtype), dtype=torch.uint8, device=device)
    fill_device_weights(model, folder, dtype, load_format, seed, buffer, progress)
    return view_device_weights(model, dtype, buffer)


def device_weights_bytes(model: ModelConfig, dtype: str) -> int:
    """Size of the buffer for `fill_device_weights`."""
    return _device_layout(model, TORCH_DTYPES[dtype])[1]


def fill_device_weights(
    model: ModelConfig,
    folder: Path,
    dtype: str,
    load_format: LoadFormat,
    seed: int,
    buffer: Tensor,
    progress: Progress,
) -> None:
    """Read the weights into `buffer`, uint8 [device_weights_bytes] on any device; they are there for what is
    enqueued after it. Files go through pinned memory; dummies are made on the device. Arguments and errors as
    `write_weights`.
    """
    torch_dtype, device = TORCH_DTYPES[dtype], buffer.device
    shapes, source = tensor_shapes(model), _source(model, folder, load_format, seed, device)
    tensors = _device_tensors(model, torch_dtype, buffer)
    total = sum(tensor.numel() for tensor in tensors.values())
    done = 0
    try:
        carrier = Carrier(device)
        progress(0.0)
        for piece in _recipe(model, packable=False):
            target, row = tensors[piece.key], 0
            for name in piece.sources:
                part = _permuted(name, carrier.carry(source.read(name, shapes[name])), model)
                target[row : row + len(part)].copy_(part)
                row += len(part)
            done += target.numel()
            progress(done / total)
    finally:
        source.close()


def view_device_weights(model: ModelConfig, dtype: str, buffer: Tensor) -> Weights:
    """Weights over a buffer that `fill_device_weights` has filled, here or in another process; no copy."""
    return _assemble(model, _device_tensors(model, TORCH_DTYPES[dtype], buffer), {}, buffer)


def _device_tensors(model: ModelConfig, dtype: torch.dtype, buffer: Tensor) -> dict[str, Tensor]:
    tensors = {}
    for key, (offset, shape) in _device_layout(model, dtype)[0].items():
        num_bytes = _num_elements(shape) * dtype.itemsize
        tensors[key] = buffer[offset : offset + num_bytes].view(dtype).view(shape)
    return tensors


def _device_layout(model: ModelConfig, dtype: torch.dtype) -> tuple[dict[str, tuple[int, Shape]], int]:
    """Offset and shape of each of our tensors in one buffer, and its size."""
    shapes, places, end = tensor_shapes(model), {}, 0
    for piece in _recipe(model, packable=False):
        first = shapes[piece.sources[0]]
        shape = (sum(shapes[name][0] for name in piece.sources), *first[1:])
        places[piece.key] = end, shape
        end += -(-_num_elements(shape) * dtype.itemsize // WEIGHT_ALIGNMENT) * WEIGHT_ALIGNMENT
    return places, end


def _source(
    model: ModelConfig, folder: Path, load_format: LoadFormat, seed: int, device: torch.device | None = None
) -> TensorSource:
    """`device`: where dummies are made."""
    if load_format == "dummy":
        return DummySource(seed, device)
    return SafetensorsSource(model, folder)


def _recipe(model: ModelConfig, packable: bool) -> Iterator[_Piece]:
    """Our tensors and what they are made of. A bias comes before its matrix.

    Packed matrices keep gate and up apart, so that oneDNN folds the activation into the products. A tied
    embedding that is packed for the head is also kept plain, for the look-up.
    """

    def linear(key: str, names: tuple[str, ...], bias: bool) -> Iterator[_Piece]:
        if bias:
            yield _Piece(f"{key}.bias", tuple(f"{name}.bias" for name in names))
        yield _Piece(key, tuple(f"{name}.weight" for name in names), is_matrix=True)

    yield _Piece("embed_tokens", ("model.embed_tokens.weight",))
    for index in range(model.num_layers):
        published, key = f"model.layers.{index}.", f"{index}."
        attention, mlp = f"{published}self_attn.", f"{published}mlp."
        yield _Piece(f"{key}input_norm", (f"{published}input_layernorm.weight",))
        yield from linear(f"{key}qkv", tuple(f"{attention}{part}_proj" for part in "qkv"), model.qkv_bias)
        if model.qk_norm:
            yield _Piece(f"{key}q_norm", (f"{attention}q_norm.weight",))
            yield _Piece(f"{key}k_norm", (f"{attention}k_norm.weight",))
        yield from linear(f"{key}o", (f"{attention}o_proj",), model.o_bias)
        yield _Piece(f"{key}post_norm", (f"{published}post_attention_layernorm.weight",))
        if packable:
            yield from linear(f"{key}gate", (f"{mlp}gate_proj",), model.mlp_bias)
            yield from linear(f"{key}up", (f"{mlp}up_proj",), model.mlp_bias)
        else:
            yield from linear(f"{key}gate_up", (f"{mlp}gate_proj", f"{mlp}up_proj"), model.mlp_bias)
        yield from linear(f"{key}down", (f"{mlp}down_proj",), model.mlp_bias)
    yield _Piece("norm", ("model.norm.weight",))
    if not model.tie_word_embeddings:
        yield from linear("lm_head", ("lm_head",), False)
    elif packable:
        yield _Piece("lm_head", ("model.embed_tokens.weight",), is_matrix=True)


def _pieces(
    model: ModelConfig,
    folder: Path,
    dtype: torch.dtype,
    load_format: LoadFormat,
    seed: int,
    packable: bool,
    progress: Progress,
) -> Iterator[tuple[_Piece, Tensor]]:
    """Each tensor of our layout, contiguous, on the CPU."""
    shapes = tensor_shapes(model)
    recipe = tuple(_recipe(model, packable))
    total = sum(_num_elements(shapes[name]) for piece in recipe for name in piece.sources)
    done = 0
    source = _source(model, folder, load_format, seed)
    try:
        progress(0.0)
        for piece in recipe:
            parts = [
                _permuted(name, source.read(name, shapes[name]).to(dtype), model) for name in piece.sources
            ]
            yield piece, (parts[0] if len(parts) == 1 else torch.cat(parts)).contiguous()
            done += sum(_num_elements(shapes[name]) for name in piece.sources)
            progress(done / total)
    finally:
        source.close()


def _permuted(name: str, tensor: Tensor, model: ModelConfig) -> Tensor:
    """Rows of whatever makes or scales a query or a key, in `rotary`'s order."""
    rotated = any(part in name for part in (".q_proj.", ".k_proj.", ".q_norm.", ".k_norm."))
    return pair_adjacent(tensor, model.head_dim) if rotated else tensor


def _packed(matrix: Tensor) -> Tensor | None:
    """`matrix` packed; None where the layout pads it beyond what the buffer was sized for."""
    packed = onednn.pack(matrix)
    rows, columns = matrix.shape
    bound = packed_bytes_bound(rows, columns, matrix.element_size())
    return packed if onednn.packed_bytes(packed).num_bytes <= bound else None


def _assemble(
    model: ModelConfig, tensors: dict[str, Tensor], linears: dict[str, Linear], memory: object
) -> Weights:
    def linear(key: str) -> Linear:
        return linears.get(key) or StridedLinear(tensors[key], tensors.get(f"{key}.bias"))

    def has(key: str) -> bool:
        return key in linears or key in tensors

    def layer(index: int) -> LayerWeights:
        gate_up: GatedLinear
        if has(f"{index}.gate_up"):
            gate_up = FusedGate(linear(f"{index}.gate_up"))
        else:
            gate_up = SplitGate(linear(f"{index}.gate"), linear(f"{index}.up"))
        return LayerWeights(
            input_norm=tensors[f"{index}.input_norm"],
            qkv=linear(f"{index}.qkv"),
            q_norm=tensors.get(f"{index}.q_norm"),
            k_norm=tensors.get(f"{index}.k_norm"),
            o=linear(f"{index}.o"),
            post_norm=tensors[f"{index}.post_norm"],
            gate_up=gate_up,
            down=linear(f"{index}.down"),
        )

    return Weights(
        embed_tokens=tensors["embed_tokens"],
        layers=tuple(layer(index) for index in range(model.num_layers)),
        norm=tensors["norm"],
        lm_head=linear("lm_head" if has("lm_head") else "embed_tokens"),
        memory=memory,
    )


def _address(buffer: Buffer) -> int:
    return int(np.frombuffer(buffer, dtype=np.uint8).ctypes.data)


def _num_elements(shape: Shape) -> int:
    return int(np.prod(shape, dtype=np.int64))
