"""The figures against values worked out by hand."""

from __future__ import annotations

import pytest

from memserve.bench.metrics import distribution, is_good, latencies, parse_goodput, summarize
from memserve.bench.records import ErrorKind, Failure, RequestRecord


def record(
    sent_at: float | None,
    chunks: list[float],
    *,
    tokens: int | None = None,
    prompt: int | None = 10,
    cached: int | None = None,
    error: ErrorKind | None = None,
    ended_at: float | None = None,
    max_tokens: int | None = None,
) -> RequestRecord:
    """Chunks at these times; ended with the last."""
    tokens = len(chunks) if tokens is None else tokens
    return RequestRecord(
        session="s",
        turn=0,
        max_tokens=tokens if max_tokens is None else max_tokens,
        scheduled_at=(sent_at or 0.0) - 0.125,  # how late it was sent is no latency of the server's
        sent_at=sent_at,
        chunk_times=chunks,
        ended_at=ended_at if ended_at is not None else chunks[-1] if chunks else sent_at,
        prompt_tokens=prompt,
        cached_tokens=cached,
        output_tokens=tokens,
        has_usage=prompt is not None,
        error=None if error is None else Failure(error, "why"),
    )


# sent, then the chunks:      TTFT   TPOT          ITL            JCT
FIRST = record(1.0, [1.5, 1.7, 2.0], cached=0)  # 500    500/2 = 250   200, 300       1000
SECOND = record(2.0, [2.1, 2.5], prompt=30, cached=20)  # 100    400           400            500
ONE_TOKEN = record(0.0, [0.3], prompt=20, cached=None)  # 300    none          none           300
TWO_IN_A_CHUNK = record(3.0, [3.2, 3.8], tokens=4, max_tokens=5)  # 200    600/3 = 200   600            800
FAILED = record(3.0, [3.1, 3.2], error=ErrorKind.CUT, ended_at=4.0)
REFUSED = record(3.5, [], error=ErrorKind.HTTP, prompt=None)
FIRST.ended_at = 2.5  # nor is what came after the last token
ALL = [FIRST, SECOND, ONE_TOKEN, TWO_IN_A_CHUNK, FAILED, REFUSED]


def test_latencies() -> None:
    assert latencies(ALL, "ttft") == pytest.approx([500, 100, 300, 200])
    assert latencies(ALL, "tpot") == pytest.approx([250, 400, 200])
    assert latencies(ALL, "itl") == pytest.approx([200, 300, 400, 600])
    assert latencies(ALL, "jct") == pytest.approx([1000, 500, 300, 800])


def test_a_distribution() -> None:
    found = distribution([float(value) for value in range(100, -1, -1)])
    assert found is not None
    assert (found.count, found.mean, found.p50, found.p90, found.p99, found.max) == (101, 50, 50, 90, 99, 100)
    between = distribution([0.0, 10.0])  # percentiles interpolate
    assert between is not None and between.p90 == pytest.approx(9) and between.p99 == pytest.approx(9.9)
    assert distribution([]) is None


def test_a_summary() -> None:
    limits = {"ttft": 300.0, "tpot": 350.0}  # ONE_TOKEN and TWO_IN_A_CHUNK keep them
    summary = summarize(ALL, limits_ms=limits, available_ratio=0.75, num_skipped=2)
    assert (summary.num_requests, summary.num_completed, summary.num_failed) == (6, 4, 2)
    assert (summary.num_skipped, summary.num_short, summary.num_with_usage) == (2, 1, 4)
    assert summary.errors == {ErrorKind.CUT: 1, ErrorKind.HTTP: 1}
    assert summary.elapsed_s == 4.0  # the last end is that of a request that failed
    assert summary.prompt_tokens == 10 + 30 + 20 + 10
    assert summary.output_tokens == 3 + 2 + 1 + 4
    assert summary.cached_tokens == 20
    assert summary.cached_ratio == 20 / (10 + 30)  # of those that tell
    assert summary.available_ratio == 0.75
    assert summary.request_rate == 4 / 4
    assert summary.input_throughput == 70 / 4
    assert summary.output_throughput == 10 / 4
    assert summary.goodput == 2 / 4
    # 1.5 s, 0.5 s, 0.3 s, 0.8 s, 1.0 s and 0 s of 4.0 s
    assert summary.mean_running == pytest.approx(4.1 / 4)
    assert summary.max_running == 2
    assert summary.ttft is not None and summary.ttft.mean == pytest.approx(275)
    assert summary.ttft.p50 == pytest.approx(250)


def test_a_summary_of_a_server_without_usage() -> None:
    summary = summarize([record(0.0, [1.0, 2.0], prompt=None)])
    assert summary.num_completed == 1 and summary.num_with_usage == 0
    assert summary.prompt_tokens is summary.input_throughput is summary.cached_ratio is None
    assert summary.goodput is None
    assert summary.output_throughput == 1


def test_a_summary_of_nothing() -> None:
    unsent = record(None, [])
    for records in ([], [unsent], [REFUSED]):
        summary = summarize(records, limits_ms={"ttft": 1.0})
        assert summary.num_completed == summary.request_rate == 0
        assert summary.ttft is summary.jct is None


def test_goodput_s_limits_are_inclusive_and_want_completion() -> None:
    assert is_good(FIRST, {"jct": 1000.0})
    assert not is_good(FIRST, {"jct": 999.0})
    assert not is_good(FIRST, {"jct": 1000.0, "ttft": 400.0})
    assert is_good(ONE_TOKEN, {"tpot": 1.0})
    assert not is_good(FAILED, {"ttft": 1e9})


def test_parsing_of_limits() -> None:
    assert parse_goodput("ttft:500, tpot:50") == {"ttft": 500.0, "tpot": 50.0}
    assert parse_goodput("e2el:1e3") == {"jct": 1000.0}
    for bad in ("", "ttft", "ttft:", "ttft:x", "ttft:0", "ttft:inf", "ttft:nan", "speed:1", "ttft:1,"):
        with pytest.raises(ValueError, match="is (none|no limit)"):
            parse_goodput(bad)
