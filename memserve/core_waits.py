"""How long this process had work but no core, thread by thread: what other processes cost it.

Linux counts it (`schedstat`, run-queue delay). A time from which it is taken off is nearly that of a machine
of one's own: on one with twice as many busy threads as cores, wall times of one step scattered by a factor of
three, and these by a few per cent.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path

_TASKS = Path("/proc/self/task")


def read_waits() -> dict[str, float]:
    """Of each thread, in ms, since it began; empty where the kernel does not tell."""
    waits: dict[str, float] = {}
    with contextlib.suppress(OSError):
        for thread_id in os.listdir(_TASKS):
            with contextlib.suppress(OSError, ValueError, IndexError):  # it may end meanwhile
                waits[thread_id] = int((_TASKS / thread_id / "schedstat").read_text().split()[1]) / 1e6
    return waits


def longest_wait(before: Mapping[str, float], after: Mapping[str, float]) -> float:
    """What the thread that waited most has waited between two readings: threads that compute together wait
    for the last of them.
    """
    return max((ms - before.get(thread_id, ms) for thread_id, ms in after.items()), default=0.0)
