"""Weights in shared memory: every fault of a folder, the layout's bound, dummies, two processes with one
copy.
"""

from __future__ import annotations

import json
import mmap
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from memserve.errors import MemoryError_, ModelError
from memserve.model_config import ModelConfig, load_model_config, weights_bytes_upper_bound
from memserve.models import onednn
from memserve.models.checkpoint import DummySource, tensor_shapes
from memserve.models.step import LogitRows, SequenceSlice, build_step
from memserve.models.transformer import Transformer
from memserve.models.weights import (
    Weights,
    device_weights_bytes,
    fill_device_weights,
    load_weights_to_device,
    map_weights,
    view_device_weights,
    write_weights,
)
from memserve.torch_dtypes import TORCH_DTYPES

Tensors = dict[str, torch.Tensor]


def ignore(_: float) -> None:
    """A progress that nobody watches."""


def write(folder: Path, dtype: str = "float32", buffer: Any = None) -> tuple[ModelConfig, bytes, Any]:
    model = load_model_config(folder)
    buffer = bytearray(weights_bytes_upper_bound(model, dtype)) if buffer is None else buffer
    return model, write_weights(model, folder, dtype, "auto", 0, memoryview(buffer), ignore), buffer


def logits(model: ModelConfig, weights: Weights, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Of a short prompt."""
    device = torch.device("cpu")
    transformer = Transformer(model, weights, 64, device, dtype)
    kv = torch.zeros((4, model.num_layers, 2, model.num_kv_heads, 16, model.head_dim), dtype=dtype)
    piece = SequenceSlice(0, 20, 0, np.array([2, 1]))
    step = build_step([(np.arange(3, 23), piece, LogitRows.ALL)], model, 16, device, dtype)
    with torch.inference_mode():
        return transformer.forward(step, kv)


@pytest.fixture
def folder(oracle, tmp_path: Path) -> Path:
    """A copy of the Llama's folder, to be spoilt."""
    for path in oracle("llama")[0].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def respoil(folder: Path, change: Callable[[Tensors], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tensors: tensors.pop(Q), f"lack 1 tensors of the model: {Q}"),
        (lambda tensors: tensors.update({Q: tensors[Q][:-1].clone()}), Q),
        (lambda tensors: tensors.update({Q: tensors[Q].to(torch.int8)}), "type I8"),
        (lambda tensors: tensors.update({Q: tensors[Q].double()}), "type F64"),
        (
            lambda tensors: tensors.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(64)}),
            "no use for",
        ),
        (lambda tensors: tensors.clear(), "lack"),
    ],
)
def test_wrong_tensors(folder: Path, change: Callable[[Tensors], None], said: str) -> None:
    respoil(folder, change)
    with pytest.raises(ModelError, match=said) as caught:
        write(folder)
    assert "\n" not in str(caught.value)


def test_tensors_that_follow_from_the_config_are_ignored(folder: Path) -> None:
    before = logits(*_mapped(folder))
    respoil(
        folder,
        lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}),
    )
    assert torch.equal(logits(*_mapped(folder)), before)


def _mapped(folder: Path) -> tuple[ModelConfig, Weights]:
    model, manifest, buffer = write(folder)
    return model, map_weights(model, manifest, memoryview(buffer))


@pytest.mark.parametrize("keep", [0, 7, 100, 5000])
def test_truncated_files(folder: Path, keep: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ModelError, match=r"model\.safetensors is not a readable safetensors file"):
        write(folder)


def test_no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"a pickle is not looked at")
    with pytest.raises(ModelError, match=r"holds neither model\.safetensors nor"):
        write(folder)


def shard(folder: Path) -> dict[str, str]:
    """Split the weights into two files; the index's weight map."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {name: f"part-{index % 2}.safetensors" for index, name in enumerate(tensors)}
    for part in set(weight_map.values()):
        save_file({name: tensors[name] for name in tensors if weight_map[name] == part}, folder / part)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return weight_map


def test_shards(folder: Path) -> None:
    whole = logits(*_mapped(folder))
    shard(folder)
    assert torch.equal(logits(*_mapped(folder)), whole)


@pytest.mark.parametrize("index", ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}'])
def test_broken_index(folder: Path, index: str) -> None:
    shard(folder)
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ModelError, match="index"):
        write(folder)


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "part-9.safetensors", "part-0.bin"])
def test_index_that_names_other_files(folder: Path, name: str) -> None:
    weight_map = shard(folder)
    weight_map[Q] = name
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ModelError, match="which is"):
        write(folder)


def test_a_tensor_in_two_files(folder: Path) -> None:
    shard(folder)
    tensors = load_file(folder / "part-1.safetensors") | {Q: torch.zeros(64, 64)}
    save_file(tensors, folder / "part-1.safetensors")
    save_file(
        load_file(folder / "part-0.safetensors") | {Q: torch.zeros(64, 64)}, folder / "part-0.safetensors"
    )
    with pytest.raises(ModelError, match="two files"):
        write(folder)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bound_holds_and_too_small_a_buffer_is_refused(oracle, family: str, dtype: str) -> None:
    folder, _ = oracle(family)
    write(folder, dtype)
    with pytest.raises(MemoryError_):
        write(folder, dtype, bytearray(1000))


def test_progress_is_monotone_and_ends_at_one(folder: Path) -> None:
    model, told = load_model_config(folder), []
    buffer = memoryview(bytearray(weights_bytes_upper_bound(model, "float32")))
    write_weights(model, folder, "float32", "auto", 0, buffer, told.append)
    assert told == sorted(told) and told[0] == 0.0 and told[-1] == 1.0


def test_packed_and_plain_weights_agree(oracle, family: str) -> None:
    """`load_weights_to_device` never packs, so it serves as the reference on a CPU."""
    folder, _ = oracle(family)
    model, manifest, buffer = write(folder)
    plain = load_weights_to_device(model, folder, "float32", torch.device("cpu"), "auto", 0, ignore)
    packed = map_weights(model, manifest, memoryview(buffer))
    assert (logits(model, plain) - logits(model, packed)).abs().max() < 1e-5


def test_without_packing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = logits(*_mapped(folder))
    monkeypatch.setattr(onednn, "probe", lambda dtype: False)
    assert (logits(*_mapped(folder)) - expected).abs().max() < 1e-5


def test_float16_weights_in_memory(folder: Path) -> None:
    """The storage type of the file does not matter."""
    respoil(folder, lambda tensors: tensors.update({name: tensors[name].half() for name in tensors}))
    assert logits(*_mapped(folder)).isfinite().all()


def test_dummy_weights(folder: Path) -> None:
    model = load_model_config(folder)

    def make(seed: int) -> bytes:
        buffer = bytearray(weights_bytes_upper_bound(model, "bfloat16"))
        write_weights(model, Path("nowhere"), "bfloat16", "dummy", seed, memoryview(buffer), ignore)
        return bytes(buffer)

    assert make(1) == make(1) != make(2)
    source = DummySource(0)
    for name, shape in tensor_shapes(model).items():
        tensor = source.read(name, shape)
        if tensor.ndim == 2:
            assert 0.015 < tensor.std() < 0.025 and abs(tensor.mean()) < 0.005, name
        else:
            assert torch.equal(tensor, torch.ones(shape)), name


READER = """
import mmap, sys
from pathlib import Path
import torch
from memserve.model_config import load_model_config
from memserve.models.weights import map_weights
sys.path.insert(0, sys.argv[1])
from test_weights import logits
torch.set_num_threads(1)
fd, size, folder, manifest = int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]), bytes.fromhex(sys.argv[5])
model = load_model_config(folder)
memory = mmap.mmap(fd, size, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
def private_kib():
    lines = Path("/proc/self/smaps").read_text().split("memfd:weights")[1].splitlines()
    return sum(int(line.split()[1]) for line in lines[:24] if line.startswith("Private_Dirty"))
result = logits(model, map_weights(model, manifest, memory))
assert private_kib() == 0
print(result.numpy().tobytes().hex())
"""


def test_two_processes_share_one_copy(folder: Path) -> None:
    # 1. the loader lays the weights out in a memfd
    model = load_model_config(folder)
    size = weights_bytes_upper_bound(model, "float32")
    fd = os.memfd_create("weights")
    os.ftruncate(fd, size)
    memory = mmap.mmap(fd, size)
    _, manifest, _ = write(folder, buffer=memory)
    readonly = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)

    # 2. another process maps it read-only, without a copy, and computes the same
    arguments = [str(Path(__file__).parent), str(readonly), str(size), str(folder), manifest.hex()]
    output = subprocess.run(
        [sys.executable, "-c", READER, *arguments], pass_fds=[readonly], capture_output=True, check=False
    )
    assert output.returncode == 0, output.stderr.decode()
    theirs = np.frombuffer(bytes.fromhex(output.stdout.decode().strip()), dtype=np.float32)

    # 3. and so does the loader
    ours = logits(model, map_weights(model, manifest, memory))
    assert np.array_equal(theirs, ours.numpy().ravel())
    os.close(readonly)
    os.close(fd)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_a_device_buffer_is_the_same_weights(oracle, name: str, dtype: str) -> None:
    """One allocation, filled piece by piece, and seen again by another who has only the buffer."""
    folder = oracle(name)[0]
    model, torch_dtype = load_model_config(folder), TORCH_DTYPES[dtype]
    buffer = torch.full((device_weights_bytes(model, dtype),), 255, dtype=torch.uint8)
    told: list[float] = []
    fill_device_weights(model, folder, dtype, "auto", 0, buffer, told.append)
    assert told[0] == 0.0 and told[-1] == 1.0 and told == sorted(told)
    weights = view_device_weights(model, dtype, buffer.clone())
    _, manifest, shared = write(folder, dtype)
    expected = logits(model, map_weights(model, manifest, memoryview(shared)), torch_dtype)
    found = logits(model, weights, torch_dtype)
    tolerance = 1e-4 if dtype == "float32" else 0.2
    assert (found - expected).abs().max() < tolerance
    assert len(buffer) <= weights_bytes_upper_bound(model, dtype)


def test_dummies_made_on_a_device_are_those_of_shared_memory(oracle) -> None:
    model = load_model_config(oracle("llama")[0])
    buffer = torch.empty(device_weights_bytes(model, "float32"), dtype=torch.uint8)
    fill_device_weights(model, Path("/nowhere"), "float32", "dummy", 5, buffer, ignore)
    shared = bytearray(weights_bytes_upper_bound(model, "float32"))
    manifest = write_weights(model, Path("/nowhere"), "float32", "dummy", 5, memoryview(shared), ignore)
    expected = logits(model, map_weights(model, manifest, memoryview(shared)))
    assert torch.allclose(logits(model, view_device_weights(model, "float32", buffer)), expected, atol=1e-4)
    other = torch.empty_like(buffer)
    fill_device_weights(model, Path("/nowhere"), "float32", "dummy", 6, other, ignore)
    assert not torch.equal(buffer, other)


def test_faults_of_a_folder_are_faults_on_a_device_too(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    model = load_model_config(folder)
    buffer = torch.empty(device_weights_bytes(model, "float32"), dtype=torch.uint8)
    with pytest.raises(ModelError, match="neither"):
        fill_device_weights(model, folder, "float32", "auto", 0, buffer, ignore)
