"""Paged attention and the store against a naive float64 reference, in an arena of NaN."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from memserve.kernels import attention_plan
from memserve.kernels.attention import paged_attention
from memserve.kernels.attention_plan import AttentionPlan, Paging, SequenceSlice, plan_attention
from memserve.kernels.kv_cache import plan_store, store_kv

torch.set_num_threads(1)
LAYERS, LAYER = 3, 1
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Case:
    """Sequences of (context, new) tokens under one shape."""

    lengths: tuple[tuple[int, int], ...]
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 64
    window: int | None = None


MIXED = ((0, 1), (0, 7), (5, 1), (40, 1), (33, 9), (16, 16), (300, 1), (0, 33), (15, 2))
CASES = [
    Case(((0, 1),)),
    Case(((0, 20),)),
    Case(((35, 13),)),
    Case(((9, 1), (3, 1), (30, 1))),
    Case(MIXED),
    Case(MIXED, num_heads=8, num_kv_heads=1, head_dim=80),
    Case(MIXED, num_heads=4, num_kv_heads=4, head_dim=96),
    Case(MIXED, num_heads=8, num_kv_heads=8, head_dim=128),
    Case(MIXED, num_heads=16, num_kv_heads=2),
    *(Case(MIXED, window=window) for window in (1, 2, 8, 16, 17, 100, 1000)),
]


def reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, context: int, case: Case) -> torch.Tensor:
    """q [new, heads, dim], k and v [context + new, kv_heads, dim], query by query, in float64."""
    groups, out = case.num_heads // case.num_kv_heads, []
    for index, query in enumerate(q.double()):
        last = context + index + 1
        first = 0 if case.window is None else max(last - case.window, 0)
        keys = k[first:last].double().repeat_interleave(groups, 1)
        values = v[first:last].double().repeat_interleave(groups, 1)
        weights = torch.einsum("hd,khd->hk", query, keys).mul(case.head_dim**-0.5).softmax(-1)
        out.append(torch.einsum("hk,khd->hd", weights, values))
    return torch.stack(out).flatten(1)


@pytest.mark.parametrize(
    ("dtype", "joins"), [(torch.float32, True), (torch.float32, False), (torch.bfloat16, False)]
)
@pytest.mark.parametrize("block_size", [1, 4, 16])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_reference(case: Case, block_size: int, dtype: torch.dtype, joins: bool) -> None:
    """In two parts that are joined, as in float32 on a CPU, and under a mask, as everywhere else."""
    check(case, block_size, dtype, joins)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_scores_of_bounded_size(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same in parts, down to one query each."""
    monkeypatch.setattr(attention_plan, "MAX_SCORE_ELEMENTS", 600)
    plan = check(case, 4, torch.float32, False)
    for chunk in plan.chunks:
        assert len(chunk.parts) != 1 or chunk.queries.stop - chunk.queries.start < 20
        for part in chunk.parts:
            num_queries = part.queries.stop - part.queries.start
            num_scores = case.num_heads * num_queries * (part.keys.stop - part.keys.start)
            assert num_queries == 1 or num_scores <= 600


def check(case: Case, block_size: int, dtype: torch.dtype, joins: bool) -> AttentionPlan:
    """Compare with the reference; the plan that was followed."""
    generator = torch.Generator().manual_seed(1)
    heads, kv_heads, dim = case.num_heads, case.num_kv_heads, case.head_dim
    blocks = [-(-(context + new) // block_size) for context, new in case.lengths]
    ids = np.random.default_rng(0).permutation(sum(blocks) + 3)
    kv = torch.full((len(ids), LAYERS, 2, kv_heads, block_size, dim), float("nan"), dtype=dtype)
    paging = Paging(LAYERS, kv_heads, block_size, CPU, dtype, joins, heads // kv_heads)

    pieces, slots, tails, stored, start = [], [], [], [], 0
    for (context, new), count in zip(case.lengths, blocks, strict=True):
        block_ids, ids = ids[:count], ids[count:]
        pieces.append(SequenceSlice(start, new, context, block_ids))
        flat = (block_ids[:, None] * block_size + np.arange(block_size)).ravel()
        slots.append(flat[: context + new])
        tails.append(flat[context + new :])
        stored.append(torch.randn(context + new, 2, kv_heads, dim, generator=generator).to(dtype))
        start += new

    # 1. the contexts were stored before, the new tokens now; unused slots are zeroed by the store
    for parts in (0, 1):
        new_kv = [
            kv_[piece.context_len :] if parts else kv_[: piece.context_len]
            for kv_, piece in zip(stored, pieces, strict=True)
        ]
        where = [
            slot[piece.context_len :] if parts else slot[: piece.context_len]
            for slot, piece in zip(slots, pieces, strict=True)
        ]
        plan = plan_store(np.concatenate(where), np.concatenate(tails), LAYERS, kv_heads, block_size, CPU)
        store_kv(kv, LAYER, torch.cat(new_kv), plan)
    assert kv[:, [0, 2]].isnan().all(), "only its own layer is written"

    # 2. queries as the model has them: a view of a wider row
    wide = torch.randn(start, (heads + 2) * dim, generator=generator).to(dtype)
    q = wide[:, : heads * dim].view(start, heads, dim)
    attention = plan_attention([(piece.start, piece) for piece in pieces], case.window, paging)
    out = paged_attention(q, torch.cat(new_kv), kv, LAYER, attention, dim**-0.5)

    # 3. each sequence as if it were alone
    expected = torch.cat(
        [
            reference(q[piece.start :][: piece.num_new], kv_[:, 0], kv_[:, 1], piece.context_len, case)
            for kv_, piece in zip(stored, pieces, strict=True)
        ]
    )
    assert out.shape == expected.shape and out.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    assert (out.double() - expected).abs().max() < tolerance
    return attention
