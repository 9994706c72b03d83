"""What happened between two snapshots.

Counters begin anew: all of them with the server (its start time tells), a worker's with each of its lives.
Then what is there now is what has come since; some of it may be older than the snapshot before only where
the start cannot be told. Times in seconds; None = not known.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from memserve.top.snapshot import Samples, Snapshot, Told, Worker

START_TIME = "memserve_start_time_seconds"


class Quantile(NamedTuple):
    """`is_over`: it lies above the last bucket's bound, which is `value`."""

    value: float
    is_over: bool = False


# Bounds, ascending, the last infinite, with the observations up to each.
Buckets = Sequence[tuple[float, float]]


class Counters:
    """The metrics of `now`, and what they grew by since `before`."""

    def __init__(self, before: Told[Samples] | None, now: Told[Samples]) -> None:
        self.values = now.value
        self.elapsed_s = 0.0 if before is None else now.at - before.at
        self._before: Samples | None = None
        if before is not None and self.elapsed_s > 0.0:
            restarted = has_restarted(before.value, now.value)
            self._before = dict.fromkeys(now.value, 0.0) if restarted else before.value

    def total(self, name: str, label: str = "") -> float | None:
        """Since the server's start."""
        return self.values.get((name, label))

    def grown(self, name: str, label: str = "") -> float | None:
        """Since the snapshot before."""
        now = self.values.get((name, label))
        before = None if self._before is None else self._before.get((name, label))
        return None if now is None or before is None else grown(before, now)

    def rate(self, name: str, label: str = "") -> float | None:
        """A second."""
        number = self.grown(name, label)
        return None if number is None else number / self.elapsed_s

    def all_buckets(self, name: str) -> Buckets:
        """Of a histogram, since the server's start; empty if there is none."""
        return _buckets(self.values, name)

    def grown_buckets(self, name: str) -> Buckets:
        """Of a histogram, since the snapshot before; empty if that is not known."""
        now = self.all_buckets(name)
        before = [] if self._before is None else _buckets(self._before, name)
        if [bound for bound, _ in before] != [bound for bound, _ in now]:
            return []
        if any(count < old for (_, count), (_, old) in zip(now, before, strict=True)):
            return now
        return [(bound, count - old) for (bound, count), (_, old) in zip(now, before, strict=True)]


def has_restarted(before: Samples, now: Samples) -> bool:
    """Whether it is another life of the server."""
    return before.get((START_TIME, "")) != now.get((START_TIME, ""))


def grown(before: float, now: float) -> float:
    """By how much a counter grew; if it fell, it began at 0 again."""
    return now - before if now >= before else now


def _buckets(samples: Samples, name: str) -> Buckets:
    found = []
    for (each, label), count in samples.items():
        if each == f"{name}_bucket":
            try:
                found.append((float(label), count))
            except ValueError:
                return []
    found.sort()
    return found if found and found[-1][0] == math.inf else []


def quantile(buckets: Buckets, share: float) -> Quantile | None:
    """The `share` quantile of what is in the buckets, as if spread evenly within each; None of nothing."""
    wanted = share * buckets[-1][1] if buckets else 0.0
    if wanted <= 0.0:
        return None
    low, below = 0.0, 0.0
    for bound, count in buckets:
        if count >= wanted:
            if math.isinf(bound):
                return Quantile(low, is_over=True)
            return Quantile(low + (bound - low) * (wanted - below) / (count - below))
        low, below = bound if math.isfinite(bound) else low, max(below, count)
    return None


class WorkerRates(NamedTuple):
    """A second: forward passes, tokens by phase."""

    steps: float
    prefill_tokens: float
    decode_tokens: float


def worker_rates(before: Snapshot | None, now: Snapshot) -> dict[str, WorkerRates]:
    """By id; of those that were there before."""
    if before is None or before.workers is None or now.workers is None:
        return {}
    elapsed_s = now.workers.at - before.workers.at
    if elapsed_s <= 0.0:
        return {}
    restarted = bool(
        before.samples and now.samples and has_restarted(before.samples.value, now.samples.value)
    )
    olds = {worker.id: worker for worker in before.workers.value}
    rates = {}
    for worker in now.workers.value:
        old = olds.get(worker.id)
        if old is not None:
            counts = list(_counts(worker))
            same = old.incarnation == worker.incarnation and not restarted
            since = list(_counts(old)) if same else [0] * len(counts)
            if any(count < past for count, past in zip(counts, since, strict=True)):
                since = [0] * len(counts)
            rates[worker.id] = WorkerRates(
                *((count - past) / elapsed_s for count, past in zip(counts, since, strict=True))
            )
    return rates


def _counts(worker: Worker) -> Iterable[int]:
    load = worker.load
    return load.steps, load.prefill_tokens, load.decode_tokens
