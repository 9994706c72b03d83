"""Copies of blocks in as few pieces as they allow."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from memserve.pool.allocator import BlockIds


def runs(a: BlockIds, b: BlockIds) -> Iterator[tuple[int, int]]:
    """Ranges [start, stop) of positions that are consecutive in both."""
    if len(a) == 0:
        return
    jumps = (np.diff(a) != 1) | (np.diff(b) != 1)
    start = 0
    for stop in (*(np.flatnonzero(jumps) + 1).tolist(), len(a)):
        yield start, stop
        start = stop
