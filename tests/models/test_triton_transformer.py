"""The Triton path under the interpreter against the plain one: the same logits however tokens are fed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from memserve.kernels.triton.tuning import SkinnyConfig
from memserve.model_config import load_model_config
from memserve.models.paged_step import Staging, StaticStep, build_paged_step
from memserve.models.step import LogitRows, SequenceSlice, build_step
from memserve.models.transformer import Transformer
from memserve.models.triton_transformer import TritonTransformer
from memserve.models.weights import load_weights_to_device

CPU = torch.device("cpu")
NONE, LAST, ALL = LogitRows.NONE, LogitRows.LAST, LogitRows.ALL
Oracle = Callable[[str], tuple[Path, Any]]
Fed = tuple[int, int, LogitRows]


class Pair:
    """Both models over arenas of their own, with the same scattered blocks for each of four sequences."""

    def __init__(self, folder: Path, block_size: int, dtype: torch.dtype = torch.float32) -> None:
        self.config = load_model_config(folder)
        name = str(dtype).removeprefix("torch.")
        weights = load_weights_to_device(self.config, folder, name, CPU, "safetensors", 0, lambda _: None)
        self.plain = Transformer(self.config, weights, 256, CPU, dtype)
        self.triton = TritonTransformer(self.config, weights, 256, CPU, dtype)
        self.block_size, self.dtype = block_size, dtype
        rng = np.random.default_rng(0)
        self.tokens = rng.integers(3, 320, (4, 96)).astype(np.int32)
        self.block_ids = rng.permutation(4 * 96 // block_size).reshape(4, -1)
        shape = (self.config.num_layers, 2, self.config.num_kv_heads, block_size, self.config.head_dim)
        self.plain_kv, self.triton_kv = torch.full(
            (2, self.block_ids.size, *shape), float("nan"), dtype=dtype
        )
        self.done = [0] * 4
        self.staging = Staging(CPU)
        self.layers_told = 0

    def pieces(self, fed: Sequence[Fed]) -> list[tuple[np.ndarray, SequenceSlice, LogitRows]]:
        start, pieces = 0, []
        for sequence, count, wanted in fed:
            context = self.done[sequence]
            tokens = self.tokens[sequence, context : context + count]
            piece = SequenceSlice(start, count, context, self.block_ids[sequence])
            pieces.append((tokens, piece, wanted))
            start += count
        return pieces

    def told(self) -> None:
        self.layers_told += 1

    @torch.inference_mode()
    def step(self, *fed: Fed) -> tuple[torch.Tensor, torch.Tensor]:
        """Feed (sequence, number of tokens, logits wanted) to both: their logits."""
        pieces = self.pieces(fed)
        step = build_step(pieces, self.config, self.block_size, CPU, self.dtype)
        expected = self.plain.forward(step, self.plain_kv)
        found = self.triton.forward(
            build_paged_step(pieces, self.block_size, self.staging), self.triton_kv, self.told
        )
        for sequence, count, _ in fed:
            self.done[sequence] += count
        return found, expected


def check(pair: Pair, *fed: Fed, tolerance: float = 2e-4) -> None:
    found, expected = pair.step(*fed)
    assert found.shape == expected.shape and found.dtype == torch.float32
    if len(found):
        assert (found - expected).abs().max() < tolerance
    written = ~pair.plain_kv.isnan()
    assert torch.equal(written, ~pair.triton_kv.isnan())  # tails are zeroed alike
    assert torch.allclose(pair.triton_kv[written], pair.plain_kv[written], atol=tolerance)


CASES = [
    ("llama3_rope", 16),
    ("llama_mqa_biases", 4),
    ("mistral_window", 1),
    ("qwen2_window", 16),
    ("qwen3", 4),
]


@pytest.mark.parametrize(("family", "block_size"), CASES)
def test_chunks_and_decodes(oracle: Oracle, family: str, block_size: int) -> None:
    pair = Pair(oracle(family)[0], block_size)
    # 1. chunks that end at a block's end and inside one, past the window, and a first chunk of one token
    check(pair, (0, 22, LAST), (1, 16, NONE), (2, 1, LAST), (3, 2, ALL))
    # 2. nothing but KV is wanted
    check(pair, (1, 3, NONE), (3, 2, NONE))
    # 3. decodes among chunks, out of order: logits come in the caller's order
    check(pair, (3, 5, LAST), (0, 1, LAST), (1, 2, NONE), (2, 1, LAST))
    # 4. decodes alone
    check(pair, (2, 1, LAST), (0, 1, LAST), (3, 1, LAST), (1, 1, LAST))
    # 5. one sequence after a context
    check(pair, (0, 4, ALL))
    assert pair.layers_told == 5 * pair.config.num_layers


def test_half_precision(oracle: Oracle) -> None:
    pair = Pair(oracle("qwen2")[0], 16, torch.float16)
    check(pair, (0, 18, LAST), (1, 5, LAST), tolerance=0.1)
    check(pair, (0, 1, LAST), (1, 1, LAST), tolerance=0.1)


def test_static_step(oracle: Oracle) -> None:
    """Padded decodes give what the same decodes give alone, and padding writes nothing."""
    pair = Pair(oracle("mistral_window")[0], 4)
    pair.step((0, 23, NONE), (1, 3, NONE), (2, 4, NONE))
    static = StaticStep(4, 24, 4, pair.staging)
    first_tensors = static.step
    for fed in (((0, 1, LAST), (2, 1, LAST), (1, 1, LAST)), ((1, 1, LAST),), ()):
        static.fill(pair.pieces(fed))
        before = pair.triton_kv.clone()
        with torch.inference_mode():
            logits = pair.triton.forward(static.step, pair.triton_kv)
        assert logits.shape == (4, 320) and logits.isfinite().all()
        if fed:
            after = pair.triton_kv.clone()
            pair.triton_kv.copy_(before)
            found, expected = pair.step(*fed)
            assert torch.allclose(logits[: len(fed)], found, atol=1e-5)
            assert (found - expected).abs().max() < 2e-4
            assert torch.equal(after.isnan(), pair.triton_kv.isnan())
            assert torch.allclose(after.nan_to_num(), pair.triton_kv.nan_to_num(), atol=1e-5)
        else:
            assert torch.equal(before.nan_to_num(), pair.triton_kv.nan_to_num())
    assert static.step is first_tensors


def test_what_is_compiled_ahead_touches_no_block(oracle: Oracle) -> None:
    pair = Pair(oracle("llama")[0], 16)
    pair.triton_kv.fill_(7.0)
    with torch.inference_mode():
        pair.triton.prepare(pair.triton_kv)
    assert bool((pair.triton_kv == 7.0).all())


def test_products_of_few_rows(oracle: Oracle) -> None:
    """The same through the kernels for few rows, in the steps that have few."""
    pair = Pair(oracle("llama_mqa_biases")[0], 16, torch.float16)
    tuning = pair.triton.tuning
    skinny = SkinnyConfig(max_rows=2, block_n=64, block_k=128, num_warps=4, num_stages=2)
    pair.triton.tuning = msgspec.structs.replace(
        tuning, configs=msgspec.structs.replace(tuning.configs, skinny=skinny)
    )
    check(pair, (0, 10, LAST), (1, 3, LAST), tolerance=0.1)
    check(pair, (0, 1, LAST), (1, 1, LAST), tolerance=0.1)
