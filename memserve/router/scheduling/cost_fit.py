"""Coefficients of a cost model from measured steps, or from single operators that were measured alone.

Least squares of the relative error with coefficients that are not negative: a step of 1 ms counts as much as
one of 100 ms, and no operator can pay for another's excess with a negative cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum, auto
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from memserve.router.scheduling.cost_model import Operators, Ramp, StepShape, Waves

Floats = NDArray[np.float64]

# Bends of a curve by rows where none are given: matrices go from reading weights to multiplying.
DEFAULT_KNOTS = (0, 1, 16, 64, 256)


class Operator(Enum):
    """What a point measured, if not a whole step."""

    FIXED = auto()
    ROWS = auto()
    PREFILL_ATTENTION = auto()
    DECODE_ATTENTION = auto()
    HEAD = auto()


class Point(NamedTuple):
    """A measurement: the median of several quiet repeats, in ms. `operator` None: the whole step."""

    shape: StepShape
    ms: float
    operator: Operator | None = None


class Errors(NamedTuple):
    """Relative errors |predicted - measured| / measured."""

    median: float
    p95: float


def fit(points: Sequence[Point], rows: Ramp | Waves | None = None) -> Operators:
    """The coefficients that explain the points best.

    Args:
        points: at least one.
        rows: the form of the curve by rows; its coefficients do not matter.
    """
    form = Ramp(DEFAULT_KNOTS, (0.0,) * len(DEFAULT_KNOTS)) if rows is None else rows
    weights = np.array([1 / point.ms for point in points])
    columns = np.array([_columns(point, form) for point in points])
    solved = nnls(columns * weights[:, None], np.ones(len(points))).tolist()
    num_rows = len(form.columns(0))
    of_rows, rest = solved[1 : 1 + num_rows], solved[1 + num_rows :]
    curve = Ramp(form.knots, tuple(of_rows)) if isinstance(form, Ramp) else Waves(form.wave_rows, *of_rows)
    return Operators(
        rows=curve,
        fixed_ms=solved[0],
        pair_ms=rest[0],
        square_ms=rest[1],
        decode_row_ms=rest[2],
        context_ms=rest[3],
        logit_row_ms=rest[4],
        draw_ms=rest[5],
        gather_ms=rest[6],
        mixed_ms=rest[7],
        far_pair_ms=rest[8],
        chunk_ms=rest[9],
    )


def errors(operators: Operators, points: Sequence[Point]) -> Errors:
    """How far whole steps are predicted wrong."""
    wrong = [abs(operators.step_ms(p.shape) - p.ms) / p.ms for p in points if p.operator is None]
    return Errors(float(np.median(wrong)), float(np.percentile(wrong, 95)))


def nnls(a: Floats, b: Floats) -> Floats:
    """The x >= 0 that minimises |a x - b| (Lawson and Hanson 1974, algorithm NNLS)."""
    scale = np.linalg.norm(a, axis=0)
    scale[scale == 0] = 1.0
    a = a / scale
    x: Floats = np.zeros(a.shape[1])
    is_free = np.zeros(a.shape[1], dtype=bool)
    tolerance = 1e-10 * max(1.0, float(np.abs(a.T @ b).max()))
    for _ in range(10 * len(x)):
        gradient = a.T @ (b - a @ x)
        gradient[is_free] = -np.inf
        best = int(gradient.argmax())
        if gradient[best] <= tolerance:
            break
        is_free[best] = True
        while True:
            trial = np.zeros_like(x)
            trial[is_free] = np.linalg.lstsq(a[:, is_free], b, rcond=None)[0]
            below = is_free & (trial <= 0)
            if not below.any():
                x = trial
                break
            # go as far towards the trial as nothing turns negative, and hold what got to zero there
            steps = x[below] / (x[below] - trial[below])
            x = x + float(steps.min()) * (trial - x)
            is_free &= x > 1e-15
            x[~is_free] = 0.0
    solved: Floats = x / scale
    return solved


def _columns(point: Point, form: Ramp | Waves) -> list[float]:
    """What each coefficient multiplies, in the order of `fit`."""
    shape, only = point.shape, point.operator
    groups: list[tuple[Operator, list[float]]] = [
        (Operator.FIXED, [1.0]),
        (Operator.ROWS, form.columns(shape.num_rows)),
        (Operator.PREFILL_ATTENTION, [shape.num_pairs, shape.num_squares]),
        (Operator.DECODE_ATTENTION, [float(shape.num_decodes), shape.num_context]),
        (Operator.HEAD, [float(shape.num_logit_rows), float(shape.num_logit_rows > 0)]),
        (
            Operator.PREFILL_ATTENTION,
            [shape.num_gathered, float(shape.is_mixed), shape.num_far_pairs, float(shape.has_chunk)],
        ),
    ]
    return [
        value if only is None or only is operator else 0.0 for operator, values in groups for value in values
    ]
