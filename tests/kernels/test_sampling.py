"""Sampling against a naive reference, its distribution, and that a row never depends on its batch."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from memserve.kernels.sampling import SamplingRow, exponentials, sample, token_logprobs
from memserve.messages import SamplingParams, TokenLogprobs


def make_row(
    *, seed: int = 0, position: int = 0, prompt: tuple[int, ...] = (), output: tuple[int, ...] = (), **params
) -> SamplingRow:
    sampling = SamplingParams(max_tokens=100, seed=seed, **params)
    return SamplingRow(sampling, position, np.array(prompt, dtype=np.int32), list(output))


def make_logits(num_rows: int, vocab_size: int, *, scale: float = 3.0, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_rows, vocab_size, generator=generator) * scale


def reference_probs(logits: torch.Tensor, row: SamplingRow) -> np.ndarray:
    """The distribution a row is drawn from, the obvious way, in float64."""
    params, x = row.params, logits.double().numpy().copy()
    for token, bias in params.logit_bias:
        x[token] += bias
    if len(row.output_ids) < params.min_tokens:
        for token in params.stop_token_ids:
            x[token] = -np.inf
    for token in {*row.prompt_ids.tolist(), *row.output_ids}:
        x[token] *= params.repetition_penalty ** (-1 if x[token] > 0 else 1)
    for token in set(row.output_ids):
        x[token] -= params.presence_penalty
        x[token] -= params.frequency_penalty * list(row.output_ids).count(token)
    if params.temperature == 0:
        greedy = np.zeros(len(x))
        greedy[int(x.argmax())] = 1
        return greedy
    x = x / params.temperature
    probs = np.exp(x - x.max())
    probs /= probs.sum()
    probs[probs < params.min_p * probs.max()] = 0
    if 0 < params.top_k < len(probs):
        probs[probs < np.sort(probs)[::-1][params.top_k - 1]] = 0
    probs /= probs.sum()
    kept, mass = np.zeros_like(probs), 0.0
    for token in np.argsort(-probs, kind="stable"):
        if mass < params.top_p and probs[token] > 0:
            kept[token] = probs[token]
        mass += probs[token]
    return kept / kept.sum()


SETTINGS = {
    "greedy": {"temperature": 0.0},
    "plain": {},
    "cold": {"temperature": 0.3},
    "hot": {"temperature": 5.0},
    "top_k": {"top_k": 5},
    "top_k 1": {"top_k": 1},
    "top_k all": {"top_k": 10_000},
    "top_p": {"top_p": 0.7},
    "top_p tiny": {"top_p": 1e-9},
    "top_p nearly 1": {"top_p": 0.9999},
    "min_p": {"min_p": 0.1},
    "min_p 1": {"min_p": 1.0},
    "top_k top_p": {"top_k": 12, "top_p": 0.6, "temperature": 0.8},
    "all cuts": {"top_k": 30, "top_p": 0.8, "min_p": 0.02, "temperature": 1.3},
    "bias": {"logit_bias": ((3, 4.0), (7, -100.0))},
    "min_tokens": {"min_tokens": 9, "stop_token_ids": (1, 2, 3)},
    "min_tokens over": {"min_tokens": 2, "stop_token_ids": (1, 2, 3)},
    "repetition": {"repetition_penalty": 1.7},
    "presence": {"presence_penalty": 1.5},
    "frequency": {"frequency_penalty": -0.9},
    "penalties": {
        "repetition_penalty": 0.8,
        "presence_penalty": 0.4,
        "frequency_penalty": 0.6,
        "top_p": 0.9,
        "logit_bias": ((11, 2.5),),
    },
    "greedy penalties": {"temperature": 0.0, "repetition_penalty": 3.0, "frequency_penalty": 1.0},
}
PAST = {"prompt": (4, 9, 9, 21), "output": (11, 11, 5, 4)}


def assert_each_wins_its_race(token_ids: list[int], probs: np.ndarray, rows: list[SamplingRow]) -> None:
    """Each row's token is of the block of 64 that is first by its sum, and the first within that block.

    Where the two fastest arrive within rounding of each other either may win; that must be rare.
    """
    vocab_size = len(probs)
    padded = np.zeros(-(-vocab_size // 64) * 64)
    padded[:vocab_size] = probs
    sums = padded.reshape(-1, 64).sum(axis=1)
    seeds, positions = [row.params.seed for row in rows], [row.position for row in rows]
    counters = torch.arange(vocab_size + len(sums)).expand(len(rows), -1)
    waits = exponentials(seeds, positions, counters).numpy()
    num_close = 0
    for token, wait in zip(token_ids, waits, strict=True):
        assert probs[token] > 0
        with np.errstate(divide="ignore"):
            block_times = wait[vocab_size:] / sums
            times = np.where(np.arange(vocab_size) // 64 == token // 64, wait[:vocab_size] / probs, np.inf)
        assert block_times[token // 64] <= block_times.min() * 1.0001
        assert times[token] <= times.min() * 1.0001
        num_close += (np.sort(block_times)[:2] / block_times.min() < 1.0001).sum() > 1
        num_close += (times < times.min() * 1.0001).sum() > 1
    assert num_close <= 1


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("vocab_size", [50, 64, 333])
def test_each_setting_races_over_the_reference_distribution(name: str, vocab_size: int) -> None:
    logits = make_logits(1, vocab_size, seed=vocab_size).repeat(100, 1)
    rows = [make_row(seed=seed, position=seed % 7, **SETTINGS[name], **PAST) for seed in range(100)]
    sampled = sample(logits, rows)
    assert sampled.bad_rows == []
    assert_each_wins_its_race(sampled.token_ids, reference_probs(logits[0], rows[0]), rows)


@pytest.mark.parametrize("setting", [{}, {"top_p": 0.95}, {"top_k": 700}, {"min_p": 0.3}])
def test_rounding_of_the_logits_hardly_ever_changes_a_draw(setting: dict[str, float]) -> None:
    """Nearly flat over a thousand tokens: a cumulative distribution changes many times as many."""
    num_draws, vocab_size = 4_000, 1_000
    logits = make_logits(num_draws, vocab_size, scale=0.5, seed=3)
    noise = make_logits(num_draws, vocab_size, scale=1e-4, seed=4)
    rows = [make_row(seed=seed, position=seed % 11, **setting) for seed in range(num_draws)]
    exact, rounded = sample(logits, rows).token_ids, sample(logits + noise, rows).token_ids
    assert len(set(exact)) > 500
    assert sum(a != b for a, b in zip(exact, rounded, strict=True)) <= 3


@pytest.mark.parametrize("name", ["plain", "hot", "top_k top_p", "all cuts", "penalties"])
def test_draws_follow_the_distribution(name: str) -> None:
    num_draws, vocab_size = 5_000, 40
    logits = make_logits(1, vocab_size, scale=1.5, seed=1)
    rows = [make_row(seed=i // 50, position=i % 50, **SETTINGS[name], **PAST) for i in range(num_draws)]
    sampled = sample(logits.expand(num_draws, -1), rows)
    expected = reference_probs(logits[0], rows[0]) * num_draws
    counts = np.bincount(sampled.token_ids, minlength=vocab_size)
    assert counts[expected == 0].sum() == 0
    common = expected > 5
    chi_square = ((counts[common] - expected[common]) ** 2 / expected[common]).sum()
    degrees = common.sum() - 1
    # Mean `degrees`, variance 2 * `degrees`: five sigma. The seeds are fixed, so this passes always or never.
    assert chi_square < degrees + 5 * math.sqrt(2 * degrees)


def test_a_row_never_depends_on_its_batch() -> None:
    vocab_size = 1000
    rows = [
        make_row(seed=seed, position=seed * 3, logprobs=2, **setting, **PAST)
        for seed, setting in enumerate([*SETTINGS.values(), *SETTINGS.values()])
    ]
    logits = make_logits(len(rows), vocab_size, seed=2)
    together = sample(logits, rows)
    # 1. alone
    for i, row in enumerate(rows):
        alone = sample(logits[i : i + 1], [row])
        assert alone.token_ids == [together.token_ids[i]], row.params
        assert alone.logprobs == [together.logprobs[i]]
    # 2. in another order, and only some of them
    random = np.random.default_rng(0)
    for size in (len(rows), 7, 2):
        order = random.permutation(len(rows))[:size]
        mixed = sample(logits[torch.from_numpy(order)], [rows[i] for i in order])
        assert mixed.token_ids == [together.token_ids[i] for i in order]
    # 3. beside rows that are bad
    padded = torch.cat([torch.full((1, vocab_size), torch.nan), logits])
    beside = sample(padded, [make_row(top_p=0.5), *rows])
    assert beside.bad_rows == [0] and beside.token_ids[1:] == together.token_ids


def test_logits_are_left_alone() -> None:
    logits = make_logits(len(SETTINGS), 100)
    before = logits.clone()
    sample(logits, [make_row(logprobs=3, **setting, **PAST) for setting in SETTINGS.values()])
    assert torch.equal(logits, before)


@pytest.mark.parametrize("vocab_size", [1, 63, 64, 65, 1000])
def test_greedy_is_the_lowest_id_of_the_largest(vocab_size: int) -> None:
    logits = make_logits(50, vocab_size).round()  # many ties
    sampled = sample(logits, [make_row(temperature=0.0) for _ in range(50)])
    assert sampled.token_ids == [int(np.argmax(row)) for row in logits.numpy()]


def test_equal_weights_at_the_edge_of_the_nucleus_go_by_id() -> None:
    logits = torch.zeros(64, 8)
    rows = [make_row(seed=seed, top_p=0.5) for seed in range(64)]
    assert set(sample(logits, rows).token_ids) == {0, 1, 2, 3}
    rows = [make_row(seed=seed, top_p=0.5, top_k=3) for seed in range(64)]
    assert set(sample(logits, rows).token_ids) == {0, 1, 2, 3}, "tokens equal to the k-th stay"


@pytest.mark.parametrize("setting", [{}, {"top_p": 0.99}, {"top_k": 50}, {"min_p": 1e-9}])
def test_what_cannot_be_is_never_drawn(setting: dict[str, float]) -> None:
    vocab_size, num_rows = 200, 1000
    logits = make_logits(num_rows, vocab_size, scale=1)
    logits[:, ::2] = -torch.inf
    logits[:, 101:] = -200.0  # its probability is 0 in float32
    sampled = sample(logits, [make_row(seed=seed, **setting) for seed in range(num_rows)])
    assert all(token % 2 == 1 and token < 101 for token in sampled.token_ids)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("setting", [{"temperature": 0.0}, {}, {"top_p": 0.9}, {"top_k": 3}])
def test_bad_rows_are_reported(bad: float, setting: dict[str, float]) -> None:
    logits = make_logits(4, 100)
    expected = sample(logits, [make_row(seed=i, **setting) for i in range(4)]).token_ids
    logits[1, 77] = bad
    logits[2] = -torch.inf
    sampled = sample(logits, [make_row(seed=i, logprobs=1, **setting) for i in range(4)])
    assert sampled.bad_rows == [1, 2]
    assert sampled.token_ids == [expected[0], -1, -1, expected[3]]
    assert [found is None for found in sampled.logprobs] == [False, True, True, False]


def test_all_rows_may_be_bad() -> None:
    for setting in SETTINGS.values():
        sampled = sample(torch.full((2, 70), torch.nan), [make_row(**setting)] * 2)
        assert sampled.bad_rows == [0, 1]


def test_nothing_to_sample() -> None:
    assert sample(torch.empty(0, 10), []).token_ids == []


def test_ids_beyond_the_vocabulary_are_ignored() -> None:
    row = make_row(
        prompt=(3, 200),
        output=(100, 150),
        temperature=0.0,
        repetition_penalty=2.0,
        presence_penalty=2.0,
        logit_bias=((105, 50.0), (-1, 50.0)),
        min_tokens=9,
        stop_token_ids=(100, 199),
    )
    logits = make_logits(3, 100)
    assert sample(logits, [row, row, row]).token_ids == logits.argmax(dim=1).tolist()


def test_waits_depend_on_seed_position_and_counter_and_are_exponential() -> None:
    seeds = np.repeat(np.arange(40), 40)
    positions = np.tile(np.arange(40), 40)
    counters = torch.arange(40).expand(1600, -1)
    waits = exponentials(seeds.tolist(), positions.tolist(), counters).numpy()
    assert len(np.unique(waits)) == 64_000
    assert waits.min() > 0 and np.isfinite(waits).all()
    numbers = np.exp(-waits)  # evenly spread over (0, 1)
    counts, _ = np.histogram(numbers, bins=20, range=(0, 1))
    assert (np.abs(counts - 3200) < 5 * math.sqrt(3200)).all()
    # no two neighbours along any axis go together
    grid = numbers.reshape(40, 40, 40) - 0.5
    for axis in range(3):
        moved = np.moveaxis(grid, axis, 0)
        assert abs((moved[1:] * moved[:-1]).mean()) < 5 / 12 / math.sqrt(grid.size)


def test_waits_never_vanish() -> None:
    """A wait of 0 would let a token of probability 0 win: the largest hash must stay below 1."""
    largest = ((torch.tensor([2**52 - 1]).double() + 0.5) * 2.0**-52).log().neg()
    assert largest.item() > 0


@pytest.mark.parametrize("seed", [0, -1, 2**63, 2**64 - 1, 2**64 + 5])
def test_any_seed_will_do(seed: int) -> None:
    counters = torch.arange(5).unsqueeze(0)
    waits = exponentials([seed], [1 << 20], counters)
    assert torch.equal(waits, exponentials([seed % 2**64], [1 << 20], counters))


def test_waits_are_pinned() -> None:
    """A replay on another version or machine draws the same, so these may never change."""
    waits = exponentials([0, 1, 12345], [0, 1, 4096], torch.tensor([[0, 1], [2, 131071], [7, 1 << 20]]))
    expected = [[1.975374108645118, 0.029323684598536848], [0.7669923088344223, 0.4017507515158747]]
    expected.append([3.425763399104018, 0.7534092436896082])
    assert waits.numpy() == pytest.approx(np.array(expected), rel=1e-14)


def test_logprobs_are_of_the_raw_model() -> None:
    logits = make_logits(3, 100)
    rows = [
        make_row(temperature=0.0, logit_bias=((5, 100.0),), logprobs=0),
        make_row(seed=1, temperature=2.0, top_k=3, logprobs=5),
        make_row(seed=2),
    ]
    sampled = sample(logits, rows)
    assert sampled.token_ids[0] == 5
    expected = torch.log_softmax(logits.double(), dim=1)
    for i in (0, 1):
        found, token = sampled.logprobs[i], sampled.token_ids[i]
        assert found is not None
        assert found.logprob == pytest.approx(float(expected[i, token]), abs=1e-5)
        assert found.rank == 1 + int((logits[i] > logits[i, token]).sum())
    assert sampled.logprobs[0].top == () and sampled.logprobs[2] is None
    values, ids = expected[1].topk(5)
    assert [token for token, _ in sampled.logprobs[1].top] == ids.tolist()
    assert [value for _, value in sampled.logprobs[1].top] == pytest.approx(values.tolist(), abs=1e-5)


def test_token_logprobs_in_parts_equal_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = make_logits(10, 60)
    targets = torch.arange(10) * 5
    whole = token_logprobs(logits, targets, 3)
    monkeypatch.setattr("memserve.kernels.sampling._LOGPROBS_ELEMENTS", 180)
    assert token_logprobs(logits, targets, 3) == whole
    assert [len(found.top) for found in token_logprobs(logits, targets, 100)] == [60] * 10
    assert token_logprobs(logits[:0], targets[:0], 3) == []


def test_equal_logprobs_are_listed_by_id() -> None:
    logits = torch.tensor([[0.0, 2.0, 0.0, 2.0, -torch.inf]])
    (found,) = token_logprobs(logits, torch.tensor([3]), 4)
    assert isinstance(found, TokenLogprobs)
    assert found.rank == 1 and [token for token, _ in found.top] == [1, 3, 0, 2]


@pytest.mark.parametrize("name", ["top_k", "top_p", "min_p", "repetition", "cold"])
def test_transformers_keep_the_same_tokens(name: str) -> None:
    process = pytest.importorskip("transformers.generation.logits_process")
    setting = SETTINGS[name]
    processor = {
        "top_k": lambda: process.TopKLogitsWarper(setting["top_k"]),
        "top_p": lambda: process.TopPLogitsWarper(setting["top_p"]),
        "min_p": lambda: process.MinPLogitsWarper(setting["min_p"]),
        "repetition": lambda: process.RepetitionPenaltyLogitsProcessor(setting["repetition_penalty"]),
        "cold": lambda: process.TemperatureLogitsWarper(setting["temperature"]),
    }[name]()
    logits = make_logits(1, 120, seed=5)
    past = torch.tensor([[*PAST["prompt"], *PAST["output"]]])
    expected = torch.softmax(processor(past, logits.clone()), dim=1)[0].double().numpy()
    rows = [make_row(seed=seed, **setting, **PAST) for seed in range(500)]
    sampled = sample(logits.expand(500, -1), rows)
    assert_each_wins_its_race(sampled.token_ids, expected, rows)
