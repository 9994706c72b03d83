"""Draws without the host's knowing are those of `sample`."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from memserve.kernels.device_sampling import Draws, RowTensors, draw, is_plain
from memserve.kernels.sampling import SamplingRow, sample
from memserve.messages import SamplingParams

NOTHING = np.empty(0, np.int32)


def params_of(seed: int = 0, **asked: object) -> SamplingParams:
    return SamplingParams(max_tokens=1, seed=seed, **asked)  # type: ignore[arg-type]


def drawn(logits: torch.Tensor, rows: list[tuple[SamplingParams, int]]) -> tuple[list[int], list[int]]:
    draws = Draws.of(rows, logits.shape[1])
    tensors = None if draws.arrays is None else RowTensors(*map(torch.from_numpy, draws.arrays))
    before = logits.clone()
    token_ids, is_finite = draw(logits, draws, tensors)
    assert torch.equal(logits.nan_to_num(7.0), before.nan_to_num(7.0))
    return token_ids.tolist(), is_finite.tolist()


def expected(logits: torch.Tensor, rows: list[tuple[SamplingParams, int]]) -> list[int]:
    return sample(logits, [SamplingRow(params, at, NOTHING, ()) for params, at in rows]).token_ids


KINDS = {
    "greedy": {"temperature": 0.0},
    "plain": {"temperature": 1.0},
    "hot": {"temperature": 1.7},
    "nucleus": {"temperature": 1.0, "top_p": 0.8},
    "none left": {"temperature": 1.0, "top_p": 1e-9},
    "top_k": {"temperature": 0.9, "top_k": 5},
    "all": {"temperature": 1.1, "top_k": 40, "top_p": 0.9, "min_p": 0.01},
    "min_p": {"temperature": 1.0, "min_p": 0.3},
    "too many": {"temperature": 1.0, "top_k": 10**6},
}


@pytest.mark.parametrize("vocab_size", [5, 64, 199, 1000])
@pytest.mark.parametrize("kinds", [*([kind] for kind in KINDS), list(KINDS)], ids=lambda kinds: kinds[-1])
def test_the_tokens_of_sample(vocab_size: int, kinds: list[str]) -> None:
    rng = np.random.default_rng(vocab_size)
    generator = torch.Generator().manual_seed(vocab_size)
    seen = set()
    for _ in range(4):
        chosen = [kinds[i % len(kinds)] for i in range(24)]
        rows = [
            (params_of(seed=int(rng.integers(2**63)), **KINDS[kind]), int(rng.integers(9999)))
            for kind in chosen
        ]
        logits = torch.randn(24, vocab_size, generator=generator) * 3
        found, is_finite = drawn(logits, rows)
        assert found == expected(logits, rows) and all(is_finite)
        seen |= set(found)
    assert len(seen) > 3


def test_of_equals_the_lowest_ids_stay() -> None:
    logits = torch.zeros(200, 8)
    rows = [(params_of(seed=seed, temperature=1.0, top_p=0.5), 3) for seed in range(200)]
    found, _ = drawn(logits, rows)
    assert found == expected(logits, rows) and set(found) == {0, 1, 2, 3}


def test_a_row_that_is_not_of_numbers_is_told_and_draws_token_0() -> None:
    logits = torch.randn(4, 100, generator=torch.Generator().manual_seed(0))
    logits[1, 5] = torch.nan
    logits[2] = -torch.inf
    rows = [(params_of(seed=i, temperature=float(i % 2)), i) for i in range(4)]
    found, is_finite = drawn(logits, rows)
    assert is_finite == [1, 0, 0, 1] and found[1] == found[2] == 0
    fine = torch.tensor([0, 3])
    assert [found[0], found[3]] == expected(logits[fine], [rows[0], rows[3]])


def test_many_rows_are_sorted_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(10, 50, generator=torch.Generator().manual_seed(1))
    rows = [(params_of(seed=i, temperature=1.0, top_p=0.1 * (i + 1)), i) for i in range(10)]
    whole = drawn(logits, rows)
    monkeypatch.setattr("memserve.kernels.device_sampling._SORT_ELEMENTS", 150)
    assert drawn(logits, rows) == whole


@pytest.mark.parametrize(
    "asked",
    [
        {"logit_bias": ((3, 1.0),)},
        {"logprobs": 0},
        {"repetition_penalty": 1.1},
        {"presence_penalty": 0.1},
        {"frequency_penalty": -0.1},
    ],
)
def test_what_is_left_to_sample(asked: dict[str, object]) -> None:
    assert is_plain(params_of(temperature=1.0, top_p=0.5, top_k=3, min_p=0.1, seed=1))
    assert not is_plain(params_of(**asked))
