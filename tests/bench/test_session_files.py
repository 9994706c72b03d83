"""Files of sessions: what they say, and what is said about broken ones."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from memserve.bench.session_files import read_sessions
from memserve.bench.shaping import DraftSession
from memserve.bench.text_tokens import TextTokens
from memserve.bench.workload import Turn
from memserve.errors import WorkloadError

ESTIMATE = TextTokens()

GOOD = {"id": "s1", "prefix": "p1", "turns": [{"in": "Q1", "out": "an answer"}, {"in": "Q2", "out": ""}]}
PREFIX = {"id": "p1", "text": "A document. "}


def write(path: Path, *rows: object) -> Path:
    """Rows as JSON, strings as they are; gzip where the name says so."""
    data = "".join(row + "\n" if isinstance(row, str) else json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.mark.parametrize("sessions_end", ["", ".gz"])
@pytest.mark.parametrize("prefixes_end", ["", ".gz"])
def test_sessions_and_their_prefixes_are_read(tmp_path: Path, sessions_end: str, prefixes_end: str) -> None:
    other = {"id": "s2", "turns": [{"in": "Hello", "in_role": "user"}], "meta": {"unknown": 1}}
    file = write(tmp_path / f"sessions.jsonl{sessions_end}", GOOD, "", other)
    write(tmp_path / f"prefixes.jsonl{prefixes_end}", PREFIX, {"id": "p2", "title": "T", "text": "Other"})
    draft = read_sessions(file, ESTIMATE, default_output_tokens=7)
    assert draft.sessions == (
        DraftSession("s1", (Turn("Q1", "an answer", 3), Turn("Q2", "", 7)), "p1"),
        DraftSession("s2", (Turn("Hello", None, 7),), None),
    )
    assert draft.prefixes == {"p1": "A document. ", "p2": "Other"}
    assert read_sessions(tmp_path, ESTIMATE, default_output_tokens=7) == draft


def test_no_prefixes_are_needed_where_none_is_named(tmp_path: Path) -> None:
    file = write(tmp_path / "chat.jsonl", {"id": "s", "turns": [{"in": "Hello", "out": "Hi"}]})
    assert read_sessions(file, ESTIMATE).prefixes == {}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"id": "s3", "turns": [', "Input data was truncated"),
        ("[]", "Expected `object`, got `array`"),
        ({"turns": [{"in": "x"}]}, "missing required field `id`"),
        ({"id": "s3"}, "missing required field `turns`"),
        ({"id": "s3", "turns": [{"out": "x"}]}, r"missing required field `in` - at `\$\.turns\[0\]`"),
        ({"id": "s3", "turns": [{"in": 5}]}, "Expected `str`, got `int`"),
        ({"id": "s3", "turns": []}, "session 's3' has no turns"),
        ({"id": "s1", "turns": [{"in": "x"}]}, "a second session with the id 's1'"),
        ({"id": "s3", "prefix": "p9", "turns": [{"in": "x"}]}, "session 's3': there is no prefix 'p9'"),
        ({"id": "s3", "turns": [{"in": ""}]}, "session 's3' begins with an empty prompt"),
        ('{"id": "\\ud800", "turns": []}', "JSON is malformed"),
    ],
)
def test_a_bad_line_is_named_by_file_and_number(tmp_path: Path, row: object, message: str) -> None:
    file = write(tmp_path / "sessions.jsonl", GOOD, row)
    write(tmp_path / "prefixes.jsonl", PREFIX)
    with pytest.raises(WorkloadError, match=rf"sessions\.jsonl:2: .*{message}") as caught:
        read_sessions(file, ESTIMATE)
    assert "\n" not in str(caught.value)


def test_bytes_that_are_no_text_are_named(tmp_path: Path) -> None:
    file = tmp_path / "sessions.jsonl"
    file.write_bytes(b'{"id": "\xff", "turns": [{"in": "x"}]}\n')
    with pytest.raises(WorkloadError, match=r"sessions\.jsonl:1: "):
        read_sessions(file, ESTIMATE)


@pytest.mark.parametrize("row", [{"id": "p1"}, {"id": "p1", "text": None}, PREFIX])
def test_a_bad_prefix_is_named(tmp_path: Path, row: object) -> None:
    file = write(tmp_path / "sessions.jsonl", GOOD)
    write(tmp_path / "prefixes.jsonl", PREFIX, row)
    with pytest.raises(WorkloadError, match=r"prefixes\.jsonl:2: "):
        read_sessions(file, ESTIMATE)


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(WorkloadError, match=r"none\.jsonl: cannot be read: No such file"):
        read_sessions(tmp_path / "none.jsonl", ESTIMATE)
    with pytest.raises(
        WorkloadError, match=r"sessions\.jsonl\.gz: there is no such file \(nor sessions\.jsonl\)"
    ):
        read_sessions(tmp_path, ESTIMATE)
    file = write(tmp_path / "sessions.jsonl", GOOD)
    with pytest.raises(WorkloadError, match=r"prefixes\.jsonl: there is no such file"):
        read_sessions(file, ESTIMATE)
    empty = write(tmp_path / "empty.jsonl")
    with pytest.raises(WorkloadError, match=r"empty\.jsonl: there is nothing in it"):
        read_sessions(empty, ESTIMATE)


@pytest.mark.parametrize("damage", ["no gzip", "cut short", "flipped", "rubbish behind the header"])
def test_broken_gzip_is_named(tmp_path: Path, damage: str) -> None:
    file = tmp_path / "sessions.jsonl.gz"
    data = gzip.compress("".join(json.dumps({**GOOD, "id": str(n)}) + "\n" for n in range(50)).encode())
    file.write_bytes(
        {
            "no gzip": b"hello",
            "cut short": data[:-20],
            "flipped": data[:-6] + bytes([data[-6] ^ 1]) + data[-5:],
            "rubbish behind the header": data[:12] + b"\xff" * 50,
        }[damage]
    )
    write(tmp_path / "prefixes.jsonl", PREFIX)
    with pytest.raises(WorkloadError, match=r"sessions\.jsonl\.gz:\d+: the gzip data is broken: "):
        read_sessions(file, ESTIMATE)


def test_a_folder_in_a_files_place_is_named(tmp_path: Path) -> None:
    (tmp_path / "sessions.jsonl").mkdir()
    with pytest.raises(WorkloadError, match=r"sessions\.jsonl: cannot be read: Is a directory"):
        read_sessions(tmp_path, ESTIMATE)
