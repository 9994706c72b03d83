"""The seam between workloads and load generator: sessions of turns, and nothing that reads or sends.

A workload is a list of sessions; a session's request k has the prompt

    input_1 + output_1 + input_2 + output_2 + … + input_k          (append-only)

as text or as token ids, one kind throughout a workload (`Workload.is_text`). What sessions share they share
by content alone: equal beginnings, as a server's cache sees them.

Pieces are a str, a tuple of token ids, or a small lazy object (`LazyPiece`) that makes its text or ids when
asked: a trace of 20,000 prompts of 100k tokens must not stand in memory. So a load generator never looks at
a piece: it calls `expand(piece)` or `join_prompt(pieces)` shortly before it sends, and drops what they
return. Both are pure: the same piece always expands to the same value. Everything here is immutable.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol


class LazyPiece(Protocol):
    """Text or token ids that are made when needed."""

    def expand(self) -> str | list[int]:
        """The text or the ids; the caller owns them. Costs microseconds to milliseconds (10 ns a token)."""
        ...

    def __len__(self) -> int:
        """Tokens, without expanding."""
        ...


Piece = str | tuple[int, ...] | LazyPiece


@dataclass(frozen=True, slots=True)
class Turn:
    """One request of a session.

    Args:
        input: what the client adds to the conversation in this turn (first turn: the whole prompt, shared
            prefix included).
        output: the logged answer: what a replayed (teacher-forced) run appends before the next turn. None:
            there is none, only live answers. May be empty text where the log has no answer.
        max_tokens: how long the answer is to be, at least 1 (a run asks for exactly that, with ignore_eos
            where the server knows it).
    """

    input: Piece
    output: Piece | None
    max_tokens: int


@dataclass(frozen=True, slots=True)
class Session:
    """A conversation: its turns in causal order, at least one.

    Args:
        id: unique within the workload.
        turns: the requests.
        at_s: arrival of the first turn from a trace, seconds after the trace's start; None: the load
            generator decides.
        conversation: which one it belongs to, where a trace has each request as a session of its own; None:
            it is one itself.
    """

    id: str
    turns: tuple[Turn, ...]
    at_s: float | None = None
    conversation: str | None = None


@dataclass(frozen=True, slots=True)
class Workload:
    """What a run sends. Sessions stand in order of arrival where they have one.

    Args:
        name: short, for file names and tables (`react_hotpotqa`, `mooncake`, `sharegpt-like`).
        sessions: at least one.
        is_text: True: every piece is text; False: every piece is token ids.
        description: one line for reports: source, scaling and truncation, seed.
    """

    name: str
    sessions: tuple[Session, ...]
    is_text: bool
    description: str = ""

    @property
    def num_requests(self) -> int:
        """Turns of all sessions."""
        return sum(len(session.turns) for session in self.sessions)

    @property
    def has_arrivals(self) -> bool:
        """Whether every session knows its arrival."""
        return all(session.at_s is not None for session in self.sessions)


def expand(piece: Piece) -> str | list[int]:
    """The text or the token ids of a piece; the caller owns the list."""
    if isinstance(piece, str):
        return piece
    return list(piece) if isinstance(piece, tuple) else piece.expand()


def join_prompt(pieces: Iterable[Piece]) -> str | list[int]:
    """One prompt from pieces of one kind, at least one piece."""
    parts = [expand(piece) for piece in pieces]
    texts = [part for part in parts if isinstance(part, str)]
    if texts:
        assert len(texts) == len(parts), "text and token ids in one prompt"
        return "".join(texts)
    assert parts, "a prompt of no pieces"
    return [token for part in parts if not isinstance(part, str) for token in part]
