"""Where a model's tensors come from: a folder of safetensors files, or random numbers (`load_format dummy`).

A folder is checked before anything is read from it: every tensor the model needs is there with its shape
and a floating-point type, and none is there that the model would leave out of its mathematics. All faults
are ModelErrors. Only safetensors are read; pickled weights are never opened.
"""

from __future__ import annotations

import json
import zlib
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from memserve.errors import ModelError
from memserve.model_config import ModelConfig

_INDEX = "model.safetensors.index.json"
_FLOATS = ("F32", "F16", "BF16")
# Buffers that older checkpoints carry; their content follows from the config.
_IGNORED_SUFFIXES = ("rotary_emb.inv_freq",)
_NOISE_LEN = 4_194_301
_DUMMY_STD = 0.02

Shape = tuple[int, ...]


class TensorSource(Protocol):
    """A model's tensors by their published names."""

    def read(self, name: str, shape: Shape) -> Tensor:
        """The tensor, on the source's device, in whatever floating-point type it is stored; not to be
        written to.
        """
        ...

    def close(self) -> None:
        """Close the files. Tensors read before stay valid."""
        ...


def tensor_shapes(model: ModelConfig) -> dict[str, Shape]:
    """Name and shape of every tensor of the model, as Hugging Face transformers publishes it."""
    hidden, inner = model.hidden_size, model.intermediate_size
    q, kv = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    shapes: dict[str, Shape] = {
        "model.embed_tokens.weight": (model.vocab_size, hidden),
        "model.norm.weight": (hidden,),
    }
    if not model.tie_word_embeddings:
        shapes["lm_head.weight"] = (model.vocab_size, hidden)
    for index in range(model.num_layers):
        layer = f"model.layers.{index}."
        matrices = {
            "self_attn.q_proj": (q, hidden, model.qkv_bias),
            "self_attn.k_proj": (kv, hidden, model.qkv_bias),
            "self_attn.v_proj": (kv, hidden, model.qkv_bias),
            "self_attn.o_proj": (hidden, q, model.o_bias),
            "mlp.gate_proj": (inner, hidden, model.mlp_bias),
            "mlp.up_proj": (inner, hidden, model.mlp_bias),
            "mlp.down_proj": (hidden, inner, model.mlp_bias),
        }
        for name, (rows, columns, bias) in matrices.items():
            shapes[f"{layer}{name}.weight"] = (rows, columns)
            if bias:
                shapes[f"{layer}{name}.bias"] = (rows,)
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{layer}{name}.weight"] = (hidden,)
        if model.qk_norm:
            for name in ("q_norm", "k_norm"):
                shapes[f"{layer}self_attn.{name}.weight"] = (model.head_dim,)
    return shapes


class SafetensorsSource:
    """`model.safetensors`, or the shards that `model.safetensors.index.json` names. Checked when made."""

    def __init__(self, model: ModelConfig, folder: Path) -> None:
        self._stack = ExitStack()
        self._files: dict[str, Any] = {}
        try:
            for path in _shards(folder):
                self._open(path)
            self._check(model)
        except BaseException:
            self.close()
            raise

    def read(self, name: str, shape: Shape) -> Tensor:
        try:
            tensor: Tensor = self._files[name].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ModelError(f"tensor {name} cannot be read: {error}") from error
        return tensor

    def close(self) -> None:
        self._stack.close()

    def _open(self, path: Path) -> None:
        try:
            file = self._stack.enter_context(safe_open(str(path), framework="pt", device="cpu"))
            names = file.keys()
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{path} is not a readable safetensors file: {_one_line(error)}") from error
        for name in names:
            if name in self._files:
                raise ModelError(f"tensor {name} is in two files, {path.name} is the second")
            self._files[name] = file

    def _check(self, model: ModelConfig) -> None:
        wanted = tensor_shapes(model)
        missing = [name for name in wanted if name not in self._files]
        if missing:
            raise ModelError(f"the weights lack {len(missing)} tensors of the model: {_some(missing)}")
        tied = ("lm_head.weight",) if model.tie_word_embeddings else ()
        surplus = [
            name
            for name in self._files
            if name not in wanted and name not in tied and not name.endswith(_IGNORED_SUFFIXES)
        ]
        if surplus:
            raise ModelError(f"the weights hold tensors that the model has no use for: {_some(surplus)}")
        for name, shape in wanted.items():
            found = self._files[name].get_slice(name)
            if tuple(found.get_shape()) != shape:
                raise ModelError(f"tensor {name} is {found.get_shape()}, by config.json {list(shape)}")
            if found.get_dtype() not in _FLOATS:
                raise ModelError(
                    f"tensor {name} has type {found.get_dtype()}; supported: {', '.join(_FLOATS)}"
                )


class DummySource:
    """Random weights of the model's shapes, the same for the same seed: matrices normal with std 0.02 (as
    transformers initialises them), norms 1, biases 0. Made of one stretch of noise, which each tensor starts
    at a place of its own, since drawing billions of normals takes minutes. `device`: where all but the noise
    is made; the numbers are the same everywhere.
    """

    def __init__(self, seed: int, device: torch.device | None = None) -> None:
        generator = torch.Generator().manual_seed(seed)
        noise = torch.empty(_NOISE_LEN).normal_(std=_DUMMY_STD, generator=generator)
        self._noise = noise.to(device)
        self._device = device

    def read(self, name: str, shape: Shape) -> Tensor:
        if name.endswith("norm.weight"):
            return torch.ones(shape, device=self._device)
        if name.endswith(".bias"):
            return torch.zeros(shape, device=self._device)
        tensor = torch.empty(shape, device=self._device)
        flat, offset = tensor.view(-1), zlib.crc32(name.encode()) % _NOISE_LEN
        done = 0
        while done < len(flat):
            piece = self._noise[offset : offset + len(flat) - done]
            flat[done : done + len(piece)] = piece
            done, offset = done + len(piece), 0
        return tensor

    def close(self) -> None:
        pass


def _shards(folder: Path) -> list[Path]:
    index, single = folder / _INDEX, folder / "model.safetensors"
    if single.is_file():
        return [single]
    if not index.is_file():
        raise ModelError(f"{folder} holds neither model.safetensors nor {_INDEX}")
    try:
        names = set(json.loads(index.read_text())["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"{index} is broken: {_one_line(error)}") from error
    for name in names:
        # A shard is a file of this folder; anything else would read outside of it.
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise ModelError(f"{index} names {name!r}, which is not a safetensors file of the folder")
        if not (folder / name).is_file():
            raise ModelError(f"{index} names {name}, which is missing")
    return [folder / name for name in sorted(names)]


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
