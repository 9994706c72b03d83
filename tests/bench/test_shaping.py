"""Selecting, scaling and truncating: limits hold, and what was shared stays shared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import memserve
from memserve.bench.shaping import Draft, DraftSession, Shape, shape
from memserve.bench.text_tokens import TextTokens
from memserve.bench.tokens import Tokens, Vocabulary
from memserve.bench.workload import Piece, Session, Turn, expand, join_prompt
from memserve.errors import ConfigError

ESTIMATE = TextTokens()
EXACT = TextTokens.load(Path(memserve.__file__).parent / "tiny_model")
IDS = Vocabulary(seed=0, size=490, first_id=10)
WORDS = "the cat sat on a mat and saw two small birds near an old house by their river "


def text(num_tokens: int, start: int = 0) -> str:
    """About so many tokens of plain text."""
    return (WORDS * (num_tokens // 4 + 1))[start : start + 4 * num_tokens]


def make_ids(key: int, num_tokens: int) -> Tokens:
    return Tokens(IDS, [key], [num_tokens])


def make_draft(num_sessions: int, *, per_prefix: int, num_turns: int = 1, as_text: bool = False) -> Draft:
    """Sessions of 100 shared tokens, then turns of 10 in and 5 out."""
    prefixes: dict[str, Piece] = {}
    sessions = []
    for number in range(num_sessions):
        name = f"p{number // per_prefix}"
        prefixes[name] = text(100, 7 * len(name)) if as_text else make_ids(1000 + number // per_prefix, 100)
        pieces = [(f" Question {number}.{n}" + text(6), text(5)) for n in range(num_turns)]
        turns = [
            Turn(a, b, 5) if as_text else Turn(make_ids(9 * number + n, 10), make_ids(500 + number, 5), 5)
            for n, (a, b) in enumerate(pieces)
        ]
        sessions.append(DraftSession(f"s{number}", tuple(turns), name))
    return Draft(tuple(sessions), prefixes)


def prompts(session: Session) -> list[str | list[int]]:
    """Every request's prompt, logged answers included."""
    pieces: list[Piece] = []
    result = []
    for turn in session.turns:
        pieces.append(turn.input)
        result.append(join_prompt(pieces))
        pieces += [] if turn.output is None else [turn.output]
    return result


def length(prompt: str | list[int], counter: TextTokens = ESTIMATE) -> int:
    return counter.count(prompt) if isinstance(prompt, str) else len(prompt)


def shaped(draft: Draft, counter: TextTokens = ESTIMATE, seed: int = 0, **options: Any) -> list[Session]:
    """In the draft's order, so that sessions can be compared."""
    order = {session.id: at for at, session in enumerate(draft.sessions)}
    return sorted(shape(draft, Shape(**options), counter, seed), key=lambda session: order[session.id])


def test_prefix_and_first_turn_become_one_piece() -> None:
    draft = make_draft(2, per_prefix=2, num_turns=2)
    one, two = shaped(draft)
    assert expand(one.turns[0].input) == [
        *expand(draft.prefixes["p0"]),
        *expand(draft.sessions[0].turns[0].input),
    ]
    assert one.turns[1] == draft.sessions[0].turns[1]
    assert prompts(one)[0][:100] == prompts(two)[0][:100] and prompts(one)[0] != prompts(two)[0]


@pytest.mark.parametrize("counter", [ESTIMATE, EXACT], ids=["estimate", "tokenizer"])
@pytest.mark.parametrize("as_text", [False, True], ids=["ids", "text"])
def test_truncation_cuts_documents_and_keeps_questions(as_text: bool, counter: TextTokens) -> None:
    draft = make_draft(6, per_prefix=3, as_text=as_text)
    sessions = shaped(draft, counter, max_prompt_tokens=60)
    assert len(sessions) == 6
    for session, before in zip(sessions, draft.sessions, strict=True):
        (prompt,) = prompts(session)
        question = expand(before.turns[0].input)
        assert 50 < length(prompt, counter) <= 60
        # The question stands whole behind what is left of the document, …
        assert prompt[-len(question) :] == question
    for first in (0, 3):
        heads = {
            str(prompts(session)[0][: -len(expand(before.turns[0].input))])
            for session, before in zip(sessions[first : first + 3], draft.sessions[first:], strict=False)
        }
        # … and that is the same in all sessions that share the document.
        assert len(heads) == 1


def test_a_prefix_gives_way_to_half_the_limit_and_then_turns_do() -> None:
    draft = make_draft(2, per_prefix=2, num_turns=20)
    sessions = shaped(draft, max_prompt_tokens=80)
    for session in sessions:
        # 40 tokens of prefix; 10 + 5 + 10 + 5 + 10 = 40 of turns.
        assert [length(prompt) for prompt in prompts(session)] == [50, 65, 80]
    one, two = sessions
    assert prompts(one)[0][:40] == prompts(two)[0][:40] == expand(draft.prefixes["p0"])[:40]


def test_answers_that_were_not_logged_count_as_long_as_they_are_asked_for() -> None:
    turns = (Turn(make_ids(1, 10), None, 100), Turn(make_ids(2, 10), None, 100))
    draft = Draft((DraftSession("s", turns),))
    assert len(shaped(draft, max_prompt_tokens=119)[0].turns) == 1
    assert len(shaped(draft, max_prompt_tokens=120)[0].turns) == 2


def test_a_first_turn_that_is_too_long_is_cut_at_its_end() -> None:
    turns = (Turn(make_ids(1, 50), None, 5), Turn(make_ids(2, 10), None, 5))
    (session,) = shaped(Draft((DraftSession("s", turns),)), max_prompt_tokens=30)
    assert prompts(session) == [expand(make_ids(1, 30))]


@pytest.mark.parametrize("counter", [ESTIMATE, EXACT], ids=["estimate", "tokenizer"])
@given(data=st.data(), limit=st.integers(2, 60))
def test_no_prompt_of_text_is_over_the_limit(counter: TextTokens, data: st.DataObject, limit: int) -> None:
    piece = st.text("ab é\n🦆", max_size=40)
    turn = st.builds(Turn, piece.filter(bool), st.none() | piece, st.integers(1, 10))
    turns = st.lists(turn, min_size=1, max_size=4).map(tuple)
    sessions = data.draw(
        st.lists(st.tuples(turns, st.sampled_from(["p", "q", None])), min_size=1, max_size=4)
    )
    prefixes: dict[str, Piece] = {"p": data.draw(piece), "q": data.draw(piece)}
    draft = Draft(
        tuple(DraftSession(str(at), turns, prefix) for at, (turns, prefix) in enumerate(sessions)), prefixes
    )
    for session in shaped(draft, counter, max_prompt_tokens=limit):
        assert session.turns and all(length(prompt, counter) <= limit for prompt in prompts(session))


@given(
    st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=6), min_size=2, max_size=6), st.integers(2, 60)
)
def test_truncated_prompts_share_what_they_shared(chains: list[list[int]], limit: int) -> None:
    sessions = [
        DraftSession(str(at), (Turn(Tokens(IDS, chain, [10] * len(chain)), None, 1),))
        for at, chain in enumerate(chains)
    ]
    draft = Draft(tuple(sessions))
    for session, before in zip(shaped(draft, max_prompt_tokens=limit), draft.sessions, strict=True):
        assert prompts(session)[0] == list(expand(before.turns[0].input))[:limit]


def test_length_scale_changes_every_length_and_keeps_sharing() -> None:
    sessions = shaped(make_draft(2, per_prefix=2, num_turns=2), length_scale=0.5)
    for session in sessions:
        assert [len(turn.input) for turn in session.turns] == [55, 5]
        assert [turn.max_tokens for turn in session.turns] == [2, 2]
        assert all(turn.output is not None and len(turn.output) == 2 for turn in session.turns)
    assert prompts(sessions[0])[0][:50] == prompts(sessions[1])[0][:50]
    longer = shaped(make_draft(1, per_prefix=1), length_scale=3)
    assert len(longer[0].turns[0].input) == 330 and longer[0].turns[0].max_tokens == 15


def test_text_can_be_made_shorter_only() -> None:
    draft = make_draft(2, per_prefix=2, as_text=True)
    (session, _) = shaped(draft, length_scale=0.5)
    whole = ESTIMATE.count(f"{draft.prefixes['p0']}{draft.sessions[0].turns[0].input}")
    assert length(prompts(session)[0]) == pytest.approx(whole / 2, abs=2)
    with pytest.raises(ConfigError, match="text cannot be made longer: length_scale is 1.5, at most 1"):
        shaped(draft, length_scale=1.5)


def test_answers_have_a_limit() -> None:
    (session,) = shaped(make_draft(1, per_prefix=1), max_output_tokens=3)
    (turn,) = session.turns
    assert turn.max_tokens == 3 and turn.output is not None and len(turn.output) == 3


def test_time_scale_stretches_arrivals_and_keeps_their_order() -> None:
    sessions = tuple(DraftSession(str(n), (Turn(make_ids(n, 5), None, 1),), at_s=n * 2.0) for n in range(50))
    result = shape(Draft(sessions), Shape(time_scale=1.5, num_sessions=20), ESTIMATE, 0)
    assert [(session.id, session.at_s) for session in result] == [(str(n), n * 3.0) for n in range(20)]


def test_a_sharing_ratio_chooses_few_prefixes_and_many_sessions_of_each() -> None:
    draft = make_draft(40, per_prefix=4)
    prefix_of = {session.id: session.prefix_id for session in draft.sessions}
    for ratio, num_prefixes in ((1, 10), (2, 6), (4, 3)):
        chosen = shape(draft, Shape(num_sessions=12, sessions_per_prefix=ratio), ESTIMATE, 1)
        used = [prefix_of[session.id] for session in chosen]
        assert len(chosen) == min(12, 10 * ratio) and len(set(used)) == num_prefixes
        assert max(used.count(name) for name in set(used)) == ratio


@pytest.mark.parametrize("num_requests", [1, 3, 4, 7, 100])
def test_so_many_requests_and_no_more(num_requests: int) -> None:
    sessions = shape(make_draft(5, per_prefix=5, num_turns=3), Shape(num_requests=num_requests), ESTIMATE, 0)
    assert sum(len(session.turns) for session in sessions) == min(15, num_requests)
    assert sum(len(session.turns) < 3 for session in sessions) <= 1


def test_the_seed_settles_choice_and_order() -> None:
    draft = make_draft(30, per_prefix=3)
    options = Shape(num_sessions=10)
    assert shape(draft, options, ESTIMATE, 5) == shape(draft, options, ESTIMATE, 5)
    chosen = {seed: [session.id for session in shape(draft, options, ESTIMATE, seed)] for seed in (5, 6)}
    assert set(chosen[5]) != set(chosen[6])
    unshuffled = shape(draft, Shape(num_sessions=10, shuffle=False), ESTIMATE, 5)
    assert [session.id for session in unshuffled] == [f"s{n}" for n in range(10)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_sessions": 0}, "num_sessions must be at least 1, not 0"),
        ({"num_requests": -1}, "num_requests must be at least 1"),
        ({"sessions_per_prefix": 0}, "sessions_per_prefix must be at least 1"),
        ({"max_output_tokens": 0}, "max_output_tokens must be at least 1"),
        ({"max_prompt_tokens": 1}, "max_prompt_tokens must be at least 2"),
        ({"length_scale": 0.0}, "length_scale must be a positive number"),
        ({"time_scale": float("nan")}, "time_scale must be a positive number"),
        ({"time_scale": float("inf")}, "time_scale must be a positive number"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Shape(**options)
