"""Reads sessions of turns: one JSON object a line, {"id", "prefix", "turns": [{"in", "out"}]}.

`prefix` names a text of prefixes.jsonl ({"id", "text"} a line) in the same folder, or is absent. Request k of
a session is the prefix, in_1, out_1, …, in_k. Both files may be gzip. Other fields are ignored. An `out` that
is empty or absent has no length to ask for: the caller's default is taken.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from memserve.bench.files import at_line, read_json_rows
from memserve.bench.shaping import Draft, DraftSession
from memserve.bench.text_tokens import TextTokens
from memserve.bench.workload import Piece, Turn
from memserve.errors import WorkloadError

DEFAULT_OUTPUT_TOKENS = 128


class _Turn(msgspec.Struct):
    input: str = msgspec.field(name="in")
    output: str | None = msgspec.field(name="out", default=None)


class _Session(msgspec.Struct):
    id: str
    turns: list[_Turn]
    prefix: str | None = None


class _Prefix(msgspec.Struct):
    id: str
    text: str


def read_sessions(path: Path, text: TextTokens, default_output_tokens: int = DEFAULT_OUTPUT_TOKENS) -> Draft:
    """The sessions of a file, in its order.

    Args:
        path: the file, or a folder with sessions.jsonl(.gz).
        text: counts the tokens of the logged answers, which become `max_tokens`.
        default_output_tokens: for turns without a logged answer.

    Raises WorkloadError.
    """
    file = _with_or_without_gz(path / "sessions.jsonl.gz") if path.is_dir() else path
    prefixes: dict[str, Piece] | None = None
    sessions: dict[str, DraftSession] = {}
    for line, row in read_json_rows(file, _Session):
        if row.id in sessions:
            raise at_line(file, line, f"a second session with the id {row.id!r}")
        if not row.turns:
            raise at_line(file, line, f"session {row.id!r} has no turns")
        if row.prefix is not None:
            if prefixes is None:
                prefixes = _read_prefixes(file)
            if row.prefix not in prefixes:
                raise at_line(file, line, f"session {row.id!r}: there is no prefix {row.prefix!r}")
        if not row.turns[0].input and not (prefixes and row.prefix is not None and prefixes[row.prefix]):
            raise at_line(file, line, f"session {row.id!r} begins with an empty prompt")
        turns = tuple(
            Turn(turn.input, turn.output, text.count(turn.output or "") or default_output_tokens)
            for turn in row.turns
        )
        sessions[row.id] = DraftSession(row.id, turns, row.prefix)
    return Draft(tuple(sessions.values()), prefixes or {})


def _read_prefixes(sessions_file: Path) -> dict[str, Piece]:
    name = "prefixes.jsonl.gz" if sessions_file.suffix == ".gz" else "prefixes.jsonl"
    file = _with_or_without_gz(sessions_file.parent / name)
    prefixes: dict[str, Piece] = {}
    for line, row in read_json_rows(file, _Prefix):
        if row.id in prefixes:
            raise at_line(file, line, f"a second prefix with the id {row.id!r}")
        prefixes[row.id] = row.text
    return prefixes


def _with_or_without_gz(path: Path) -> Path:
    """The path, or its twin with or without .gz where only that exists. Raises WorkloadError."""
    twin = path.with_suffix("") if path.suffix == ".gz" else path.with_name(path.name + ".gz")
    for file in (path, twin):
        if file.exists():
            return file
    raise WorkloadError(f"{path}: there is no such file (nor {twin.name})")
