"""What the server's counters say, as lines: each a name, and figures of the last interval before those since
the server's start.
"""

from __future__ import annotations

from typing import NamedTuple

from rich.text import Text

from memserve.top.rates import Buckets, Counters, Quantile, quantile
from memserve.top.text import NONE, amount, duration, percent, size

_SOURCES = ("device", "host", "pulled")
_PROMPT, _CACHED = "memserve_prompt_tokens_total", "memserve_cached_prompt_tokens_total"
_STAGES = ("available", "expected", "captured")


class Line(NamedTuple):
    """A row of the view."""

    name: str
    text: Text


def hit_lines(counters: Counters) -> list[Line]:
    """Cached of all prompt tokens, as clients were told, by source; and what was believed at the placements,
    against what the workers then had.
    """
    lines = []
    for name, of in (("hits now", counters.grown), ("hits all", counters.total)):
        prompt = of(_PROMPT)
        by_source = {source: of(_CACHED, source) for source in _SOURCES}
        known = [number for number in by_source.values() if number is not None]
        line = Text(f"{percent(sum(known) if known else None, prompt):7}", "bold")
        for source, number in by_source.items():
            line.append(f" {source} {percent(number, prompt)}", "")
        line.append(f"  of {amount(prompt)} tokens", "dim")
        lines.append(Line(name, line))
    prefilled = counters.total("memserve_prefilled_prompt_tokens_total")
    told = Text("  ").join(
        Text(f"{stage} {percent(counters.total('memserve_cache_tokens_total', stage), prefilled)}")
        for stage in _STAGES
    )
    lines.append(Line("believed", told))
    return lines


def traffic_lines(counters: Counters) -> list[Line]:
    """KV from worker to worker: handed off to decode, sent back to prefill, pulled as another's prefix."""
    lines = [_prompt_traffic("P→D", counters, handoffs=True)]
    lines.append(
        Line(
            "D→P",
            _traffic(
                counters.rate("memserve_pulled_back_bytes_total"),
                counters.rate("memserve_pulled_back_tokens_total"),
                counters.total("memserve_pulled_back_bytes_total"),
                counters.total("memserve_pull_backs_done_total"),
                counters.total("memserve_pull_back_misses_total"),
            ),
        )
    )
    if counters.total("memserve_prefill_pulls_total"):
        lines.append(_prompt_traffic("prefixes", counters, handoffs=False))
    return lines


def _prompt_traffic(name: str, counters: Counters, *, handoffs: bool) -> Line:
    """Pulls of prompts' KV: handoffs to where they are decoded are all but those for a prefill."""

    def told(kind: str, rate: bool) -> float | None:
        of = counters.rate if rate else counters.total
        part = of(f"memserve_prefill_{kind}_total")
        if not handoffs:
            return part
        whole = of(f"memserve_{kind}_total")
        return None if whole is None else max(0.0, whole - (part or 0.0))

    return Line(
        name,
        _traffic(
            told("pulled_bytes", rate=True),
            told("pulled_tokens", rate=True),
            told("pulled_bytes", rate=False),
            told("pulls", rate=False),
            told("pull_failures", rate=False),
        ),
    )


def _traffic(
    bytes_s: float | None,
    tokens_s: float | None,
    num_bytes: float | None,
    pulls: float | None,
    failures: float | None,
) -> Text:
    line = Text(f"{size(bytes_s):>9}/s {amount(tokens_s):>6} tok/s")
    line.append(f"  all {size(num_bytes)} in {amount(pulls)} pulls, ", "dim")
    return line.append(f"{amount(failures)} failed", "bold red" if failures else "dim")


def queue_line(counters: Counters) -> Line:
    """Requests held back, dispatched, refused."""
    refused, lately = counters.total("memserve_refused_total"), counters.grown("memserve_refused_total")
    line = Text(f"{amount(counters.total('memserve_requests', 'waiting'))} waiting  ")
    line.append(f"{amount(counters.total('memserve_requests', 'running'))} running  ")
    line.append(f"{amount(refused)} refused", "red" if lately else "")
    return Line("queue", line.append(f" (+{amount(lately)})" if lately else ""))


def latency_lines(counters: Counters) -> list[Line]:
    """Percentiles of the time to the first token, and of that between tokens."""
    return [
        Line(name, _quantiles(counters.grown_buckets(metric), counters.all_buckets(metric)))
        for name, metric in (
            ("TTFT", "memserve_time_to_first_token_seconds"),
            ("ITL", "memserve_inter_token_latency_seconds"),
        )
    ]


def _quantiles(now: Buckets, all_: Buckets) -> Text:
    line = Text(f"P50 {_ms(quantile(now, 0.5)):>7}  P99 {_ms(quantile(now, 0.99)):>7}")
    return line.append(f"  all {_ms(quantile(all_, 0.5))}, {_ms(quantile(all_, 0.99))}", "dim")


def _ms(found: Quantile | None) -> str:
    return NONE if found is None else f"{'>' * found.is_over}{duration(1e3 * found.value)}"


def prediction_line(counters: Counters) -> Line:
    """How far the predicted times to the first token are from the measured ones."""
    name = "memserve_ttft_prediction_error_ratio"
    now, all_ = counters.grown_buckets(name), counters.all_buckets(name)
    line = Text(f"TTFT off by P50 {_share(quantile(now, 0.5))}  P95 {_share(quantile(now, 0.95))}")
    line.append(f"  all {_share(quantile(all_, 0.5))}, {_share(quantile(all_, 0.95))}", "dim")
    predicted = counters.total("memserve_predicted_ttft_seconds_total")
    measured = counters.total("memserve_measured_ttft_seconds_total")
    if predicted is not None and measured:
        line.append(f"  in sum {100 * (predicted / measured - 1):+.0f} %", "dim")
    return Line("predicted", line)


def _share(found: Quantile | None) -> str:
    return NONE if found is None else f"{'>' * found.is_over}{100 * found.value:.0f} %"
