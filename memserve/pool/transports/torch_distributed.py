"""Pulls between arenas that cannot map each other: over gloo, the source's help needed (DESIGN "Moving KV").

For each source that we pull from there is a link with a thread of its own (gloo_receiver.py), for each
receiver that pulls from us another one (gloo_source.py); a link goes one way. It is a gloo group of two
processes (gloo_pair.py), formed when it is first needed, and formed anew after a failure, by one control
message each way (`Connect`, `Accept`), which the router relays. What is said on it is gloo_wire.py's.

Pulls from one source come one after the other, from several side by side. Every wait has a deadline, and a
pull that misses one is a miss. Links listen and connect on loopback; each end proves a token before it is
believed, but nothing is encrypted: between machines gloo would need a network that is.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from memserve.messages import BlockRefs, Connect, LinkMessage, Refuse, Tier
from memserve.pool.allocator import BlockIds
from memserve.pool.arena import Arena
from memserve.pool.transports.base import FailedPull, Pull
from memserve.pool.transports.gloo_receiver import LinkEnds, Receiver
from memserve.pool.transports.gloo_source import Sender
from memserve.pool.transports.gloo_wire import Bytes, Options, TierMemory
from memserve.pool.transports.links import LinkMeans
from memserve.pool.transports.pull import QueuedPull

logger = logging.getLogger(__name__)

__all__ = ["Options", "TorchPeer", "TorchPool", "TorchTransfer"]


@dataclass(frozen=True, slots=True)
class TorchPool:
    """Our own end: `blocks` uint8 [num_blocks, block_bytes] and `generations` uint64 [num_blocks] in memory
    that the host addresses, both the owner's; `fingerprint` of the model and the layout of its KV; `layout`
    in words. `host` is the second tier, if there is one.
    """

    instance: str
    incarnation: int
    layout: str
    fingerprint: str
    blocks: Bytes
    generations: NDArray[np.uint64]
    host: TierMemory | None = None

    @classmethod
    def of(
        cls, instance: str, incarnation: int, fingerprint: str, arena: Arena, host: Arena | None
    ) -> TorchPool:
        """Of the arenas of a pool, of equal geometry, which the host can address."""
        assert arena.blocks is not None
        second = None
        if host is not None and host.blocks is not None:
            second = TierMemory(host.blocks, host.generations)
        layout = arena.geometry.description
        return cls(instance, incarnation, layout, fingerprint, arena.blocks, arena.generations, second)

    @property
    def tiers(self) -> dict[Tier, TierMemory]:
        """What can be asked for."""
        tiers = {Tier.DEVICE: TierMemory(self.blocks, self.generations)}
        return tiers if self.host is None else {**tiers, Tier.HOST: self.host}


@dataclass(frozen=True, slots=True)
class TorchPeer:
    """Another instance that can be pulled from: blocks of its device tier, and at most of its host tier."""

    instance: str
    incarnation: int
    num_blocks: int
    num_host_blocks: int = 0


class TorchTransfer:
    """A `Transfer` over torch.distributed's gloo, both its ends.

    Args:
        pool: ours: blocks named in `begin` are written, others only read.
        wake: called after each pull's end, mostly from a link's thread, until `close` returns; must not
            block.
        send_control: called as `(peer, message)` from any thread; must not block or raise. A message that is
            lost costs the deadline of a connection.
        options: deadlines and bounds.
    """

    def __init__(
        self,
        pool: TorchPool,
        wake: Callable[[], None],
        send_control: Callable[[str, LinkMessage], None],
        options: Options | None = None,
    ) -> None:
        assert pool.blocks.flags.c_contiguous and len(pool.blocks) == len(pool.generations)
        self._pool = pool
        self._wake = wake
        self._means = LinkMeans(options or Options(), send_control)
        self._peers: dict[str, TorchPeer] = {}
        self._receivers: dict[str, Receiver] = {}
        self._senders: dict[str, Sender] = {}
        self._leaving: list[Receiver | Sender] = []
        self._is_closed = False

    def add_peer(self, peer: TorchPeer) -> None:
        """Pull from this instance from now on. If it is another incarnation, pulls from the last one fail."""
        known = self._peers.get(peer.instance)
        if known is not None and known != peer:
            self.remove_peer(peer.instance)
        self._peers[peer.instance] = peer

    def remove_peer(self, instance: str) -> None:
        """Forget an instance: its links end, pulls from it fail. Unknown names are ignored."""
        self._peers.pop(instance, None)
        reason = f"{instance} was removed"
        if instance in self._receivers:
            self._leave(self._receivers.pop(instance), reason)
        if instance in self._senders:
            self._leave(self._senders.pop(instance), reason)
        self._reap()

    def begin(self, refs: BlockRefs, into: BlockIds, layers_from: int | None = None) -> Pull:
        """See `Transfer.begin`. `refs` came over a socket, so it is checked; `into` is ours and trusted.

        Addresses of another life of the source are a miss: that life sends nothing any more, and here nothing
        says that its generations went on in the next. Blocks that are still being computed (`layers_from`)
        are refused.
        """
        assert len(into) == len(refs.blocks)
        if self._is_closed:
            return self._fail("the pool is closed")
        peer = self._peers.get(refs.instance)
        if peer is None:
            return self._fail(f"unknown peer {refs.instance}")
        if refs.incarnation != peer.incarnation:
            return self._fail(f"{refs.instance} is of incarnation {peer.incarnation}, not {refs.incarnation}")
        if layers_from is not None:
            return self._fail("over gloo, blocks are pulled once they are complete")
        try:
            pull = QueuedPull(
                refs, into, peer.num_blocks if refs.tier is Tier.DEVICE else peer.num_host_blocks
            )
        except (ValueError, OverflowError) as error:
            return self._fail(f"bad addresses at {refs.instance}: {error}")
        receiver = self._receivers.get(peer.instance)
        if receiver is None:
            receiver = self._receivers[peer.instance] = self._make_receiver(peer)
        elif receiver.num_queued >= self._means.options.max_queued:
            return self._fail(f"{self._means.options.max_queued} pulls are waiting already")
        receiver.put(pull)
        return pull

    def on_control(self, message: LinkMessage) -> None:
        """Take a control message that a peer sent to us. Stale ones are ignored."""
        if self._is_closed:
            return
        if not isinstance(message, Connect):
            receiver = self._receivers.get(message.source)
            if receiver is not None and message.receiver_incarnation == self._pool.incarnation:
                receiver.answer(message)
            return
        previous = self._senders.get(message.receiver)
        if previous is not None and _age(message) <= _age(previous.request):
            return
        if previous is not None:
            self._leave(self._senders.pop(message.receiver), "replaced")
        reason = self._why_not(message)
        if reason is not None:
            logger.warning("%s: refused a link: %s", self._pool.instance, reason)
            refusal = Refuse(
                receiver=message.receiver,
                receiver_incarnation=message.receiver_incarnation,
                source=self._pool.instance,
                source_incarnation=message.source_incarnation,
                attempt=message.attempt,
                reason=reason,
            )
            self._means.send_control(message.receiver, refusal)
            return
        pool = self._pool
        self._senders[message.receiver] = Sender(message, pool.tiers, self._means)

    def close(self) -> None:
        """See `Transfer.close`. Links that others have to us end too; no thread or socket is left.

        Takes milliseconds, but up to `stall_s` where a receiver stands still in the middle of a message, and
        up to `connect_s` where a link is being formed with somebody who does not answer.
        """
        self._is_closed = True
        for receiver in self._receivers.values():
            self._leave(receiver, "cancelled")
        for sender in self._senders.values():
            self._leave(sender, "cancelled")
        for link in self._leaving:
            link.join()
        self._receivers.clear()
        self._senders.clear()
        self._leaving.clear()
        self._peers.clear()
        self._means.close()

    def _make_receiver(self, peer: TorchPeer) -> Receiver:
        pool = self._pool
        ends = LinkEnds(
            receiver=pool.instance,
            receiver_incarnation=pool.incarnation,
            source=peer.instance,
            source_incarnation=peer.incarnation,
            layout=pool.layout,
            block_bytes=pool.blocks.shape[1],
            fingerprint=pool.fingerprint,
        )
        return Receiver(ends, pool.blocks, self._means, self._wake)

    def _why_not(self, request: Connect) -> str | None:
        """Why we would not send to who asks for it, in words that name both sides; None if we do."""
        pool = self._pool
        us, them = f"source {pool.instance}", f"receiver {request.receiver}"
        if request.source_incarnation != pool.incarnation:
            return f"{us} is of incarnation {pool.incarnation}, {them} means {request.source_incarnation}"
        if request.layout != pool.layout:
            return f"{us} has KV of {pool.layout}, {them} of {request.layout}"
        if request.block_bytes != pool.blocks.shape[1]:
            return f"{us} has blocks of {pool.blocks.shape[1]} bytes, {them} of {request.block_bytes}"
        if request.fingerprint != pool.fingerprint:
            ours, theirs = pool.fingerprint[:12], request.fingerprint[:12]
            return f"{us} has a model or layout of fingerprint {ours}, {them} of {theirs}"
        self._reap()
        max_senders = self._means.options.max_senders
        if len(self._senders) + len(self._leaving) >= max_senders:
            return f"{us} has {max_senders} links already, {them} is one too many"
        return None

    def _leave(self, link: Receiver | Sender, reason: str) -> None:
        link.end(reason)
        self._leaving.append(link)

    def _reap(self) -> None:
        """Forget links that have ended by themselves."""
        self._leaving = [link for link in self._leaving if not link.is_over]
        self._senders = {name: sender for name, sender in self._senders.items() if not sender.is_over}

    def _fail(self, failure: str) -> Pull:
        self._wake()
        return FailedPull(failure)


def _age(request: Connect) -> tuple[int, int]:
    return request.receiver_incarnation, request.attempt
