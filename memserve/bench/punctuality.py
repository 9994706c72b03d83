"""How late the load generator itself was: whether its figures are the server's or its own.

Three witnesses: requests sent after they were due; a clock that ticks on the same event loop and is late by
what the loop was busy or the machine had no core for it (then tokens were read late too); and the share of a
core that this process took.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterator, Sequence

import msgspec
import numpy as np

from memserve.bench.records import RequestRecord

# Beyond this the generator says that it is the bottleneck.
MAX_LATE_MS = 10.0
MAX_CPU = 0.9
_TICK_S = 0.02
# The share of a core tells nothing about a run that is shorter.
_MIN_SPAN_S = 0.5


class LagMeter:
    """Measures the event loop of the task that runs `measuring`."""

    def __init__(self) -> None:
        self.lags_s: list[float] = []
        self.cpu: float | None = None

    @contextlib.contextmanager
    def measuring(self) -> Iterator[None]:
        """Measure while the body runs; the loop must be running."""
        wall, cpu = time.perf_counter(), time.process_time()
        ticking = asyncio.create_task(self._tick())
        try:
            yield
        finally:
            ticking.cancel()
            span_s = time.perf_counter() - wall
            if span_s >= _MIN_SPAN_S:
                self.cpu = (time.process_time() - cpu) / span_s

    async def _tick(self) -> None:
        while True:
            due = time.perf_counter() + _TICK_S
            await asyncio.sleep(_TICK_S)
            self.lags_s.append(max(0.0, time.perf_counter() - due))


class Punctuality(msgspec.Struct, frozen=True, kw_only=True):
    """How the generator kept up, in ms; `cpu` is the share of one core, None if it was not measured.

    `complaint`: why the figures are in doubt, as a line for the user; None if they are not.
    """

    late_p50_ms: float
    late_p99_ms: float
    late_max_ms: float
    loop_lag_p99_ms: float
    loop_lag_max_ms: float
    cpu: float | None
    complaint: str | None


def punctuality(records: Sequence[RequestRecord], lag: LagMeter) -> Punctuality:
    """The verdict on a run."""
    late = [1e3 * max(0.0, r.sent_at - r.scheduled_at) for r in records if r.sent_at is not None]
    lags = [1e3 * lag_s for lag_s in lag.lags_s]
    late_p50, late_p99 = (float(value) for value in np.percentile(late or [0.0], [50, 99]))
    lag_p99 = float(np.percentile(lags or [0.0], 99))
    return Punctuality(
        late_p50_ms=late_p50,
        late_p99_ms=late_p99,
        late_max_ms=max(late, default=0.0),
        loop_lag_p99_ms=lag_p99,
        loop_lag_max_ms=max(lags, default=0.0),
        cpu=lag.cpu,
        complaint=_complaint(late_p99, lag_p99, lag.cpu),
    )


def _complaint(late_p99_ms: float, lag_p99_ms: float, cpu: float | None) -> str | None:
    reasons = []
    if late_p99_ms > MAX_LATE_MS:
        reasons.append(f"1 % of the requests were sent more than {late_p99_ms:.0f} ms late")
    if lag_p99_ms > MAX_LATE_MS:
        reasons.append(f"its event loop lagged by {lag_p99_ms:.0f} ms (P99)")
    if cpu is not None and cpu > MAX_CPU:
        reasons.append(f"it took {cpu:.0%} of a core")
    if not reasons:
        return None
    what = "the load generator, or the machine that it shares with the server, was itself the bottleneck"
    return f"{what}: {', '.join(reasons)}"
