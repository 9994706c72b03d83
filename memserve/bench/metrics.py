"""The figures of a run, from its records. Pure.

The formulas are those of `vllm bench serve`, so that figures can be set beside others':

    TTFT    first token − sent                       over completed requests
    TPOT    (last token − first) / (tokens − 1)      over completed requests of two tokens or more
    ITL     gaps between chunks                      over all gaps of completed requests
    JCT     last token − sent                        over completed requests ("E2EL" there)
    throughputs, rates, goodput                      over the time from the start to the last end

Percentiles interpolate linearly. A request that failed has no latency; what it cost the others is in theirs,
its tokens are in no throughput, and it never counts as good. A latency that is undefined (TPOT of one token)
meets any limit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import msgspec
import numpy as np

from memserve.bench.records import ErrorKind, RequestRecord

# Metrics that `--goodput` limits, and what else they are called.
GOODPUT_NAMES = {"ttft": "ttft", "tpot": "tpot", "jct": "jct", "e2el": "jct"}


class Distribution(msgspec.Struct, frozen=True):
    """Of some latencies, in ms."""

    count: int
    mean: float
    p50: float
    p90: float
    p99: float
    max: float


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that a run's table says. None: there is nothing to say it of.

    Args:
        num_requests: sent ones. `num_skipped` more could not be sent (live answers that are missing).
        num_short: completed ones whose answer is not as long as was asked for.
        prompt_tokens, cached_tokens: over the completed requests whose usage tells them; None if none does.
        num_with_usage: completed requests whose server counted their tokens; of others every chunk counts
            as a token, and their prompts as nothing.
        cached_ratio: cached_tokens / prompt_tokens of those requests that tell both.
        available_ratio: what a cache without bounds would have had of the completed requests' prompts.
        goodput: requests a second that met every limit.
        mean_running, max_running: requests at the same time.
    """

    num_requests: int
    num_completed: int
    num_failed: int
    num_skipped: int
    num_short: int
    num_with_usage: int
    errors: dict[ErrorKind, int]
    elapsed_s: float
    prompt_tokens: int | None
    output_tokens: int
    cached_tokens: int | None
    cached_ratio: float | None
    available_ratio: float | None
    request_rate: float
    input_throughput: float | None
    output_throughput: float
    goodput: float | None
    mean_running: float
    max_running: int
    ttft: Distribution | None
    tpot: Distribution | None
    itl: Distribution | None
    jct: Distribution | None


LATENCIES = ("ttft", "tpot", "itl", "jct")


def summarize(
    records: Sequence[RequestRecord],
    *,
    limits_ms: Mapping[str, float] | None = None,
    available_ratio: float | None = None,
    num_skipped: int = 0,
) -> Summary:
    """The figures of a run. `limits_ms`: of `ttft`, `tpot`, `jct`, for the goodput."""
    sent = [record for record in records if record.sent_at is not None]
    done = [record for record in sent if record.completed]
    elapsed_s = max((record.ended_at or 0.0 for record in sent), default=0.0)

    def a_second(count: float) -> float:
        return count / elapsed_s if elapsed_s else 0.0

    prompts = [r.prompt_tokens for r in done if r.prompt_tokens is not None]
    caches = [r for r in done if r.prompt_tokens is not None and r.cached_tokens is not None]
    cached = sum(r.cached_tokens or 0 for r in caches)
    cachable = sum(r.prompt_tokens or 0 for r in caches)
    output_tokens = sum(r.output_tokens for r in done)
    mean_running, max_running = _running(sent, elapsed_s)
    return Summary(
        num_requests=len(sent),
        num_completed=len(done),
        num_failed=len(sent) - len(done),
        num_skipped=num_skipped,
        num_short=sum(r.output_tokens != r.max_tokens for r in done),
        num_with_usage=sum(r.has_usage for r in done),
        errors=dict(Counter(r.error.kind for r in sent if r.error is not None)),
        elapsed_s=elapsed_s,
        prompt_tokens=sum(prompts) if prompts else None,
        output_tokens=output_tokens,
        cached_tokens=cached if caches else None,
        cached_ratio=cached / cachable if cachable else None,
        available_ratio=available_ratio,
        request_rate=a_second(len(done)),
        input_throughput=a_second(sum(prompts)) if prompts else None,
        output_throughput=a_second(output_tokens),
        goodput=a_second(sum(is_good(r, limits_ms) for r in done)) if limits_ms else None,
        mean_running=mean_running,
        max_running=max_running,
        ttft=distribution(latencies(done, "ttft")),
        tpot=distribution(latencies(done, "tpot")),
        itl=distribution(latencies(done, "itl")),
        jct=distribution(latencies(done, "jct")),
    )


def latencies(records: Iterable[RequestRecord], metric: str) -> list[float]:
    """One of LATENCIES of those records that are completed and have it, in ms."""
    values: list[float] = []
    for record in records:
        if not record.completed:
            continue
        if metric == "itl":
            values += record.itls_s
        elif (value := _latency_s(record, metric)) is not None:
            values.append(value)
    return [1e3 * value for value in values]


def _latency_s(record: RequestRecord, metric: str) -> float | None:
    if metric == "ttft":
        return record.ttft_s
    if metric == "tpot":
        return record.tpot_s
    assert metric == "jct", metric
    return record.jct_s


def distribution(values_ms: Sequence[float]) -> Distribution | None:
    """None of no values."""
    if not values_ms:
        return None
    values = np.asarray(values_ms)
    p50, p90, p99 = (float(value) for value in np.percentile(values, [50, 90, 99]))
    return Distribution(len(values), float(values.mean()), p50, p90, p99, float(values.max()))


def is_good(record: RequestRecord, limits_ms: Mapping[str, float]) -> bool:
    """Completed, and within all limits."""
    if not record.completed:
        return False
    values = {metric: _latency_s(record, metric) for metric in limits_ms}
    return all(value is None or 1e3 * value <= limits_ms[metric] for metric, value in values.items())


def parse_goodput(text: str) -> dict[str, float]:
    """Limits in ms from `ttft:500,tpot:50`. Raises ValueError with a line for the user."""
    limits = {}
    for part in text.split(","):
        name, _, value = part.strip().partition(":")
        if name not in GOODPUT_NAMES:
            raise ValueError(f"{name!r} is none of {', '.join(GOODPUT_NAMES)}")
        try:
            limit = float(value)
        except ValueError:
            limit = 0.0
        if not 0 < limit < float("inf"):
            raise ValueError(f"{part.strip()!r} is no limit in milliseconds, such as ttft:500")
        limits[GOODPUT_NAMES[name]] = limit
    return limits


def _running(sent: Sequence[RequestRecord], elapsed_s: float) -> tuple[float, int]:
    """Requests at the same time: over the time in the mean, and at most."""
    edges: list[tuple[float, int]] = []
    busy_s = 0.0
    for record in sent:
        if record.sent_at is not None and record.ended_at is not None:
            edges += [(record.sent_at, 1), (record.ended_at, -1)]
            busy_s += record.ended_at - record.sent_at
    running = most = 0
    for _, change in sorted(edges):  # at equal times, ends come first
        running += change
        most = max(most, running)
    return (busy_s / elapsed_s if elapsed_s else 0.0), most
