"""What is simulated is what the benchmark would send."""

from __future__ import annotations

import gzip
from pathlib import Path

import msgspec
import numpy as np
import pytest

from memserve.bench.load import LoadOptions, arrival_times
from memserve.bench.text_tokens import TextTokens
from memserve.bench.workload_spec import Source, WorkloadSpec, load_workload
from memserve.errors import WorkloadError
from memserve.simulate.clients import Clients, Question
from memserve.simulate.traces import Trace, read_trace


def asked(trace: Trace) -> list[Question]:
    """All requests, answered at once, in the order in which they are asked."""
    clients, questions = Clients(trace), []
    for _, session in clients.arrivals():
        question: Question | None = clients.begin(session)
        while question is not None:
            questions.append(question)
            then = clients.answered(question)
            assert then is None or isinstance(then[1], Question)
            question = None if then is None else then[1]
    return questions


def write(path: Path, *rows: object) -> Path:
    path.write_bytes(gzip.compress(b"\n".join(map(msgspec.json.encode, rows))))
    return path


def test_mooncake_rows_share_blocks_and_conversations(tmp_path: Path) -> None:
    rows = [
        {"timestamp": 500, "input_length": 1300, "output_length": 7, "hash_ids": [0, 5, 6]},
        {"timestamp": 3000, "input_length": 1100, "output_length": 0, "hash_ids": [0, 5, 9]},
    ]
    trace = read_trace(write(tmp_path / "trace.jsonl.gz", *rows))
    first, second = asked(trace)
    assert (trace.dues, trace.block_size, trace.lengths()) == ((0.0, 2.5), 512, [(1300, 7), (1100, 1)])
    assert (first.session, second.session, len(first.answer), len(second.answer)) == ("5", "5", 7, 1)
    assert np.array_equal(first.prompt[:1024], second.prompt[:1024])
    assert not np.array_equal(first.prompt[1024:1100], second.prompt[1024:1100])
    assert read_trace(tmp_path / "trace.jsonl.gz", limit=1).num_requests == 1


def test_sessions_grow_turn_by_turn(tmp_path: Path) -> None:
    turns = [{"in": "a" * 200, "out": "b" * 80}, {"in": "c" * 99, "out": ""}]
    write(tmp_path / "sessions.jsonl.gz", {"id": "s", "prefix": "p", "turns": turns})
    write(tmp_path / "prefixes.jsonl.gz", {"id": "p", "text": "x" * 64})
    trace = read_trace(tmp_path)
    first, second = asked(trace)
    assert (len(first.prompt), len(first.answer), len(second.prompt)) == (66, 20, 66 + 20 + 25)
    assert np.array_equal(second.prompt[:86], np.concatenate([first.prompt, first.answer]))
    assert trace.lengths() == [(66, 20), (111, 128)]


def test_equal_traces_ask_the_same(tmp_path: Path) -> None:
    turns = [{"in": f"{i} " * 50, "out": "b" * 80} for i in range(3)]
    write(tmp_path / "sessions.jsonl.gz", *({"id": str(i), "turns": turns} for i in range(5)))
    one, other = read_trace(tmp_path, rate=3.0, seed=7), read_trace(tmp_path, rate=3.0, seed=7)
    assert one.dues == other.dues != read_trace(tmp_path, rate=3.0, seed=8).dues
    for a, b in zip(asked(one), asked(other), strict=True):
        assert a.session == b.session and np.array_equal(a.prompt, b.prompt)


def test_the_report_of_a_run_repeats_it(tmp_path: Path) -> None:
    words = "memserve bench serve sharegpt-like --sessions 5 --rate 3 --seed 4 --think-time exp:0.5"
    path = tmp_path / "report.json"
    path.write_bytes(msgspec.json.encode({"command": words.split(), "report": {}}))
    trace = read_trace(path)
    spec = WorkloadSpec(Source.SHAREGPT_LIKE, seed=4)
    workload = load_workload(
        WorkloadSpec(spec.source, seed=4, shape=type(spec.shape)(num_sessions=5)), TextTokens()
    )
    dues = arrival_times(workload.sessions, LoadOptions(rate=3.0, seed=4))
    assert trace.dues == tuple(dues or ())
    assert (trace.answers, trace.think.mean_s, trace.block_size) == ("replayed", 0.5, 16)
    first = asked(trace)[0]
    assert np.array_equal(first.prompt, trace.ids(workload.sessions[0].turns[0].input))
    # what was drawn is not the logged answer that the next turn goes on with
    assert (first.answer < 0).all()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("bench compare a b random", "only one of bench serve"),
        ("bench serve random --nonsense", "No such option"),
        ("bench serve random --rate 2 --concurrency 3", "not simulated"),
    ],
)
def test_other_reports_are_refused(tmp_path: Path, words: str, said: str) -> None:
    path = tmp_path / "report.json"
    path.write_bytes(msgspec.json.encode({"command": ["memserve", *words.split()]}))
    with pytest.raises(WorkloadError, match=said):
        read_trace(path)
