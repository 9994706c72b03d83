"""How each peer is reached: its arena is mapped (shm.py), opened on our GPU (cuda_ipc.py), or it sends its
blocks (torch_distributed.py).

The supervisor's grant of a peer says which: one with descriptors is to be mapped. What the second transport
needs is made when the first such peer, or its first message, comes. Its control messages for other workers
wait in the outbox for the loop, which `wake` rings: links' threads never write to the router's socket.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from memserve.errors import EngineError
from memserve.messages import BlockRefs, DeviceGrant, LinkMessage, PeerGrant, Tier
from memserve.pool.allocator import BlockIds
from memserve.pool.arena import PeerArena
from memserve.pool.transports.base import FailedPull, Pull, Transfer
from memserve.pool.transports.cuda_ipc import CudaTransfer
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
        cuda: reaches peers whose blocks our GPU can copy; None = there is no GPU.
    """

    def __init__(
        self,
        wake: Callable[[], None],
        shm: ShmTransfer | None,
        torch_pool: TorchPool | None = None,
        options: Options | None = None,
        cuda: CudaTransfer | None = None,
    ) -> None:
        self._wake = wake
        self._shm = shm
        self._cuda = cuda
        self._torch_pool = torch_pool
        self._options = options
        self._torch: TorchTransfer | None = None
        self._ways: dict[str, Transfer] = {}
        self._outbox: deque[LinkMessage] = deque()

    def add_mapped(self, peer: PeerArena) -> None:
        """Pull out of this arena from now on. Raises EngineError if arenas are not to be mapped here."""
        if self._cuda is not None:
            self._cuda.add_host(peer)
            self._ways[peer.instance] = self._cuda
            return
        if self._shm is None:
            raise EngineError(f"the arena of {peer.instance} is not to be mapped here")
        self._shm.add_peer(peer)
        self._ways[peer.instance] = self._shm

    def open_device(self, grant: DeviceGrant, words: NDArray[np.uint64], memory_fd: int | None) -> None:
        """Pull out of a peer's arena on a GPU from now on; the descriptor is ours. `words` are its table.
        Raises EngineError if it cannot be opened.
        """
        if self._cuda is None:
            if memory_fd is not None:
                os.close(memory_fd)
            raise EngineError(f"the arena of {grant.instance} is for GPUs, and there is none here")
        self._cuda.open_device(grant, words, memory_fd)
        self._ways[grant.instance] = self._cuda

    def add_sending(self, grant: PeerGrant) -> None:
        """Ask this peer for blocks from now on. Raises EngineError if that is not to be done here."""
        transfer = self._sending()
        if transfer is None:
            raise EngineError(f"{grant.instance} is not to be asked for blocks here")
        transfer.add_peer(
            TorchPeer(grant.instance, grant.incarnation, grant.num_blocks, grant.num_host_blocks)
        )
        self._ways[grant.instance] = transfer

    def remove_peer(self, instance: str, tier: Tier | None = None) -> None:
        """Forget a peer, or one tier of it. Unknown names are ignored."""
        if tier is not None:
            if self._cuda is not None:
                self._cuda.remove_peer(instance, tier)
            return
        self._ways.pop(instance, None)
        if self._cuda is not None:
            self._cuda.remove_peer(instance)
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
        for transfer in (self._cuda, self._shm, self._torch):
            if transfer is not None:
                transfer.close()

    def _sending(self) -> TorchTransfer | None:
        if self._torch is None and self._torch_pool is not None:
            self._torch = TorchTransfer(self._torch_pool, self._wake, self._post, self._options)
        return self._torch

    def _post(self, peer: str, message: LinkMessage) -> None:
        self._outbox.append(message)
        self._wake()
