"""Prometheus metrics: what HTTP requests went through here, and the engine's status, read when it is asked
for.

Label values come from a fixed set (routes, instance names, states), never from a request, so the number of
series is bounded. One `Metrics` belongs to one application; there is no global registry.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from memserve.messages import CachedTokens
from memserve.router.engine_api import Engine, InstanceState
from memserve.router.http.formats import CACHE_SOURCES
from memserve.router.http.openai import Usage
from memserve.router.scheduling.hindsight import ERROR_BOUNDS, Hindsight

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

# Bounds of the histograms' buckets, in seconds.
_TTFT_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_ITL_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
_DURATION_S = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Histogram(Collector):
    """Counts by bucket. The library's own takes locks and walks all bounds: too much for every token."""

    def __init__(self, name: str, text: str, bounds: Sequence[float]) -> None:
        self._name = name
        self._text = text
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        """Counts `value` so many times."""
        self._counts[bisect_left(self._bounds, value)] += times  # a bound is in its own bucket
        self._sum += value * times

    def collect(self) -> Iterator[Metric]:
        """See Collector."""
        yield _family(self._name, self._text, self._bounds, self._counts, self._sum)


def _family(
    name: str, text: str, bounds: Sequence[float], counts: Sequence[int], total: float
) -> HistogramMetricFamily:
    """From counts by bucket, the last of what is over all bounds."""
    names = [*map(floatToGoString, bounds), "+Inf"]
    buckets = list(zip(names, map(float, accumulate(counts)), strict=True))
    return HistogramMetricFamily(name, text, buckets=buckets, sum_value=total)


class Metrics:
    """The registry of one application. `started_at` in seconds since the epoch: with another, all counters
    began anew.
    """

    def __init__(
        self,
        engine: Engine,
        clock: Callable[[], float] = time.monotonic,
        started_at: float | None = None,
    ) -> None:
        self._clock = clock
        self._registry = CollectorRegistry()
        self._registry.register(_EngineCollector(engine))
        start = Gauge("memserve_start_time_seconds", "When this began to count", registry=self._registry)
        start.set(time.time() if started_at is None else started_at)
        self._requests = Counter(
            "memserve_http_requests",
            "HTTP requests answered",
            ["endpoint", "status"],
            registry=self._registry,
        )
        self._prompt_tokens = Counter(
            "memserve_prompt_tokens", "Prompt tokens of finished requests", registry=self._registry
        )
        self._cached_tokens = Counter(
            "memserve_cached_prompt_tokens",
            "Prompt tokens that were not computed, by where their KV was",
            ["source"],
            registry=self._registry,
        )
        # `labels` takes locks and looks at its arguments: the children are kept
        self._cached_by_source = [self._cached_tokens.labels(source) for source in CACHE_SOURCES]
        self._responses: dict[tuple[str, int], Counter] = {}
        self._completion_tokens = Counter(
            "memserve_completion_tokens", "Tokens generated", registry=self._registry
        )
        self._reused_histories = Counter(
            "memserve_reused_histories",
            "Prompts that begin with remembered tokens of an earlier answer",
            registry=self._registry,
        )
        self._reused_tokens = Counter(
            "memserve_reused_history_tokens", "Prompt tokens that were remembered", registry=self._registry
        )
        self._diverged = Counter(
            "memserve_diverged_prompts",
            "Prompts that depart from what is remembered",
            registry=self._registry,
        )
        self._ttft = Histogram(
            "memserve_time_to_first_token_seconds",
            "From the validated request to its first token",
            _TTFT_S,
        )
        self._itl = Histogram(
            "memserve_inter_token_latency_seconds",
            "Between two tokens of a sequence",
            _ITL_S,
        )
        self._duration = Histogram(
            "memserve_request_duration_seconds",
            "From the validated request to its last token",
            _DURATION_S,
        )
        for histogram in (self._ttft, self._itl, self._duration):
            self._registry.register(histogram)

    def on_response(self, endpoint: str, status: int) -> None:
        """An HTTP request was answered; `endpoint` is a route's path, not the client's."""
        counter = self._responses.get((endpoint, status))
        if counter is None:
            counter = self._responses[endpoint, status] = self._requests.labels(endpoint, str(status))
        counter.inc()

    def on_prompt(self, num_reused: int, diverged: bool) -> None:
        """A prompt was read; its first `num_reused` tokens were remembered ones."""
        if num_reused:
            self._reused_histories.inc()
            self._reused_tokens.inc(num_reused)
        if diverged:
            self._diverged.inc()

    def start_request(self) -> RequestTimer:
        """The clock of a job that starts now."""
        return RequestTimer(self._clock, self._ttft, self._itl)

    def on_finished(self, timer: RequestTimer, usage: Usage, cached: Sequence[CachedTokens]) -> None:
        """A job ran to its end; `cached` of each of its prompts."""
        self._prompt_tokens.inc(usage.prompt_tokens)
        for each in cached:
            for counter, count in zip(
                self._cached_by_source, (each.device, each.host, each.pulled), strict=True
            ):
                if count:
                    counter.inc(count)
        self._completion_tokens.inc(usage.completion_tokens)
        self._duration.observe(timer.elapsed_s())

    def render(self) -> bytes:
        """Everything in Prometheus' text format (`CONTENT_TYPE`)."""
        return generate_latest(self._registry)


class RequestTimer:
    """Times of one job's tokens, by choice."""

    def __init__(self, clock: Callable[[], float], ttft: Histogram, itl: Histogram) -> None:
        self._clock = clock
        self._ttft = ttft
        self._itl = itl
        self._started = clock()
        self._last: dict[int, float] = {}

    def on_tokens(self, index: int, num_tokens: int) -> None:
        """So many tokens of choice `index` arrived together."""
        if not num_tokens:
            return
        now = self._clock()
        last = self._last.get(index)
        self._last[index] = now
        if last is None:
            self._ttft.observe(now - self._started)
            last, num_tokens = now, num_tokens - 1
        if num_tokens:
            self._itl.observe((now - last) / num_tokens, num_tokens)

    def elapsed_s(self) -> float:
        """Since the job started."""
        return self._clock() - self._started


class _EngineCollector(Collector):
    """Turns `Engine.status()` into metrics at each scrape."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def describe(self) -> Iterator[Metric]:
        """Nothing to be checked for duplicates: the names below are this file's own."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        status = self._engine.status()
        requests = GaugeMetricFamily("memserve_requests", "Requests in the router", labels=["state"])
        requests.add_metric(["waiting"], status.num_waiting)
        requests.add_metric(["running"], status.num_running)
        yield requests
        for name, text, value in (
            ("memserve_pulls", "KV transfers from one instance to another", status.pulls_total),
            (
                "memserve_pull_failures",
                "Transfers that failed and were recomputed",
                status.pull_failures_total,
            ),
            ("memserve_pulled_bytes", "Bytes of KV transferred", status.pulled_bytes_total),
            ("memserve_pulled_tokens", "Tokens whose KV was transferred", status.pulled_tokens_total),
            ("memserve_pull_seconds", "Time that transfers took, added up", status.pull_ms_total / 1e3),
            ("memserve_refused", "Sequences refused or given up by the router", status.refused_total),
            ("memserve_abandoned", "Sequences whose client left or had enough", status.abandoned_total),
            (
                "memserve_salvaged_tokens",
                "Tokens whose KV was pulled from the memory of a dead instance",
                status.salvaged_tokens_total,
            ),
            ("memserve_pull_backs", "Prefill sides told of generated KV to pull", status.pull_backs_total),
            ("memserve_pull_backs_done", "Of those, ended in whatever way", status.pull_backs_done_total),
            ("memserve_pull_back_misses", "Of those, not pulled whole", status.pull_back_misses_total),
            (
                "memserve_pulled_back_tokens",
                "Generated tokens whose KV went to the prefill side",
                status.pulled_back_tokens_total,
            ),
            ("memserve_pulled_back_bytes", "Bytes of KV that went there", status.pulled_back_bytes_total),
            ("memserve_evicted_blocks", "Cached blocks given up", status.evicted_blocks_total),
            (
                "memserve_swapped_out_blocks",
                "Cached blocks moved to a host tier",
                status.swapped_out_blocks_total,
            ),
            ("memserve_swapped_in_blocks", "Cached blocks moved back", status.swapped_in_blocks_total),
            (
                "memserve_prefill_pulls",
                "Of the transfers, those of a prompt's prefix from another cache",
                status.prefill_pulls_total,
            ),
            ("memserve_prefill_pull_failures", "Of those, failed", status.prefill_pull_failures_total),
            ("memserve_prefill_pulled_tokens", "Tokens that came so", status.prefill_pulled_tokens_total),
            ("memserve_prefill_pulled_bytes", "Bytes that came so", status.prefill_pulled_bytes_total),
            ("memserve_stale_answers", "Answers of workers to what was given up", status.stale_total),
            ("memserve_replays", "Requests dispatched again after a failure", status.replays_total),
            ("memserve_restarts", "Instances started again", status.restarts_total),
        ):
            yield CounterMetricFamily(name, text, value=value)
        yield from _hindsight(status.hindsight)
        yield from self._collect_instances()

    def _collect_instances(self) -> Iterator[Metric]:
        one = ["instance"]
        up = GaugeMetricFamily("memserve_instance_up", "1 when ready", labels=["instance", "role"])
        running = GaugeMetricFamily(
            "memserve_instance_requests", "Requests at an instance", labels=["instance", "state"]
        )
        blocks = GaugeMetricFamily(
            "memserve_blocks", "KV blocks of an instance's pool", labels=["instance", "state"]
        )
        host_blocks = GaugeMetricFamily(
            "memserve_host_blocks", "KV blocks of an instance's host tier", labels=["instance", "state"]
        )
        offers = GaugeMetricFamily(
            "memserve_offers", "Prefilled requests whose KV waits to be pulled", labels=one
        )
        oldest = GaugeMetricFamily("memserve_oldest_offer_seconds", "Age of the oldest of them", labels=one)
        preemptions = CounterMetricFamily(
            "memserve_preemptions", "Requests set back for want of blocks", labels=one
        )
        steps = CounterMetricFamily("memserve_steps", "Forward passes", labels=one)
        tokens = CounterMetricFamily(
            "memserve_computed_tokens", "Tokens computed", labels=["instance", "phase"]
        )
        for row in self._engine.status().instances:
            name, load = row.instance, row.load
            up.add_metric([name, row.role.value], float(row.state is InstanceState.READY))
            running.add_metric([name, "waiting"], load.num_waiting)
            running.add_metric([name, "running"], load.num_running)
            running.add_metric([name, "pulling"], load.num_pulling)
            blocks.add_metric([name, "free"], load.num_free_blocks)
            blocks.add_metric([name, "active"], load.num_active_blocks)
            blocks.add_metric([name, "historical"], load.num_historical_blocks)
            if row.max_host_blocks:
                num_cached = load.num_host_historical_blocks
                host_blocks.add_metric([name, "free"], load.num_host_blocks - num_cached)
                host_blocks.add_metric([name, "historical"], num_cached)
            offers.add_metric([name], load.num_offers)
            oldest.add_metric([name], load.oldest_offer_s)
            preemptions.add_metric([name], load.num_preemptions)
            steps.add_metric([name], load.num_steps)
            tokens.add_metric([name, "prefill"], load.num_prefill_tokens)
            tokens.add_metric([name, "decode"], load.num_decode_tokens)
        yield from (up, running, blocks, host_blocks, offers, oldest, preemptions, steps, tokens)


def _hindsight(hindsight: Hindsight) -> Iterator[Metric]:
    """Of the sequences whose first token came. What clients were told is memserve_cached_prompt_tokens."""
    yield CounterMetricFamily(
        "memserve_prefilled_prompt_tokens",
        "Prompt tokens of sequences whose first token came",
        value=hindsight.prompt_tokens,
    )
    tokens = CounterMetricFamily(
        "memserve_cache_tokens",
        "Of those, cached: as the trees believed of any worker (available), as the decision counted on "
        "(expected), as the worker had them (captured)",
        labels=["stage"],
    )
    tokens.add_metric(["available"], hindsight.available_tokens)
    tokens.add_metric(["expected"], hindsight.expected_tokens)
    tokens.add_metric(["captured"], hindsight.captured_tokens)
    yield tokens
    for name, value_ms in (("predicted", hindsight.predicted_ms), ("measured", hindsight.measured_ms)):
        text = f"Time from placement to first token as {name}, added up"
        yield CounterMetricFamily(f"memserve_{name}_ttft_seconds", text, value=value_ms / 1e3)
    yield _family(
        "memserve_ttft_prediction_error_ratio",
        "|predicted - measured| / measured",
        ERROR_BOUNDS,
        hindsight.error_counts,
        hindsight.error_sum,
    )
