"""Answers are read as they come, or refused: nothing else is raised whatever they are."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memserve.top.snapshot import Worker, WorkerLoad, read_requests, read_samples, read_workers
from tests.top.recordings import body


def test_recorded() -> None:
    workers = read_workers(body("after.workers.json"))
    assert [(worker.id, worker.role, worker.state) for worker in workers[:3:2]] == [
        ("prefill-0", "prefill", "ready"),
        ("decode-0", "decode", "ready"),
    ]
    load = workers[0].load
    assert load.num_blocks == load.free_blocks + load.active_blocks + load.historical_blocks > 0
    assert load.steps > 0 and workers[0].block_bytes > 0
    requests = read_requests(body("after.requests.json"))
    assert {request.state for request in requests} == {"prefilling", "decoding", "finished"}
    assert any(request.cached_tokens and request.cached_tokens.pulled for request in requests)
    samples = read_samples(body("after.metrics.txt"))
    assert samples["memserve_prompt_tokens_total", ""] > 0
    assert samples["memserve_time_to_first_token_seconds_bucket", "+Inf"] > 0
    assert samples["memserve_requests", "running"] == 5


def test_what_other_versions_leave_out_or_add() -> None:
    assert read_workers(b'{"data": [{"id": "w", "new": [1], "load": {"new": 2}}]}') == [
        Worker("w", load=WorkerLoad())
    ]
    (request,) = read_requests(b'{"data": [{"id": "r"}]}')
    assert request.cached_tokens is request.ttft_ms is None


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"<html>",
        b'{"data": [], "new": ' + b"[" * 100_000,
        b'{"data": {}}',
        b'{"data": [{"id": 1}]}',
        b'{"data": [{}]}',
        b'{"data": [{"id": "x", "incarnation": -1, "age_ms": -1}]}',
        b'{"data": [{"id": "x", "incarnation": 1e999, "age_ms": 1e999}]}',
        b'{"data": [{"id": "x", "incarnation": %d, "prompt_tokens": %d}]}' % (10**400, 10**400),
        b"\xff\xfe",
    ],
)
def test_garbage_is_a_value_error(text: bytes) -> None:
    for read in (read_workers, read_requests):
        with pytest.raises(ValueError):
            read(text)
    with contextlib.suppress(ValueError):
        assert read_samples(text) == {}


def test_numbers_that_make_no_sense_are_left_out() -> None:
    samples = read_samples(
        b"memserve_pulls_total NaN\nmemserve_refused_total +Inf\nmemserve_prompt_tokens_total 3\n"
        b'memserve_requests{state="running",more="x"} 1\nforeign{{{ 1\n# TYPE broken\n'
    )
    assert samples == {("memserve_prompt_tokens_total", ""): 3.0}


@pytest.mark.parametrize(
    "line",
    [
        b"memserve_pulls_total",
        b"memserve_pulls_total{",
        b'memserve_pulls_total{a="} 1',
        b"memserve_pulls_total{,} 1",
        b"memserve_pulls_total x",
        b"memserve_pulls_total " + b"9" * 5000,
        b"memserve_pulls_total " + b"9" * 400,
        b"memserve_pulls_total \xff",
    ],
)
def test_broken_metrics(line: bytes) -> None:
    with contextlib.suppress(ValueError):
        assert set(read_samples(line)) <= {("memserve_pulls_total", "")}


@given(st.text(alphabet='{}",=\\ \t#1eN.a', max_size=30))
def test_any_rest_of_a_line(rest: str) -> None:
    with contextlib.suppress(ValueError):
        read_samples(f"memserve_pulls_total{rest}".encode())
