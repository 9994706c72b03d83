"""What a server told at one time: its workers, its metrics, its last requests.

Read leniently: a field that is missing has a default, one that is new is skipped. What cannot be read, or has
numbers that make no sense, is a `ValueError`. Nothing here trusts a text: who shows one cleans it (text.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Generic, NamedTuple, TypeVar

import msgspec
from prometheus_client.parser import text_string_to_metric_families

Value = TypeVar("Value")

Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 60)]
Milliseconds = Annotated[float, msgspec.Meta(ge=0, le=1e15)]


class WorkerLoad(msgspec.Struct, frozen=True):
    """See GET /v1/workers. Counts in requests and blocks; the last four grow through a worker's life."""

    running: Count = 0
    waiting: Count = 0
    pulling: Count = 0
    num_blocks: Count = 0
    free_blocks: Count = 0
    active_blocks: Count = 0
    historical_blocks: Count = 0
    num_host_blocks: Count = 0
    historical_host_blocks: Count = 0
    preemptions: Count = 0
    steps: Count = 0
    prefill_tokens: Count = 0
    decode_tokens: Count = 0


class Worker(msgspec.Struct, frozen=True):
    """A row of GET /v1/workers."""

    id: str
    role: str = "?"
    state: str = "?"
    incarnation: Count = 0
    restarts: Count = 0
    block_bytes: Count = 0
    max_host_blocks: Count = 0
    load: WorkerLoad = WorkerLoad()


class Cached(msgspec.Struct, frozen=True):
    """Cached prompt tokens by source."""

    device: Count = 0
    host: Count = 0
    pulled: Count = 0


class Request(msgspec.Struct, frozen=True):
    """A row of GET /v1/requests."""

    id: str
    state: str = "?"
    prompt_tokens: Count = 0
    age_ms: Milliseconds = 0.0
    attempts: Count = 0
    policy: str | None = None
    prefill: str | None = None
    decode: str | None = None
    cached_tokens: Cached | None = None
    predicted_ttft_ms: Milliseconds | None = None
    ttft_ms: Milliseconds | None = None


class _Workers(msgspec.Struct):
    data: list[Worker]


class _Requests(msgspec.Struct):
    data: list[Request]


# Of a metric's name and the value of its only label, "" = it has none.
Samples = Mapping[tuple[str, str], float]

_workers_decoder = msgspec.json.Decoder(_Workers)
_requests_decoder = msgspec.json.Decoder(_Requests)
# The metrics that are shown; those of each worker are in its row.
_NAMES = (
    "memserve_start_time_seconds",
    "memserve_requests",
    "memserve_refused",
    "memserve_pull",
    "memserve_prefill",
    "memserve_prompt_tokens",
    "memserve_cached_prompt_tokens",
    "memserve_cache_tokens",
    "memserve_time_to_first_token_seconds",
    "memserve_inter_token_latency_seconds",
    "memserve_predicted_ttft",
    "memserve_measured_ttft",
    "memserve_ttft_prediction_error_ratio",
)


class Told(NamedTuple, Generic[Value]):
    """Something, and when it was told, in seconds."""

    at: float
    value: Value


class Snapshot(NamedTuple):
    """One round of questions. What was not answered is None, and `problems` has a line for it."""

    workers: Told[list[Worker]] | None = None
    samples: Told[Samples] | None = None
    requests: Told[list[Request]] | None = None
    problems: tuple[str, ...] = ()


def read_workers(body: bytes) -> list[Worker]:
    """Of an answer's body. Raises ValueError."""
    return _decoded(_workers_decoder, body).data


def read_requests(body: bytes) -> list[Request]:
    """Of an answer's body. Raises ValueError."""
    return _decoded(_requests_decoder, body).data


def read_samples(body: bytes) -> Samples:
    """Of an answer's body in Prometheus' text format: those that are shown, as far as they are finite.
    Raises ValueError.
    """
    lines = [line for line in body.decode().splitlines() if line.startswith(_NAMES)]
    samples = {}
    try:
        for family in text_string_to_metric_families("\n".join(lines)):
            for sample in family.samples:
                value = float(sample.value)
                if math.isfinite(value) and len(sample.labels) <= 1:
                    samples[sample.name, next(iter(sample.labels.values()), "")] = value
    except (LookupError, OverflowError) as error:  # the parser indexes into what it has not checked
        raise ValueError(f"not in Prometheus' format: {error}") from None
    return samples


def _decoded(decoder: msgspec.json.Decoder[Value], body: bytes) -> Value:
    try:
        return decoder.decode(body)
    except RecursionError:
        raise ValueError("JSON that is nested too deeply") from None
