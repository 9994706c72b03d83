"""How each peer is reached: its arena is mapped (shm.py), or it sends its blocks (torch_distributed.py).

The supervisor's grant of a peer says which: one with descriptors is to be mapped. What the second transport
needs is made when the first such peer, or its first message, comes. Its control messages for other workers
wait in the outbox for the loop, which `wake` rings: links' threads never write to the router's socket.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from memserve.errors import EngineError
from memserve.messages import BlockRefs, LinkMessage, PeerGrant
from memserve.pool.allocator import BlockIds
from memserve.pool.arena import PeerArena
from memserve.pool.transports.base import FailedPull, Pull, Transfer
from memserve.pool.transports.gloo_wire import Options
from memserve.pool.transports.shm import ShmTransfer
from memserve.pool.transports.torch_distributed import TorchPeer, TorchPool, TorchTransfer


class PeerTransfer:
    """A `Transfer` that knows its peers. Everything is called from the loop's thread.

    Args:
        wake: rings the loop: a pull has ended, or the outbox holds something; from any thread.
        shm: reaches peers that are mapped; None = none can be.
        torch_pool: our end of what is sent, None = nothing can be.
        options: of that.
    """

    def __init__(
        self,
        wake: Callable[[], None],
        shm: ShmTransfer | None,
        torch_pool: TorchPool | None = None,
        options: Options | None = None,
    ) -> None:
        self._wake = wake
        self._shm = shm
        self._torch_pool = torch_pool
        self._options = options
        self._torch: TorchTransfer | None = None
        self._ways: dict[str, Transfer] = {}
        self._outbox: deque[LinkMessage] = deque()

    def add_mapped(self, peer: PeerArena) -> None:
        """Pull out of this arena from now on. Raises EngineError if arenas are not to be mapped here."""
        if self._shm is None:
            raise EngineError(f"the arena of {peer.instance} is not to be mapped here")
        self._shm.add_peer(peer)
        self._ways[peer.instance] = self._shm

    def add_sending(self, grant: PeerGrant) -> None:
        """Ask this peer for blocks from now on. Raises EngineError if that is not to be done here."""
        transfer = self._sending()
        if transfer is None:
            raise EngineError(f"{grant.instance} is not to be asked for blocks here")
        transfer.add_peer(
            TorchPeer(grant.instance, grant.incarnation, grant.num_blocks, grant.num_host_blocks)
        )
        self._ways[grant.instance] = transfer

    def remove_peer(self, instance: str) -> None:
        """Forget a peer. Unknown names are ignored."""
        self._ways.pop(instance, None)
        for transfer in (self._shm, self._torch):
            if transfer is not None:
                transfer.remove_peer(instance)

    def begin(self, refs: BlockRefs, into: BlockIds, layers_from: int | None = None) -> Pull:
        """See `Transfer.begin`."""
        way = self._ways.get(refs.instance)
        if way is None:
            self._wake()
            return FailedPull(f"unknown peer {refs.instance}")
        return way.begin(refs, into, layers_from)

    def on_control(self, message: LinkMessage) -> None:
        """A message of a link from another worker."""
        transfer = self._sending()
        if transfer is not None:
            transfer.on_control(message)

    def take_control(self) -> list[LinkMessage]:
        """The messages for other workers since the last call."""
        taken: list[LinkMessage] = []
        while self._outbox:
            taken.append(self._outbox.popleft())
        return taken

    def close(self) -> None:
        """See `Transfer.close`."""
        for transfer in (self._shm, self._torch):
            if transfer is not None:
                transfer.close()

    def _sending(self) -> TorchTransfer | None:
        if self._torch is None and self._torch_pool is not None:
            self._torch = TorchTransfer(self._torch_pool, self._wake, self._post, self._options)
        return self._torch

    def _post(self, peer: str, message: LinkMessage) -> None:
        self._outbox.append(message)
        self._wake()
