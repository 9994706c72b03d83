"""Pulls into a GPU's arena, out of another GPU worker's arena or host tier: copies on a stream of their own.

    begin ─► queued ─► copying ─► copied ─► result      the thread puts copies on the pull lane, in the order
                └─────────┴──────────┴─ cancel ─► …     in which pulls began, and looks whether they are done

A source's device arena is the memory that it exported, opened for our own GPU: the same one, or one that
reaches it directly. Where our GPU cannot reach it, it is opened on the source's, and the driver stages what
is copied through pinned host memory. A host tier is a mapped memfd, as between CPU workers.

Order is what makes it right, and nobody waits for it. The owner announces a block when its own stream has
passed the step that wrote it (`Publisher`), and raises its generation before anything is launched that
writes to it again. We compare generations with the addresses, copy, see our mark done, compare again: so a
block whose new owner has begun to write is a miss. The copy itself waits on the GPU for what our pool has
put on its other lanes, since our blocks may just have been somebody else's.

A source that died is *retired*: its memory may be whole, but nobody can tell, so pulls of it that are under
way fail. Its mapping is given back, by the thread, when the last of them has ended; until then the GPU's
memory is not free for its replacement.
"""

from __future__ import annotations

import ctypes
import logging
import threading
import time
from collections.abc import Callable
from queue import Empty, SimpleQueue

import numpy as np
import torch
from numpy.typing import NDArray

from memserve.messages import BlockRefs, DeviceGrant, Tier
from memserve.pool.allocator import BlockIds
from memserve.pool.arena import PeerArena, layers_written
from memserve.pool.lanes import AllMarks, Lane, Mark, as_words
from memserve.pool.transports.base import FailedPull, Pull
from memserve.pool.transports.device_sources import DeviceSource, Gpu
from memserve.pool.transports.pull import QueuedPull, gone, num_same

logger = logging.getLogger(__name__)

MAX_QUEUED_PULLS = 1024
# How often the thread looks at copies and sources; a short copy is over in some hundred microseconds.
_LOOK_S = 2e-5
_LONG_LOOK_S = 2e-4
_LONG_S = 2e-3
_STALLED_S = 30.0
_PR_SET_TIMERSLACK = 29


class CudaTransfer:
    """A `Transfer` into a GPU's arena.

    Args:
        blocks: our arena, uint8 [num_blocks, block_bytes]; only blocks named in `begin` are written.
        gpu: ours.
        wake: called after each pull's end, mostly from the transfer thread, until `close` returns; must not
            block.
        num_layers: of a block, each as many bytes.
        max_queued: pulls that may be under way.
    """

    def __init__(
        self,
        blocks: torch.Tensor,
        gpu: Gpu,
        wake: Callable[[], None],
        *,
        num_layers: int = 1,
        max_queued: int = MAX_QUEUED_PULLS,
    ) -> None:
        self._blocks = as_words(blocks, num_layers)
        self._block_bytes = blocks.shape[1]
        self._gpu = gpu
        self._lanes = gpu.lanes
        self._wake = wake
        self._num_layers = num_layers
        self._max_queued = max_queued
        self._num_open = 0  # pulls begun and not ended, by both threads under the lock
        self._lock = threading.Lock()
        self._sources: dict[tuple[str, Tier], DeviceSource] = {}
        self._queue: SimpleQueue[_CudaPull | DeviceSource | None] = SimpleQueue()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="memserve-pull", daemon=True)
        self._thread.start()

    def open_device(self, grant: DeviceGrant, words: NDArray[np.uint64], memory_fd: int | None) -> None:
        """Pull out of a peer's arena on a GPU from now on, and no more out of that of its life before; the
        descriptor is ours. Raises CudaError if it cannot be opened.
        """
        self.remove_peer(grant.instance, Tier.DEVICE)
        self._add(DeviceSource.open(self._gpu, grant, words, memory_fd))

    def add_host(self, peer: PeerArena) -> None:
        """Pull out of a peer's host tier from now on."""
        self.remove_peer(peer.instance, peer.tier)
        self._add(DeviceSource.of_host(peer))

    def _add(self, source: DeviceSource) -> None:
        assert source.blocks.shape[1] == self._block_bytes, "block sizes differ"
        self._sources[source.instance, source.tier] = source

    def remove_peer(self, instance: str, tier: Tier | None = None) -> None:
        """Retire a tier of a peer, None = both: pulls of it that are under way fail. An unknown name is
        ignored.
        """
        for each in Tier if tier is None else (tier,):
            self._retire(self._sources.pop((instance, each), None))

    def begin(self, refs: BlockRefs, into: BlockIds, layers_from: int | None = None) -> Pull:
        """See `Transfer.begin`. `refs` came over a socket, so it is checked; `into` is ours and trusted.

        The incarnation is not compared: a GPU worker's new life lets no address of the one before verify.
        """
        assert len(into) == len(refs.blocks)
        if self._closing.is_set():
            return self._refuse("the pool is closed")
        source = self._sources.get((refs.instance, refs.tier))
        if source is None:
            return self._refuse(f"unknown peer {refs.instance}")
        if self._num_open >= self._max_queued:
            return self._refuse(f"{self._max_queued} pulls are waiting already")
        # Our blocks may have been written or read by what these lanes still have to do.
        before = AllMarks((self._lanes.compute.mark(), self._lanes.swap_out.mark()))
        try:
            pull = _CudaPull(source, refs, into, before, layers_from)
        except (ValueError, OverflowError) as error:
            return self._refuse(f"bad addresses at {refs.instance}: {error}")
        with self._lock:
            self._num_open += 1
        self._queue.put(pull)
        return pull

    def close(self) -> None:
        """See `Transfer.close`. All peers are forgotten."""
        for instance, tier in tuple(self._sources):
            self.remove_peer(instance, tier)
        self._closing.set()
        self._queue.put(None)
        self._thread.join()

    def _retire(self, source: DeviceSource | None) -> None:
        if source is not None:
            source.is_retired = True
            self._queue.put(source)

    def _refuse(self, failure: str) -> Pull:
        self._wake()
        return FailedPull(failure)

    # --- the thread's ---

    def _run(self) -> None:
        ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, 1000, 0, 0, 0)  # else a short sleep takes 50 us more
        under_way: list[_CudaPull] = []
        retired: list[DeviceSource] = []
        is_open = True
        while is_open or under_way:
            try:
                taken = self._queue.get(timeout=_pause_s(under_way))
            except Empty:
                pass
            else:
                match taken:
                    case None:
                        is_open = False
                    case DeviceSource():
                        retired.append(taken)
                    case _:
                        self._take(taken, under_way)
                del taken
            under_way = [pull for pull in under_way if not self._advance(pull)]
            in_use = {id(pull.source) for pull in under_way}
            for source in [each for each in retired if id(each) not in in_use]:
                retired.remove(source)
                _close(source)

    def _take(self, pull: _CudaPull, under_way: list[_CudaPull]) -> None:
        if self._closing.is_set():
            pull.cancel()
        if pull.start():
            under_way.append(pull)
        else:
            self._ended()

    def _advance(self, pull: _CudaPull) -> bool:
        """Do what of a pull can be done now; True if that was its end."""
        try:
            if self._closing.is_set():
                pull.is_cancelled = True
            pull.advance(self._blocks, self._num_layers, self._lanes.pull)
        except Exception as error:  # whatever a copy can raise, the request behind it must go on
            logger.exception("pull from %s failed", pull.source.instance)
            pull.give_up(f"copy failed: {error}", self._lanes.pull)
        if pull.poll() is None:
            return False
        self._ended()
        return True

    def _ended(self) -> None:
        with self._lock:
            self._num_open -= 1
        self._wake()


class _CudaPull(QueuedPull):
    """One pull: `advance` is the transfer thread's. It ends when the last copy put on the lane is done."""

    def __init__(
        self,
        source: DeviceSource,
        refs: BlockRefs,
        into: BlockIds,
        before: AllMarks,
        layers_from: int | None = None,
    ) -> None:
        super().__init__(refs, into, len(source.generations))
        self.source = source
        self.copying_since: float | None = None
        self._before = before
        self._incarnation = refs.incarnation
        self._layers_from = layers_from
        self._num_put = 0  # blocks, or of each block layers, whose copies are on the lane
        self._num_bytes = 0
        self._moved_s = time.monotonic()
        self._failure: str | None = None
        self._mark: Mark | None = None  # of the last copy, once no further one follows

    def advance(self, blocks: torch.Tensor, num_layers: int, lane: Lane) -> None:
        """Put on the lane what can be copied now; end, verified, when all of it is done."""
        if self._mark is None:
            if self.is_cancelled:
                self._stop("cancelled", lane)
            elif self.source.is_retired:
                self._stop("the source has died", lane)
            elif self._layers_from is None:
                self._put_all(blocks, lane)
            else:
                self._put_layers(blocks, num_layers, lane, self._layers_from)
        if self._mark is not None and self._mark.is_done():
            self._end()

    def give_up(self, failure: str, lane: Lane) -> None:
        """A call has failed. What is on the lane is waited for, unless that cannot even be asked: then the
        GPU is broken, and copies nothing any more.
        """
        try:
            assert self._mark is None, "a mark that cannot be asked"
            self._stop(failure, lane)
        except Exception:
            self.end(0, self._num_bytes, failure)

    def _put_all(self, blocks: torch.Tensor, lane: Lane) -> None:
        num_wanted = len(self.blocks)
        num_fresh = self._num_unchanged(num_wanted)
        if num_fresh < num_wanted:
            self._failure = gone(num_fresh, num_wanted, "before")
        self._put(blocks, num_fresh, slice(None), lane)
        self._num_put = num_fresh
        self._mark = lane.mark()

    def _put_layers(self, blocks: torch.Tensor, num_layers: int, lane: Lane, layers_from: int) -> None:
        """Copy the layers that are there by now; all are of one size, and a step writes them in order."""
        num_written = layers_written(self.source.progress, self._incarnation)
        if num_written is None:
            self._stop("the source has restarted", lane)
            return
        num_ready = min(num_layers, num_written - layers_from)
        if num_ready <= self._num_put:
            if time.monotonic() - self._moved_s > _STALLED_S:
                self._stop(f"the source took more than {_STALLED_S:g} s for a layer", lane)
            return
        size = blocks.shape[1] // num_layers
        self._put(blocks, len(self.blocks), slice(self._num_put * size, num_ready * size), lane)
        self._num_put, self._moved_s = num_ready, time.monotonic()
        if num_ready == num_layers:
            self._num_put = len(self.blocks)
            self._mark = lane.mark()

    def _put(self, blocks: torch.Tensor, num_blocks: int, columns: slice, lane: Lane) -> None:
        if self.copying_since is None:
            self.copying_since = time.monotonic()
            for mark in self._before.marks:
                lane.wait(mark)
        into, source_ids = self.into[:num_blocks], self.blocks[:num_blocks]
        source = self.source.blocks.view(blocks.dtype)
        self._num_bytes += lane.copy_blocks(blocks, into, source, source_ids, columns)

    def _stop(self, failure: str, lane: Lane) -> None:
        """No further copy; nothing counts, but those on the lane must be done before our blocks are free."""
        self._failure, self._num_put = failure, 0
        self._mark = lane.mark()

    def _end(self) -> None:
        num_wanted, num_copied = len(self.blocks), self._num_put
        if self.is_cancelled:
            self.end(0, self._num_bytes, "cancelled")
            return
        if self.source.is_retired:
            self.end(0, self._num_bytes, "the source has died")
            return
        num_verified = self._num_unchanged(num_copied)
        if num_verified < num_copied:
            self._failure = gone(num_verified, num_wanted, "after")
        self.end(num_verified, self._num_bytes, self._failure)

    def _num_unchanged(self, num_blocks: int) -> int:
        """Of the first `num_blocks`, those before the first whose generation is not the one asked for."""
        return num_same(self.source.generations[self.blocks[:num_blocks]], self.generations[:num_blocks])


def _pause_s(under_way: list[_CudaPull]) -> float | None:
    """How long the thread sleeps if nothing comes: not at all long while a copy may be over any moment."""
    if not under_way:
        return None
    since = [pull.copying_since for pull in under_way if pull.copying_since is not None]
    is_short = bool(since) and time.monotonic() - max(since) < _LONG_S
    return _LOOK_S if is_short else _LONG_LOOK_S


def _close(source: DeviceSource) -> None:
    try:
        source.close()
    except Exception:  # its memory stays mapped: the next life of its owner may lack it
        logger.exception("the memory of %s cannot be given back", source.instance)
