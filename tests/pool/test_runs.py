"""Runs against looking at each position."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from memserve.pool.runs import run_ends, runs

STEPS = st.lists(st.tuples(st.sampled_from([1, 1, 2, -1, 0]), st.sampled_from([1, 1, 1, 3])), max_size=12)


@given(steps=STEPS)
def test_runs_are_as_long_as_they_can_be(steps: list[tuple[int, int]]) -> None:
    a, b = (np.cumsum([step[i] for step in steps], dtype=np.int64) for i in (0, 1))
    for other in (b, None):
        jumps = [
            i
            for i in range(1, len(a))
            if a[i] != a[i - 1] + 1 or (other is not None and other[i] != other[i - 1] + 1)
        ]
        bounds = [0, *jumps, len(a)]
        assert run_ends(a, other) == bounds[1:]
        assert list(runs(a, other)) == (list(zip(bounds, bounds[1:], strict=False)) if len(a) else [])
