"""Requests to simulate, from files: Mooncake's traces (an id for each 512 tokens) and session files (text).

Pure but for reading the files. A trace is open (each request has its time) or of sessions, whose next turn
comes when the one before is answered.
"""

from __future__ import annotations

import gzip
import random
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Annotated, NamedTuple, cast

import msgspec
import numpy as np

MOONCAKE_BLOCK_TOKENS = 512
SESSION_BLOCK_TOKENS = 16
# A token of English is about so many characters. Sessions only need lengths, and equal prefixes to be equal.
_TOKEN_CHARS = 4


@dataclass(slots=True, eq=False)
class Job:
    """One request. `ids` are its prompt's whole blocks, `ids_after` with what was drawn, as far as the trace
    tells. `at_s` is when it arrives, for the later turns of a session once the turn before is answered;
    `then` is the next turn.
    """

    session: str
    ids: bytes
    ids_after: bytes
    num_tokens: int
    num_new_tokens: int
    at_s: float = 0.0
    then: Job | None = None


class Trace(NamedTuple):
    """First turns in order of time. `ids_per_block` int32 ids stand for each block of `block_size` tokens."""

    jobs: Sequence[Job]
    block_size: int
    ids_per_block: int

    def all_jobs(self) -> Iterator[Job]:
        """With the later turns."""
        for first in self.jobs:
            job: Job | None = first
            while job is not None:
                yield job
                job = job.then

    def stretched(self, factor: float) -> Trace:
        """The same with all times multiplied, in place."""
        for job in self.jobs:
            job.at_s *= factor
        return self


class _MooncakeRow(msgspec.Struct):
    timestamp: Annotated[float, msgspec.Meta(ge=0)]
    input_length: Annotated[int, msgspec.Meta(ge=0)]
    output_length: Annotated[int, msgspec.Meta(ge=0)]
    hash_ids: Annotated[list[int], msgspec.Meta(min_length=1)]


class _Turn(msgspec.Struct):
    in_: str = msgspec.field(name="in")
    out: str = ""


class _Session(msgspec.Struct):
    id: str
    turns: list[_Turn]
    prefix: str | None = None


class _Prefix(msgspec.Struct):
    id: str
    text: str


def read_mooncake(path: Path, limit: int | None = None) -> Trace:
    """A Mooncake trace (.jsonl, .jsonl.gz), its first `limit` rows. A conversation's requests share their
    second block (the first may be everybody's). What was drawn is not in it, so it is never found again.
    """
    jobs: list[Job] = []
    with _open(path) as lines:
        for line in lines:
            if limit is not None and len(jobs) >= limit:
                break
            row = msgspec.json.decode(line, type=_MooncakeRow)
            whole = row.hash_ids[: row.input_length // MOONCAKE_BLOCK_TOKENS]
            ids = np.asarray(whole, dtype="<i4").tobytes()
            session = str(row.hash_ids[min(1, len(row.hash_ids) - 1)])
            num_tokens = max(1, row.input_length)
            jobs.append(Job(session, ids, ids, num_tokens, max(1, row.output_length), row.timestamp / 1e3))
    return Trace(jobs, MOONCAKE_BLOCK_TOKENS, 1)


def read_sessions(folder: Path, *, rate: float, seed: int = 0, limit: int | None = None) -> Trace:
    """A folder of sessions.jsonl.gz and perhaps prefixes.jsonl.gz; sessions begin at random, `rate` a
    second.
    """
    rng = random.Random(seed)
    prefixes = {}
    if (folder / "prefixes.jsonl.gz").exists():
        with _open(folder / "prefixes.jsonl.gz") as lines:
            for line in lines:
                prefix = msgspec.json.decode(line, type=_Prefix)
                prefixes[prefix.id] = prefix.text
    with _open(folder / "sessions.jsonl.gz") as lines:
        sessions = [msgspec.json.decode(line, type=_Session) for line in lines]
    rng.shuffle(sessions)
    jobs, now = [], 0.0
    for session in sessions[:limit]:
        now += rng.expovariate(rate)
        turns = list(_turns(session, prefixes))
        for job, then in zip(turns, turns[1:], strict=False):
            job.then = then
        if turns:
            turns[0].at_s = now
            jobs.append(turns[0])
    return Trace(jobs, SESSION_BLOCK_TOKENS, SESSION_BLOCK_TOKENS)


def _turns(session: _Session, prefixes: dict[str, str]) -> Iterator[Job]:
    text = prefixes[session.prefix] if session.prefix is not None else ""
    for turn in session.turns:
        text += turn.in_
        prompt = _ids_of(text)
        text += turn.out
        after = _ids_of(text)
        num_new = max(1, len(turn.out) // _TOKEN_CHARS)
        yield Job(session.id, _whole(prompt), _whole(after), max(1, len(prompt) // 4), num_new)


def _ids_of(text: str) -> bytes:
    """An int32 for each few characters, the same for the same ones."""
    pieces = [text[at : at + _TOKEN_CHARS] for at in range(0, len(text) - _TOKEN_CHARS + 1, _TOKEN_CHARS)]
    return np.array([zlib.crc32(piece.encode()) >> 1 for piece in pieces], dtype="<i4").tobytes()


def _whole(ids: bytes) -> bytes:
    return ids[: len(ids) // (4 * SESSION_BLOCK_TOKENS) * 4 * SESSION_BLOCK_TOKENS]


def _open(path: Path) -> IO[bytes]:
    return cast(IO[bytes], gzip.open(path)) if path.suffix == ".gz" else path.open("rb")
