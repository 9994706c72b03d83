"""Copies of blocks between two processes and between two tiers, by mode, layout and number, each by turns
with one plain memcpy of as many bytes between the same two populated mappings.

    mode               layout
    pull               contiguous   blocks aggregated over layers, neighbours on both sides: one long copy
                       scattered    no two neighbours: a copy a block
                       discrete     K and V of each layer apart (MemServe §Memory layout): 2 x layers small
                                    copies a block; no transport of ours does that, so it is done here by hand
    pull by layer      contiguous   while the source computes: what is left to do after its last layer
    pull, gloo         contiguous   by the transport torch_distributed, by turns with a bare send and recv of
                       scattered    one tensor of as many bytes between the same processes (pool_gloo.py)
    swap_out, swap_in  contiguous   to and from the host tier, the index's work included

A pull is timed from its call to the wake-up of the loop. Positions are drawn anew each time, so that no copy
finds what another has left in the processor's caches.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import msgspec
import numpy as np
from numpy.typing import NDArray

from memserve.bench import pool_gloo
from memserve.bench.pool_gloo import BareGloo
from memserve.bench.pool_peer import (
    GEOMETRY,
    MAX_MESSAGE_BYTES,
    MODEL,
    NAME,
    RECEIVER,
    Advance,
    Advanced,
    Join,
    Message,
    Offer,
    Send,
)
from memserve.bench.pool_report import CopyRow
from memserve.errors import BenchError
from memserve.messages import Accept, BlockRefs, Connect, PeerGrant, Refuse, Tier

if TYPE_CHECKING:
    from memserve.pool.mempool import MemPool
    from memserve.pool.transports.base import Pull

Ids = NDArray[np.int64]
Bytes = NDArray[np.uint8]
NUM_PIECES = 2 * GEOMETRY.num_layers
PEER_TIMEOUT_S = 60.0
LEAST_GAP_S = 2e-3  # between layers of a source that computes


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is measured."""

    num_blocks: tuple[int, ...] = (1, 8, 32, 128, 512)
    num_arena_blocks: int = 2048
    num_repeats: int = 15


def measure_copies(sizes: Sizes) -> Iterator[CopyRow]:
    """Every row, as it is there. Raises BenchError if the other process fails, MemoryError_ without room."""
    with _receiver(sizes.num_arena_blocks) as receiver:
        for count in sizes.num_blocks:
            yield receiver.row("pull", "contiguous", count, sizes.num_repeats, receiver.pull_contiguous)
            yield receiver.row("pull", "scattered", count, sizes.num_repeats, receiver.pull_scattered)
            yield receiver.row("pull", "discrete", count, sizes.num_repeats, receiver.pull_discrete)
            yield receiver.row("pull by layer", "contiguous", count, sizes.num_repeats, receiver.pull_layers)
        for count in sizes.num_blocks:
            yield from receiver.swaps(count, sizes.num_repeats)
        receiver.use_gloo()
        for count in sizes.num_blocks:
            for layout, pull in (
                ("contiguous", receiver.pull_contiguous),
                ("scattered", receiver.pull_scattered),
            ):
                yield receiver.gloo_row(layout, count, sizes.num_repeats, pull)


class _Receiver:
    """A pool here and its peer over there; see the module."""

    def __init__(
        self, pool: MemPool, ours: Bytes, host: Bytes, theirs: Bytes, refs: BlockRefs, link: _Link
    ) -> None:
        self._pool, self._ours, self._host, self._theirs, self._refs = pool, ours, host, theirs, refs
        self._link = link
        self._rng = np.random.default_rng(0)
        self._bare: BareGloo | None = None

    def row(
        self, mode: str, layout: str, count: int, num_repeats: int, copy: Callable[[int], float]
    ) -> CopyRow:
        """Medians of copies of `count` blocks; the first of each is not counted."""
        times = [(copy(count), self._memcpy(self._ours, self._theirs, count)) for _ in range(1 + num_repeats)]
        return _row(mode, layout, count, times[1:])

    def gloo_row(self, layout: str, count: int, num_repeats: int, copy: Callable[[int], float]) -> CopyRow:
        """As `row`, and beside a bare send and recv."""
        times, bare_times = [], []
        for _ in range(1 + num_repeats):
            times.append((copy(count), self._memcpy(self._ours, self._theirs, count)))
            bare_times.append(self._send_recv(count))
        row = _row("pull, gloo", layout, count, times[1:])
        ratio = median(copy / bare for (copy, _), bare in zip(times[1:], bare_times[1:], strict=True))
        return msgspec.structs.replace(row, send_recv_ms=1e3 * median(bare_times[1:]), of_send_recv=ratio)

    def _send_recv(self, count: int) -> float:
        assert self._bare is not None
        at, into = self._run(count), self._run(count)
        began = time.perf_counter()
        self._link.send(Send(at, count))
        self._bare.recv(self._ours[into : into + count])
        return time.perf_counter() - began

    def _memcpy(self, to: Bytes, source: Bytes, count: int) -> float:
        at, into = self._run(count), self._run(count)
        began = time.perf_counter()
        np.copyto(to[into : into + count], source[at : at + count])
        return time.perf_counter() - began

    def _run(self, count: int) -> int:
        """Where a run of blocks begins."""
        return int(self._rng.integers(0, len(self._ours) - count + 1))

    # --- pulls ---

    def pull_contiguous(self, count: int) -> float:
        at, into = self._run(count), self._run(count)
        return self._timed(np.arange(at, at + count), np.arange(into, into + count))

    def pull_scattered(self, count: int) -> float:
        return self._timed(self._scattered(count), self._scattered(count))

    def pull_discrete(self, count: int) -> float:
        """As a pull's thread would do it, copy by copy."""
        pieces = [
            blocks.reshape(NUM_PIECES, -1, blocks.shape[1] // NUM_PIECES)
            for blocks in (self._theirs, self._ours)
        ]
        theirs, ours = pieces
        at, into = self._scattered(count).tolist(), self._scattered(count).tolist()
        began = time.perf_counter()
        for source, to in zip(at, into, strict=True):
            for piece in range(NUM_PIECES):
                np.copyto(ours[piece, to], theirs[piece, source])
        return time.perf_counter() - began

    def pull_layers(self, count: int) -> float:
        at, into = self._run(count), self._run(count)
        pull = self._fetch(np.arange(at, at + count), np.arange(into, into + count), self._link.num_layers)
        layer_s = count * self._ours.shape[1] / GEOMETRY.num_layers / 2e9
        last_s = self._link.advance(max(LEAST_GAP_S, layer_s))
        return self._wait(pull, count) - last_s

    def use_gloo(self) -> None:
        """Ask the peer for blocks from now on."""
        self._pool.peers.add_sending(PeerGrant(NAME, 0, len(self._theirs)))
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "store"
            self._link.send(Join(str(path)))
            self._bare = BareGloo(path, pool_gloo.RECEIVER)

    def _scattered(self, count: int) -> Ids:
        """Ids of which no two are neighbours."""
        ids: Ids = 2 * self._rng.permutation(len(self._ours) // 2)[:count]
        return ids

    def _fetch(self, at: Ids, into: Ids, layers_from: int | None = None) -> Pull:
        refs = self._refs
        generations = np.asarray(refs.generations)[at].tolist()
        wanted = msgspec.structs.replace(refs, blocks=tuple(at.tolist()), generations=tuple(generations))
        return self._pool.fetch(wanted, into, layers_from)

    def _timed(self, at: Ids, into: Ids) -> float:
        began = time.perf_counter()
        return self._wait(self._fetch(at, into), len(at)) - began

    def _wait(self, pull: Pull, count: int) -> float:
        """Until the pull has ended; when that was."""
        deadline = time.perf_counter() + PEER_TIMEOUT_S
        while (result := pull.poll()) is None:
            if not self._link.woken.acquire(timeout=max(0.0, deadline - time.perf_counter())):
                raise BenchError("a pull did not end")
            self._link.relay(self._pool)
        ended = time.perf_counter()
        if result.num_blocks < count:
            raise BenchError(f"a pull failed: {result.failure}")
        return ended

    # --- tiers ---

    def swaps(self, count: int, num_repeats: int) -> Iterator[CopyRow]:
        """Of one cached prompt of so many blocks, out and in again."""
        pool, outs, ins = self._pool, [], []
        tokens = self._rng.integers(0, 32000, count * GEOMETRY.block_size).astype("<i4").tobytes()
        for _ in range(1 + num_repeats):
            # Not always the lowest blocks: those would still be in the processor's caches.
            below = pool.alloc_mem(self._run(count)), pool.alloc_mem(self._run(count), Tier.HOST)
            ids = pool.alloc_mem(count)
            assert ids is not None and below[0] is not None and below[1] is not None
            pool.insert(tokens, ids)
            began = time.perf_counter()
            num_out = pool.swap_out(count)
            outs.append((time.perf_counter() - began, self._memcpy(self._host, self._ours, count)))
            began = time.perf_counter()
            num_in = pool.swap_in(tokens)
            ins.append((time.perf_counter() - began, self._memcpy(self._ours, self._host, count)))
            assert num_out == num_in == count
            pool.flush()
            pool.free_mem(below[0])
            pool.free_mem(below[1], Tier.HOST)
        yield _row("swap_out", "contiguous", count, outs[1:])
        yield _row("swap_in", "contiguous", count, ins[1:])


class _Link:
    """What is said between the two processes. A thread reads; all else is the caller's."""

    def __init__(self, ours: socket.socket, woken: threading.Semaphore) -> None:
        self.woken = woken
        self.num_layers = 0  # that the peer has told of
        self._socket = ours
        self._encoder = msgspec.msgpack.Encoder()
        self._control: list[Connect | Accept | Refuse] = []
        self._advanced: list[float] = []
        self._has_advanced = threading.Semaphore(0)
        self._thread = threading.Thread(target=self._read, name="memserve-bench-peer", daemon=True)
        self._thread.start()

    def send(self, message: Message) -> None:
        """Tell the peer."""
        self._socket.send(self._encoder.encode(message))

    def advance(self, gap_s: float) -> float:
        """Let the peer tell of one layer after the other; when the last one was."""
        self.send(Advance(gap_s))
        if not self._has_advanced.acquire(timeout=PEER_TIMEOUT_S):
            raise BenchError("the other process does not answer")
        self.num_layers += GEOMETRY.num_layers
        return self._advanced.pop()

    def relay(self, pool: MemPool) -> None:
        """Control messages, both ways, as the router does."""
        while self._control:
            pool.peers.on_control(self._control.pop(0))
        for message in pool.peers.take_control():
            self.send(message)

    def close(self) -> None:
        """End the peer, and the thread."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._socket.close()

    def _read(self) -> None:
        decoder = msgspec.msgpack.Decoder(Message)
        while True:
            try:
                data = self._socket.recv(MAX_MESSAGE_BYTES)
            except ConnectionResetError:
                return
            if not data:
                return
            message = decoder.decode(data)
            if isinstance(message, Advanced):
                self._advanced.append(message.at_s)
                self._has_advanced.release()
            elif isinstance(message, Connect | Accept | Refuse):
                self._control.append(message)
                self.woken.release()


def _row(mode: str, layout: str, count: int, times: list[tuple[float, float]]) -> CopyRow:
    return CopyRow(
        mode=mode,
        layout=layout,
        num_blocks=count,
        num_bytes=count * GEOMETRY.block_bytes,
        median_ms=1e3 * median(copy for copy, _ in times),
        memcpy_ms=1e3 * median(memcpy for _, memcpy in times),
        of_memcpy=median(memcpy / copy for copy, memcpy in times),
    )


@contextmanager
def _receiver(num_blocks: int) -> Iterator[_Receiver]:
    """Both processes, their memory populated."""
    from memserve import memfd
    from memserve.pool.arena import Arena, ArenaFds, PeerArena
    from memserve.pool.mempool import MemPool
    from memserve.pool.retention import HostArena, Retention
    from memserve.pool.transports.by_peer import PeerTransfer
    from memserve.pool.transports.shm import ShmTransfer
    from memserve.pool.transports.torch_distributed import TorchPool

    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours:
        with theirs:
            command = [
                sys.executable,
                "-m",
                "memserve.bench.pool_peer",
                str(theirs.fileno()),
                str(num_blocks),
            ]
            process = subprocess.Popen(command, pass_fds=[theirs.fileno()], start_new_session=True)
        try:
            ours.settimeout(PEER_TIMEOUT_S)
            data, fds, _, _ = socket.recv_fds(ours, MAX_MESSAGE_BYTES, 2)
            ours.settimeout(None)
            if not data:
                raise BenchError("the other process has ended")
            offer = msgspec.msgpack.decode(data, type=Offer)
            peer = PeerArena.map(offer.grant, ArenaFds(*fds))
            memfd.populate(peer.blocks.reshape(-1))
            arena, arena_fds = Arena.create(RECEIVER, GEOMETRY, num_blocks)
            host, host_fds = Arena.create(f"{RECEIVER}-host", GEOMETRY, num_blocks)
            for fd in (*arena_fds, *host_fds):
                os.close(fd)
            assert arena.blocks is not None and host.blocks is not None
            woken = threading.Semaphore(0)
            wake = woken.release
            shm = ShmTransfer(arena.blocks, wake, num_layers=GEOMETRY.num_layers)
            transfer = PeerTransfer(wake, shm, TorchPool.of(RECEIVER, 0, MODEL, arena, None))
            retention = Retention(host=HostArena(host, num_blocks))
            pool = MemPool(arena, RECEIVER, 0, wake, retention=retention, transfer=transfer)
            pool.peers.add_mapped(offer.grant, *fds)
            pool.populate()
            link = _Link(ours, woken)
            try:
                yield _Receiver(pool, arena.blocks, host.blocks, peer.blocks, offer.refs, link)
            finally:
                pool.close()
                link.close()
        finally:
            ours.close()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
