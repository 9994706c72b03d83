"""Traces: arrivals, lengths, and prompts that share exactly what the trace says."""

from __future__ import annotations

import gzip
import json
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from memserve.bench.tokens import Tokens, Vocabulary
from memserve.bench.traces import read_azure, read_mooncake
from memserve.bench.workload import Piece, expand
from memserve.errors import WorkloadError

VOCABULARY = Vocabulary(seed=0, size=490, first_id=10)
HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens"


def mooncake_row(at_ms: float, num_input: int, num_output: int, hash_ids: list[int]) -> str:
    return json.dumps(
        {"timestamp": at_ms, "input_length": num_input, "output_length": num_output, "hash_ids": hash_ids}
    )


def write(path: Path, *lines: str) -> Path:
    data = "".join(line + "\n" for line in lines).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def common(a: Piece, b: Piece) -> int:
    """Tokens that two prompts share from the start."""
    pairs = zip(expand(a), expand(b), strict=False)
    return next((at for at, (x, y) in enumerate(pairs) if x != y), min(len(a), len(b)))


def test_prompts_share_exactly_the_blocks_whose_hash_ids_agree(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows: list[tuple[int, list[int]]] = []
    parents: list[list[int]] = [[]]
    for number in range(60):
        kept = parents[rng.integers(len(parents))]
        chain = kept[: rng.integers(len(kept) + 1)] + [1000 + 10 * number + n for n in range(3)]
        parents.append(chain)
        rows.append((512 * len(chain) - int(rng.integers(0, 500)), chain))
    lines = [mooncake_row(n, length, 1, chain) for n, (length, chain) in enumerate(rows)]
    prompts = [
        session.turns[0].input
        for session in read_mooncake(write(tmp_path / "t", *lines), VOCABULARY).sessions
    ]
    shared = 0
    for i, (length, chain) in enumerate(rows):
        assert len(prompts[i]) == len(expand(prompts[i])) == length
        for j in range(i):
            agreeing = next(
                (n for n, (a, b) in enumerate(zip(chain, rows[j][1], strict=False)) if a != b), None
            )
            agreeing = min(len(chain), len(rows[j][1])) if agreeing is None else agreeing
            expected = min(512 * agreeing, length, rows[j][0])
            assert common(prompts[i], prompts[j]) == expected
            shared += expected > 0
    assert shared > 50


def test_a_row_becomes_a_session_at_its_time(tmp_path: Path) -> None:
    file = write(
        tmp_path / "trace.jsonl.gz",
        mooncake_row(3000, 513, 7, [1, 2]),
        mooncake_row(1500, 512, 0, [1]),
        mooncake_row(1500.5, 1, 9, [4]),
    )
    sessions = read_mooncake(file, VOCABULARY).sessions
    assert [session.id for session in sessions] == ["row-2", "row-3", "row-1"]
    assert [session.at_s for session in sessions] == pytest.approx([0.0, 0.0005, 1.5])
    assert [session.turns[0].max_tokens for session in sessions] == [1, 9, 7]
    assert all(session.turns[0].output is None and session.prefix_id is None for session in sessions)
    assert sessions[2].turns[0].input == Tokens(VOCABULARY, [1, 2], [512, 1])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (mooncake_row(0, 513, 1, [1]), "513 tokens are 2 blocks of 512, but there are 1 hash ids"),
        (mooncake_row(0, 512, 1, [1, 2]), "512 tokens are 1 blocks of 512, but there are 2 hash ids"),
        (mooncake_row(0, 0, 1, []), "`int` >= 1"),
        (mooncake_row(0, -5, 1, [1]), "`int` >= 1"),
        (mooncake_row(0, 10**12, 1, [1]), "`int` <= 10000000"),
        (mooncake_row(0, 5, -1, [1]), "`int` >= 0"),
        (mooncake_row(0, 5, 1, [-1]), "`int` >= 0"),
        (mooncake_row(0, 5, 1, [2**63]), "`int` <= 9223372036854775807"),
        (mooncake_row(-1, 5, 1, [1]), "`float` >= 0"),
        ('{"timestamp": NaN, "input_length": 5, "output_length": 1, "hash_ids": [1]}', "malformed"),
        ('{"timestamp": 0, "input_length": 5, "output_length": 1}', "missing required field `hash_ids`"),
        ('{"timestamp": "0", "input_length": 5, "output_length": 1, "hash_ids": [1]}', "got `str`"),
        ("{", "truncated"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path: Path, row: str, message: str) -> None:
    file = write(tmp_path / "trace.jsonl", mooncake_row(0, 5, 1, [1]), "", row)
    with pytest.raises(WorkloadError, match=rf"trace\.jsonl:3: .*{message}"):
        read_mooncake(file, VOCABULARY)


def test_azure_rows_share_nothing_and_keep_their_lengths(tmp_path: Path) -> None:
    file = write(
        tmp_path / "azure.csv.gz",
        HEADER,
        "2023-11-16 18:17:03.9799600,480,10",
        "2023-11-16 18:17:04.0319600,31,0",
        "2023-11-16 18:17:03.4799600,480,5",
    )
    sessions = read_azure(file, VOCABULARY).sessions
    assert [session.at_s for session in sessions] == pytest.approx([0.0, 0.5, 0.552], abs=1e-5)
    assert [len(expand(session.turns[0].input)) for session in sessions] == [480, 480, 31]
    assert [session.turns[0].max_tokens for session in sessions] == [5, 10, 1]
    assert common(sessions[0].turns[0].input, sessions[1].turns[0].input) == 0


@pytest.fixture
def far_from_greenwich(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


@pytest.mark.usefixtures("far_from_greenwich")
def test_azure_columns_are_found_by_name_and_times_may_have_a_zone(tmp_path: Path) -> None:
    file = write(
        tmp_path / "azure.csv",
        "\ufeffContextTokens, GeneratedTokens, TIMESTAMP",
        "5,6,2024-05-10 00:00:01+00:00",
        "7,8,2024-05-10 00:00:00",
    )
    sessions = read_azure(file, VOCABULARY).sessions
    assert [(len(session.turns[0].input), session.at_s) for session in sessions] == [(7, 0.0), (5, 1.0)]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("2023-11-16 18:17:03,480", "2 cells are too few"),
        ("yesterday,480,5", "Invalid isoformat string: 'yesterday'"),
        ("2023-11-16 18:17:03,-1,5", "`int` >= 1"),
        ("2023-11-16 18:17:03,many,5", "Expected `int`, got `str`"),
        ("2023-11-16 18:17:03,1.5,5", "Expected `int`, got `str`"),
        ("2023-11-16 18:17:03,5,-5", "`int` >= 0"),
    ],
)
def test_a_bad_azure_row_is_named(tmp_path: Path, row: str, message: str) -> None:
    file = write(tmp_path / "azure.csv", HEADER, "2023-11-16 18:17:03,5,5", row)
    with pytest.raises(WorkloadError, match=rf"azure\.csv:3: .*{message}"):
        read_azure(file, VOCABULARY)


def test_an_azure_file_without_rows_or_columns_is_named(tmp_path: Path) -> None:
    with pytest.raises(WorkloadError, match=r"azure\.csv:1: the header has no column GeneratedTokens"):
        read_azure(write(tmp_path / "azure.csv", "TIMESTAMP,ContextTokens"), VOCABULARY)
    for lines in ((), (HEADER,)):
        with pytest.raises(WorkloadError, match=r"azure\.csv: there are no rows in it"):
            read_azure(write(tmp_path / "azure.csv", *lines), VOCABULARY)
    with pytest.raises(WorkloadError, match=r"none\.csv: cannot be read: No such file"):
        read_azure(tmp_path / "none.csv", VOCABULARY)


def test_a_trace_of_long_prompts_stays_small(tmp_path: Path) -> None:
    """2,000 prompts of 100k tokens: 200 million tokens, 1.6 GB as numbers."""
    chain = list(range(196))
    rows = [mooncake_row(n, 100_000, 1, [*chain[:-1], 1000 + n]) for n in range(2000)]
    file = write(tmp_path / "trace.jsonl", *rows)
    tracemalloc.start()
    draft = read_mooncake(file, VOCABULARY)
    used, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(draft.sessions) == 2000 and used < 20e6
