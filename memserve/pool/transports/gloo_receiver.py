"""The asking end of a gloo link: a thread that pulls from one source, one pull after the other.

    begin ─► queued ─► (connecting) ─► copying ─► result
                └──────────┴──────────────┴─ cancel, source gone, deadline missed ─► result

The pair is formed when the first pull needs it, and kept. When it breaks, the pull fails that was being
copied; the next one forms a new pair, as a new attempt. A pair may also have died while it was idle (its
source was started anew, say): a pull that finds it so before any byte has come tries once more. When no
connection can be made at all, every pull that waits for it fails, so that a dead source costs one deadline,
not one each.
"""

from __future__ import annotations

import logging
import os
import secrets
import threading
from collections.abc import Callable
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import NamedTuple

import torch
from torch.distributed import Work

from memserve.messages import LINK_TOKEN_BYTES, Accept, Connect, Refuse
from memserve.pool.allocator import BlockIds
from memserve.pool.transports.gloo_pair import RECEIVER, GlooPair, Letterbox, PairError
from memserve.pool.transports.gloo_wire import (
    ASK_TAG,
    CHUNKS_UNDER_WAY,
    DATA_TAG,
    PROOF_TAG,
    Ask,
    Bytes,
    Proof,
    Staging,
    cut,
)
from memserve.pool.transports.links import LinkMeans
from memserve.pool.transports.pull import QueuedPull, gone

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LinkEnds:
    """Who pulls from whom, and what the source must agree with (see `messages.Connect`)."""

    receiver: str
    receiver_incarnation: int
    source: str
    source_incarnation: int
    layout: str
    block_bytes: int
    fingerprint: str


@dataclass(slots=True)
class _UnderWay:
    """A chunk that was asked for: positions [start, end) of its pull."""

    start: int
    end: int
    places: list[Bytes]
    data: list[Work]
    proof: Work
    turn: int


@dataclass(slots=True)
class _Progress:
    """Of one pull: verified blocks, bytes received, and why it stops, once it does."""

    num_verified: int = 0
    num_bytes: int = 0
    failure: str | None = None


class _Meeting(NamedTuple):
    """A pair that is being formed."""

    attempt: int
    box: Letterbox


class Receiver:
    """Pulls from one source into `blocks`, until `end`. See `TorchTransfer` for `wake`."""

    def __init__(self, ends: LinkEnds, blocks: Bytes, means: LinkMeans, wake: Callable[[], None]) -> None:
        options = means.options
        self.ends = ends
        self._means = means
        self._options = options
        self._wake = wake
        self._queue: SimpleQueue[QueuedPull | None] = SimpleQueue()
        self._ending: str | None = None  # why it ends
        self._meeting: _Meeting | None = None
        self._attempt = 0
        self._turn = 0  # which chunk of the pair's life comes next
        self._pair: GlooPair | None = None
        self._staging = Staging(blocks)
        self._num_chunk_blocks = options.chunk_blocks(ends.block_bytes)
        self._asks = [Ask() for _ in range(CHUNKS_UNDER_WAY)]
        self._proofs = [Proof() for _ in range(CHUNKS_UNDER_WAY)]
        self._thread = threading.Thread(target=self._run, name=f"memserve-pull-{ends.source}")
        self._thread.start()

    @property
    def num_queued(self) -> int:
        """Pulls that wait."""
        return self._queue.qsize()

    @property
    def is_over(self) -> bool:
        """Whether its thread has ended."""
        return not self._thread.is_alive()

    def put(self, pull: QueuedPull) -> None:
        """Run `pull` after those before it."""
        self._queue.put(pull)

    def answer(self, message: Accept | Refuse) -> None:
        """The source comes, or will not. Stale answers are ignored."""
        meeting = self._meeting
        if (
            meeting is None
            or message.attempt != meeting.attempt
            or message.source_incarnation != self.ends.source_incarnation
        ):
            return
        if isinstance(message, Accept):
            meeting.box.deliver(message.address)
        else:
            meeting.box.give_up(message.reason)

    def end(self, reason: str) -> None:
        """Fail every pull, that under way too; never waits."""
        self._ending = reason
        self._queue.put(None)
        pair, meeting = self._pair, self._meeting
        if meeting is not None:
            meeting.box.give_up(reason)
        if pair is not None:
            self._means.interrupt(pair)

    def join(self) -> None:
        """Wait until the thread has ended."""
        self._thread.join()

    # --- the thread -----------------------------------------------------------------------------------------

    def _run(self) -> None:
        os.sched_setaffinity(0, self._means.cpus)
        while (pull := self._queue.get()) is not None:
            if pull.start():
                try:
                    self._serve(pull)
                except Exception as error:  # whatever it was, the request behind the pull must go on
                    logger.exception("pull from %s failed", self.ends.source)
                    self._drop_pair()
                    pull.end(0, 0, f"pull failed: {error}")
            self._wake()
            del pull
        self._drop_pair()

    def _serve(self, pull: QueuedPull) -> None:
        """Run one pull to its end."""
        self._options.on_pull()
        if self._ending is not None or pull.is_cancelled:
            pull.end(0, 0, self._ending or "cancelled")
            return
        progress = _Progress()
        for is_retry in (False, True):
            is_new = self._pair is None
            try:
                pair = self._pair or self._connect()
            except PairError as error:
                progress.failure = self._ending or f"no link to {self.ends.source}: {error}"
                self._fail_waiting(progress.failure)
                break
            try:
                self._copy(pull, pair, progress)
                break
            except PairError as error:
                self._drop_pair()
                progress.failure = self._ending or f"lost {self.ends.source}: {error}"
                logger.info("%s: %s", self.ends.receiver, progress.failure)
                if is_new or is_retry or progress.num_bytes or error.timed_out or self._ending:
                    break
                progress.failure = None
        pull.end(progress.num_verified, progress.num_bytes, progress.failure)

    def _connect(self) -> GlooPair:
        self._attempt += 1
        self._turn = 0
        token = secrets.token_bytes(LINK_TOKEN_BYTES)
        box = Letterbox(lambda address: self._ask_for_pair(address, token), self._options.connect_s)
        self._meeting = _Meeting(self._attempt, box)
        if self._ending is not None:
            box.give_up(self._ending)
        try:
            pair = GlooPair(box, RECEIVER, self._means.device(), token, self._options.connect_s)
        finally:
            self._meeting = None
        self._pair = pair
        if self._ending is not None:
            pair.interrupt()
        return pair

    def _ask_for_pair(self, address: bytes, token: bytes) -> None:
        ends = self.ends
        request = Connect(
            receiver=ends.receiver,
            receiver_incarnation=ends.receiver_incarnation,
            source=ends.source,
            source_incarnation=ends.source_incarnation,
            attempt=self._attempt,
            address=address,
            token=token,
            layout=ends.layout,
            block_bytes=ends.block_bytes,
            fingerprint=ends.fingerprint,
        )
        self._means.send_control(ends.source, request)

    def _drop_pair(self) -> None:
        pair, self._pair = self._pair, None
        if pair is not None:
            pair.close()

    def _fail_waiting(self, failure: str) -> None:
        """Fail what is in the queue now; what `end` put there stays."""
        for _ in range(self._queue.qsize()):
            try:
                pull = self._queue.get_nowait()
            except Empty:
                return
            if pull is None:
                self._queue.put(None)
                return
            if pull.start():
                pull.end(0, 0, failure)
            self._wake()

    def _copy(self, pull: QueuedPull, pair: GlooPair, progress: _Progress) -> None:
        """Ask, receive, verify, chunk by chunk, until all is here or something was gone. Raises PairError."""
        num_blocks, step = len(pull.blocks), self._num_chunk_blocks
        under_way: list[_UnderWay] = []
        next_start, more = 0, num_blocks > 0
        try:
            while more or under_way:
                while more and len(under_way) < CHUNKS_UNDER_WAY:
                    if pull.is_cancelled and progress.failure is None:
                        progress.failure = "cancelled"
                    end = next_start if progress.failure else min(next_start + step, num_blocks)
                    more = next_start < end < num_blocks
                    if end > next_start:
                        under_way.append(self._ask(pull, pair, next_start, end, more))
                    elif next_start > 0:  # more had been promised
                        self._send_ask(pair, pull, pull.blocks[:0], [], more)
                    next_start = end
                if under_way:
                    self._take(pull, pair, under_way.pop(0), progress)
        finally:
            under_way.clear()

    def _ask(self, pull: QueuedPull, pair: GlooPair, start: int, end: int, more: bool) -> _UnderWay:
        """Ask for positions [start, end), ready to receive them."""
        turn, blocks, into = self._turn, pull.blocks[start:end], pull.into[start:end]
        ends = cut(blocks, into, self.ends.block_bytes)
        places = self._staging.places(into, ends, turn)
        data = [pair.recv(torch.from_numpy(place), DATA_TAG) for place in places]
        proof = pair.recv(self._proofs[turn % CHUNKS_UNDER_WAY].tensor, PROOF_TAG)
        self._send_ask(pair, pull, blocks, ends, more)
        return _UnderWay(start, end, places, data, proof, turn)

    def _send_ask(
        self, pair: GlooPair, pull: QueuedPull, blocks: BlockIds, ends: list[int], more: bool
    ) -> None:
        ask = self._asks[self._turn % CHUNKS_UNDER_WAY]
        ask.set(blocks, ends, more=more, tier=pull.tier)
        pair.wait(pair.send(ask.tensor, ASK_TAG), self._options.stall_s)
        self._turn += 1

    def _take(self, pull: QueuedPull, pair: GlooPair, chunk: _UnderWay, progress: _Progress) -> None:
        """Receive a chunk; it counts if it is verified and so is all before it."""
        # The proof, which comes after the data, is waited for first: when the source goes, gloo wakes who
        # waits for a message to begin, but not who waits for one that has begun.
        pair.wait(chunk.proof, self._options.stall_s)
        for piece in chunk.data:
            pair.wait(piece, self._options.stall_s)
        progress.num_bytes += (chunk.end - chunk.start) * self.ends.block_bytes
        if progress.failure is not None:
            return
        into = pull.into[chunk.start : chunk.end]
        expected = pull.generations[chunk.start : chunk.end]
        num_verified, gone_before = self._proofs[chunk.turn % CHUNKS_UNDER_WAY].num_verified(expected)
        if self._staging.is_staged(chunk.places):
            self._staging.scatter(into[:num_verified], chunk.turn)
        progress.num_verified += num_verified
        if num_verified < len(into):
            when = "before" if gone_before else "after"
            progress.failure = gone(progress.num_verified, len(pull.blocks), when)
