"""Each Triton kernel against its bound on the GPU at hand: device copy bandwidth, or the bf16 matmul rate.

    python benchmarks/kernels.py                      # the ceilings, then every kernel, Llama-3-8B shapes
    python benchmarks/kernels.py --only decode        # lines whose name has this in it
    python benchmarks/kernels.py --model              # also whole steps of a random Llama-3-8B
    python benchmarks/kernels.py --json out.json

The two ceilings are measured first, on random data: a large copy (bytes read plus bytes written) and a large
matrix product. A kernel's bound is the larger of its fewest bytes over the one and its operations over the
other; what is printed is bound / measured time. Times are medians between CUDA events, the L2 cache flushed
before each run. The arena has 32 layers, so that blocks lie as far apart as in a server. Numbers are the
GPU's: run nothing else meanwhile. `tune_kernels.py` beside this finds tile shapes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

HEADS, KV_HEADS, HEAD_DIM, BLOCK_SIZE, LAYERS, LAYER = 32, 8, 128, 16, 32, 7
HIDDEN, INNER, VOCAB = 4096, 14336, 128256
DTYPE, ELEMENT = torch.bfloat16, 2


@dataclass(frozen=True, slots=True)
class Ceilings:
    """What the GPU reaches: bytes/s of a copy, to pinned memory, and operations/s of a bf16 product."""

    copy: float
    to_host: float
    matmul: float


@dataclass(frozen=True, slots=True)
class Case:
    """One line: fewest bytes and operations, and the call. `is_host`: bound by the way to the host."""

    name: str
    num_bytes: float
    num_operations: float
    run: Callable[[], object]
    is_host: bool = False


@dataclass(frozen=True, slots=True)
class Result:
    """Milliseconds, and the bound's share of them."""

    name: str
    ms: float
    bound_ms: float
    fraction: float


def median_ms(run: Callable[[], object], rep: int = 200) -> float:
    from triton.testing import do_bench

    return float(do_bench(run, warmup=50, rep=rep, return_mode="median"))


def measure_ceilings() -> Ceilings:
    return Ceilings(*_copy_rates(), _matmul_rate())


def _copy_rates() -> tuple[float, float]:
    """Bytes/s on the device, read plus written, and from the device to pinned memory."""
    source = torch.randint(0, 255, (1 << 32,), dtype=torch.uint8, device="cuda")
    target, pinned = torch.empty_like(source), torch.empty(1 << 30, dtype=torch.uint8, pin_memory=True)
    copy = 2 * source.numel() / median_ms(lambda: target.copy_(source)) * 1e3
    part = source[: pinned.numel()]
    return copy, pinned.numel() / median_ms(lambda: pinned.copy_(part, non_blocking=True)) * 1e3


def _matmul_rate() -> float:
    a, b = randn(8192, 8192), randn(8192, 8192)
    return 2 * 8192**3 / median_ms(lambda: a @ b) * 1e3


def measure(case: Case, ceilings: Ceilings) -> Result:
    bandwidth = ceilings.to_host if case.is_host else ceilings.copy
    bound_ms = max(case.num_bytes / bandwidth, case.num_operations / ceilings.matmul) * 1e3
    ms = median_ms(case.run)
    return Result(case.name, ms, bound_ms, bound_ms / ms)


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device="cuda", dtype=DTYPE)


class Paged:
    """An arena and scattered block tables of sequences of these lengths."""

    def __init__(self, kv: torch.Tensor, lengths: list[int]) -> None:
        counts = [-(-length // BLOCK_SIZE) for length in lengths]
        order = torch.randperm(len(kv), device="cuda")[: sum(counts)].int()
        self.tables = torch.zeros((len(lengths), max(counts)), dtype=torch.int32, device="cuda")
        for row, blocks in enumerate(order.split(counts)):
            self.tables[row, : len(blocks)] = blocks
        self.lens = torch.tensor(lengths, dtype=torch.int32, device="cuda")
        self.kv, self.longest, self.num_keys = kv, max(lengths), sum(lengths)


def make_arena(num_tokens: int) -> torch.Tensor:
    shape = (num_tokens // BLOCK_SIZE, LAYERS, 2, KV_HEADS, BLOCK_SIZE, HEAD_DIM)
    return torch.empty(shape, device="cuda", dtype=DTYPE).normal_()


def decode_case(name: str, kv: torch.Tensor, lengths: list[int], tuning: Any) -> Case:
    from memserve.kernels.triton.decode_attention import decode_attention

    paged, batch = Paged(kv, lengths), len(lengths)
    q, out = randn(batch, HEADS, HEAD_DIM), randn(batch, HEADS, HEAD_DIM)
    num_bytes = ELEMENT * (paged.num_keys * 2 * KV_HEADS * HEAD_DIM + 2 * q.numel())
    args = (q, kv, LAYER, paged.tables, None, paged.lens, HEAD_DIM**-0.5, None, paged.longest, tuning, out)
    return Case(name, num_bytes, 4 * HEADS * HEAD_DIM * paged.num_keys, lambda: decode_attention(*args))


def prefill_case(name: str, kv: torch.Tensor, chunks: list[tuple[int, int]], tuning: Any) -> Case:
    """Chunks of (context, new) tokens."""
    from memserve.kernels.triton.prefill_attention import prefill_attention

    paged = Paged(kv, [context + new for context, new in chunks])
    starts = [0, *itertools.accumulate(new for _, new in chunks)]
    query_starts = torch.tensor(starts, dtype=torch.int32, device="cuda")
    q, out = randn(starts[-1], HEADS, HEAD_DIM), randn(starts[-1], HEADS, HEAD_DIM)
    pairs = sum(new * context + new * (new + 1) / 2 for context, new in chunks)
    num_bytes = ELEMENT * (paged.num_keys * 2 * KV_HEADS * HEAD_DIM + 2 * q.numel())
    args = (
        q,
        kv,
        LAYER,
        paged.tables,
        query_starts,
        paged.lens,
        HEAD_DIM**-0.5,
        None,
        tuning,
        out,
        starts[-1],
    )
    return Case(name, num_bytes, 4 * HEADS * HEAD_DIM * pairs, lambda: prefill_attention(*args))


def attention_cases(kv: torch.Tensor, tuning: Any) -> Iterator[Case]:
    mixed = [256 * (1 + index % 16) for index in range(64)]
    for name, lengths in (
        ("1 x 2k", [2048]),
        ("1 x 32k", [32768]),
        ("8 x 4k", [4096] * 8),
        ("64 x 2k", [2048] * 64),
        ("64 x 4k", [4096] * 64),
        ("64 mixed to 4k", mixed),
    ):
        yield decode_case(f"decode attention {name}", kv, lengths, tuning)
    for name, chunks in (
        ("1 x 8k", [(0, 8192)]),
        ("4 x 2k", [(0, 2048)] * 4),
        ("2k after 6k", [(6144, 2048)]),
        ("64 x 32 after 2k", [(2048, 32)] * 64),
    ):
        yield prefill_case(f"prefill attention {name}", kv, chunks, tuning)


def elementwise_cases(kv: torch.Tensor) -> Iterator[Case]:
    from memserve.kernels.rotary import rotation_table
    from memserve.kernels.triton.activation import silu_and_mul
    from memserve.kernels.triton.kv_store import rotate_and_store
    from memserve.kernels.triton.norm import add_rms_norm_, rms_norm
    from memserve.model_config import RopeConfig

    weight = randn(HIDDEN)
    rotations = rotation_table(RopeConfig(), HEAD_DIM, 8192, torch.device("cuda"))
    for rows in (64, 8192):
        x, residual, gate_up = randn(rows, HIDDEN), randn(rows, HIDDEN), randn(rows, 2 * INNER)
        size = ELEMENT * x.numel()
        yield Case(f"rms_norm {rows}", 2 * size, 0, lambda x=x: rms_norm(x, weight, 1e-5))
        yield Case(
            f"add_rms_norm {rows}",
            4 * size,
            0,
            lambda x=x, residual=residual: add_rms_norm_(x, residual, weight, 1e-5),
        )
        num_bytes = ELEMENT * 3 * rows * INNER
        yield Case(f"silu_and_mul {rows}", num_bytes, 0, lambda gate_up=gate_up: silu_and_mul(gate_up))
        qkv = randn(rows, HEADS + 2 * KV_HEADS, HEAD_DIM)
        positions = torch.arange(rows, device="cuda") % 8192
        slots = torch.randperm(len(kv) * BLOCK_SIZE, device="cuda")[:rows]
        tails = torch.zeros(rows, dtype=torch.int32, device="cuda")
        args = (qkv, None, rotations, positions, slots, tails, kv, LAYER, HEADS, 1e-5)
        num_bytes = ELEMENT * 2 * qkv.numel()
        yield Case(f"rotate_and_store {rows}", num_bytes, 0, lambda args=args: rotate_and_store(*args))


def copy_cases(kv: torch.Tensor) -> Iterator[Case]:
    from memserve.kernels.triton.copy_blocks import BlockMemory, BlockPart, copy_blocks

    count = 512
    memory = BlockMemory.of(kv)
    ids = torch.randperm(len(kv), device="cuda")[: 2 * count]
    sources, targets = ids[:count].contiguous(), ids[count:].contiguous()
    part = BlockPart.of_layers(range(LAYER, LAYER + 1), LAYERS, memory.block_bytes)
    run = torch.arange(count, device="cuda")
    host = torch.empty((64, *kv.shape[1:]), dtype=DTYPE, pin_memory=True)
    few = run[:64].contiguous()
    whole = 2 * count * memory.block_bytes
    yield Case("copy_blocks scattered", whole, 0, lambda: copy_blocks(memory, memory, sources, targets))
    yield Case("copy_blocks in a run", whole, 0, lambda: copy_blocks(memory, memory, run, run + count))
    one = 2 * count * part.num_bytes
    yield Case("copy_blocks one layer", one, 0, lambda: copy_blocks(memory, memory, sources, targets, part))
    to_host = BlockMemory.of(host)
    yield Case(
        "copy_blocks to the host", host.nbytes, 0, lambda: copy_blocks(memory, to_host, few, few), True
    )
    yield Case(
        "copy_blocks from the host", host.nbytes, 0, lambda: copy_blocks(to_host, memory, few, few), True
    )


def sampling_cases() -> Iterator[Case]:
    from memserve.kernels.triton.sampling import DrawParams, draw

    for rows in (1, 64):
        logits = torch.randn((rows, VOCAB), device="cuda") * 3
        for name, temperature, top_p, top_k in (
            ("greedy", 0.0, 1.0, 0),
            ("temperature", 1.0, 1.0, 0),
            ("top_p", 1.0, 0.9, 0),
            ("top_k", 1.0, 1.0, 50),
        ):
            params = DrawParams(
                torch.full((rows,), temperature, device="cuda"),
                torch.full((rows,), top_p, device="cuda", dtype=torch.float64),
                torch.zeros(rows, device="cuda"),
                torch.full((rows,), top_k, device="cuda", dtype=torch.int32),
                torch.arange(rows, device="cuda"),
                torch.arange(rows, device="cuda"),
            )
            cut = top_p < 1 or top_k > 0
            args = (logits, params, cut)
            yield Case(f"sampling {name} {rows}", logits.nbytes, 0, lambda args=args: draw(*args))


# --- whole steps -------------------------------------------------------------------------------------------


def model_cases(kv: torch.Tensor, tuning: Any) -> Iterator[Case]:
    """Decode steps as CUDA graphs and a prefill, of random weights: attention and norms within 32 layers."""
    import numpy as np

    from memserve.kernels.attention_plan import SequenceSlice
    from memserve.model_config import parse_model_config
    from memserve.models.linear import FusedGate, StridedLinear
    from memserve.models.paged_step import Staging, StaticStep, build_paged_step
    from memserve.models.step import LogitRows
    from memserve.models.triton_transformer import TritonTransformer
    from memserve.models.weights import LayerWeights, Weights

    model = parse_model_config(
        {
            "architectures": ["LlamaForCausalLM"],
            "vocab_size": VOCAB,
            "hidden_size": HIDDEN,
            "intermediate_size": INNER,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "num_key_value_heads": KV_HEADS,
            "max_position_embeddings": 8192,
        }
    )

    def linear(rows: int, columns: int) -> StridedLinear:
        return StridedLinear(randn(rows, columns).mul_(0.02))

    layers = tuple(
        LayerWeights(
            input_norm=torch.ones(HIDDEN, device="cuda", dtype=DTYPE),
            qkv=linear((HEADS + 2 * KV_HEADS) * HEAD_DIM, HIDDEN),
            q_norm=None,
            k_norm=None,
            o=linear(HIDDEN, HEADS * HEAD_DIM),
            post_norm=torch.ones(HIDDEN, device="cuda", dtype=DTYPE),
            gate_up=FusedGate(linear(2 * INNER, HIDDEN)),
            down=linear(HIDDEN, INNER),
        )
        for _ in range(LAYERS)
    )
    norm = torch.ones(HIDDEN, device="cuda", dtype=DTYPE)
    weights = Weights(randn(VOCAB, HIDDEN), layers, norm, linear(VOCAB, HIDDEN), None)
    device = torch.device("cuda")
    transformer = TritonTransformer(model, weights, 8192, device, DTYPE, tuning)
    staging = Staging(device)
    of_layer = (HEADS + 2 * KV_HEADS + HEADS) * HEAD_DIM * HIDDEN + 3 * HIDDEN * INNER
    parameters = LAYERS * of_layer + VOCAB * HIDDEN
    order = torch.randperm(len(kv)).numpy()
    kv_bytes = LAYERS * 2 * KV_HEADS * HEAD_DIM * ELEMENT

    for batch, context in ((1, 1024), (8, 2048), (64, 2048)):
        width = context // BLOCK_SIZE + 1
        pieces = [
            (
                np.zeros(1, np.int32),
                SequenceSlice(row, 1, context - 1, order[row * width : (row + 1) * width]),
                LogitRows.LAST,
            )
            for row in range(batch)
        ]
        static = StaticStep(batch, width, BLOCK_SIZE, staging)
        static.fill(pieces)
        with torch.inference_mode():
            for _ in range(2):
                transformer.forward(static.step, kv)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                transformer.forward(static.step, kv)
        num_bytes = ELEMENT * parameters + batch * context * kv_bytes
        yield Case(f"step of {batch} decodes after {context}", num_bytes, 0, graph.replay)

    pieces = [(np.zeros(8192, np.int32), SequenceSlice(0, 8192, 0, order[:512]), LogitRows.LAST)]
    step = build_paged_step(pieces, BLOCK_SIZE, staging)
    attention = LAYERS * 4 * HEADS * HEAD_DIM * 8192 * 8193 / 2
    operations = 2 * 8192 * LAYERS * of_layer + attention

    def prefill() -> None:
        with torch.inference_mode():
            transformer.forward(step, kv)

    yield Case("step of 8192 prompt tokens", 0, operations, prefill)


def matrices() -> list[tuple[torch.Tensor, bool]]:
    """A layer's four matrices, and whether each is the gated one."""
    sizes = (((HEADS + 2 * KV_HEADS) * HEAD_DIM, HIDDEN), (HIDDEN, HEADS * HEAD_DIM), (HIDDEN, INNER))
    return [*((randn(*size), False) for size in sizes), (randn(2 * INNER, HIDDEN), True)]


def linear_cases(tuning: Any) -> Iterator[Case]:
    """A layer's products of few rows, by the library and by the kernel for them."""
    from memserve.kernels.triton.skinny_linear import skinny_gated, skinny_linear
    from memserve.kernels.triton.tuning import SkinnyConfig

    config = tuning.configs.skinny or SkinnyConfig(max_rows=16)
    for rows, (weight, is_gated) in itertools.product((1, 8), matrices()):
        x = randn(rows, weight.shape[1])
        shape = f"{'gated ' if is_gated else ''}{weight.shape[0]}x{weight.shape[1]}"
        args = (x, weight)
        yield Case(
            f"library {shape}, {rows} rows",
            weight.nbytes,
            0,
            lambda args=args: torch.nn.functional.linear(*args),
        )
        ours = skinny_gated if is_gated else skinny_linear
        yield Case(
            f"skinny {shape}, {rows} rows",
            weight.nbytes,
            0,
            lambda args=args, ours=ours: ours(*args, None, config),
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="lines whose name has this in it")
    parser.add_argument(
        "--model", action="store_true", help="also whole steps of a random Llama-3-8B (18 GB)"
    )
    parser.add_argument("--tokens", type=int, default=64 * 4096, help="size of the arena, 128 KiB a token")
    parser.add_argument("--json", type=Path, help="write the results there")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks/kernels.py measures a GPU, and torch finds none here")
    from memserve.kernels.triton.tuning import Tuning

    torch.manual_seed(0)
    name = torch.cuda.get_device_name()
    ceilings = measure_ceilings()
    print(f"{name}, torch {torch.__version__}: copy {ceilings.copy / 1e12:.2f} TB/s,", end=" ")
    print(f"bf16 matmul {ceilings.matmul / 1e12:.0f} TFLOP/s, to the host {ceilings.to_host / 1e9:.0f} GB/s")
    kv = make_arena(options.tokens)
    tuning = Tuning.of(torch.device("cuda"))
    groups = [
        attention_cases(kv, tuning),
        elementwise_cases(kv),
        copy_cases(kv),
        sampling_cases(),
        linear_cases(tuning),
    ]
    if options.model:
        groups.append(model_cases(kv, tuning))
    results = []
    print(f"{'':40}{'ms':>10}{'bound ms':>12}{'of bound':>10}")
    for case in itertools.chain(*groups):
        if options.only in case.name:
            results.append(measure(case, ceilings))
            last = results[-1]
            print(f"{last.name:40}{last.ms:10.4f}{last.bound_ms:12.4f}{last.fraction:10.1%}", flush=True)
    if options.json:
        document = {"gpu": name, "ceilings": asdict(ceilings), "results": [asdict(one) for one in results]}
        options.json.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
