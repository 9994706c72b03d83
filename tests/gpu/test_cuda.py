"""On a GPU: the kernels' generic path against the CPU's in float32, and a worker from Init to Shutdown."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from memserve.config import Role, WorkerConfig
from memserve.kernels import attention_plan
from memserve.kernels.sampling import SamplingRow, sample
from memserve.messages import (
    FRAME_HEADER,
    Decode,
    Heartbeat,
    Init,
    Loading,
    Ready,
    SamplingParams,
    Shutdown,
    StepOutputs,
    ToRouter,
    decode_to_router,
    encode_frame,
    pack_tokens,
)
from memserve.model_config import KVGeometry, ModelConfig, load_model_config
from memserve.models.checkpoint import tensor_shapes
from memserve.models.step import LogitRows, SequenceSlice, build_step
from memserve.models.transformer import Transformer
from memserve.models.weights import load_weights_to_device
from memserve.pool.arena import Arena
from memserve.pool.mempool import MemPool
from memserve.torch_dtypes import TORCH_DTYPES
from memserve.workers.runner import ModelRunner
from memserve.workers.worker import Worker

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU here"),
]

DEVICE = "cuda:0"
CPU = torch.device("cpu")
BLOCK_SIZE = 16
MAX_MODEL_LEN = 256
NONE, LAST, ALL = LogitRows.NONE, LogitRows.LAST, LogitRows.ALL

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"architectures": ["LlamaForCausalLM"]},
    "mha": {"architectures": ["LlamaForCausalLM"], "num_key_value_heads": 8, "head_dim": 80},
    "mistral_window": {"architectures": ["MistralForCausalLM"], "sliding_window": 21},
    "qwen2": {"architectures": ["Qwen2ForCausalLM"]},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"]},
}


def make_folder(folder: Path, changes: dict[str, Any]) -> Path:
    """A small model of weights so large that every token of context matters."""
    config = {
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
        **changes,
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(0)
    shapes = tensor_shapes(load_model_config(folder))
    tensors = {
        name: torch.randn(shape, generator=generator) * (0.2 if len(shape) > 1 else 1.0)
        for name, shape in shapes.items()
    }
    save_file(tensors, folder / "model.safetensors")
    return folder


def load(folder: Path, device: torch.device, dtype: str) -> Transformer:
    model = load_model_config(folder)
    weights = load_weights_to_device(model, folder, dtype, device, "auto", 0, lambda fraction: None)
    return Transformer(model, weights, MAX_MODEL_LEN, device, TORCH_DTYPES[dtype])


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("gpu") / request.param, FAMILIES[request.param])


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("gpu") / "model", FAMILIES["llama"])


def all_logits(transformer: Transformer) -> torch.Tensor:
    """Logits of a few steps of three sequences: whole prompts, chunks with context, decodes, all mixed."""
    model, rng = transformer.model, np.random.default_rng(0)
    tokens = [rng.integers(0, model.vocab_size, 120).astype(np.int32) for _ in range(3)]
    blocks = np.split(rng.permutation(24), 3)
    shape = (24, model.num_layers, 2, model.num_kv_heads, BLOCK_SIZE, model.head_dim)
    kv = torch.full(shape, float("nan"), dtype=transformer.dtype, device=transformer.device)
    done, logits = [0, 0, 0], []
    steps: list[list[tuple[int, int, LogitRows]]] = [
        [(0, 40, ALL)],
        [(1, 3, LAST), (0, 33, ALL), (2, 17, NONE)],
        [(0, 1, LAST), (2, 1, LAST), (1, 60, ALL)],
        [(0, 1, LAST), (1, 1, LAST), (2, 1, LAST)],
        [(2, 100, ALL), (0, 1, LAST)],
    ]
    for step in steps:
        start, pieces = 0, []
        for index, num_new, wanted in step:
            first = done[index]
            done[index] += num_new
            piece = SequenceSlice(start, num_new, first, blocks[index][: -(-done[index] // BLOCK_SIZE)])
            pieces.append((tokens[index][first : done[index]], piece, wanted))
            start += num_new
        built = build_step(pieces, model, BLOCK_SIZE, transformer.device, transformer.dtype)
        with torch.inference_mode():
            logits.append(transformer.forward(built, kv).cpu())
    return torch.cat(logits)


def test_float32_logits_are_the_cpus(folder: Path) -> None:
    expected = all_logits(load(folder, CPU, "float32"))
    found = all_logits(load(folder, torch.device(DEVICE), "float32"))
    assert (found - expected).abs().max() < 2e-3


def test_scores_in_parts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transformer = load(folder, torch.device(DEVICE), "float32")
    expected = all_logits(transformer)
    monkeypatch.setattr(attention_plan, "MAX_SCORE_ELEMENTS", 2000)
    assert (all_logits(transformer) - expected).abs().max() < 2e-3


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_short_types_are_close(folder: Path, dtype: str) -> None:
    expected = all_logits(load(folder, CPU, "float32"))
    found = all_logits(load(folder, torch.device(DEVICE), dtype))
    error = (found - expected).square().mean().sqrt() / expected.std()
    assert error < 0.06


def test_draws_are_the_cpus() -> None:
    logits = torch.randn(6, 1000, generator=torch.Generator().manual_seed(1)) * 3
    plain = {"max_tokens": 1, "logprobs": 2}
    params = [
        SamplingParams(seed=1, temperature=0.0, **plain),
        SamplingParams(seed=2, temperature=0.7, **plain),
        SamplingParams(seed=3, top_k=20, **plain),
        SamplingParams(seed=4, top_p=0.8, **plain),
        SamplingParams(seed=5, min_p=0.1, top_p=0.9, top_k=50, **plain),
        SamplingParams(
            seed=6, repetition_penalty=1.3, frequency_penalty=0.5, logit_bias=((3, 2.0),), **plain
        ),
    ]
    prompt = np.arange(50, dtype=np.int32)
    rows = [SamplingRow(each, 50 + index, prompt, [1, 2, 3]) for index, each in enumerate(params)]
    expected, found = sample(logits, rows), sample(logits.to(DEVICE), rows)
    assert found.token_ids == expected.token_ids and not found.bad_rows
    for ours, theirs in zip(found.logprobs, expected.logprobs, strict=True):
        assert ours is not None and theirs is not None
        assert ours.rank == theirs.rank and ours.logprob == pytest.approx(theirs.logprob, abs=1e-4)


# --- a worker ---


def make_config(folder: Path, model: ModelConfig, num_blocks: int | None) -> WorkerConfig:
    return WorkerConfig(
        instance="colocated-0",
        role=Role.COLOCATED,
        model_path=str(folder),
        model=model,
        device=DEVICE,
        dtype="float32",
        load_format="auto",
        seed=0,
        block_size=BLOCK_SIZE,
        num_blocks=num_blocks,
        device_memory_fraction=0.1,
        max_model_len=MAX_MODEL_LEN,
        max_batch_tokens=80,
        max_running=8,
        max_step_ms=None,
        threads=1,
    )


def requests(model: ModelConfig) -> list[Decode]:
    """Greedy and seeded, of various lengths."""
    rng = np.random.default_rng(2)
    made = []
    for index, length in enumerate((1, 15, 16, 40, 100)):
        tokens = pack_tokens(rng.integers(0, model.vocab_size, length).astype(np.int32))
        sampling = SamplingParams(max_tokens=24, seed=index, temperature=0.0 if index % 2 else 1.0)
        made.append(Decode(f"r{index}", 0, tokens, length, sampling))
    return made


def tokens_of(messages: Sequence[ToRouter]) -> dict[str, list[int]]:
    drawn: dict[str, list[int]] = {}
    for message in messages:
        assert isinstance(message, StepOutputs), message
        for output in message.outputs:
            drawn.setdefault(output.request_id, []).extend(output.token_ids)
    return drawn


class Lists:
    """A channel and a source of grants without sockets."""

    def __init__(self) -> None:
        self.inbox: list[Any] = []
        self.sent: list[ToRouter] = []

    def receive(self) -> list[Any]:
        received, self.inbox = self.inbox, []
        return received

    def send(self, message: ToRouter) -> None:
        self.sent.append(message)


def run_in_process(folder: Path, device: torch.device, num_blocks: int) -> tuple[dict[str, list[int]], int]:
    """Tokens by request, and the number of preemptions."""
    transformer = load(folder, device, "float32")
    model = transformer.model
    arena = Arena.on_device(KVGeometry.of(model, BLOCK_SIZE, "float32"), num_blocks, device)
    pool, channel = MemPool(arena, "colocated-0", 0, lambda: None), Lists()
    runner = ModelRunner(transformer, pool.kv, BLOCK_SIZE)
    worker = Worker(make_config(folder, model, num_blocks), channel, Lists(), pool, runner)
    channel.inbox = list(requests(model))
    while worker.step():
        pass
    pool.assert_idle()
    pool.close()
    return tokens_of(channel.sent), worker.gauges.load().num_preemptions


@pytest.fixture(scope="module")
def expected(llama: Path) -> dict[str, list[int]]:
    """What the requests say on a CPU."""
    drawn, _ = run_in_process(llama, CPU, 64)
    assert len(drawn) == 5 and all(len(tokens) == 24 for tokens in drawn.values())
    return drawn


def test_a_colocated_worker_says_what_a_cpu_says(llama: Path, expected: dict[str, list[int]]) -> None:
    assert run_in_process(llama, torch.device(DEVICE), 64) == (expected, 0)


def test_after_preemption(llama: Path, expected: dict[str, list[int]]) -> None:
    drawn, num_preemptions = run_in_process(llama, torch.device(DEVICE), 18)
    assert drawn == expected and num_preemptions > 0


class Process:
    """A worker process and the router's end of its sockets."""

    def __init__(self) -> None:
        self.control, control_end = socket.socketpair()
        self.grants, grants_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        fds = (control_end.fileno(), grants_end.fileno())
        command = [sys.executable, "-m", "memserve.workers.process", "--title", "memserve: test"]
        command += ["--control-fd", str(fds[0]), "--grants-fd", str(fds[1])]
        self.popen = subprocess.Popen(command, pass_fds=fds, start_new_session=True)
        control_end.close()
        grants_end.close()
        self.control.settimeout(100.0)

    def receive(self) -> ToRouter:
        """The next message that is no heartbeat or progress."""
        while True:
            num_bytes, _ = FRAME_HEADER.unpack(self._read(FRAME_HEADER.size))
            message = decode_to_router(self._read(num_bytes))
            if not isinstance(message, Heartbeat | Loading):
                return message

    def _read(self, num_bytes: int) -> bytes:
        data = b""
        while len(data) < num_bytes:
            piece = self.control.recv(num_bytes - len(data))
            assert piece, "the worker ended"
            data += piece
        return data

    def close(self) -> None:
        self.popen.kill()
        self.popen.wait()
        self.control.close()
        self.grants.close()


def test_a_worker_process_from_init_to_shutdown(llama: Path, expected: dict[str, list[int]]) -> None:
    model = load_model_config(llama)
    process = Process()
    try:
        # 1. It sizes its pool by what is free on the GPU.
        process.control.sendall(encode_frame(Init(make_config(llama, model, None), 0), 0))
        ready = process.receive()
        assert isinstance(ready, Ready), ready
        assert ready.device == DEVICE and ready.num_blocks * BLOCK_SIZE >= MAX_MODEL_LEN
        # 2. It says what a CPU says.
        for request in requests(model):
            process.control.sendall(encode_frame(request, 0))
        messages: list[ToRouter] = []
        while sum(map(len, tokens_of(messages).values())) < 5 * 24:
            messages.append(process.receive())
        assert tokens_of(messages) == expected
        last = messages[-1]
        assert isinstance(last, StepOutputs) and last.load.num_active_blocks == 0
        assert last.load.num_free_blocks + last.load.num_historical_blocks == ready.num_blocks
        # 3. It ends.
        process.control.sendall(encode_frame(Shutdown(), 0))
        assert process.popen.wait(60) == 0
    finally:
        process.close()
