"""The paged attention kernels under Triton's interpreter against their plain twins, in arenas of NaN."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from memserve.kernels.triton.decode_attention import (
    MAX_SPLITS,
    decode_attention,
    decode_attention_torch,
    num_splits,
)
from memserve.kernels.triton.prefill_attention import prefill_attention, prefill_attention_torch
from memserve.kernels.triton.tuning import DecodeConfig, KernelConfigs, PrefillConfig, Tuning

torch.set_num_threads(1)
CPU = torch.device("cpu")
LAYERS, LAYER = 2, 1


def tuning(block_m: int = 32, block_n: int = 16, programs_per_sm: int = 2) -> Tuning:
    """Tiles so small that short sequences take several."""
    prefill = PrefillConfig(block_m=block_m, block_n=block_n, num_warps=4, num_stages=1)
    decode = DecodeConfig(block_n=block_n, num_warps=4, num_stages=1, programs_per_sm=programs_per_sm)
    sizes = [f"{size}x{width}" for size in (2, 4) for width in (64, 128)]
    return Tuning(
        4, KernelConfigs(prefill=dict.fromkeys(sizes, prefill), decode=dict.fromkeys(sizes, decode))
    )


@dataclass(frozen=True)
class Case:
    """A shape of heads and blocks."""

    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 64
    block_size: int = 16
    window: int | None = None
    dtype: torch.dtype = torch.float32


SHAPES = [
    Case(4, 4, 64, 16),
    Case(4, 4, 80, 4),
    Case(4, 1, 80, 16),
    Case(8, 2, 96, 16),
    Case(8, 1, 128, 4),
    Case(8, 1, 64, 1),
    Case(6, 2, 64, 16),  # groups of 3: some rows of a tile are nobody's
    Case(4, 2, 128, 16, dtype=torch.float16),
    Case(8, 1, 96, 4, dtype=torch.float16),
    *(Case(window=window) for window in (1, 2, 15, 16, 17, 40, 1000)),
    Case(block_size=4, window=21),
    Case(block_size=1, window=16),
]


class Arena:
    """Sequences of the given lengths in scattered blocks; whatever holds no token is NaN."""

    def __init__(self, case: Case, lengths: list[int], seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        counts = [-(-length // case.block_size) for length in lengths]
        order = torch.randperm(sum(counts) + 3, generator=self.generator).int()
        shape = (len(order), LAYERS, 2, case.num_kv_heads, case.block_size, case.head_dim)
        self.kv = torch.full(shape, float("nan"), dtype=case.dtype)
        self.tables = torch.zeros((len(lengths), max(*counts, 1)), dtype=torch.int32)
        self.lens = torch.tensor(lengths, dtype=torch.int32)
        done = 0
        for row, (length, count) in enumerate(zip(lengths, counts, strict=True)):
            blocks = order[done : done + count]
            self.tables[row, :count] = blocks
            for index, block in enumerate(blocks.tolist()):
                used = min(length - index * case.block_size, case.block_size)
                part = self.kv[block, LAYER, :, :, :used]
                part.copy_(torch.randn(part.shape, generator=self.generator))
            done += count

    def randn(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator).to(dtype)


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    tolerance = 2e-6 if found.dtype == torch.float32 else 3e-3
    assert found.isfinite().all()
    assert (found - expected).abs().max() <= tolerance * max(1.0, expected.abs().max().item())


@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_decode(case: Case) -> None:
    lengths = [1, 16, 0, 17, 75, 32] if case.window is None else [40, 0, 17, 1]
    arena = Arena(case, lengths)
    q = arena.randn(len(lengths), case.num_heads, case.head_dim, dtype=case.dtype)
    scale = case.head_dim**-0.5
    expected = decode_attention_torch(q, arena.kv, LAYER, arena.tables, None, arena.lens, scale, case.window)
    found = decode_attention(
        q, arena.kv, LAYER, arena.tables, None, arena.lens, scale, case.window, 128, tuning()
    )
    assert_close(found, expected)
    assert not found[lengths.index(0)].any()


@pytest.mark.parametrize("programs_per_sm", [1, 4, 64])
def test_decode_in_splits(programs_per_sm: int) -> None:
    """One split, a few, and more than there are tiles; queries that share tables, in any order."""
    case = Case(num_heads=2, num_kv_heads=1)
    arena = Arena(case, [90, 3])
    rows, lens = torch.tensor([1, 0, 0], dtype=torch.int32), torch.tensor([3, 90, 41], dtype=torch.int32)
    q = arena.randn(3, 2, 64, dtype=case.dtype)
    args = (q, arena.kv, LAYER, arena.tables, rows, lens, 0.3, None)
    out = torch.full_like(q, float("nan"))
    found = decode_attention(*args, 1 << 20, tuning(programs_per_sm=programs_per_sm), out)
    assert found is out
    assert_close(found, decode_attention_torch(*args))


@pytest.mark.parametrize("count", [1, 2, 64])
def test_decode_of_many_sequences(count: int) -> None:
    case = Case(num_heads=2, num_kv_heads=1)
    arena = Arena(case, [(7 * index) % 40 + 1 for index in range(count)])
    q = arena.randn(count, 2, 64, dtype=case.dtype)
    args = (q, arena.kv, LAYER, arena.tables, None, arena.lens, 0.1, None)
    assert_close(
        decode_attention(*args, 40, tuning(block_n=32, programs_per_sm=1)), decode_attention_torch(*args)
    )


def test_number_of_splits() -> None:
    assert num_splits(8, 8192, 64, 2112) == MAX_SPLITS  # batch 1
    assert num_splits(512, 4096, 64, 2112) == 4  # batch 64
    assert num_splits(8, 1000, 64, 2112) == 4  # two tiles a split: 7, down to a power of two
    assert num_splits(8, 20, 64, 2112) == 1
    assert num_splits(4096, 8192, 64, 2112) == 1


def check_prefill(case: Case, lengths: list[tuple[int, int]], tiles: Tuning) -> None:
    """Sequences of (context, new) tokens; the rows before and behind them are not theirs."""
    arena = Arena(case, [context + new for context, new in lengths])
    before, news = 3, torch.tensor([new for _, new in lengths])
    starts = torch.cat((torch.zeros(1), news.cumsum(0))).int() + before
    num_queries = int(news.sum())
    q = arena.randn(before + num_queries + 2, case.num_heads, case.head_dim, dtype=case.dtype)
    args = (q, arena.kv, LAYER, arena.tables, starts, arena.lens, case.head_dim**-0.5, case.window)
    expected = prefill_attention_torch(*args, torch.full_like(q, 7.0))
    found = prefill_attention(*args, tiles, torch.full_like(q, 7.0), num_queries)
    assert_close(found, expected)


@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_prefill(case: Case) -> None:
    """Chunks from the start, after a context, of one token, of none, that end at and beside a boundary."""
    check_prefill(case, [(0, 17), (16, 1), (5, 0), (33, 15)], tuning())


@pytest.mark.parametrize(("block_m", "block_n"), [(16, 64), (64, 16), (64, 64)])
def test_prefill_tiles(block_m: int, block_n: int) -> None:
    check_prefill(Case(), [(30, 40), (0, 1)], tuning(block_m, block_n))
    check_prefill(Case(window=19), [(30, 40), (0, 1)], tuning(block_m, block_n))


def test_prefill_of_many_sequences() -> None:
    """Each program finds its sequence among many, some of them empty."""
    lengths = [(index % 5, (index * 3) % 7) for index in range(64)]
    check_prefill(Case(num_heads=2, num_kv_heads=1), lengths, tuning(block_m=16))


def test_prefill_of_nothing() -> None:
    check_prefill(Case(), [(5, 0)], tuning())
