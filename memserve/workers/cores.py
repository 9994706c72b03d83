"""A worker's process on its machine: which of its threads compute on which cores, and that it keeps the pages
that it has freed.

The cores are taken and torch's pools sized before anything is computed (`take_cores`); once the threads that
are to have all the cores are there too, each that computes gets one of its own (`spread`).
"""

from __future__ import annotations

import ctypes
import os
import threading

import torch

from memserve.config import WorkerConfig

# Of malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4


def keep_pages() -> None:
    """Have freed memory stay with the process (glibc only).

    A step's tensors come and go. Those above 32 MiB glibc would map and unmap each time, and each mapping
    faults its pages in anew: 12 decodes after 3,000 tokens took 148 ms a step instead of 41.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def take_cores(config: WorkerConfig) -> list[int]:
    """Pin the threads there are and size torch's pools; those made later inherit the cores.

    Returns the ids of the threads that compute together, this one first.
    """
    if config.cpus:
        for thread_id in _thread_ids():
            os.sched_setaffinity(thread_id, config.cpus)
    torch.set_num_threads(config.threads)
    torch.set_num_interop_threads(1)
    before = _thread_ids()
    torch.ones(1 << 20).add_(1)  # large enough to be shared out, so that the team is made
    return [threading.get_native_id(), *sorted(_thread_ids() - before)]


def spread(team: list[int], config: WorkerConfig) -> None:
    """Give each thread that computes a core of its own, where there are enough; the others keep them all.

    A team whose threads share a core waits for the slower at every product: a step then takes two or three
    times as long, until the kernel has moved one of them. Threads made after this inherit one core.
    """
    if 1 < len(team) <= len(config.cpus):
        for thread_id, cpu in zip(team, config.cpus, strict=False):
            os.sched_setaffinity(thread_id, {cpu})


def _thread_ids() -> set[int]:
    return {int(name) for name in os.listdir("/proc/self/task")}
