"""Predicted against measured: real prefills of lengths x, of which a ratio y is cached, through a worker.

They are held out: the cost model was fitted to single steps, these are whole requests, cut into chunks by
the worker. Each point is the median of several prompts of about its length, the quiet ones where there are
enough.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable, Sequence

import msgspec
import numpy as np

from memserve.messages import Repeat
from memserve.router.calibration.measured_worker import Worker
from memserve.router.calibration.plan import is_quiet, typical_ms
from memserve.router.scheduling.cost_fit import Errors
from memserve.router.scheduling.predictor import Predictor

logger = logging.getLogger(__name__)

RATIOS = (0.0, 0.25, 0.5, 0.75, 0.9)
LENGTHS = (50, 120, 300, 700, 1500, 3000, 6000, 12_000, 24_000)
# A prompt that is predicted to take longer than this is not tried.
_LONGEST_MS = 3000.0
# For so long more repeats are made in the hope of quiet ones.
_HOPE_S = 3.0
# The longest prompt of a point is longer by less than this.
_SPARE_TOKENS = 16


class AccuracyPoint(msgspec.Struct, frozen=True):
    """One (x, y). `num_quiet` of the repeats were left alone by other processes; where those are fewer than
    `wanted`, the time is that of the quieter half of all, free of what they waited for a core. `wall_ms` is
    the median by the clock, whatever disturbed it.
    """

    num_tokens: int
    num_cached: int
    predicted_ms: float
    measured_ms: float
    wall_ms: float
    num_repeats: int
    num_quiet: int

    @property
    def error(self) -> float:
        """(predicted - measured) / measured."""
        return (self.predicted_ms - self.measured_ms) / self.measured_ms


def plan_lengths(max_tokens: int, predictor: Predictor, *, most: int | None = None) -> list[int]:
    """Prompt lengths to try where a prompt may have so many tokens, at most `most` of them."""
    max_tokens -= _SPARE_TOKENS
    lengths = [length for length in LENGTHS if length < max_tokens]
    if max_tokens > (lengths[-1] * 1.2 if lengths else 0):
        lengths.append(max_tokens)
    lengths = [length for length in lengths if predictor.prefill_ms(length, 0) <= _LONGEST_MS]
    return lengths[:most]


async def measure_accuracy(
    worker: Worker,
    predictor: Predictor,
    lengths: Sequence[int],
    *,
    num_repeats: int,
    on_point: Callable[[AccuracyPoint], None] = lambda point: None,
) -> list[AccuracyPoint]:
    """Run the prompts; up to three times as many repeats where few are quiet. Raises NotMeasured."""
    points: list[AccuracyPoint] = []
    for length in lengths:
        size = worker.config.block_size
        ratios = RATIOS if worker.config.caches else (0.0,)
        for num_shared in dict.fromkeys(int(length * ratio) // size * size for ratio in ratios):
            point = await _point(worker, predictor, length, num_shared, num_repeats)
            points.append(point)
            on_point(point)
    return points


async def _point(
    worker: Worker, predictor: Predictor, length: int, num_shared: int, num_repeats: int
) -> AccuracyPoint:
    await worker.flush()
    shared = worker.prompt(num_shared, length)
    if num_shared:
        await worker.prefill(np.append(shared, shared[:1]))
    hope_ends_at = time.monotonic() + _HOPE_S
    repeats: list[Repeat] = []
    cached: list[int] = []
    for number in range(3 * num_repeats):
        rest = worker.prompt(length - num_shared + _offset(number), length + 1 + number)
        repeat, num_cached = await worker.prefill(np.append(shared, rest))
        repeats.append(repeat)
        cached.append(num_cached)
        has_enough = sum(map(is_quiet, repeats)) >= num_repeats or time.monotonic() > hope_ends_at
        if len(repeats) >= num_repeats and has_enough:
            break
    num_cached = int(statistics.median_low(cached))
    return AccuracyPoint(
        num_tokens=length,
        num_cached=num_cached,
        predicted_ms=predictor.prefill_ms(length, num_cached),
        measured_ms=typical_ms(repeats),
        wall_ms=statistics.median(repeat.ms for repeat in repeats),
        num_repeats=len(repeats),
        num_quiet=sum(map(is_quiet, repeats)),
    )


def _offset(number: int) -> int:
    """0, 1, -1, 2, -2, …: no two prompts of a point are of one length, as little as those of users are, for
    which a library that makes kernels for each shape cannot have them ready.
    """
    return (number + 1) // 2 * (1 if number % 2 else -1)


def summary(points: Sequence[AccuracyPoint]) -> Errors:
    """Of the relative errors."""
    wrong = [abs(point.error) for point in points]
    return Errors(float(np.median(wrong)), float(np.percentile(wrong, 95)))
