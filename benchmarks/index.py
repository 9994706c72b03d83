"""The local index at size: 10,000 prompts of 2,048 tokens over 50 shared prefixes of 512, blocks of 16.

    python benchmarks/index.py

Prints microseconds (p50 and p99 of single calls) and the memory an indexed block costs beside its token ids.
"""

from __future__ import annotations

import random
import time
import tracemalloc
from collections.abc import Callable, Iterable

import numpy as np

from memserve.pool.index import Index

NUM_PROMPTS, PROMPT_TOKENS, SHARED_TOKENS, NUM_SHARED, BLOCK_SIZE = 10_000, 2048, 512, 50, 16


def timed(name: str, calls: Iterable[Callable[[], object]]) -> None:
    """Time each call and print a line."""
    times_us = []
    for call in calls:
        started = time.perf_counter()
        call()
        times_us.append((time.perf_counter() - started) * 1e6)
    times_us.sort()
    print(f"{name:<34}{times_us[len(times_us) // 2]:8.1f}{times_us[int(len(times_us) * 0.99)]:8.1f}")


def fill(index: Index, prompts: list[bytes]) -> list[Callable[[], object]]:
    """One insert a prompt, not called yet."""
    num_blocks = PROMPT_TOKENS // BLOCK_SIZE
    blocks = [np.arange(n * num_blocks, (n + 1) * num_blocks, dtype=np.int64) for n in range(len(prompts))]
    return [lambda n=n: index.insert("", prompts[n], blocks[n], float(n)) for n in range(len(prompts))]


def main() -> None:
    """Run everything."""
    rng = np.random.default_rng(0)

    def random_tokens(count: int) -> bytes:
        return rng.integers(0, 32000, count).astype("<i4").tobytes()

    shared = [random_tokens(SHARED_TOKENS) for _ in range(NUM_SHARED)]
    rest = PROMPT_TOKENS - SHARED_TOKENS
    prompts = [shared[n % NUM_SHARED] + random_tokens(rest) for n in range(NUM_PROMPTS)]
    picked = random.Random(0).sample(prompts, 5000)

    index = Index(BLOCK_SIZE)
    print(f"{'us':<34}{'p50':>8}{'p99':>8}")
    timed("insert of 2,048 tokens", fill(index, prompts))
    timed("match of 2,048, all cached", [lambda p=p: index.match("", p, 1e6).blocks() for p in picked])
    partly = [p[: SHARED_TOKENS * 4] + random_tokens(rest) for p in picked]
    timed("match of 512 of 2,048", [lambda p=p: index.match("", p, 1e6).blocks() for p in partly])
    timed("evict 1,536 tokens", [lambda: index.evict(rest // BLOCK_SIZE) for _ in range(5000)])

    tracemalloc.start()
    index = Index(BLOCK_SIZE)
    for insert in fill(index, prompts):
        insert()
    held = tracemalloc.get_traced_memory()[0]
    ids = (NUM_SHARED * SHARED_TOKENS + NUM_PROMPTS * rest) * 4
    print(f"{(held - ids) / index.num_blocks:.1f} bytes a block beside the token ids")


if __name__ == "__main__":
    main()
