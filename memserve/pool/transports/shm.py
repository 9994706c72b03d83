"""Pulls between processes of one machine: a memory copy out of a peer's mapped arena, in a thread of its own.

    begin ─► queued ─► copying ─► result            the thread takes pulls in the order in which they began
                └─────────┴─ cancel ─► result       a queued one ends at once, the copying one after its piece

A pull of what is still being computed is copied layer by layer as the source gets on, and lets others pass in
between. The source takes no part and may stall, restart or die meanwhile: its memory stays mapped, and its
generations tell whether what was copied is what was asked for. The queue is bounded; what does not fit
fails at once and is recomputed.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from queue import Empty, SimpleQueue

import numpy as np
from numpy.typing import NDArray

from memserve.messages import BlockRefs, Tier
from memserve.pool.allocator import BlockIds
from memserve.pool.arena import PeerArena
from memserve.pool.runs import runs
from memserve.pool.transports.base import FailedPull, Pull
from memserve.pool.transports.pull import QueuedPull, gone, num_same

logger = logging.getLogger(__name__)

Bytes = NDArray[np.uint8]
Copy = Callable[[Bytes, Bytes], int]

MAX_QUEUED_PULLS = 1024
_PIECE_BYTES = 4 << 20  # copied between two looks at `cancel`: under a millisecond
# How often the thread looks whether a source has got on, and how long one may take for a layer.
_POLL_S = 1e-3
_STALLED_S = 30.0


def copy_bytes(destination: Bytes, source: Bytes) -> int:
    """Copy `source` over `destination` (same shape, both contiguous), the GIL free; returns the bytes."""
    np.copyto(destination, source)
    return source.nbytes


class ShmTransfer:
    """A `Transfer` between mapped arenas.

    Args:
        blocks: our arena, uint8 [num_blocks, block_bytes]; only blocks named in `begin` are written.
        wake: called after each pull's end, mostly from the transfer thread, until `close` returns; must not
            block (write an eventfd there, on which the loop waits).
        num_layers: of a block, each as many bytes.
        copy: copies bytes and says how many; tests inject faults here.
        max_queued: pulls that may wait behind the one being copied.
        cores: where the thread may run; None = where its maker may. A copy should not have to share the core
            of a worker's step while another is idle.
    """

    def __init__(
        self,
        blocks: Bytes,
        wake: Callable[[], None],
        *,
        num_layers: int = 1,
        copy: Copy = copy_bytes,
        max_queued: int = MAX_QUEUED_PULLS,
        cores: set[int] | None = None,
    ) -> None:
        self._blocks = blocks
        self._wake = wake
        self._num_layers = num_layers
        self._copy = copy
        self._max_queued = max_queued
        self._cores = cores
        self._peers: dict[tuple[str, Tier], PeerArena] = {}
        self._queue: SimpleQueue[_ShmPull | None] = SimpleQueue()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="memserve-pull", daemon=True)
        self._thread.start()

    def add_peer(self, peer: PeerArena) -> None:
        """Pull from this arena from now on; pulls under way keep the one they began with."""
        assert peer.blocks.shape[1] == self._blocks.shape[1], "block sizes differ"
        self._peers[peer.instance, peer.tier] = peer

    def remove_peer(self, instance: str) -> None:
        """Forget an instance's arenas; each is unmapped when the last pull from it has ended. An unknown
        name is ignored.
        """
        for tier in Tier:
            self._peers.pop((instance, tier), None)

    def begin(self, refs: BlockRefs, into: BlockIds, layers_from: int | None = None) -> Pull:
        """See `Transfer.begin`. `refs` came over a socket, so it is checked; `into` is ours and trusted.

        The incarnation is not compared: a replacement inherits the table, whose generations never fall, so an
        address of the life before is good as long as its block was not allocated anew.
        """
        assert len(into) == len(refs.blocks)
        if self._closing.is_set():
            return self._refuse("the pool is closed")
        peer = self._peers.get((refs.instance, refs.tier))
        if peer is None:
            return self._refuse(f"unknown peer {refs.instance}")
        if self._queue.qsize() >= self._max_queued:
            return self._refuse(f"{self._max_queued} pulls are waiting already")
        try:
            pull = _ShmPull(peer, refs, into, layers_from)
        except (ValueError, OverflowError) as error:
            return self._refuse(f"bad addresses at {refs.instance}: {error}")
        self._queue.put(pull)
        return pull

    def close(self) -> None:
        """See `Transfer.close`. The peers are forgotten."""
        self._closing.set()
        self._queue.put(None)
        self._thread.join()
        self._peers.clear()

    def _refuse(self, failure: str) -> Pull:
        self._wake()
        return FailedPull(failure)

    def _run(self) -> None:
        if self._cores is not None:
            os.sched_setaffinity(0, self._cores)
        following: list[_ShmPull] = []  # those whose source is still computing
        while True:
            try:
                pull = self._queue.get(timeout=_POLL_S if following else None)
            except Empty:
                pass
            else:
                if pull is None:
                    break
                if self._closing.is_set():
                    pull.cancel()
                if not pull.start():
                    self._wake()
                else:
                    following.append(pull)
                del pull  # holds the peer's mapping, which may be removed meanwhile
            following = [pull for pull in following if not self._advance(pull)]
        for pull in following:
            pull.end(0, 0, "cancelled")
            self._wake()

    def _advance(self, pull: _ShmPull) -> bool:
        """Copy what of a pull can be copied now; True if that was its end."""
        try:
            pull.run(self._blocks, self._num_layers, self._copy, self._closing)
        except Exception as error:  # whatever a copy can raise, the request behind it must go on
            logger.exception("pull from %s failed", pull.source.instance)
            pull.end(0, 0, f"copy failed: {error}")
        if pull.poll() is None:
            return False
        self._wake()
        return True


class _ShmPull(QueuedPull):
    """One pull: `run` is the transfer thread's."""

    def __init__(
        self, source: PeerArena, refs: BlockRefs, into: BlockIds, layers_from: int | None = None
    ) -> None:
        super().__init__(refs, into, len(source.generations))
        self.source = source
        self._incarnation = refs.incarnation
        self._layers_from = layers_from
        self._num_layers_done = 0
        self._num_bytes = 0
        self._moved_s = time.monotonic()

    def run(self, blocks: Bytes, num_layers: int, copy: Copy, closing: threading.Event) -> None:
        """Check, copy, check again: the reader of a seqlock, whose writer bumps, then writes.

        Between the owner's bump and its first write lies a step of its model, so that no processor's
        reordering of loads (some microseconds at the worst) can make the second check miss the bump. Returns
        without a result where the source has not got further yet.
        """
        if self.is_cancelled or closing.is_set():
            self.end(0, self._num_bytes, "cancelled")
        elif self._layers_from is None:
            self._run_whole(blocks, copy, closing)
        else:
            self._run_layers(blocks, num_layers, copy, self._layers_from)

    def _run_whole(self, blocks: Bytes, copy: Copy, closing: threading.Event) -> None:
        num_wanted = len(self.blocks)
        failure: str | None = None
        num_fresh = self._num_unchanged(num_wanted)
        if num_fresh < num_wanted:
            failure = gone(num_fresh, num_wanted, "before")
        num_copied = num_bytes = 0
        for start, end in self._runs(num_fresh, max(1, _PIECE_BYTES // blocks.shape[1])):
            if self.is_cancelled or closing.is_set():
                failure = "cancelled"
                break
            source = self.source.blocks[self.blocks[start] : self.blocks[start] + end - start]
            destination = blocks[self.into[start] : self.into[start] + end - start]
            num_piece_bytes = copy(destination, source)
            num_bytes += num_piece_bytes
            num_copied = start + num_piece_bytes // blocks.shape[1]
            if num_copied < end:
                failure = f"the copy stopped after {num_bytes} bytes"
                break
        self._end_verified(num_copied, num_bytes, failure)

    def _run_layers(self, blocks: Bytes, num_layers: int, copy: Copy, layers_from: int) -> None:
        """Copy the layers that are there by now; all are of one size, and a step writes them in order."""
        num_wanted = len(self.blocks)
        num_written = self.source.layers_written(self._incarnation)
        if num_written is None:
            self.end(0, self._num_bytes, "the source has restarted")
            return
        num_ready = min(num_layers, num_written - layers_from)
        if num_ready <= self._num_layers_done:
            if time.monotonic() - self._moved_s > _STALLED_S:
                self.end(0, self._num_bytes, f"the source took more than {_STALLED_S:g} s for a layer")
            return
        size = blocks.shape[1] // num_layers
        part = slice(self._num_layers_done * size, num_ready * size)
        for start, end in self._runs(num_wanted, num_wanted):
            source = self.source.blocks[self.blocks[start] : self.blocks[start] + end - start, part]
            destination = blocks[self.into[start] : self.into[start] + end - start, part]
            num_piece_bytes = copy(destination, source)
            self._num_bytes += num_piece_bytes
            if num_piece_bytes < source.nbytes:
                self.end(0, self._num_bytes, f"the copy stopped after {self._num_bytes} bytes")
                return
        self._num_layers_done, self._moved_s = num_ready, time.monotonic()
        if num_ready == num_layers:
            self._end_verified(num_wanted, self._num_bytes, None)

    def _end_verified(self, num_copied: int, num_bytes: int, failure: str | None) -> None:
        num_wanted = len(self.blocks)
        num_verified = self._num_unchanged(num_copied)
        if num_verified < num_copied and failure != "cancelled":
            failure = gone(num_verified, num_wanted, "after")
        self.end(num_verified, num_bytes, failure)

    def _num_unchanged(self, num_blocks: int) -> int:
        """Of the first `num_blocks`, those before the first whose generation is not the one asked for."""
        return num_same(self.source.generations[self.blocks[:num_blocks]], self.generations[:num_blocks])

    def _runs(self, num_blocks: int, max_blocks: int) -> Iterator[tuple[int, int]]:
        """Ranges [start, end) of at most `max_blocks` positions, consecutive both at the source and here."""
        for start, stop in runs(self.blocks[:num_blocks], self.into[:num_blocks]):
            for piece in range(start, stop, max_blocks):
                yield piece, min(piece + max_blocks, stop)
