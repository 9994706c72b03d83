"""On a GPU: each Triton kernel at Llama-3-8B's sizes, on fresh random inputs, against a float32 twin.

Errors are relative, ||found - expected|| / ||expected||; outputs are poisoned with NaN first, so that what is
not written shows. The last tests replay a captured step, and compare whole models.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from memserve.kernels import activation as plain_activation
from memserve.kernels import norm as plain_norm
from memserve.kernels.rotary import rotation_table
from memserve.kernels.sampling import SamplingRow, sample
from memserve.messages import SamplingParams
from memserve.model_config import RopeConfig

if not torch.cuda.is_available():
    pytest.skip("torch finds no GPU here", allow_module_level=True)

from memserve.kernels.triton.activation import silu_and_mul
from memserve.kernels.triton.copy_blocks import BlockMemory, BlockPart, copy_blocks, copy_blocks_torch
from memserve.kernels.triton.decode_attention import decode_attention, decode_attention_torch
from memserve.kernels.triton.kv_store import rotate_and_store, rotate_and_store_torch
from memserve.kernels.triton.norm import add_rms_norm_, rms_norm
from memserve.kernels.triton.prefill_attention import prefill_attention, prefill_attention_torch
from memserve.kernels.triton.skinny_linear import skinny_gated, skinny_linear
from memserve.kernels.triton.tuning import SkinnyConfig, Tuning
from memserve.models.paged_step import Staging, StaticStep, build_paged_step
from memserve.models.sampling_step import build_sampling_step, sample_step
from memserve.models.step import LogitRows, SequenceSlice

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda:0")
HEADS, KV_HEADS, HEAD_DIM, BLOCK_SIZE, LAYERS, LAYER = 32, 8, 128, 16, 3, 1
LIMITS = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}
dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
shapes = pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "dtype"),
    [
        (32, 8, 128, torch.bfloat16),
        (32, 8, 128, torch.float16),
        (32, 32, 96, torch.bfloat16),
        (8, 1, 80, torch.bfloat16),
        (28, 4, 128, torch.bfloat16),
        (32, 8, 64, torch.float16),
        (8, 2, 128, torch.float32),
    ],
)


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """NaN fails every comparison with a limit."""
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


def randn(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype)


class Paged:
    """Sequences in scattered blocks of an arena; slots that hold no token are NaN."""

    def __init__(self, lengths: list[int], kv_heads: int, head_dim: int, dtype: torch.dtype) -> None:
        counts = [-(-length // BLOCK_SIZE) for length in lengths]
        order = torch.randperm(sum(counts) + 7).int()
        self.kv = randn(len(order), LAYERS, 2, kv_heads, BLOCK_SIZE, head_dim, dtype=dtype)
        self.tables = torch.zeros((len(lengths), max(counts)), dtype=torch.int32)
        for row, (length, blocks) in enumerate(zip(lengths, order.split([*counts, 7]), strict=False)):
            self.tables[row, : len(blocks)] = blocks
            if length % BLOCK_SIZE:
                self.kv[blocks[-1], :, :, :, length % BLOCK_SIZE :] = float("nan")
        self.tables = self.tables.to(DEVICE)
        self.lens = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)


@shapes
@pytest.mark.parametrize("window", [None, 1000])
def test_decode_attention(
    heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, window: int | None
) -> None:
    for lengths in ([2048], [1, 15, 16, 17, 4096, 0, 700, 2049], [1 + 61 * index for index in range(64)]):
        paged = Paged(lengths, kv_heads, head_dim, dtype)
        q = randn(len(lengths), heads, head_dim, dtype=dtype)
        args = (LAYER, paged.tables, None, paged.lens, head_dim**-0.5, window)
        expected = decode_attention_torch(q.float(), paged.kv.float(), *args)
        for longest in (max(lengths), 1 << 17):
            out = torch.full_like(q, float("nan"))
            decode_attention(q, paged.kv, *args, longest, Tuning.of(DEVICE), out)
            assert error(out, expected) < LIMITS[dtype]


@shapes
@pytest.mark.parametrize("window", [None, 500])
def test_prefill_attention(
    heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, window: int | None
) -> None:
    for chunks in ([(0, 2048)], [(0, 1), (1000, 333), (17, 0), (16, 16), (0, 700), (2047, 2)]):
        paged = Paged([context + new for context, new in chunks], kv_heads, head_dim, dtype)
        starts = np.cumsum([0, *(new for _, new in chunks)])
        query_starts = torch.tensor(starts, dtype=torch.int32, device=DEVICE)
        q = randn(int(starts[-1]), heads, head_dim, dtype=dtype)
        args = (LAYER, paged.tables, query_starts, paged.lens, head_dim**-0.5, window)
        expected = torch.empty_like(q, dtype=torch.float32)
        prefill_attention_torch(q.float(), paged.kv.float(), *args, expected)
        out = torch.full_like(q, float("nan"))
        prefill_attention(q, paged.kv, *args, Tuning.of(DEVICE), out, len(q))
        assert error(out, expected) < LIMITS[dtype]


@dtypes
@pytest.mark.parametrize("rows", [1, 64, 8192])
def test_norm_and_activation(rows: int, dtype: torch.dtype) -> None:
    x, residual, weight = (randn(*shape, dtype=dtype) for shape in ((rows, 4096), (rows, 4096), (4096,)))
    expected = plain_norm.rms_norm(x.float(), weight.float(), 1e-5)
    assert error(rms_norm(x, weight, 1e-5), expected) < LIMITS[dtype]
    total = residual.float() + x.float()
    found = add_rms_norm_(x, residual, weight, 1e-5)
    assert torch.equal(residual, total.to(dtype))
    assert error(found, plain_norm.rms_norm(total, weight.float(), 1e-5)) < LIMITS[dtype]
    gate_up = randn(rows, 2 * 14336, dtype=dtype)
    assert error(silu_and_mul(gate_up), plain_activation.silu_and_mul(gate_up.float())) < LIMITS[dtype]


@dtypes
@pytest.mark.parametrize("rows", [1, 16, 17, 32])
@pytest.mark.parametrize("block_n", [16, 64])
def test_products_of_few_rows(rows: int, block_n: int, dtype: torch.dtype) -> None:
    config = SkinnyConfig(max_rows=32, block_n=block_n, block_k=128)
    for size, depth in ((6144, 4096), (1000, 4104)):
        x, weight, bias = (randn(*shape, dtype=dtype) for shape in ((rows, depth), (size, depth), (size,)))
        expected = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
        assert error(skinny_linear(x, weight, bias, config), expected) < LIMITS[dtype]
        expected = plain_activation.silu_and_mul(x.double() @ weight.double().T)
        assert error(skinny_gated(x, weight, None, config), expected) < LIMITS[dtype]


@dtypes
@pytest.mark.parametrize("has_norms", [False, True])
@pytest.mark.parametrize("rows", [1, 64, 4096])
def test_rotate_and_store(rows: int, has_norms: bool, dtype: torch.dtype) -> None:
    qkv = randn(rows, HEADS + 2 * KV_HEADS, HEAD_DIM, dtype=dtype)
    norms = None
    if has_norms:
        norms = randn(HEAD_DIM, dtype=dtype), randn(HEAD_DIM, dtype=dtype)
    wide_norms = None if norms is None else (norms[0].float(), norms[1].float())
    rotations = rotation_table(RopeConfig(theta=500000.0), HEAD_DIM, 8192, DEVICE)
    positions = torch.randint(0, 8192, (rows,), device=DEVICE)
    # Every second block is written to, so that a tail meets nobody else's slots.
    slots = (
        torch.randperm(rows, device=DEVICE) * 2 * BLOCK_SIZE + torch.arange(rows, device=DEVICE) % BLOCK_SIZE
    )
    tails = (BLOCK_SIZE - 1 - slots % BLOCK_SIZE).int() * (torch.arange(rows, device=DEVICE) % 2).int()
    slots[rows // 2 :: 5] = -1
    kv = torch.full(
        (2 * rows, 2, 2, KV_HEADS, BLOCK_SIZE, HEAD_DIM), float("nan"), device=DEVICE, dtype=dtype
    )
    wide_kv = kv.float()
    expected = rotate_and_store_torch(
        qkv.float(), wide_norms, rotations, positions, slots, tails, wide_kv, 1, HEADS, 1e-5
    )
    found = rotate_and_store(qkv, norms, rotations, positions, slots, tails, kv, 1, HEADS, 1e-5)
    assert error(found, expected) < LIMITS[dtype]
    assert torch.equal(kv.isnan(), wide_kv.isnan())
    if not kv.isnan().all():
        assert error(kv.nan_to_num(), wide_kv.nan_to_num()) < LIMITS[dtype]


@pytest.mark.parametrize("layers", [None, range(3, 4), range(0, 32)])
def test_copy_blocks(layers: range | None) -> None:
    source = randn(70, 32, 2, KV_HEADS, BLOCK_SIZE, HEAD_DIM, dtype=torch.bfloat16)
    for is_host in (False, True):
        target = torch.zeros_like(source, device="cpu" if is_host else DEVICE)
        target = target.pin_memory() if is_host else target
        twin = torch.zeros_like(source)
        ids = torch.randperm(70, device=DEVICE)[:40]
        source_ids, target_ids = ids.contiguous(), ids.flip(0).contiguous()
        memory = BlockMemory.of(source)
        part = None if layers is None else BlockPart.of_layers(layers, 32, memory.block_bytes)
        copy_blocks(memory, BlockMemory.of(target), source_ids, target_ids, part)
        torch.cuda.synchronize()
        copy_blocks_torch(source, twin, source_ids, target_ids, layers)
        assert torch.equal(target.to(DEVICE), twin)


def test_draws() -> None:
    """The plain path's tokens, but for races that rounding decides: at most one row in a hundred."""
    rng = np.random.default_rng(0)
    rows = [
        SamplingRow(
            SamplingParams(
                max_tokens=1,
                seed=int(rng.integers(0, 2**63)),
                temperature=float(rng.choice([0.0, 0.7, 1.0])),
                top_p=float(rng.choice([1.0, 0.3, 0.9])),
                top_k=int(rng.choice([0, 1, 50, 5000])),
                min_p=float(rng.choice([0.0, 0.05])),
                repetition_penalty=float(rng.choice([1.0, 1.2])),
                logit_bias=((5, 3.0),) if index % 3 == 0 else (),
            ),
            index,
            np.arange(100, dtype=np.int32),
            [7, 7, 8],
        )
        for index in range(256)
    ]
    logits = torch.randn((256, 128256), device=DEVICE) * 3
    logits[3, 77] = float("nan")
    expected = sample(logits.cpu(), rows)
    step = build_sampling_step(rows, 128256, Staging(DEVICE))
    ids, is_bad = sample_step(logits, step)
    again, _ = sample_step(logits, step)
    assert torch.equal(ids, again)
    assert is_bad.nonzero().flatten().tolist() == expected.bad_rows == [3]
    assert (ids.cpu() != torch.tensor(expected.token_ids)).sum() <= 2


# --- whole models: see test_cuda for the folders -----------------------------------------------------------


def test_a_captured_step_is_the_step(tmp_path: Path) -> None:
    """Replays of one graph over other content give what the same step gives outside of it."""
    from safetensors.torch import save_file

    from memserve.model_config import parse_model_config
    from memserve.models.checkpoint import tensor_shapes
    from memserve.models.triton_transformer import TritonTransformer
    from memserve.models.weights import load_weights_to_device

    model = parse_model_config(
        {
            "architectures": ["MistralForCausalLM"],
            "vocab_size": 1000,
            "hidden_size": 512,
            "intermediate_size": 1024,
            "num_hidden_layers": 3,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "head_dim": 64,
            "sliding_window": 100,
            "max_position_embeddings": 1024,
            "torch_dtype": "bfloat16",
        }
    )
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randn(shape, generator=generator) * (0.05 if len(shape) > 1 else 1.0)
        for name, shape in tensor_shapes(model).items()
    }
    save_file(tensors, tmp_path / "model.safetensors")
    weights = load_weights_to_device(model, tmp_path, "bfloat16", DEVICE, "auto", 0, lambda _: None)
    transformer = TritonTransformer(model, weights, 1024, DEVICE, torch.bfloat16)
    staging, rng = Staging(DEVICE), np.random.default_rng(0)
    kv = randn(200, 3, 2, 2, BLOCK_SIZE, 64, dtype=torch.bfloat16)
    blocks = rng.permutation(200)

    def pieces(contexts: list[int]) -> list[tuple[np.ndarray, SequenceSlice, LogitRows]]:
        tables = np.array_split(blocks, 8)
        return [
            (
                rng.integers(0, 1000, 1).astype(np.int32),
                SequenceSlice(row, 1, context, tables[row]),
                LogitRows.LAST,
            )
            for row, context in enumerate(contexts)
        ]

    static = StaticStep(8, 25, BLOCK_SIZE, staging)
    with torch.inference_mode():
        for _ in range(2):
            transformer.forward(static.step, kv)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = transformer.forward(static.step, kv)
        for contexts in ([0, 5, 300, 399], [17] * 8, [100], [398, 1, 15, 16, 31, 32, 250, 99]):
            now = pieces(contexts)
            before = kv.clone()
            static.fill(now)
            graph.replay()
            found = logits[: len(contexts)].clone()
            kv.copy_(before)
            expected = transformer.forward(build_paged_step(now, BLOCK_SIZE, staging), kv)
            assert logits.isfinite().all()
            assert error(found, expected) < 1e-2
