"""Two pools under any history of allocations, offers, pulls, cancels and reuse, against a model of it."""

from __future__ import annotations

import os
import threading

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

from memserve import memfd
from memserve.messages import ArenaGrant, BlockRefs, Tier
from memserve.model_config import KVGeometry
from memserve.pool.arena import Arena, ArenaFds
from memserve.pool.mempool import MemPool
from memserve.pool.transports.by_peer import PeerTransfer
from memserve.pool.transports.shm import Bytes, ShmTransfer, copy_bytes

NUM_BLOCKS = 12
GEOMETRY = KVGeometry(num_layers=1, num_kv_heads=1, block_size=1, head_dim=4, dtype="float32")


class PoolsMachine(RuleBasedStateMachine):
    """The content of a block is one number, drawn anew for each life of it; `content` models the source's."""

    def __init__(self) -> None:
        super().__init__()
        self.fds: list[int] = []
        self.woken = threading.Semaphore(0)
        self.before_copy = lambda: None
        self.source_arena, self.source = self.make("source")
        self.arena, self.receiver = self.make("receiver")
        grant = ArenaGrant("source", 1, Tier.DEVICE, NUM_BLOCKS, GEOMETRY.block_bytes)
        self.receiver.peers.add_mapped(grant, *map(memfd.reopen_readonly, self.fds[:2]))
        self.content: dict[int, int] = {}  # of each held block of the source
        self.num_lives = 0
        self.offers: list[tuple[BlockRefs, list[int]]] = []

    def make(self, instance: str) -> tuple[Arena, MemPool]:
        sizes = (NUM_BLOCKS * GEOMETRY.block_bytes, (NUM_BLOCKS + 1) * 8)
        fds = ArenaFds(*(memfd.create_memfd(instance, size) for size in sizes))
        self.fds += fds
        arena = Arena.map(GEOMETRY, NUM_BLOCKS, fds)

        def poison(ids: np.ndarray) -> None:
            assert arena.blocks is not None
            arena.blocks[ids] = 0xFF

        shm = ShmTransfer(arena.blocks, self.woken.release, copy=self.copy)
        transfer = PeerTransfer(self.woken.release, shm)
        return arena, MemPool(arena, instance, 1, self.woken.release, on_free=poison, transfer=transfer)

    def copy(self, destination: Bytes, source: Bytes) -> int:
        self.before_copy()
        self.before_copy = lambda: None
        return copy_bytes(destination, source)

    @rule(num_blocks=st.integers(1, 6))
    def compute(self, num_blocks: int) -> None:
        ids = self.source.alloc_mem(num_blocks)
        assert (ids is None) == (num_blocks > NUM_BLOCKS - len(self.content))
        for block in [] if ids is None else ids.tolist():
            self.num_lives += 1
            self.content[block] = self.num_lives
            self.source_arena.blocks[block] = self.num_lives % 250

    @precondition(lambda self: self.content)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        ids = data.draw(st.lists(st.sampled_from(sorted(self.content)), unique=True, min_size=1))
        self.source.free_mem(ids)
        for block in ids:
            del self.content[block]

    @precondition(lambda self: self.content)
    @rule(data=st.data())
    def offer(self, data: st.DataObject) -> None:
        ids = data.draw(st.lists(st.sampled_from(sorted(self.content)), unique=True, min_size=1))
        self.offers.append((self.source.addresses(ids), [self.content[block] for block in ids]))

    @precondition(lambda self: self.offers)
    @rule(data=st.data(), reuse=st.booleans(), cancel=st.booleans())
    def pull(self, data: st.DataObject, reuse: bool, cancel: bool) -> None:
        refs, lives = data.draw(st.sampled_from(self.offers))
        # 1. what is already gone before the pull bounds what it can bring
        is_current = [self.content.get(block) == life for block, life in zip(refs.blocks, lives, strict=True)]
        num_certain = next((i for i, current in enumerate(is_current) if not current), len(lives))
        # 2. and what is given to somebody else during the copy (one that is cancelled may not have begun, and
        # which, is nobody's to say)
        if reuse and not cancel:
            self.before_copy = lambda: self.compute(3)
        into = self.receiver.alloc_mem(len(lives))
        assert into is not None
        pull = self.receiver.fetch(refs, into)
        if cancel:
            pull.cancel()
        while (result := pull.poll()) is None:
            assert self.woken.acquire(timeout=30)
        self.before_copy = lambda: None
        # 3. what is verified is what was offered
        assert self.arena.blocks is not None
        for index in range(result.num_blocks):
            assert is_current[index]
            assert (self.arena.blocks[into[index]] == lives[index] % 250).all()
        assert (result.failure is None) == (result.num_blocks == len(lives)) or cancel
        if not cancel:
            assert result.num_blocks >= num_certain
        self.receiver.free_mem(into)
        self.receiver.assert_idle()

    def teardown(self) -> None:
        self.source.free_mem(sorted(self.content))
        for pool in (self.source, self.receiver):
            pool.close()
            pool.assert_idle()
        for fd in self.fds:
            os.close(fd)


PoolsMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
test_any_history = PoolsMachine.TestCase
