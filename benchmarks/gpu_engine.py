"""The engine's own speed on one GPU, against what the GPU can do and against `transformers`, in one run.

    python benchmarks/gpu_engine.py                          # Llama-3-8B's shapes, bf16, dummy weights
    python benchmarks/gpu_engine.py --json out.json --no-reference --no-graphs
    TRITON_INTERPRET=1 python benchmarks/gpu_engine.py --rehearse     # tiny, on a CPU: checks the script only

Measured, each the median of `--repeats` rounds:

* copy: a device-to-device copy, bytes read and written a second: the bandwidth that all bounds go by
* matmul: a large bf16 product, operations a second
* decode, batch 1 and batch 64 with 2k of context: ms a step; its bound is what a step must read (weights and
  KV, once) at the bandwidth
* prefill of 8k tokens: ms; its bound is what it must multiply (matrices, causal attention) at the rate

The worker's loop runs as in a server, over a channel without sockets: scheduling, overlap, graphs, sampling.
The reference is `generate` of transformers on the same shapes (its prefill subtracted) and its bare forward.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

from memserve.config import Role, WorkerConfig
from memserve.messages import Cancel, Decode, SamplingParams, StepOutputs, pack_tokens
from memserve.model_config import KVGeometry, ModelConfig, RopeConfig, blocks_for
from memserve.models.triton_transformer import TritonTransformer
from memserve.models.weights import load_weights_to_device
from memserve.pool.arena import Arena
from memserve.pool.mempool import MemPool
from memserve.torch_dtypes import TORCH_DTYPES
from memserve.workers.cuda_graphs import CudaDevice
from memserve.workers.cuda_runner import CudaRunner
from memserve.workers.worker import Worker

LLAMA_3_8B = ModelConfig(
    architecture="LlamaForCausalLM",
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    rms_norm_eps=1e-5,
    rope=RopeConfig(theta=500000.0),
    tie_word_embeddings=False,
    qkv_bias=False,
    o_bias=False,
    mlp_bias=False,
    qk_norm=False,
    sliding_window=(None,) * 32,
    max_position_embeddings=8192,
    dtype="bfloat16",
    eos_token_ids=(),
    bos_token_id=None,
)
TINY = msgspec.structs.replace(
    LLAMA_3_8B,
    vocab_size=512,
    hidden_size=64,
    intermediate_size=96,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    sliding_window=(None,) * 2,
)
BLOCK_SIZE = 16


@dataclass(frozen=True, slots=True)
class Sizes:
    """What is run: batch and context of the decodes, tokens of the prefill."""

    batch: int
    context: int
    prefill: int
    steps: int


FULL = Sizes(batch=64, context=2048, prefill=8192, steps=64)
REHEARSAL = Sizes(batch=3, context=20, prefill=40, steps=3)


@dataclass(frozen=True, slots=True)
class Row:
    """One line: ours and the reference's in ms, the bound in ms, and the share of it that is aimed at."""

    name: str
    ours_ms: float
    bound_ms: float
    reference_ms: float | None
    floor: float

    @property
    def share(self) -> float:
        return self.bound_ms / self.ours_ms

    def print(self) -> None:
        reference = "" if self.reference_ms is None else f"{self.reference_ms:.2f}"
        gain = "" if self.reference_ms is None else f"{self.reference_ms / self.ours_ms:.2f}x"
        verdict = "ok" if self.share >= self.floor else "MISSED"
        print(
            f"{self.name:<26}{self.ours_ms:>10.2f}{self.bound_ms:>10.2f}{self.share:>8.0%}"
            f"{self.floor:>8.0%}{reference:>14}{gain:>8}   {verdict}"
        )


class Clock:
    """Times work on the device: from an idle device to an idle device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def ms(self, work: Callable[[], object]) -> float:
        self.synchronize()
        began_at = time.perf_counter()
        work()
        self.synchronize()
        return (time.perf_counter() - began_at) * 1e3

    def median_ms(self, work: Callable[[], object], repeats: int) -> float:
        work()
        return statistics.median(self.ms(work) for _ in range(repeats))


def copy_bandwidth(device: torch.device, clock: Clock, num_bytes: int, repeats: int) -> float:
    """Bytes a ms, read and written."""
    source = torch.randint(0, 256, (num_bytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * num_bytes / clock.median_ms(lambda: target.copy_(source), repeats)


def matmul_rate(device: torch.device, clock: Clock, size: int, repeats: int) -> float:
    """Operations a ms of a bf16 product of random matrices: zeros would run faster."""
    a, b = (torch.randn((size, size), device=device, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * size**3 / clock.median_ms(lambda: torch.mm(a, b, out=out), repeats)


def matrix_elements(model: ModelConfig) -> int:
    """Of all layers; the head is apart."""
    q, kv = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    layer = model.hidden_size * (2 * q + 2 * kv + 3 * model.intermediate_size)
    return layer * model.num_layers


def decode_bytes(model: ModelConfig, batch: int, context: int) -> int:
    """What a step must read: each matrix once, the head, and every sequence's KV."""
    head = model.vocab_size * model.hidden_size
    kv = model.num_layers * 2 * model.num_kv_heads * model.head_dim * context
    return 2 * (matrix_elements(model) + head + batch * kv)


def prefill_operations(model: ModelConfig, num_tokens: int) -> int:
    """Matrices for each token, the head for one, and attention to what came before."""
    head = model.vocab_size * model.hidden_size
    pairs = num_tokens * (num_tokens + 1) // 2
    attention = 4 * pairs * model.num_heads * model.head_dim * model.num_layers
    return 2 * (matrix_elements(model) * num_tokens + head) + attention


class Lists:
    """A channel and a source of grants without sockets."""

    def __init__(self) -> None:
        self.inbox: list[Any] = []
        self.num_tokens = 0
        self.heard: set[str] = set()

    def receive(self) -> list[Any]:
        received, self.inbox = self.inbox, []
        return received

    def send(self, message: object) -> None:
        assert isinstance(message, StepOutputs), message
        self.num_tokens += len(message.outputs)
        self.heard.update(output.request_id for output in message.outputs)


class _Rehearsal:
    """In the place of `CudaDevice`, on a CPU: done at once, and replayed by doing it again."""

    def host_buffer(self, num_elements: int) -> torch.Tensor:
        return torch.zeros(num_elements, dtype=torch.int64)

    def mark(self) -> _Rehearsal:
        return self

    def wait(self) -> None:
        pass

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        work()
        return work


class Engine:
    """A colocated worker over a pool of its own."""

    def __init__(
        self, model: ModelConfig, sizes: Sizes, repeats: int, device: torch.device, *, graphs: bool
    ) -> None:
        weights = load_weights_to_device(
            model, Path(), model.dtype, device, "dummy", 0, lambda fraction: None
        )
        # Those prefilled first decode while the others are prefilled.
        most = sizes.context + sizes.steps * repeats + 2 * sizes.batch
        longest = max(sizes.prefill + 1, most) + BLOCK_SIZE
        num_blocks = sizes.batch * (blocks_for(most, BLOCK_SIZE) + 1) + blocks_for(longest, BLOCK_SIZE)
        self._model = model
        self._rng = np.random.default_rng(0)
        self._num_sent = 0
        config = WorkerConfig(
            instance="colocated-0",
            role=Role.COLOCATED,
            model_path="",
            model=model,
            device=str(device),
            dtype=model.dtype,
            load_format="dummy",
            seed=0,
            block_size=BLOCK_SIZE,
            num_blocks=num_blocks,
            device_memory_fraction=None,
            max_model_len=longest,
            max_batch_tokens=max(sizes.prefill, sizes.batch + BLOCK_SIZE),
            max_running=sizes.batch,
            max_step_ms=None,
            threads=1,
            caches=False,
        )
        transformer = TritonTransformer(model, weights, longest, device, TORCH_DTYPES[model.dtype])
        arena = Arena.on_device(KVGeometry.of(model, BLOCK_SIZE, model.dtype), num_blocks, device)
        self._channel, self._pool = Lists(), MemPool(arena, config.instance, 0, lambda: None)
        real = CudaDevice(device) if device.type == "cuda" else _Rehearsal()
        runner = CudaRunner(transformer, self._pool.kv, BLOCK_SIZE, sizes.batch + 1, real)
        if graphs:
            runner.capture(sizes.batch, longest)
        self._worker = Worker(config, self._channel, Lists(), self._pool, runner)

    def _send(self, num_tokens: int, max_tokens: int) -> str:
        self._num_sent += 1
        token_ids = self._rng.integers(0, self._model.vocab_size, num_tokens).astype(np.int32)
        sampling = SamplingParams(max_tokens=max_tokens, seed=self._num_sent, temperature=0.0)
        name = f"r{self._num_sent}"
        self._channel.inbox.append(Decode(name, 0, pack_tokens(token_ids), num_tokens, sampling))
        return name

    def _until_idle(self) -> None:
        while self._worker.step():
            pass

    def decode_ms(self, batch: int, context: int, steps: int, repeats: int, clock: Clock) -> float:
        """ms a step of `batch` requests that have `context` tokens about halfway through."""
        names = [self._send(context - steps * repeats // 2, 10**6) for _ in range(batch)]
        while not self._channel.heard.issuperset(names):
            self._worker.step()
        self._worker.step()  # every step from now on is of decodes alone
        found = []
        for _ in range(repeats):
            before = self._channel.num_tokens

            def run() -> None:
                for _ in range(steps):
                    self._worker.step()

            found.append(clock.ms(run) / steps)
            assert self._channel.num_tokens == before + batch * steps, "not all requests decode"
        self._channel.inbox += [Cancel(name, 0) for name in names]
        self._until_idle()
        return statistics.median(found)

    def prefill_ms(self, num_tokens: int, repeats: int, clock: Clock) -> float:
        """ms from a request to its first token."""

        def run() -> None:
            self._send(num_tokens, 1)
            self._until_idle()

        return clock.median_ms(run, repeats)

    def close(self) -> None:
        self._worker.close()
        self._pool.close()


class Reference:
    """transformers, on random weights of the same shapes."""

    def __init__(self, model: ModelConfig, device: torch.device) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            vocab_size=model.vocab_size,
            hidden_size=model.hidden_size,
            intermediate_size=model.intermediate_size,
            num_hidden_layers=model.num_layers,
            num_attention_heads=model.num_heads,
            num_key_value_heads=model.num_kv_heads,
            head_dim=model.head_dim,
            max_position_embeddings=model.max_position_embeddings,
            rope_theta=500000.0,
            attn_implementation="sdpa",
            torch_dtype="bfloat16",
        )
        with torch.device(device):
            self._model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
        generation = self._model.generation_config
        generation.eos_token_id, generation.pad_token_id = None, 0
        self._vocab_size, self._device = model.vocab_size, device

    def _ids(self, batch: int, length: int) -> torch.Tensor:
        return torch.randint(0, self._vocab_size, (batch, length), device=self._device)

    @torch.inference_mode()
    def decode_ms(self, batch: int, context: int, steps: int, repeats: int, clock: Clock) -> float:
        """ms a step of `generate`, its prefill subtracted."""
        ids = self._ids(batch, context - steps // 2)

        def generate(num_out: int) -> float:
            return clock.median_ms(
                lambda: self._model.generate(ids, max_new_tokens=num_out, do_sample=False), repeats
            )

        return (generate(1 + steps) - generate(1)) / steps

    @torch.inference_mode()
    def prefill_ms(self, num_tokens: int, repeats: int, clock: Clock) -> float:
        """ms of a forward that gives the last token's logits."""
        ids = self._ids(1, num_tokens)
        return clock.median_ms(lambda: self._model(ids, logits_to_keep=1, use_cache=True), repeats)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--no-reference", action="store_true", help="ours and the bounds alone")
    parser.add_argument("--no-graphs", action="store_true", help="launch every kernel")
    parser.add_argument(
        "--rehearse", action="store_true", help="tiny shapes on a CPU; the figures mean nothing"
    )
    arguments = parser.parse_args()
    if not arguments.rehearse and not torch.cuda.is_available():
        print(
            "gpu_engine: torch finds no GPU here (--rehearse checks the script without one)", file=sys.stderr
        )
        return 2
    device = torch.device("cpu" if arguments.rehearse else "cuda:0")
    sizes, model = (REHEARSAL, TINY) if arguments.rehearse else (FULL, LLAMA_3_8B)
    if arguments.rehearse:
        model = msgspec.structs.replace(model, dtype="float32")
    else:
        torch.cuda.set_device(device)
    clock, repeats = Clock(device), 1 if arguments.rehearse else arguments.repeats

    bandwidth = copy_bandwidth(device, clock, 1 << (12 if arguments.rehearse else 32), repeats)
    rate = matmul_rate(device, clock, 64 if arguments.rehearse else 8192, repeats)
    name = "a CPU" if arguments.rehearse else torch.cuda.get_device_name(device)
    print(
        f"{name}: copy {bandwidth / 1e9:.2f} TB/s, matmul {rate / 1e9:.0f} TFLOP/s, torch {torch.__version__}"
    )

    ours: dict[str, float] = {}
    engine = Engine(model, sizes, repeats, device, graphs=not arguments.no_graphs)
    decodes = {"decode, batch 1": 1, f"decode, batch {sizes.batch}": sizes.batch}
    with torch.inference_mode():
        for label, batch in decodes.items():
            ours[label] = engine.decode_ms(batch, sizes.context, sizes.steps, repeats, clock)
        prefill = f"prefill of {sizes.prefill}"
        ours[prefill] = engine.prefill_ms(sizes.prefill, repeats, clock)
    engine.close()
    del engine
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()

    theirs: dict[str, float] = {}
    if not arguments.no_reference:
        reference = Reference(model, device)
        for label, batch in decodes.items():
            theirs[label] = reference.decode_ms(batch, sizes.context, sizes.steps, repeats, clock)
        theirs[prefill] = reference.prefill_ms(sizes.prefill, repeats, clock)

    rows = [
        Row(
            label,
            ours[label],
            decode_bytes(model, batch, sizes.context) / bandwidth,
            theirs.get(label),
            0.8 if batch == 1 else 0.7,
        )
        for label, batch in decodes.items()
    ]
    bound_ms = prefill_operations(model, sizes.prefill) / rate
    rows.append(Row(prefill, ours[prefill], bound_ms, theirs.get(prefill), 0.55))
    print(f"{'':<26}{'ours ms':>10}{'bound ms':>10}{'share':>8}{'aim':>8}{'transformers':>14}{'gain':>8}")
    for row in rows:
        row.print()
    if arguments.json is not None:
        result = {
            "device": name,
            "torch": torch.__version__,
            "copy_bytes_per_s": bandwidth * 1e3,
            "matmul_flop_per_s": rate * 1e3,
            "graphs": not arguments.no_graphs,
            "repeats": repeats,
            "sizes": asdict(sizes),
            "rows": [{**asdict(row), "share": row.share} for row in rows],
        }
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
