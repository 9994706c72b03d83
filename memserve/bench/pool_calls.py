"""Microbenchmarks of the calls of `MemPool`, one at a time: allocation at several fill levels, and the index
at size.

The tree: prompts of 2,048 tokens, of which 512 are shared by every 50th, blocks of 16, and a tenth of as many
prompts beside it: what does not depend on the size of the tree is flat. Blocks are made as small as can be:
what is timed is who holds what, not copies (pool_copies.py).
"""

from __future__ import annotations

import random
import time
import tracemalloc
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from memserve.bench.pool_report import CallRow, quantile

if TYPE_CHECKING:
    from memserve.pool.mempool import MemPool

BLOCK_SIZE = 16
PROMPT_TOKENS, SHARED_TOKENS, NUM_SHARED = 2048, 512, 50
PROMPT_BLOCKS, OWN_BLOCKS = PROMPT_TOKENS // BLOCK_SIZE, (PROMPT_TOKENS - SHARED_TOKENS) // BLOCK_SIZE
BATCHES = (1, 16, 64, 96, 256)
FILL_LEVELS = (0.0, 0.5, 0.98)


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is measured."""

    num_prompts: int = 10_000
    num_calls: int = 2_000
    num_arena_blocks: int = 65_536


def measure_calls(sizes: Sizes) -> Iterator[CallRow]:
    """Every row, as it is there."""
    yield from measure_allocation(sizes)
    for num_prompts in tree_sizes(sizes):
        prompts = Prompts(num_prompts)
        num_calls = min(sizes.num_calls, num_prompts // 4)
        yield from measure_index(prompts, num_calls)
        yield from measure_tiers(prompts, min(num_calls, 200))


def tree_sizes(sizes: Sizes) -> tuple[int, int]:
    """Prompts in the two trees."""
    return sizes.num_prompts // 10, sizes.num_prompts


def index_bytes(num_prompts: int) -> float:
    """Memory of a block in the index, beside its token ids."""
    from memserve.pool.index import Index

    prompts = Prompts(num_prompts)
    tracemalloc.start()
    index = Index(BLOCK_SIZE)
    for number, tokens in enumerate(prompts.tokens):
        first = number * PROMPT_BLOCKS
        tokens = bytes(bytearray(tokens))  # a copy: what the index keeps of it is traced
        index.insert("", tokens, np.arange(first, first + PROMPT_BLOCKS), float(number))
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    return (held - index.num_blocks * BLOCK_SIZE * 4) / index.num_blocks


class Prompts:
    """So many, the same ones every time."""

    def __init__(self, count: int) -> None:
        self._rng = np.random.default_rng(0)
        shared = [self.random(SHARED_TOKENS) for _ in range(min(NUM_SHARED, count))]
        rest = PROMPT_TOKENS - SHARED_TOKENS
        self.tokens = [shared[n % len(shared)] + self.random(rest) for n in range(count)]

    def random(self, num_tokens: int) -> bytes:
        """Tokens that are nowhere else."""
        return self._rng.integers(0, 32000, num_tokens).astype("<i4").tobytes()

    def sample(self, count: int) -> list[bytes]:
        """Some of them, each once."""
        return random.Random(0).sample(self.tokens, count)


class _Timer:
    """Times calls of one pool."""

    def __init__(self, state: str) -> None:
        self._state = state

    def row(self, call: str, num_blocks: int, times_us: list[float]) -> CallRow:
        ordered = sorted(times_us)
        return CallRow(
            call=call,
            state=self._state,
            num_blocks=num_blocks,
            num_calls=len(ordered),
            p50_us=quantile(ordered, 0.5),
            p99_us=quantile(ordered, 0.99),
        )

    def timed(self, call: str, num_blocks: int, calls: Iterable[Callable[[], object]]) -> CallRow:
        return self.row(call, num_blocks, [_time_us(each) for each in calls])


def _time_us(call: Callable[[], object]) -> float:
    began = time.perf_counter_ns()
    call()
    return (time.perf_counter_ns() - began) / 1e3


@contextmanager
def _small_pool(num_blocks: int, num_host: int | None = None) -> Iterator[MemPool]:
    """A pool that caches, of the smallest blocks there are."""
    import os

    from memserve.model_config import KVGeometry
    from memserve.pool.arena import Arena
    from memserve.pool.mempool import MemPool
    from memserve.pool.retention import HostArena, Retention

    geometry = KVGeometry(num_layers=1, num_kv_heads=1, block_size=BLOCK_SIZE, head_dim=1, dtype="bfloat16")
    arena, fds = Arena.create("bench", geometry, num_blocks)
    host = None
    if num_host is not None:
        host_arena, host_fds = Arena.create("bench-host", geometry, num_host)
        fds = (*fds, *host_fds)  # type: ignore[assignment]
        host = HostArena(host_arena, num_host)
    pool = MemPool(arena, "bench", 0, lambda: None, retention=Retention(host=host))
    pool.populate()
    try:
        yield pool
    finally:
        pool.close()
        for fd in fds:
            os.close(fd)


def measure_allocation(sizes: Sizes) -> Iterator[CallRow]:
    """`alloc_mem` and `free_mem`, of an arena of which so much is in use, in blocks scattered all over."""
    for level in FILL_LEVELS:
        timer = _Timer(f"{level:.0%} in use")
        for batch in BATCHES:
            with _small_pool(sizes.num_arena_blocks) as pool:
                ids = pool.alloc_mem(sizes.num_arena_blocks)
                assert ids is not None
                np.random.default_rng(0).shuffle(ids)
                pool.free_mem(ids[: max(batch, round(sizes.num_arena_blocks * (1 - level)))])
                allocs, frees = [], []
                for _ in range(sizes.num_calls):
                    began = time.perf_counter_ns()
                    taken = pool.alloc_mem(batch)
                    allocated = time.perf_counter_ns()
                    assert taken is not None
                    pool.free_mem(taken)
                    frees.append((time.perf_counter_ns() - allocated) / 1e3)
                    allocs.append((allocated - began) / 1e3)
                yield timer.row("alloc_mem", batch, allocs)
                yield timer.row("free_mem", batch, frees)


def measure_index(prompts: Prompts, num_calls: int) -> Iterator[CallRow]:
    """Calls on a tree, the evicting ones last."""
    count = len(prompts.tokens)
    timer = _Timer(f"{count:,} prompts")
    with _small_pool((count + 2) * PROMPT_BLOCKS) as pool:
        yield _insert_all(pool, prompts, timer)
        some = prompts.sample(num_calls)
        # 1. look up
        yield timer.timed("match, all cached", PROMPT_BLOCKS, [partial(pool.match, t) for t in some])
        partly = [t[: SHARED_TOKENS * 4] + prompts.random(PROMPT_TOKENS - SHARED_TOKENS) for t in some]
        blocks = SHARED_TOKENS // BLOCK_SIZE
        yield timer.timed("match of 512 tokens", blocks, [partial(pool.match, t) for t in partly])
        found = [pool.match(t).device_blocks for t in some]
        yield timer.timed("addresses", PROMPT_BLOCKS, [partial(pool.addresses, f) for f in found])
        # 2. the life of a sequence that continues a cached one
        acquires, publishes, releases = [], [], []
        for tokens in some:
            began = time.perf_counter_ns()
            table = pool.acquire(tokens)
            acquires.append((time.perf_counter_ns() - began) / 1e3)
            ids = pool.alloc_mem(1)
            assert ids is not None
            table.append(ids)
            more = prompts.random(BLOCK_SIZE)
            publishes.append(_time_us(partial(pool.publish, table, more)))
            releases.append(_time_us(partial(pool.release, table)))
            pool.delete(tokens + more)
            if pool.match(tokens).num_tokens < PROMPT_TOKENS:  # went with it, as it had no other use
                _insert(pool, tokens)
        yield timer.row("acquire", PROMPT_BLOCKS, acquires)
        yield timer.row("publish", 1, publishes)
        yield timer.row("release", PROMPT_BLOCKS, releases)
        # 3. delete, and insert again
        deletes, inserts = [], []
        for tokens in some:
            deletes.append(_time_us(partial(pool.delete, tokens)))
            inserts.append(_insert(pool, tokens))
        yield timer.row("delete", OWN_BLOCKS, deletes)
        yield timer.row("insert", PROMPT_BLOCKS, inserts)
        # 4. allocate what only an eviction frees
        ids = pool.alloc_mem(pool.stats().free)
        assert ids is not None
        evicts = [partial(pool.alloc_mem, OWN_BLOCKS) for _ in range(num_calls)]
        yield timer.timed("alloc_mem that evicts", OWN_BLOCKS, evicts)


def measure_tiers(prompts: Prompts, num_calls: int) -> Iterator[CallRow]:
    """Swaps and sizes of the host tier; the blocks' copies are small."""
    count = len(prompts.tokens)
    timer = _Timer(f"{count:,} prompts")
    num_host = 2 * num_calls * OWN_BLOCKS
    with _small_pool((count + 2) * PROMPT_BLOCKS, num_host) as pool:
        for tokens in prompts.tokens:
            _insert(pool, tokens)
        outs, ins = [], []
        for tokens in prompts.tokens[:num_calls]:  # the least recently used first
            outs.append(_time_us(partial(pool.swap_out, OWN_BLOCKS)))
            ins.append(_time_us(partial(pool.swap_in, tokens)))
        yield timer.row("swap_out", OWN_BLOCKS, outs)
        yield timer.row("swap_in", OWN_BLOCKS, ins)
        pool.swap_out(num_host // 4)
        shrinks, grows = [], []
        for _ in range(min(20, num_calls)):
            shrinks.append(_time_us(partial(pool.resize, num_host // 2)))
            grows.append(_time_us(partial(pool.resize, num_host)))
        yield timer.row("resize, to half", num_host // 2, shrinks)
        yield timer.row("resize, to twice", num_host // 2, grows)


def _insert(pool: MemPool, tokens: bytes) -> float:
    """Publish a prompt; the time that this took, in us."""
    ids = pool.alloc_mem(len(tokens) // (4 * BLOCK_SIZE))
    assert ids is not None
    return _time_us(partial(pool.insert, tokens, ids))


def _insert_all(pool: MemPool, prompts: Prompts, timer: _Timer) -> CallRow:
    return timer.row("insert, to fill", PROMPT_BLOCKS, [_insert(pool, tokens) for tokens in prompts.tokens])
