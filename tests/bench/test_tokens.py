"""Streams of tokens: equal keys are equal tokens, other keys are others, and nothing depends on the order."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from memserve.bench.tokens import Tokens, Vocabulary

RUNS = st.lists(st.tuples(st.integers(0, 9), st.integers(1, 40)), min_size=1, max_size=8)


def make_vocabulary(seed: int = 0, size: int = 100, first_id: int = 10) -> Vocabulary:
    return Vocabulary(seed=seed, size=size, first_id=first_id)


def make(runs: list[tuple[int, int]], vocabulary: Vocabulary | None = None) -> Tokens:
    keys, lengths = zip(*runs, strict=True)
    return Tokens(vocabulary or make_vocabulary(), list(keys), list(lengths))


def ids(piece: Tokens) -> list[int]:
    expanded = piece.expand()
    assert isinstance(expanded, list)
    return expanded


@given(RUNS)
def test_a_piece_is_its_runs_one_after_another(runs: list[tuple[int, int]]) -> None:
    piece = make(runs)
    assert ids(piece) == [token for run in runs for token in ids(make([run]))]
    assert len(piece) == len(ids(piece)) == sum(length for _, length in runs)
    assert all(10 <= token < 110 for token in ids(piece))


@given(RUNS, st.integers(0, 400))
def test_a_cut_is_the_beginning(runs: list[tuple[int, int]], num_tokens: int) -> None:
    piece = make(runs)
    assert ids(piece.cut(num_tokens)) == ids(piece)[:num_tokens]
    assert len(piece.cut(num_tokens)) == min(num_tokens, len(piece))


@given(RUNS, RUNS)
def test_concat_is_concatenation(first: list[tuple[int, int]], second: list[tuple[int, int]]) -> None:
    assert ids(Tokens.concat([make(first), make(second)])) == ids(make(first)) + ids(make(second))


@given(RUNS, st.sampled_from([0.1, 0.5, 1.0, 2.0]))
def test_scaling_keeps_equal_runs_equal(runs: list[tuple[int, int]], factor: float) -> None:
    scaled = make(runs).scale(factor)
    assert ids(scaled) == [
        token for key, length in runs for token in ids(make([(key, max(1, round(length * factor)))]))
    ]


def test_neighbouring_keys_differ_in_the_first_token_and_any_two_in_the_first_four() -> None:
    heads = make([(key, 4) for key in range(16**4)], make_vocabulary(size=16)).numbers().reshape(-1, 4)
    assert len(np.unique(heads, axis=0)) == 16**4
    assert (heads[1:, 0] != heads[:-1, 0]).all()


def test_tokens_are_spread_over_the_vocabulary() -> None:
    counts = np.bincount(make([(5, 100_000)], make_vocabulary(first_id=0)).numbers(), minlength=100)
    # 1,000 each on average, with a standard deviation of 32.
    assert counts.min() > 840 and counts.max() < 1160


def test_a_seed_settles_everything() -> None:
    runs = [(3, 50), (4, 50)]
    assert ids(make(runs, make_vocabulary(seed=7))) == ids(make(runs, make_vocabulary(seed=7)))
    one, other = (ids(make(runs, make_vocabulary(seed=seed))) for seed in (7, 8))
    assert sum(a == b for a, b in zip(one, other, strict=True)) < 10


def test_the_streams_stay_what_they_are() -> None:
    """Results of two machines, or of two versions, are of the same prompts."""
    assert ids(make([(12345, 8)], make_vocabulary(seed=3, size=490))) == [
        279,
        90,
        23,
        197,
        479,
        415,
        187,
        426,
    ]


def test_words_spell_the_numbers() -> None:
    words = tuple(f" w{number}" for number in range(20))
    piece = Tokens(Vocabulary(seed=0, size=20, words=words), [3], [6])
    assert piece.expand() == "".join(words[number] for number in piece.numbers())


def test_equal_pieces_are_equal() -> None:
    assert make([(1, 2), (3, 4)]) == make([(1, 2), (3, 4)]) != make([(1, 2), (3, 5)])
    assert hash(make([(1, 2)])) == hash(make([(1, 2)]))
    assert make([(1, 2)]) != make([(1, 2)], make_vocabulary(seed=9))


def test_a_long_prompt_is_small_until_it_is_expanded() -> None:
    piece = Tokens(make_vocabulary(), [1], [10**12])
    assert len(piece) == 10**12 and len(ids(piece.cut(3))) == 3
