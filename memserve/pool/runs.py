"""Copies of blocks in as few pieces as they allow."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from memserve.pool.allocator import BlockIds


def run_ends(a: BlockIds, b: BlockIds | None = None) -> list[int]:
    """Where ranges of positions that are consecutive in both end; at least one, the last at `len(a)`."""
    jumps = np.diff(a) != 1
    if b is not None:
        jumps |= np.diff(b) != 1
    return [*(np.flatnonzero(jumps) + 1).tolist(), len(a)]


def runs(a: BlockIds, b: BlockIds | None = None) -> Iterator[tuple[int, int]]:
    """Those ranges, [start, stop), none of them empty."""
    start = 0
    for stop in run_ends(a, b) if len(a) else ():
        yield start, stop
        start = stop
