"""On a GPU: steps that are only enqueued, graphs, draws on the device, start-up. Tokens are the CPU's."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from memserve.config import Role, WorkerConfig
from memserve.errors import MemoryError_
from memserve.messages import Cancel, Decode, SamplingParams, StepOutputs, pack_tokens
from memserve.model_config import KVGeometry, ModelConfig, load_model_config
from memserve.models.carrier import Carrier
from memserve.models.checkpoint import DummySource, tensor_shapes
from memserve.models.transformer import Transformer
from memserve.models.triton_transformer import TritonTransformer
from memserve.models.weights import device_weights_bytes, fill_device_weights, load_weights_to_device
from memserve.pool.arena import Arena
from memserve.pool.mempool import MemPool
from memserve.torch_dtypes import TORCH_DTYPES
from memserve.workers.cuda_graphs import CudaDevice
from memserve.workers.cuda_runner import CudaRunner
from memserve.workers.gpu_model import GpuModel, largest_step, max_rows
from memserve.workers.request import Request
from memserve.workers.runner import ModelRunner
from memserve.workers.steps import Chunk, Runner
from memserve.workers.worker import Worker

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU here"),
]

DEVICE = "cuda:0"
CPU = torch.device("cpu")
BLOCK_SIZE = 16
MAX_MODEL_LEN = 256
MAX_RUNNING = 9
FEW_BLOCKS = 20
MIB = 1 << 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model of weights so large that every token of context matters."""
    made = tmp_path_factory.mktemp("gpu") / "model"
    made.mkdir()
    config = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "torch_dtype": "float32",
    }
    (made / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randn(shape, generator=generator) * (0.2 if len(shape) > 1 else 1.0)
        for name, shape in tensor_shapes(load_model_config(made)).items()
    }
    save_file(tensors, made / "model.safetensors")
    return made


@pytest.fixture(scope="module")
def model(folder: Path) -> ModelConfig:
    return load_model_config(folder)


def triton_of(folder: Path, model: ModelConfig, dtype: str = "float32") -> TritonTransformer:
    device = torch.device(DEVICE)
    weights = load_weights_to_device(model, folder, dtype, device, "auto", 0, lambda fraction: None)
    return TritonTransformer(model, weights, MAX_MODEL_LEN, device, TORCH_DTYPES[dtype])


def make_config(model: ModelConfig, **changes: Any) -> WorkerConfig:
    config = WorkerConfig(
        instance="colocated-0",
        role=Role.COLOCATED,
        model_path="",
        model=model,
        device=DEVICE,
        dtype="float32",
        load_format="auto",
        seed=0,
        block_size=BLOCK_SIZE,
        num_blocks=None,
        device_memory_fraction=0.05,
        max_model_len=MAX_MODEL_LEN,
        max_batch_tokens=80,
        max_running=MAX_RUNNING,
        max_step_ms=None,
        threads=1,
        caches=False,
    )
    return msgspec.structs.replace(config, **changes)


SAMPLINGS: Sequence[dict[str, Any]] = (
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 1.1, "top_p": 0.9, "top_k": 40, "min_p": 0.01},
    {"temperature": 0.9, "top_p": 0.7, "stop_token_ids": tuple(range(0, 320, 9))},
    {"temperature": 1.0, "presence_penalty": 0.5, "logprobs": 2},
)


def requests(model: ModelConfig) -> list[Decode]:
    rng = np.random.default_rng(2)
    made = []
    for index in range(10):
        length = (1, 15, 16, 17, 100)[index % 5]
        tokens = pack_tokens(rng.integers(0, model.vocab_size, length).astype(np.int32))
        sampling = SamplingParams(max_tokens=24, seed=index, **SAMPLINGS[index % len(SAMPLINGS)])
        made.append(Decode(f"r{index}", 0, tokens, length, sampling))
    return made


class Lists:
    """A channel and a source of grants without sockets."""

    def __init__(self) -> None:
        self.inbox: list[Any] = []
        self.sent: list[Any] = []

    def receive(self) -> list[Any]:
        received, self.inbox = self.inbox, []
        return received

    def send(self, message: Any) -> None:
        self.sent.append(message)


def run(
    model: ModelConfig, device: str, num_blocks: int, runner_of: Callable[[torch.Tensor], Runner]
) -> tuple[dict[str, list[int]], int]:
    """Tokens by request, and the number of preemptions. Requests come one by one, or all at once where blocks
    are few, so that they crowd each other out; one is cancelled.
    """
    arena = Arena.on_device(KVGeometry.of(model, BLOCK_SIZE, "float32"), num_blocks, torch.device(device))
    pool, channel = MemPool(arena, "colocated-0", 0, lambda: None), Lists()
    worker = Worker(make_config(model, num_blocks=num_blocks), channel, Lists(), pool, runner_of(pool.kv))
    for request in requests(model):
        channel.inbox.append(request)
        if num_blocks > FEW_BLOCKS:
            worker.step()
    channel.inbox.append(Cancel("r1", 0))
    while worker.step():
        pass
    pool.assert_idle()
    pool.close()
    drawn: dict[str, list[int]] = {}
    for message in channel.sent:
        assert isinstance(message, StepOutputs), message
        for output in message.outputs:
            drawn.setdefault(output.request_id, []).extend(output.token_ids)
    drawn.pop("r1", None)
    return drawn, worker.gauges.load().num_preemptions


@pytest.fixture(scope="module")
def expected(folder: Path, model: ModelConfig) -> dict[str, list[int]]:
    """What the requests say on a CPU, step by step."""
    weights = load_weights_to_device(model, folder, "float32", CPU, "auto", 0, lambda fraction: None)
    transformer = Transformer(model, weights, MAX_MODEL_LEN, CPU, torch.float32)
    drawn, _ = run(model, "cpu", 96, lambda kv: ModelRunner(transformer, kv, BLOCK_SIZE))
    assert len(drawn) == 9 and {len(tokens) for tokens in drawn.values()} > {24}
    return drawn


@pytest.mark.parametrize("num_blocks", [96, FEW_BLOCKS])
@pytest.mark.parametrize("graphs", [False, True])
def test_overlapped_steps_say_what_a_cpu_says(
    folder: Path, model: ModelConfig, expected: dict[str, list[int]], graphs: bool, num_blocks: int
) -> None:
    transformer = triton_of(folder, model)

    def runner_of(kv: torch.Tensor) -> CudaRunner:
        runner = CudaRunner(transformer, kv, BLOCK_SIZE, MAX_RUNNING + 1, CudaDevice(torch.device(DEVICE)))
        if graphs:
            runner.capture(MAX_RUNNING, MAX_MODEL_LEN)
        return runner

    drawn, num_preemptions = run(model, DEVICE, num_blocks, runner_of)
    assert drawn == expected and (num_preemptions > 0) == (num_blocks == FEW_BLOCKS)


def arena_of(model: ModelConfig, num_blocks: int, dtype: str) -> torch.Tensor:
    arena = Arena.on_device(KVGeometry.of(model, BLOCK_SIZE, dtype), num_blocks, torch.device(DEVICE))
    return arena.kv


def decodes(model: ModelConfig, count: int, context: int, temperature: float = 0.0) -> list[Chunk]:
    """Requests with `context` tokens computed, each of blocks of its own."""
    chunks, width = [], context // BLOCK_SIZE + 1
    for index in range(count):
        tokens = np.random.default_rng(index).integers(0, model.vocab_size, context + 1).astype(np.int32)
        sampling = SamplingParams(max_tokens=64, seed=index, temperature=temperature)
        request = Request.of(
            Decode(f"r{index}", 0, pack_tokens(tokens), context + 1, sampling), arrival=index
        )
        request.num_computed_tokens = context
        request.table.append(np.arange(index * width, (index + 1) * width, dtype=np.int64))
        chunks.append(Chunk(request, 1))
    return chunks


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_graph_gives_the_logits_of_the_kernels(folder: Path, model: ModelConfig, dtype: str) -> None:
    """Of every batch size, padded or not, and over other requests than were captured."""
    transformer = triton_of(folder, model, dtype)
    kv = arena_of(model, 64, dtype)
    device = CudaDevice(torch.device(DEVICE))
    plain, replayed = (CudaRunner(transformer, kv, BLOCK_SIZE, MAX_RUNNING, device) for _ in range(2))
    kv.normal_()
    before = kv.clone()
    replayed.capture(MAX_RUNNING, MAX_MODEL_LEN)
    assert torch.equal(kv, before)  # padding stores nothing
    for count in range(1, MAX_RUNNING + 1):
        chunks = decodes(model, count, 80 + count)
        expected = plain.execute(chunks)
        assert replayed.execute(chunks) == expected
        graphs = replayed._graphs
        assert graphs is not None
        graph = graphs.find(count)
        assert graph is not None and graph.logits[:count].isfinite().all()


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature")
def test_nothing_in_a_step_waits_for_the_device(folder: Path, model: ModelConfig) -> None:
    """Torch itself tells of every wait: prefills, decodes, graphs, greedy and drawn, pending tokens too."""
    transformer = triton_of(folder, model)
    kv = arena_of(model, 64, "float32")
    runner = CudaRunner(transformer, kv, BLOCK_SIZE, MAX_RUNNING, CudaDevice(torch.device(DEVICE)))
    runner.capture(MAX_RUNNING, MAX_MODEL_LEN)

    def steps() -> None:
        chunks = decodes(model, 4, 40, temperature=1.0)
        first = runner.begin(chunks)
        for request, _ in chunks:
            request.num_computed_tokens += 1
            request.expect(MAX_MODEL_LEN)
        second = runner.begin(chunks)
        third = runner.begin([Chunk(decodes(model, 5, 40)[4].request, 1), *_prefill(model)])
        pending.extend((first, second, third))

    pending: list[Any] = []
    steps()  # whatever is made lazily
    for step in pending:
        step.result()
    pending.clear()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        steps()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(result.error is None for step in pending for result in step.result())


def _prefill(model: ModelConfig) -> list[Chunk]:
    (chunk,) = decodes(model, 1, 47)
    chunk.request.num_computed_tokens = 0
    return [Chunk(chunk.request, 48)]


def test_files_and_dummies_reach_the_device_as_they_are(folder: Path, model: ModelConfig) -> None:
    tensor = torch.randn(1000, 333, generator=torch.Generator().manual_seed(0))
    for num_bytes in (1 << 10, 12345 * 4, 64 << 20):
        assert torch.equal(Carrier(torch.device(DEVICE), num_bytes).carry(tensor).cpu(), tensor)
    name, shape = "model.layers.0.mlp.up_proj.weight", (96, 64)
    expected = DummySource(3).read(name, shape)
    assert torch.equal(DummySource(3, torch.device(DEVICE)).read(name, shape).cpu(), expected)
    for load_format in ("auto", "dummy"):
        buffers = []
        for device in (CPU, torch.device(DEVICE)):
            size = device_weights_bytes(model, "bfloat16")
            buffer = torch.zeros(size, dtype=torch.uint8, device=device)
            fill_device_weights(model, folder, "bfloat16", load_format, 3, buffer, lambda fraction: None)
            buffers.append(buffer.cpu())
        assert torch.equal(*buffers)


def test_the_pool_leaves_room_for_the_largest_step(folder: Path, model: ModelConfig) -> None:
    device = torch.device(DEVICE)
    weights = load_weights_to_device(model, folder, "float32", device, "auto", 0, lambda fraction: None)
    config = make_config(model, max_batch_tokens=2048, max_running=64)
    geometry = KVGeometry.of(model, BLOCK_SIZE, "float32")
    gpu_model = GpuModel(config, weights, device)
    # 1. The pool is a part of what is free, beside a step.
    num_blocks = gpu_model.num_blocks(geometry)
    free_bytes, _ = torch.cuda.mem_get_info(device)
    assert 0.03 * free_bytes < num_blocks * geometry.block_bytes < 0.05 * free_bytes
    # 2. With it, the largest step takes no more than was measured.
    step_bytes = gpu_model._profile(geometry)
    kv = torch.zeros((1, *arena_of(model, 1, "float32").shape[1:]), device=device)
    runner = CudaRunner(gpu_model._transformer, kv, BLOCK_SIZE, max_rows(config), CudaDevice(device))
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved(device)
    torch.cuda.reset_peak_memory_stats(device)
    for asks_more in (False, True):
        drawn = runner.execute(largest_step(config, asks_more=asks_more))
        assert all(result.error is None for result in drawn)
    assert torch.cuda.max_memory_reserved(device) - before <= step_bytes + 64 * MIB
    # 3. What cannot fit is refused in words.
    large = msgspec.structs.replace(config, num_blocks=free_bytes // geometry.block_bytes)
    with pytest.raises(MemoryError_, match="missing"):
        GpuModel(large, weights, device).num_blocks(geometry)
