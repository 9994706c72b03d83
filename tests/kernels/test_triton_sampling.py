"""The draw on the device, under Triton's interpreter: the same tokens as the plain path."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from memserve.kernels.sampling import SamplingRow, sample
from memserve.messages import SamplingParams
from memserve.models.paged_step import Staging
from memserve.models.sampling_step import build_sampling_step, sample_step

torch.set_num_threads(1)
NONE = np.empty(0, dtype=np.int32)
CPU = torch.device("cpu")


def row(
    seed: int = 0, position: int = 7, past: tuple[list[int], list[int]] = ([], []), **params
) -> SamplingRow:
    sampling = SamplingParams(max_tokens=100, seed=seed, **params)
    return SamplingRow(sampling, position, np.array(past[0], dtype=np.int32), past[1])


def check(logits: torch.Tensor, rows: list[SamplingRow]) -> torch.Tensor:
    kept = logits.clone()
    expected = sample(logits, rows)
    ids, is_bad = sample_step(logits, build_sampling_step(rows, logits.shape[1], Staging(CPU)))
    assert torch.equal(kept.nan_to_num(), logits.nan_to_num())
    assert ids.dtype == torch.int64 and ids.tolist() == expected.token_ids
    assert is_bad.nonzero().flatten().tolist() == expected.bad_rows
    return ids


SETTINGS = [
    {"temperature": 0.0},
    {},
    {"temperature": 0.3},
    {"top_k": 1},
    {"top_k": 5},
    {"top_k": 70},  # more than there are blocks
    {"top_k": 10**6, "top_p": 0.5},
    {"top_p": 1e-6},
    {"top_p": 0.6},
    {"top_p": 0.95, "temperature": 1.7},
    {"min_p": 0.2},
    {"min_p": 0.01, "top_k": 20, "top_p": 0.7, "temperature": 0.8},
]


@pytest.mark.parametrize("vocab_size", [1, 5, 64, 65, 1000, 4097])
def test_same_tokens(vocab_size: int) -> None:
    """Every setting in one batch, over flat and peaked logits and ones with many ties."""
    rng = torch.Generator().manual_seed(vocab_size)
    for round_, spread in enumerate((0.1, 3.0)):
        logits = torch.randn(len(SETTINGS), vocab_size, generator=rng) * spread
        if round_ == 1:
            logits = logits.round()
        rows = [row(seed=2**62 + index, position=index, **params) for index, params in enumerate(SETTINGS)]
        check(logits, rows)


@pytest.mark.parametrize("params", [{}, {"top_k": 3}, {"top_p": 0.9}], ids=str)
def test_draws_follow_the_seed_and_the_position(params: dict[str, float]) -> None:
    logits = torch.randn(1, 320, generator=torch.Generator().manual_seed(0)).expand(8, -1).contiguous()
    rows = [row(seed=-1 - index // 4, position=index % 4, **params) for index in range(8)]
    ids = check(logits, rows)
    assert len(set(ids.tolist())) > 1
    again = check(logits[:3].contiguous(), rows[5:8])
    assert torch.equal(again, ids[5:8])  # not on the row, nor on the batch


def test_bad_rows() -> None:
    """NaN, infinities and nothing: told of their rows alone."""
    logits = torch.randn(12, 130)
    logits[0, 7], logits[1, 129] = float("nan"), float("nan")
    logits[2, 100], logits[3, 3] = float("inf"), float("inf")
    logits[4:6] = -float("inf")
    logits[6:8] = -float("inf")
    logits[6:8, 66] = 1.0
    rows = [row(seed=3, **({"top_k": 4} if index % 2 else {})) for index in range(12)]
    ids = check(logits, rows)
    assert ids[:6].tolist() == [-1] * 6 and ids[6:8].tolist() == [66, 66]


def test_edits() -> None:
    logits = torch.randn(5, 100, generator=torch.Generator().manual_seed(1))
    logits[:, 9] = 20.0
    rows = [
        row(temperature=0.0, logit_bias=((9, -100.0), (3, 30.0), (3, 30.0))),
        row(temperature=0.0, stop_token_ids=(9, 1000), min_tokens=2),
        row(temperature=0.0, repetition_penalty=50.0, past=([9, 4], [9])),
        row(temperature=0.0, presence_penalty=2.0, frequency_penalty=1.5, past=([], [9] * 20)),
        row(temperature=0.0),
    ]
    ids = check(logits, rows)
    assert ids[0] == 3 and ids[4] == 9 and 9 not in ids[:4].tolist()


def test_no_rows() -> None:
    check(torch.empty(0, 50), [])
