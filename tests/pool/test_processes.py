"""Pulls out of another process's arena: while it rewrites what is read, stands still, or has been killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import memserve
from memserve import memfd
from memserve.messages import ArenaGrant, BlockRefs, Tier
from memserve.pool.transports.base import PullResult
from memserve.pool.transports.shm import Bytes, copy_bytes

OWNER = Path(__file__).with_name("owner_process.py")
NUM_BLOCKS = 32


class Owner:
    """The other process and, on our side, what an offer from it would say."""

    def __init__(self, receiver, block_bytes: int) -> None:
        self.receiver = receiver
        sizes = (NUM_BLOCKS * block_bytes, (NUM_BLOCKS + 1) * 8, NUM_BLOCKS * 8)
        self.fds = [memfd.create_memfd("owner", size) for size in sizes]
        command = [sys.executable, str(OWNER), *map(str, (*self.fds, NUM_BLOCKS, block_bytes))]
        environment = {**os.environ, "PYTHONPATH": str(Path(memserve.__file__).parents[1])}
        self.process = subprocess.Popen(
            command, env=environment, pass_fds=self.fds, stdout=subprocess.PIPE, text=True
        )
        try:
            self.written = memfd.map_bytes(self.fds[2], NUM_BLOCKS * 8, writable=False).view(np.uint64)
            readonly = [memfd.reopen_readonly(fd) for fd in self.fds[:2]]
            receiver.pool.peers.add_mapped(
                ArenaGrant("owner", 1, Tier.DEVICE, NUM_BLOCKS, block_bytes), *readonly
            )
            assert self.process.stdout is not None and self.process.stdout.readline() == "up\n"
        except BaseException:
            self.process.kill()  # it writes as fast as it can, for ever
            self.process.communicate()
            raise

    def pull(self, into: np.ndarray) -> tuple[PullResult, np.ndarray]:
        """Pull all its blocks; returns the generations asked for too."""
        generations = self.written.copy()
        blocks = tuple(range(NUM_BLOCKS))
        refs = BlockRefs("owner", 1, Tier.DEVICE, blocks, tuple(generations.tolist()))
        return self.receiver.finish(self.receiver.pool.fetch(refs, into)), generations

    def check(self, result: PullResult, generations: np.ndarray, into: np.ndarray) -> None:
        """Every word of every verified block is of the generation asked for."""
        words = self.receiver.arena.blocks[into[: result.num_blocks]].view(np.uint64)
        assert (words == generations[: result.num_blocks, None]).all()

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()
        for fd in self.fds:
            os.close(fd)
        del self.receiver, self.written  # pytest keeps the fixture's value longer than mappings may live


def copy_with_a_pause(destination: Bytes, source: Bytes) -> int:
    """Half, a millisecond in which the owner runs, the other half."""
    half = len(source) // 2
    copy_bytes(destination[:half], source[:half])
    time.sleep(0.001)
    copy_bytes(destination[half:], source[half:])
    return source.nbytes


@pytest.fixture
def owner(make_pool) -> Iterator[Owner]:
    receiver = make_pool("receiver", num_blocks=NUM_BLOCKS, block_size=64, copy=copy_with_a_pause)
    owner = Owner(receiver, receiver.arena.geometry.block_bytes)
    yield owner
    owner.close()


def test_no_verified_block_ever_has_changed(owner: Owner) -> None:
    into = owner.receiver.pool.alloc_mem(NUM_BLOCKS)
    # 1. while the owner rewrites its blocks as fast as it can
    for _ in range(100):
        owner.check(*owner.pull(into), into)
    # 2. while it stands still, in the middle of whatever it was doing
    owner.process.send_signal(signal.SIGSTOP)
    for _ in range(3):
        owner.check(*owner.pull(into), into)
    owner.receiver.pool.free_mem(into)


def test_the_memory_of_a_killed_owner_can_still_be_pulled(owner: Owner) -> None:
    into = owner.receiver.pool.alloc_mem(NUM_BLOCKS)
    owner.process.kill()
    owner.process.wait()
    result, generations = owner.pull(into)
    owner.check(result, generations, into)
    complete = owner.written == memfd.map_bytes(owner.fds[1], NUM_BLOCKS * 8, writable=False).view(np.uint64)
    assert result.num_blocks == (NUM_BLOCKS if complete.all() else int(complete.argmin()))
    owner.receiver.pool.free_mem(into)
