"""What is measured on a worker to learn its cost model, and what is made of the times. Pure.

    kinds      workers that cost the same share one model: `Kind`
    steps      shapes to fit by, and others, held out, to check the fit by (`plan_steps`)
    typical    many repeats → one time (`typical_ms`)
    fit        times → operators (cost_fit.py) and links

Repeats are told with the time for which the worker's threads had no core. It is taken off, and the repeats
that lost least count, so that a machine that does other things beside is measured nearly as a quiet one.
"""

from __future__ import annotations

import logging
import statistics
from collections.abc import Mapping, Sequence

import msgspec
import numpy as np

from memserve.config import WorkerConfig
from memserve.messages import Repeat, StepSpec
from memserve.model_config import KVGeometry
from memserve.router.scheduling.cost_fit import DEFAULT_KNOTS, Errors, Point, errors, fit, nnls
from memserve.router.scheduling.cost_model import (
    FAR_CONTEXT,
    Budget,
    CostModel,
    Link,
    Links,
    Operators,
    Ramp,
    StepShape,
)
from memserve.router.scheduling.hardware import PLAIN_LINK

logger = logging.getLogger(__name__)

# A repeat that lost more than this share to other processes is not quiet.
QUIET_SHARE = 0.02
# Times of steps longer than this, in units of the bound on a step, are not worth their price.
_LONGEST_STEP = 1.2
_SLOW_MS = 250.0
# Twice the tokens take at least so much of twice the time, from so many tokens on.
_SURE_SHARE = 0.6
_TELLING_ROWS = 16

_ROWS = (1, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
_MOST_SHARE_OF_POOL = 0.9
_MOST_COPIED_BYTES = 64 << 20


class Kind(msgspec.Struct, frozen=True):
    """Workers of one model that are alike: `device` without an index. Also part of a file's key."""

    device: str
    dtype: str
    threads: int
    max_batch_tokens: int
    max_step_ms: float | None

    @classmethod
    def of(cls, config: WorkerConfig) -> Kind:
        """The kind of a worker."""
        device = config.device.partition(":")[0]
        threads = config.threads if device == "cpu" else 0
        return cls(device, config.dtype, threads, config.max_batch_tokens, config.max_step_ms)

    @property
    def name(self) -> str:
        """For people: cpu-bfloat16-2."""
        return "-".join(map(str, (self.device, self.dtype, *(() if not self.threads else (self.threads,)))))


class StepPlan(msgspec.Struct, frozen=True):
    """Steps in the order in which they are to be measured. A step of `rows` that takes too long ends that
    list: those after it take longer.
    """

    rows: tuple[StepSpec, ...]
    others: tuple[StepSpec, ...]
    held_out: tuple[StepSpec, ...]


def plan_steps(config: WorkerConfig, num_blocks: int) -> StepPlan:
    """What to measure on a worker whose pool has so many blocks, all free."""
    tokens = int(num_blocks * config.block_size * _MOST_SHARE_OF_POOL)
    longest = min(config.max_model_len, tokens) - 1

    def fitting(*specs: StepSpec) -> tuple[StepSpec, ...]:
        return tuple(spec for spec in specs if fits(spec))

    def fits(spec: StepSpec) -> bool:
        chunk, decode = spec.context_len + spec.num_new, spec.decode_context + config.block_size
        return (
            max(chunk, spec.decode_context) < longest
            and spec.num_decodes <= config.max_running
            and chunk + spec.num_decodes * decode < tokens
            and spec.num_new + spec.num_decodes <= config.max_batch_tokens
        )

    def contexts(*lengths: int) -> list[int]:
        """Those of `lengths` that fit, and the longest there can be unless it is near or far off them."""
        far = longest - 320
        some = [length for length in lengths if length <= far]
        if not some:
            return [far] if far > 0 else []
        is_apart = 1.5 * some[-1] < far and (len(some) < len(lengths) or far < 8 * some[-1])
        return [*some, far] if is_apart else some

    most = config.max_running
    return StepPlan(
        rows=fitting(*(StepSpec(n) for n in _ROWS)),
        others=fitting(
            StepSpec(21, draws=False),
            StepSpec(134, draws=False),
            *(StepSpec(n, c) for n, c in zip((26, 37, 42, 47), contexts(64, 1024, 4096), strict=False)),
            *(StepSpec(70 + 5 * i, c) for i, c in enumerate(contexts(64, 1024, 3072))),
            *(StepSpec(140 + 5 * i, c) for i, c in enumerate(contexts(512, 2048)[-2:])),
            *(StepSpec(262 + 5 * i, c) for i, c in enumerate(contexts(1024, 4096))),
            *(StepSpec(506, c) for c in contexts(2048)[:1]),
            *(StepSpec(0, 0, True, 1, c) for c in contexts(16, 2048)),
            *(StepSpec(0, 0, True, min(4, most), c) for c in contexts(16, 512)),
            StepSpec(0, 0, True, min(16, most), 128),
            StepSpec(0, 0, True, min(16, most), 1024),
            StepSpec(0, 0, True, min(64, most), 128),
            StepSpec(52, 0, True, 1, 128),
            StepSpec(90, 1024, True, 4, 1024),
            StepSpec(150, 0, True, min(16, most), 256),
        ),
        held_out=fitting(
            StepSpec(58),
            StepSpec(110),
            StepSpec(180),
            StepSpec(105, 512),
            StepSpec(116, 2048),
            StepSpec(190, 300, draws=False),
            StepSpec(0, 0, True, min(8, most), 256),
            StepSpec(98, 256, True, 2, 512),
        ),
    )


def too_long(kind: Kind, ms: float) -> bool:
    """Whether a step is longer than any that such a worker would run."""
    return ms > (_SLOW_MS if kind.max_step_ms is None else _LONGEST_STEP * kind.max_step_ms)


def is_hopeless(kind: Kind, times: Mapping[StepSpec, Sequence[Repeat]], spec: StepSpec) -> bool:
    """Whether what was measured says that a chunk will be too long, so that it need not be tried."""
    return any(
        0 < known.num_new <= spec.num_new
        and known.context_len <= spec.context_len
        and too_long(kind, _SURE_SHARE * typical_ms(repeats) * spec.num_new / known.num_new)
        for known, repeats in times.items()
        if known.num_new >= _TELLING_ROWS
    )


def typical_ms(repeats: Sequence[Repeat]) -> float:
    """The median of the quiet repeats, or of the quieter half where they are few; free of waits."""
    ordered = sorted(repeats, key=lambda repeat: repeat.waited_ms / max(repeat.ms, 1e-9))
    num_quiet = sum(is_quiet(repeat) for repeat in ordered)
    counted = ordered[: max(num_quiet, (len(ordered) + 1) // 2)]
    return statistics.median(repeat.ms - repeat.waited_ms for repeat in counted)


def is_quiet(repeat: Repeat) -> bool:
    """Whether other processes left it alone."""
    return repeat.waited_ms <= QUIET_SHARE * repeat.ms


def shape_of(spec: StepSpec) -> StepShape:
    """A step in the terms of the cost model."""
    n, context, decodes = spec.num_new, spec.context_len, spec.num_decodes
    return StepShape(
        num_rows=n + decodes,
        num_pairs=n * context,
        num_squares=n * n,
        num_decodes=decodes,
        num_context=decodes * (spec.decode_context + 1),
        num_logit_rows=decodes + (n > 0 and spec.draws),
        num_gathered=context,
        num_far_pairs=n * max(0, context - FAR_CONTEXT),
        has_chunk=n > 1,
        is_mixed=n > 0 and decodes > 0,
    )


class Fitted(msgspec.Struct, frozen=True):
    """Operators, and how far they are off at the steps that were held out (None: there were none)."""

    operators: Operators
    held_out: Errors | None


def fit_steps(
    times: Mapping[StepSpec, Sequence[Repeat]], held_out: Mapping[StepSpec, Sequence[Repeat]]
) -> Fitted:
    """Operators from the repeats of at least one step."""
    points = _points(times)
    most = max(point.shape.num_rows for point in points)
    # a piece of the curve without a point in it would be flat
    rows = {point.shape.num_rows for point in points if not point.shape.num_pairs}
    ends = [*DEFAULT_KNOTS[1:], most + 1]
    knots = tuple(
        knot
        for knot, end in zip(DEFAULT_KNOTS, ends, strict=True)
        if knot == 0 or any(knot < n <= max(end, 2 * knot) for n in rows)
    )
    operators = fit(points, Ramp(knots, (0.0,) * len(knots)))
    checks = _points(held_out)
    for spec, point in zip((*times, *held_out), (*points, *checks), strict=True):
        logger.debug("%s: %.2f ms, fitted %.2f ms", spec, point.ms, operators.step_ms(point.shape))
    return Fitted(operators, errors(operators, checks) if checks else None)


def _points(times: Mapping[StepSpec, Sequence[Repeat]]) -> list[Point]:
    return [
        Point(shape_of(spec), max(typical_ms(repeats), 1e-6)) for spec, repeats in times.items() if repeats
    ]


def fit_link(copies: Mapping[int, Sequence[Repeat]]) -> Link | None:
    """Latency and bandwidth from copies of different numbers of bytes; None of fewer than two sizes."""
    if len(copies) < 2:
        return None
    sizes = np.array(list(copies), dtype=np.float64)
    ms = np.array([max(typical_ms(repeats), 1e-6) for repeats in copies.values()])
    latency_ms, byte_ms = nnls(np.stack([1 / ms, sizes / ms], axis=1), np.ones(len(ms))).tolist()
    return Link(latency_ms, 1 / max(byte_ms, 1e-12))


def plan_copies(num_blocks: int, block_bytes: int) -> tuple[int, ...]:
    """Numbers of blocks to copy, of so many that are free: up to more than a CPU's caches hold."""
    most = min(num_blocks // 2, _MOST_COPIED_BYTES // max(1, block_bytes))
    return tuple(count for count in (1, 16, 256, 2048) if count < most) + ((most,) if most > 1 else ())


def make_model(
    config: WorkerConfig,
    operators: Operators,
    *,
    pull: Link | None = None,
    host_pull: Link | None = None,
    swap_in: Link | None = None,
    request_ms: float = 0.0,
) -> CostModel:
    """The model of a worker; what was not measured is taken from its next of kin."""
    pull = pull or PLAIN_LINK
    kind = Kind.of(config)
    return CostModel(
        name=kind.name,
        operators=operators,
        budget=Budget(config.max_batch_tokens, config.max_step_ms),
        kv_token_bytes=KVGeometry.of(config.model, config.block_size, config.dtype).token_bytes,
        links=Links(from_device=pull, from_host=host_pull or pull, swap_in=swap_in or PLAIN_LINK),
        request_ms=request_ms,
    )
