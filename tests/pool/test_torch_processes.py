"""Pulls over gloo between real processes, from one that stalls, dies, comes back or rewrites its blocks."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

import memserve
from memserve.messages import BlockRefs, Tier

SCRIPT = Path(__file__).with_name("torch_peer_process.py")
_spec = importlib.util.spec_from_file_location("torch_peer_process", SCRIPT)
assert _spec is not None and _spec.loader is not None
peer_process = importlib.util.module_from_spec(_spec)
sys.modules["torch_peer_process"] = peer_process
_spec.loader.exec_module(peer_process)

NUM_BLOCKS = 64


class Process:
    """One instance. What it sends to others is forwarded; what it says to us can be waited for."""

    def __init__(self, cluster: Cluster, name: str, number: int, block_bytes: int, stall_s: float) -> None:
        self.name, self.number = name, number
        self.said: queue.Queue = queue.Queue()
        self._cluster = cluster
        arguments = [name, number, NUM_BLOCKS, block_bytes, 4 * block_bytes, stall_s]
        environment = {**os.environ, "PYTHONPATH": str(Path(memserve.__file__).parents[1])}
        self._popen = subprocess.Popen(
            [sys.executable, str(SCRIPT), *map(str, arguments)],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self._writing = threading.Lock()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def tell(self, message: object) -> None:
        assert self._popen.stdin is not None
        with self._writing, contextlib.suppress(BrokenPipeError):  # it is dead: so is the message
            if not self._popen.stdin.closed:
                self._popen.stdin.write(msgspec.json.encode(message) + b"\n")
                self._popen.stdin.flush()

    def hear(self, kind: type, timeout_s: float = 20.0):
        message = self.said.get(timeout=timeout_s)
        assert isinstance(message, kind), message
        return message

    def fetch(
        self, key: int, owner: Process, blocks: list[int], into: list[int], generation: int = 1
    ) -> None:
        refs = BlockRefs(owner.name, 1, Tier.DEVICE, tuple(blocks), (generation,) * len(blocks))
        self.tell(peer_process.Fetch(key, refs, tuple(into), owner.number))

    def signal(self, number: int) -> None:
        self._popen.send_signal(number)
        if number == signal.SIGSTOP:  # sent is not yet obeyed
            state = Path(f"/proc/{self._popen.pid}/stat")
            while state.read_text().rpartition(")")[2].split()[0] != "T":
                time.sleep(0.001)

    def kill(self) -> None:
        self._popen.kill()
        self._popen.wait()
        self._reader.join()
        assert self._popen.stdin is not None and self._popen.stdout is not None
        with self._writing, contextlib.suppress(BrokenPipeError):
            self._popen.stdin.close()
        self._popen.stdout.close()

    def _read(self) -> None:
        decoder = msgspec.json.Decoder(peer_process.FromPeer)
        assert self._popen.stdout is not None
        for line in self._popen.stdout:
            message = decoder.decode(line)
            if isinstance(message, peer_process.Forward):
                self._cluster.processes[message.peer].tell(message.message)
            else:
                self.said.put(message)


class Cluster:
    """Processes that know each other."""

    def __init__(self) -> None:
        self.processes: dict[str, Process] = {}

    def start(self, *names: str, block_bytes: int = 4096, stall_s: float = 20.0) -> list[Process]:
        started = []
        for name in names:
            number = ord(name) - ord("a")
            self.processes[name] = Process(self, name, number, block_bytes, stall_s)
            started.append(self.processes[name])
        for process in started:
            process.hear(peer_process.Up)
        for process in self.processes.values():
            for other in self.processes.values():
                process.tell(peer_process.Know(other.name))
        return started


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    cluster = Cluster()
    yield cluster
    for process in cluster.processes.values():
        process.kill()


def test_three_pull_from_each_other_at_once_and_leave_nothing(cluster: Cluster) -> None:
    processes = cluster.start("a", "b", "c")
    # 1. each pulls from both others at once, runs and scattered blocks
    for process in processes:
        others = [other for other in processes if other is not process]
        for key in range(8):
            blocks = list(range(16)) if key % 2 else list(range(30, -2, -2))
            process.fetch(key, others[0], blocks, list(range(32, 48)))
            process.fetch(key, others[1], blocks, list(range(63, 47, -1)))
    for process in processes:
        for _ in range(16):
            done = process.hear(peer_process.Done)
            assert (done.num_blocks, done.num_good, done.failure) == (16, 16, None)
    # 2. closed one after the other: whoever closes has no thread and no socket left
    for process in processes:
        process.tell(peer_process.Close())
        closed = process.hear(peer_process.Closed)
        assert (closed.num_threads, closed.num_sockets) == (0, 0)


def test_both_ways_at_once(cluster: Cluster) -> None:
    a, b = cluster.start("a", "b")
    for key in range(20):
        a.fetch(key, b, list(range(32)), list(range(32, 64)))
        b.fetch(key, a, list(range(0, 32, 2)), list(range(48, 64)))
    for process, num_blocks in ((a, 32), (b, 16)):
        for _ in range(20):
            done = process.hear(peer_process.Done)
            assert (done.num_blocks, done.num_good, done.failure) == (num_blocks, num_blocks, None)


def test_no_verified_block_ever_has_changed(cluster: Cluster) -> None:
    source, receiver = cluster.start("a", "b", block_bytes=65536)
    # 1. the source rewrites blocks 0 … 31 all the time, and block 0 … 7 may be as they were, or not
    source.tell(peer_process.Rewrite())
    num_whole = 0
    for key in range(40):
        order = [*range(32, 40), *range(8)]
        receiver.fetch(key, source, order, list(range(16)))
        done = receiver.hear(peer_process.Done)
        assert done.num_good == done.num_blocks >= 8
        num_whole += done.failure is None
    # 2. by now none of them is
    assert done.num_blocks == 8 and num_whole < 40


def test_a_source_that_dies_is_a_miss_and_its_successor_is_pulled_from(cluster: Cluster) -> None:
    source, receiver = cluster.start("a", "b", block_bytes=1 << 20, stall_s=3.0)
    # 1. it is killed in the midst of pulls: each ends, and what it brought is what was asked for
    num_pulls = 40
    for key in range(num_pulls):
        receiver.fetch(key, source, list(range(48)), list(range(48)))
    assert receiver.hear(peer_process.Done).failure is None
    source.kill()
    results = [receiver.hear(peer_process.Done) for _ in range(num_pulls - 1)]
    assert all(done.num_good == done.num_blocks for done in results)
    failures = [done.failure for done in results if done.failure is not None]
    # the one being copied is lost, unless the death fell between two; the rest waits for one connection
    assert failures and set(failures[1:]) <= {"no link to a: no connection within 3 s"}
    assert failures[0].startswith(("lost a: ", "no link to a: "))
    # 2. whoever comes in its place is found by a new attempt
    (successor,) = cluster.start("a", block_bytes=1 << 20, stall_s=3.0)
    receiver.fetch(num_pulls, successor, [5, 7, 9], [1, 2, 3])
    done = receiver.hear(peer_process.Done)
    assert (done.num_blocks, done.num_good, done.failure) == (3, 3, None)


def test_a_source_that_stalls_costs_one_deadline(cluster: Cluster) -> None:
    source, receiver = cluster.start("a", "b", stall_s=0.5)
    receiver.fetch(0, source, [0], [0])
    assert receiver.hear(peer_process.Done).failure is None
    # 1. it stands still
    source.signal(signal.SIGSTOP)
    receiver.fetch(1, source, list(range(8)), list(range(8)))
    done = receiver.hear(peer_process.Done)
    assert (done.num_blocks, done.failure) == (0, "lost a: nothing came for 0.5 s")
    # 2. it goes on: the next pull comes by a new pair
    source.signal(signal.SIGCONT)
    receiver.fetch(2, source, list(range(8)), list(range(8)))
    done = receiver.hear(peer_process.Done)
    assert (done.num_blocks, done.num_good, done.failure) == (8, 8, None)
