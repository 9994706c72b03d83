"""Fits a workload to a machine: fewer sessions, shorter texts, another pace; what is shared stays shared.

Readers and generators give a `Draft`: sessions whose shared prefix still stands apart from their turns.
`shape` selects, scales, truncates, and puts prefix and first turn together. Pure: equal drafts, options and
seed give equal sessions.

Everything that is cut is cut at its end, to a length that depends on the text and the limits alone, and a
prefix once for all its sessions: beginnings that were equal stay equal. (Prompts that differed only past
the limit become equal, so truncation can raise the share of reusable tokens; `length_scale` keeps it.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from memserve.bench.text_tokens import TextTokens
from memserve.bench.tokens import Tokens
from memserve.bench.workload import Piece, Session, Turn
from memserve.errors import ConfigError


@dataclass(frozen=True, slots=True)
class DraftSession:
    """A session without its prefix, which is `Draft.prefixes[prefix_id]`. The rest as in `Session`."""

    id: str
    turns: tuple[Turn, ...]
    prefix_id: str | None = None
    at_s: float | None = None
    conversation: str | None = None


@dataclass(frozen=True, slots=True)
class Draft:
    """What a reader or a generator gives. Pieces are str or Tokens, one kind throughout."""

    sessions: tuple[DraftSession, ...]
    prefixes: dict[str, Piece] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Shape:
    """How to shape a workload. None: leave as it is.

    Args:
        num_sessions: at most so many sessions: the first of a trace, a random choice of others.
        num_requests: at most so many requests (turns): the last session may lose turns.
        sessions_per_prefix: the sharing ratio: at most so many sessions use one prefix (exactly so many in
            generators, whose number of prefixes follows).
        max_prompt_tokens: no request's prompt is longer, logged answers included. A shared prefix gives way
            first, but not below half the limit; then trailing turns are left out; then a first turn is cut.
        max_output_tokens: no answer is longer, asked for or logged.
        length_scale: every prefix, input and answer is so many times as long (text: at most 1).
        time_scale: every arrival is so many times as late: 2 halves the rate of a trace.
        shuffle: bring sessions without arrivals into a random order.
    """

    num_sessions: int | None = None
    num_requests: int | None = None
    sessions_per_prefix: int | None = None
    max_prompt_tokens: int | None = None
    max_output_tokens: int | None = None
    length_scale: float = 1.0
    time_scale: float = 1.0
    shuffle: bool = True

    def __post_init__(self) -> None:
        """Raises ConfigError."""
        least = {"num_sessions": 1, "num_requests": 1, "sessions_per_prefix": 1, "max_output_tokens": 1}
        for name, smallest in (*least.items(), ("max_prompt_tokens", 2)):
            value = getattr(self, name)
            if value is not None and value < smallest:
                raise ConfigError(f"{name} must be at least {smallest}, not {value}")
        for name in ("length_scale", "time_scale"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ConfigError(f"{name} must be a positive number, not {value}")


def shape(draft: Draft, options: Shape, text: TextTokens, seed: int) -> tuple[Session, ...]:
    """The sessions of a run. Raises ConfigError where an option does not fit the workload."""
    rng = np.random.default_rng(seed)
    measure = _Measure(text)
    timed = all(session.at_s is not None for session in draft.sessions)
    chosen = _select(draft.sessions, options, None if timed or not options.shuffle else rng)
    draft = Draft(tuple(chosen), draft.prefixes)
    if options.length_scale != 1.0 or options.max_output_tokens is not None:
        draft = _resize(draft, options, measure)
    if options.max_prompt_tokens is not None:
        draft = _fit(draft, options.max_prompt_tokens, measure)
    sessions = _first_requests(draft.sessions, options.num_requests)
    if options.shuffle and not timed:
        sessions = [sessions[at] for at in rng.permutation(len(sessions))]
    return tuple(_finish(session, draft.prefixes, options.time_scale, measure) for session in sessions)


class _Measure:
    """Length, cutting and joining of pieces of either kind."""

    def __init__(self, text: TextTokens) -> None:
        self._text = text

    def count(self, piece: Piece) -> int:
        return self._text.count(piece) if isinstance(piece, str) else len(piece)

    def cut(self, piece: Piece, num_tokens: int) -> Piece:
        if isinstance(piece, str):
            return self._text.cut(piece, num_tokens)
        assert isinstance(piece, Tokens)
        return piece.cut(num_tokens)

    def join(self, first: Piece, second: Piece) -> Piece:
        if isinstance(first, str):
            assert isinstance(second, str)
            return first + second
        assert isinstance(first, Tokens) and isinstance(second, Tokens)
        return Tokens.concat([first, second])

    def scale(self, piece: Piece, factor: float) -> Piece:
        if factor == 1.0:
            return piece
        if isinstance(piece, Tokens):
            return piece.scale(factor)
        if factor > 1.0:
            raise ConfigError(f"text cannot be made longer: length_scale is {factor:g}, at most 1 for text")
        return self.cut(piece, max(1, round(self.count(piece) * factor)))


def _select(
    sessions: Sequence[DraftSession], options: Shape, rng: np.random.Generator | None
) -> list[DraftSession]:
    """The sessions that stay; with a sharing ratio prefix by prefix, so that few sessions still share."""
    chosen = list(sessions)
    if rng is not None:
        chosen = [chosen[at] for at in rng.permutation(len(chosen))]
    if options.sessions_per_prefix is not None:
        groups: dict[str, list[DraftSession]] = {}
        for session in chosen:
            name = f"session {session.id}" if session.prefix_id is None else f"prefix {session.prefix_id}"
            groups.setdefault(name, []).append(session)
        chosen = [session for group in groups.values() for session in group[: options.sessions_per_prefix]]
    return chosen[: options.num_sessions]


def _resize(draft: Draft, options: Shape, measure: _Measure) -> Draft:
    """Length scale and the limit of answers."""
    factor, limit = options.length_scale, options.max_output_tokens

    def resize(turn: Turn) -> Turn:
        output, max_tokens = turn.output, max(1, round(turn.max_tokens * factor))
        output = None if output is None else measure.scale(output, factor)
        if limit is not None and max_tokens > limit:
            max_tokens = limit
            output = None if output is None else measure.cut(output, limit)
        return Turn(measure.scale(turn.input, factor), output, max_tokens)

    used = {session.prefix_id for session in draft.sessions}
    return Draft(
        tuple(replace(session, turns=tuple(map(resize, session.turns))) for session in draft.sessions),
        {name: measure.scale(prefix, factor) for name, prefix in draft.prefixes.items() if name in used},
    )


def _fit(draft: Draft, limit: int, measure: _Measure) -> Draft:
    """No prompt longer than `limit`: see Shape.max_prompt_tokens."""
    needs = [_body_needs(session.turns, measure) for session in draft.sessions]
    longest: dict[str, int] = {}
    for session, need in zip(draft.sessions, needs, strict=True):
        if session.prefix_id is not None:
            longest[session.prefix_id] = max(longest.get(session.prefix_id, 0), need[-1])
    prefixes = {
        name: measure.cut(draft.prefixes[name], max(limit - body, limit // 2))
        for name, body in longest.items()
    }
    lengths = {name: measure.count(prefix) for name, prefix in prefixes.items()}
    fitted = []
    for session, need in zip(draft.sessions, needs, strict=True):
        prefix = None if session.prefix_id is None else prefixes[session.prefix_id]
        room = limit if session.prefix_id is None else limit - lengths[session.prefix_id]
        num_turns = sum(tokens <= room for tokens in need)
        turns = session.turns[: max(1, num_turns)]
        if num_turns == 0:
            turns = (replace(turns[0], input=measure.cut(turns[0].input, room)),)
        fitted.append(replace(session, turns=_fit_joined(prefix, turns, limit, measure)))
    return Draft(tuple(fitted), prefixes)


def _body_needs(turns: tuple[Turn, ...], measure: _Measure) -> list[int]:
    """Tokens of each request's prompt without the prefix. An answer counts as long as it is logged or asked
    for, whichever is more, so that a run with live answers fits too.
    """
    needs, total = [], 0
    for turn in turns:
        total += measure.count(turn.input)
        needs.append(total)
        total += max(turn.max_tokens, 0 if turn.output is None else measure.count(turn.output))
    return needs


def _fit_joined(
    prefix: Piece | None, turns: tuple[Turn, ...], limit: int, measure: _Measure
) -> tuple[Turn, ...]:
    """Takes off what text has too much because its pieces tokenise differently together than alone."""
    if not isinstance(turns[0].input, str):
        return turns
    assert prefix is None or isinstance(prefix, str)
    while True:
        text = prefix or ""
        for turn in turns[:-1]:
            text += f"{turn.input}{turn.output or ''}"
        excess = measure.count(f"{text}{turns[-1].input}") - limit
        if excess <= 0:
            return turns
        if len(turns) > 1:
            turns = turns[:-1]
            continue
        kept = measure.count(turns[0].input) - excess
        if kept <= 0:
            return (replace(turns[0], input=""),)
        turns = (replace(turns[0], input=measure.cut(turns[0].input, kept)),)


def _first_requests(sessions: Sequence[DraftSession], num_requests: int | None) -> list[DraftSession]:
    """The first sessions with so many turns in all."""
    if num_requests is None:
        return list(sessions)
    kept = []
    for session in sessions:
        if num_requests <= 0:
            break
        kept.append(replace(session, turns=session.turns[:num_requests]))
        num_requests -= len(session.turns)
    return kept


def _finish(
    session: DraftSession, prefixes: dict[str, Piece], time_scale: float, measure: _Measure
) -> Session:
    turns = session.turns
    if session.prefix_id is not None:
        first = replace(turns[0], input=measure.join(prefixes[session.prefix_id], turns[0].input))
        turns = (first, *turns[1:])
    at_s = None if session.at_s is None else session.at_s * time_scale
    return Session(session.id, turns, at_s, session.conversation)
