"""Made-up workloads have the distributions that their documentation states."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest

from memserve.bench.generators import (
    Synthetic,
    loogle_like,
    prefix_repetition,
    random_tokens,
    react_like,
    sharegpt_like,
)
from memserve.bench.shaping import Draft
from memserve.bench.tokens import Tokens, Vocabulary
from memserve.errors import ConfigError

IDS = Vocabulary(seed=0, size=490, first_id=10)


def inputs(draft: Draft) -> list[int]:
    return [len(turn.input) for session in draft.sessions for turn in session.turns]


def answers(draft: Draft) -> list[int]:
    return [turn.max_tokens for session in draft.sessions for turn in session.turns]


def test_chats_are_as_long_as_stated() -> None:
    draft = sharegpt_like(IDS, 3000, seed=1)
    turns = np.array([len(session.turns) for session in draft.sessions])
    assert turns.mean() == pytest.approx(5.75, rel=0.05) and turns.max() <= 40
    assert (turns == 1).mean() == pytest.approx(0.27, abs=0.03)
    assert np.mean(inputs(draft)) == pytest.approx(160, rel=0.05)
    assert np.mean(answers(draft)) == pytest.approx(330, rel=0.05)
    assert np.median(inputs(draft)) == pytest.approx(78, rel=0.05)
    assert not draft.prefixes


def test_documents_and_questions_are_as_stated() -> None:
    draft = loogle_like(IDS, 1200, seed=1, sessions_per_prefix=None)
    assert Counter(Counter(session.prefix_id for session in draft.sessions).values()) == {12: 100}
    alone = loogle_like(IDS, 3000, seed=1, sessions_per_prefix=1)
    documents = [len(prefix) for prefix in alone.prefixes.values()]
    assert np.median(documents) == pytest.approx(18_000, rel=0.03)
    assert np.std(np.log(documents)) == pytest.approx(0.31, rel=0.05)
    assert min(documents) >= 4000 and max(documents) <= 40_000
    assert np.median(inputs(draft)) == pytest.approx(24, rel=0.05)
    assert np.median(answers(draft)) == pytest.approx(13, rel=0.15)
    assert all(len(session.turns) == 1 for session in draft.sessions)


def test_agents_are_as_stated() -> None:
    draft = react_like(IDS, 2000, seed=1, sessions_per_prefix=None)
    assert [len(prefix) for prefix in draft.prefixes.values()] == [1619]
    turns = Counter(len(session.turns) for session in draft.sessions)
    for number, of_89 in {2: 4, 3: 57, 4: 14, 5: 10, 6: 4}.items():
        assert turns[number] / 2000 == pytest.approx(of_89 / 89, abs=0.04)
    first = [len(session.turns[0].input) for session in draft.sessions]
    later = [len(turn.input) for session in draft.sessions for turn in session.turns[1:]]
    assert np.median(first) == pytest.approx(27, rel=0.05)
    assert np.median(later) == pytest.approx(136, rel=0.05) and max(later) <= 1100
    assert np.median(answers(draft)) == pytest.approx(38, rel=0.05)


@pytest.mark.parametrize("make", [loogle_like, react_like])
@pytest.mark.parametrize("ratio", [1, 3])
def test_the_sharing_ratio_replaces_the_usual_one(make: Any, ratio: int) -> None:
    draft = make(IDS, 12, 0, ratio)
    assert set(Counter(session.prefix_id for session in draft.sessions).values()) == {ratio}
    assert len(draft.prefixes) == 12 // ratio


def test_prefix_repetition_spreads_requests_over_prefixes() -> None:
    draft = prefix_repetition(IDS, 25, 0, Synthetic(), None)
    assert Counter(Counter(session.prefix_id for session in draft.sessions).values()) == {3: 5, 2: 5}
    assert {len(prefix) for prefix in draft.prefixes.values()} == {256}
    assert set(inputs(draft)) == {256} and set(answers(draft)) == {128}
    lengths = Synthetic(input_tokens=7, output_tokens=9, prefix_tokens=32, num_prefixes=4)
    draft = prefix_repetition(IDS, 8, 0, lengths, None)
    assert [len(prefix) for prefix in draft.prefixes.values()] == [32] * 4
    assert set(inputs(draft)) == {7} and set(answers(draft)) == {9}
    assert len(prefix_repetition(IDS, 8, 0, Synthetic(), 2).prefixes) == 4
    assert not prefix_repetition(IDS, 8, 0, Synthetic(prefix_tokens=0), None).prefixes


def test_random_lengths_are_uniform_in_their_range() -> None:
    draft = random_tokens(IDS, 2000, 0, Synthetic(input_tokens=100, output_tokens=10, range_ratio=0.5))
    assert min(inputs(draft)) == 50 and max(inputs(draft)) == 150
    assert np.mean(inputs(draft)) == pytest.approx(100, rel=0.05)
    assert min(answers(draft)) == 5 and max(answers(draft)) == 15
    plain = random_tokens(IDS, 5, 0, Synthetic(prefix_tokens=20))
    assert set(inputs(plain)) == {1024} and len(plain.prefixes["prefix"]) == 20
    assert all(session.prefix_id == "prefix" for session in plain.sessions)


def make_all(seed: int) -> list[Draft]:
    return [
        sharegpt_like(IDS, 20, seed),
        loogle_like(IDS, 20, seed, None),
        react_like(IDS, 20, seed, None),
        prefix_repetition(IDS, 20, seed, Synthetic(), None),
        random_tokens(IDS, 20, seed, Synthetic(range_ratio=0.9)),
    ]


def test_the_seed_settles_the_lengths() -> None:
    assert make_all(3) == make_all(3)
    different = [inputs(one) != inputs(other) for one, other in zip(make_all(3), make_all(4), strict=True)]
    assert different == [True, True, True, False, True]


def test_only_prefixes_are_shared() -> None:
    for draft in make_all(0):
        pieces = [
            piece
            for session in draft.sessions
            for turn in session.turns
            for piece in (turn.input, turn.output)
        ]
        pieces += draft.prefixes.values()
        heads = [
            tuple(piece.cut(4).numbers()) for piece in pieces if isinstance(piece, Tokens) and len(piece) >= 4
        ]
        assert len(heads) > 20 and len(set(heads)) == len(heads)


def test_logged_answers_are_as_long_as_asked_for() -> None:
    for draft in make_all(0):
        for session in draft.sessions:
            assert all(
                turn.output is not None and len(turn.output) == turn.max_tokens for turn in session.turns
            )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"input_tokens": 0}, "input_tokens must be at least 1, not 0"),
        ({"output_tokens": 0}, "output_tokens must be at least 1"),
        ({"prefix_tokens": -1}, "prefix_tokens must be at least 0"),
        ({"num_prefixes": 0}, "num_prefixes must be at least 1"),
        ({"range_ratio": 1.0}, "range_ratio must be at least 0 and below 1"),
        ({"range_ratio": float("nan")}, "range_ratio must be at least 0 and below 1"),
    ],
)
def test_lengths_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Synthetic(**options)


def test_options_of_the_other_generator_are_refused() -> None:
    with pytest.raises(ConfigError, match="range_ratio is an option of random alone"):
        prefix_repetition(IDS, 5, 0, Synthetic(range_ratio=0.5), None)
    with pytest.raises(ConfigError, match="num_prefixes is an option of prefix-repetition alone"):
        random_tokens(IDS, 5, 0, Synthetic(num_prefixes=3))
    with pytest.raises(ConfigError, match="num_prefixes and sessions_per_prefix say the same thing"):
        prefix_repetition(IDS, 5, 0, Synthetic(num_prefixes=3), 2)
