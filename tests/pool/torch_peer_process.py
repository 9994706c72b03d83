"""One instance with a `TorchTransfer` as a process of its own, for test_torch_processes.py.

Block b of instance i (a number) holds the words `generation * 1000 + i`, so that whoever pulls it can tell
whose it is and of when. Reads one JSON message a line: control messages, and what is defined here. Writes
those for others as `Forward`, and `Done` for each pull. Arguments: name, number, num_blocks, block_bytes,
chunk_bytes, stall_s.
"""

from __future__ import annotations

import os
import sys
import threading
from collections import deque

import msgspec
import numpy as np

from memserve.messages import Accept, BlockRefs, Connect, LinkMessage, Refuse
from memserve.pool.transports.base import Pull, PullResult
from memserve.pool.transports.torch_distributed import (
    Options,
    TorchPeer,
    TorchPool,
    TorchTransfer,
)


class Know(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Of another instance."""

    name: str


class Fetch(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Pull; `owner` is the number of who owns `refs`."""

    key: int
    refs: BlockRefs
    into: tuple[int, ...]
    owner: int


class Rewrite(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """From now on, free, allocate and fill blocks anew without end."""


class Close(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Close the transfer, answer `Closed`."""


class Up(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """The process is ready."""


class Forward(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """For another instance."""

    peer: str
    message: LinkMessage


class Done(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """A pull has ended; `num_good` of its verified blocks hold what was asked for, to the last word."""

    key: int
    num_blocks: int
    num_good: int
    failure: str | None


class Closed(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """What was left after `Close`."""

    num_threads: int
    num_sockets: int


ToPeer = Connect | Accept | Refuse | Know | Fetch | Rewrite | Close
FromPeer = Up | Forward | Done | Closed


class Peer:
    """The instance, its loop being the reading of lines."""

    def __init__(self, name: str, number: int, sizes: tuple[int, int, int], stall_s: float) -> None:
        num_blocks, block_bytes, chunk_bytes = sizes
        self.number = number
        self.blocks = np.zeros((num_blocks, block_bytes), dtype=np.uint8)
        self.words = self.blocks.view(np.uint64)
        self.generations = np.ones(num_blocks, dtype=np.uint64)
        self.words[:] = self.content(self.generations, number)
        self.before = self.left()
        self.writing = threading.Lock()
        self.pulls: deque[tuple[Fetch, Pull]] = deque()
        self.woken = threading.Semaphore(0)
        self.transfer = TorchTransfer(
            TorchPool(name, 1, "float32", "model", self.blocks, self.generations),
            self.woken.release,
            lambda peer, message: self.write(Forward(peer, message)),
            Options(connect_s=stall_s, stall_s=stall_s, chunk_bytes=chunk_bytes),
        )
        threading.Thread(target=self.finish_pulls, daemon=True).start()

    def run(self) -> None:
        self.write(Up())
        decoder = msgspec.json.Decoder(ToPeer)
        for line in sys.stdin.buffer:
            message = decoder.decode(line)
            if isinstance(message, Know):
                self.transfer.add_peer(TorchPeer(message.name, 1, len(self.blocks)))
            elif isinstance(message, Fetch):
                pull = self.transfer.begin(message.refs, np.array(message.into, dtype=np.int64))
                self.pulls.append((message, pull))
            elif isinstance(message, Rewrite):
                threading.Thread(target=self.rewrite, daemon=True).start()
            elif isinstance(message, Close):
                self.transfer.close()
                now = self.left()
                self.write(
                    Closed(now[0] - self.before[0] - 1, now[1] - self.before[1])
                )  # but for finish_pulls
            else:
                self.transfer.on_control(message)

    def finish_pulls(self) -> None:
        while True:
            self.woken.acquire()
            for _ in range(len(self.pulls)):
                message, pull = self.pulls.popleft()
                result = pull.poll()
                if result is None:
                    self.pulls.append((message, pull))
                else:
                    self.check(message, result)

    def check(self, message: Fetch, result: PullResult) -> None:
        generations = np.array(message.refs.generations, dtype=np.uint64)[: result.num_blocks]
        words = self.words[list(message.into[: result.num_blocks])]
        is_good = (words == self.content(generations, message.owner)).all(axis=1)
        self.write(Done(message.key, result.num_blocks, int(is_good.sum()), result.failure))

    def rewrite(self) -> None:
        random = np.random.default_rng(0)
        while True:
            ids = random.integers(0, len(self.blocks) // 2, size=2)
            self.generations[ids] += np.uint64(2)
            self.words[ids] = self.content(self.generations[ids], self.number)

    @staticmethod
    def content(generations: np.ndarray, number: int) -> np.ndarray:
        return (generations * np.uint64(1000) + np.uint64(number))[:, None]

    @staticmethod
    def left() -> tuple[int, int]:
        sockets = 0
        for name in os.listdir("/proc/self/fd"):
            try:
                sockets += os.readlink(f"/proc/self/fd/{name}").startswith("socket:")
            except FileNotFoundError:
                continue
        return threading.active_count(), sockets

    def write(self, message: FromPeer) -> None:
        with self.writing:
            sys.stdout.buffer.write(msgspec.json.encode(message) + b"\n")
            sys.stdout.buffer.flush()


if __name__ == "__main__":
    name, number, num_blocks, block_bytes, chunk_bytes, stall_s = sys.argv[1:]
    sizes = int(num_blocks), int(block_bytes), int(chunk_bytes)
    Peer(name, int(number), sizes, float(stall_s)).run()
