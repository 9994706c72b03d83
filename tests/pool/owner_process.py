"""The owner of an arena as a process of its own, for test_processes.py: rewrites blocks without end.

Every word of a block is its generation; `written` [num_blocks] says up to which generation a block is
complete, as an offer would. Arguments: the descriptors of arena, generations and `written`, num_blocks,
block_bytes.
"""

from __future__ import annotations

import sys

import numpy as np

from memserve import memfd
from memserve.pool.allocator import BlockAllocator


def main(arena_fd: int, generations_fd: int, written_fd: int, num_blocks: int, block_bytes: int) -> None:
    words = memfd.map_bytes(arena_fd, num_blocks * block_bytes, writable=True).view(np.uint64)
    words = words.reshape(num_blocks, -1)
    generations = memfd.map_bytes(generations_fd, (num_blocks + 1) * 8, writable=True).view(np.uint64)[:-1]
    written = memfd.map_bytes(written_fd, num_blocks * 8, writable=True).view(np.uint64)
    allocator = BlockAllocator(num_blocks, generations)
    random = np.random.default_rng(0)
    print("up", flush=True)
    while True:
        ids = allocator.allocate(int(random.integers(1, 5)))
        if ids is None:
            held = allocator.held_blocks()
            allocator.free(random.choice(held, size=len(held) // 2, replace=False))
            continue
        words[ids] = generations[ids][:, None]
        written[ids] = generations[ids]


main(*(int(argument) for argument in sys.argv[1:]))
