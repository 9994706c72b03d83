"""Reads published traces, which have arrivals and lengths but no text: token ids are made up.

Mooncake (FAST'25), one JSON object a line: timestamp (ms), input_length, output_length (tokens), hash_ids,
one for each 512 tokens of the prompt, the last block being partial. An id stands for a block *and all before
it*, so equal ids mean an equal prompt up to there. Here an id is the key of a stream of tokens (`tokens.py`):
two prompts share exactly the blocks whose ids they share. Requests with the same second id are taken for one
conversation: the first block may be everybody's.

Azure (Splitwise, ISCA'24), CSV: TIMESTAMP, ContextTokens, GeneratedTokens. Nothing is known of what prompts
share, so they share nothing.

A row becomes a session of one turn; prompts stay lazy, some 16 bytes a block.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import msgspec

from memserve.bench.files import at_line, read_json_rows, read_lines
from memserve.bench.shaping import Draft, DraftSession
from memserve.bench.tokens import Tokens, Vocabulary
from memserve.bench.workload import Turn
from memserve.errors import WorkloadError

MOONCAKE_BLOCK_TOKENS = 512
MAX_TOKENS = 10_000_000
"""No prompt or answer is longer: a longer one is a mistake, and would only show when it is sent."""

MAX_TIMESTAMP_MS = 10**13
"""Three hundred years, so that milliseconds since 1970 are fine too: a later arrival is a mistake."""

_Prompt = Annotated[int, msgspec.Meta(ge=1, le=MAX_TOKENS)]
_Output = Annotated[int, msgspec.Meta(ge=0, le=MAX_TOKENS)]
_HashId = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]

_AZURE_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")


class _MooncakeRow(msgspec.Struct):
    timestamp: Annotated[float, msgspec.Meta(ge=0, le=MAX_TIMESTAMP_MS)]
    input_length: _Prompt
    output_length: _Output
    hash_ids: list[_HashId]


def read_mooncake(path: Path, vocabulary: Vocabulary) -> Draft:
    """A Mooncake trace, plain or gzip, in order of arrival. Raises WorkloadError."""
    sessions = []
    for line, row in read_json_rows(path, _MooncakeRow):
        num_blocks = -(-row.input_length // MOONCAKE_BLOCK_TOKENS)
        if len(row.hash_ids) != num_blocks:
            raise at_line(
                path,
                line,
                f"{row.input_length} tokens are {num_blocks} blocks of {MOONCAKE_BLOCK_TOKENS}, but there "
                f"are {len(row.hash_ids)} hash ids",
            )
        lengths = [MOONCAKE_BLOCK_TOKENS] * num_blocks
        lengths[-1] = row.input_length - (num_blocks - 1) * MOONCAKE_BLOCK_TOKENS
        turn = Turn(Tokens(vocabulary, row.hash_ids, lengths), None, max(1, row.output_length))
        conversation = str(row.hash_ids[min(1, num_blocks - 1)])
        at_s = row.timestamp / 1000
        sessions.append(DraftSession(f"row-{line}", (turn,), at_s=at_s, conversation=conversation))
    return _from_the_start(sessions)


def read_azure(path: Path, vocabulary: Vocabulary) -> Draft:
    """An Azure LLM inference trace, plain or gzip, in order of arrival. Raises WorkloadError."""
    sessions = []
    for line, arrival, num_input, num_output in _azure_rows(path):
        turn = Turn(Tokens(vocabulary, [line], [num_input]), None, max(1, num_output))
        sessions.append(DraftSession(f"row-{line}", (turn,), at_s=arrival.timestamp()))
    return _from_the_start(sessions)


def _azure_rows(path: Path) -> Iterator[tuple[int, datetime, int, int]]:
    """(line, arrival, prompt tokens, answer tokens)."""
    columns: list[int] | None = None
    empty = True
    for line, data in read_lines(path):
        try:
            cells = [cell.strip() for cell in data.decode("utf-8-sig").split(",")]
        except UnicodeDecodeError as error:
            raise at_line(path, line, error) from None
        if columns is None:
            missing = [name for name in _AZURE_COLUMNS if name not in cells]
            if missing:
                raise at_line(path, line, f"the header has no column {missing[0]}")
            columns = [cells.index(name) for name in _AZURE_COLUMNS]
            continue
        if len(cells) <= max(columns):
            raise at_line(path, line, f"{len(cells)} cells are too few")
        when, num_input, num_output = (cells[column] for column in columns)
        try:
            arrival = datetime.fromisoformat(when)
            yield (
                line,
                arrival if arrival.tzinfo is not None else arrival.replace(tzinfo=UTC),
                msgspec.convert(num_input, _Prompt, strict=False),
                msgspec.convert(num_output, _Output, strict=False),
            )
        except (ValueError, msgspec.ValidationError) as error:
            raise at_line(path, line, error) from None
        empty = False
    if empty:
        raise WorkloadError(f"{path}: there are no rows in it")


def _from_the_start(sessions: list[DraftSession]) -> Draft:
    """In order of arrival, counted from the first."""
    arrivals = [session.at_s for session in sessions if session.at_s is not None]
    start = min(arrivals)
    timed = [
        replace(session, at_s=arrival - start) for session, arrival in zip(sessions, arrivals, strict=True)
    ]
    return Draft(tuple(sorted(timed, key=lambda session: session.at_s or 0.0)))
