"""The sending end of a gloo link: a thread that sends one receiver the blocks of our arena that it asks for.

    Connect ─► joining ─► idle ◄─► streaming ─► over      by `end`, the receiver's going, or a missed deadline

The worker's loop takes no part. A block may be freed or rewritten while it is sent: the generations before
and after go along, and the receiver judges. The next chunk is packed and posted before the one before it is
waited for; the next asks are expected before they are sent, so that neither end waits for the other's call.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch.distributed import Work

from memserve.messages import Accept, Connect, Tier
from memserve.pool.allocator import BlockIds
from memserve.pool.transports.gloo_pair import SOURCE, GlooPair, Letterbox, PairError
from memserve.pool.transports.gloo_wire import (
    ASK_TAG,
    CHUNKS_UNDER_WAY,
    DATA_TAG,
    PROOF_TAG,
    Ask,
    Bytes,
    Proof,
    Staging,
    TierMemory,
)
from memserve.pool.transports.links import LinkMeans

logger = logging.getLogger(__name__)

_IDLE_S = 86400.0  # an idle link costs nothing; the receiver forms a new one when this one is gone


@dataclass(slots=True)
class _Sent:
    """A chunk that was posted. `generations`: its tier's. `is_proven`: its proof is written, not sent."""

    generations: NDArray[np.uint64]
    ids: BlockIds
    places: list[Bytes]
    works: list[Work]
    proof: Proof
    is_proven: bool


class Sender:
    """Sends to one receiver from construction until `end`; `is_over` once its thread has ended."""

    def __init__(
        self,
        request: Connect,
        tiers: Mapping[Tier, TierMemory],
        means: LinkMeans,
    ) -> None:
        self.request = request
        self._tiers = tiers
        self._means = means
        self._options = means.options
        self._ending = threading.Event()
        self._box = Letterbox(self._accept, means.options.connect_s)
        self._box.deliver(request.address)
        self._pair: GlooPair | None = None
        self._staging = {tier: Staging(memory.blocks) for tier, memory in tiers.items()}
        self._asks = [Ask() for _ in range(CHUNKS_UNDER_WAY)]
        self._expected: list[Work] = []  # of the asks from the next one on
        self._turn = 0  # which chunk of the link's life comes next
        self._proofs = [Proof() for _ in range(CHUNKS_UNDER_WAY)]
        self._thread = threading.Thread(target=self._run, name=f"memserve-send-{request.receiver}")
        self._thread.start()

    @property
    def is_over(self) -> bool:
        """Whether the link has gone, for whatever reason."""
        return not self._thread.is_alive()

    def end(self, reason: str) -> None:
        """Stop sending, at once; never waits. While joining it ends when that does."""
        logger.debug("%s: the link to %s ends: %s", self.request.source, self.request.receiver, reason)
        self._ending.set()
        pair = self._pair
        if pair is not None:
            self._means.interrupt(pair)

    def join(self) -> None:
        """Wait until the thread has ended."""
        self._thread.join()

    def _run(self) -> None:
        request = self.request
        os.sched_setaffinity(0, self._means.cpus)
        try:
            timeout_s = self._options.connect_s
            pair = GlooPair(self._box, SOURCE, self._means.device(), request.token, timeout_s)
        except PairError as error:
            logger.warning("%s: cannot join %s: %s", request.source, request.receiver, str(error))
            return
        self._pair = pair
        try:
            self._expected = [pair.recv(ask.tensor, ASK_TAG) for ask in self._asks]
            while not self._ending.is_set():
                self._send_stream(pair)
        except PairError as error:
            if not self._ending.is_set():
                logger.info("%s: the link to %s is over: %s", request.source, request.receiver, str(error))
        except Exception:  # a thread must not die of it without a word; the receiver sees a closed link
            logger.exception("%s: sending to %s failed", request.source, request.receiver)
        finally:
            self._pair = None
            self._expected.clear()
            pair.close()

    def _accept(self, address: bytes) -> None:
        request = self.request
        answer = Accept(
            receiver=request.receiver,
            receiver_incarnation=request.receiver_incarnation,
            source=request.source,
            source_incarnation=request.source_incarnation,
            attempt=request.attempt,
            address=address,
        )
        self._means.send_control(request.receiver, answer)

    def _send_stream(self, pair: GlooPair) -> None:
        """Wait for the asks of one pull, send what they ask for."""
        under_way: list[_Sent] = []
        more, patience_s = True, _IDLE_S
        try:
            while more:
                tier, ids, ends, more = self._next_ask(pair, patience_s)
                patience_s = self._options.stall_s
                if ends:
                    under_way.append(self._post(pair, tier, ids, ends))
                while under_way and (not more or len(under_way) == CHUNKS_UNDER_WAY):
                    self._finish(pair, under_way.pop(0))
                self._turn += 1
        finally:
            under_way.clear()

    def _next_ask(self, pair: GlooPair, patience_s: float) -> tuple[Tier, BlockIds, list[int], bool]:
        """The blocks asked for next, of which tier, where their pieces end, and whether another ask follows
        in any case.
        """
        ask = self._asks[self._turn % CHUNKS_UNDER_WAY]
        pair.wait(self._expected[0], patience_s)
        tier = ask.tier
        memory = None if tier is None else self._tiers.get(tier)
        if tier is None or memory is None:
            raise PairError("it asked for blocks of a tier that is not here")
        ids, ends, more = ask.blocks(len(memory.blocks)), ask.ends(), ask.more
        if ids is None or ends is None:
            raise PairError("it asked for blocks that cannot be")
        del self._expected[0]
        self._expected.append(pair.recv(ask.tensor, ASK_TAG))
        return tier, ids, ends, more and len(ids) > 0

    def _post(self, pair: GlooPair, tier: Tier, ids: BlockIds, ends: list[int]) -> _Sent:
        generations, staging = self._tiers[tier].generations, self._staging[tier]
        proof = self._proofs[self._turn % CHUNKS_UNDER_WAY]
        proof.set_before(generations[ids])
        self._options.on_chunk(ids)
        places = staging.places(ids, ends, self._turn)
        is_staged = staging.is_staged(places)
        if is_staged:
            staging.gather(ids, self._turn)
        works = [pair.send(torch.from_numpy(place), DATA_TAG) for place in places]
        sent = _Sent(generations, ids, places, works, proof, is_staged)
        if is_staged:
            self._prove(sent)
        return sent

    def _finish(self, pair: GlooPair, sent: _Sent) -> None:
        """Send a chunk's proof, after those of the chunks before it, and wait until all of it has left."""
        works = sent.works
        if sent.is_proven:
            works = [*works, pair.send(sent.proof.tensor, PROOF_TAG)]
        for work in works:
            pair.wait(work, self._options.stall_s)
        if not sent.is_proven:
            self._prove(sent)
            pair.wait(pair.send(sent.proof.tensor, PROOF_TAG), self._options.stall_s)

    def _prove(self, sent: _Sent) -> None:
        """The chunk was copied out of the arena: note what its generations are now."""
        self._options.on_sent(sent.ids)
        sent.proof.set_after(sent.generations[sent.ids])
