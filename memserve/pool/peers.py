"""The other instances that a pool pulls from, as the supervisor grants them and takes them back.

    grant ──► mapped, opened or to be asked ──► pulled from ... ──► revoked: forgotten; what is under way ends
                └─ populated: with our own memory, or in the background if that was before

Owns the descriptors of a grant from the call on, the transfer that does the pulls, and the threads that
populate mappings. How bytes move and are verified is the transports'. Called from the loop's thread alone.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable

import numpy as np

from memserve import memfd
from memserve.errors import EngineError, MemserveError
from memserve.messages import (
    ArenaGrant,
    BlockRefs,
    DeviceGrant,
    LinkMessage,
    PeerGrant,
    Tier,
    generation_table_bytes,
)
from memserve.pool.allocator import BlockIds
from memserve.pool.arena import ArenaFds, PeerArena
from memserve.pool.transports.base import FailedPull, Pull
from memserve.pool.transports.by_peer import PeerTransfer

logger = logging.getLogger(__name__)

_POPULATE_NICENESS = 10


class Peers:
    """The peers of `instance`, whose blocks have `block_bytes`.

    Args:
        transfer: how they are reached, owned from now on; None = none is: grants are taken and forgotten, and
            every pull is a miss.
        wake: called when a pull has ended before it began.
    """

    def __init__(
        self, instance: str, block_bytes: int, transfer: PeerTransfer | None, wake: Callable[[], None]
    ) -> None:
        self._instance = instance
        self._block_bytes = block_bytes
        self._transfer = transfer
        self._wake = wake
        self._is_populated = False
        self._unpopulated: dict[str, PeerArena] = {}
        self._populating: list[threading.Thread] = []
        self._closing = threading.Event()

    # --- come and go ---

    def add_mapped(self, grant: ArenaGrant, arena_fd: int, generations_fd: int) -> None:
        """Map a peer's arena to pull from; a second grant of the same instance and tier replaces the first.

        Its mapping is populated by the caller of `take_unpopulated`, or in the background if that was before.
        The descriptors are ours from now on: they are closed, whatever happens. Raises MemoryError_, or
        EngineError if it is not to be mapped, or made of other blocks.
        """
        try:
            if self._transfer is None:
                return
            self._check_blocks(grant.instance, grant.block_bytes)
            peer = PeerArena.map(grant, ArenaFds(arena_fd, generations_fd))
        finally:
            os.close(arena_fd)
            os.close(generations_fd)
        self._transfer.add_mapped(peer)
        if peer.tier is Tier.HOST:
            return  # mostly holes, which reading would fill
        if self._is_populated:
            self._populate_later(peer)
        else:
            self._unpopulated[peer.instance] = peer

    def add_device(self, grant: DeviceGrant, table_fd: int, memory_fd: int | None = None) -> None:
        """Open a peer's arena on a GPU to pull from; a later grant of the same instance replaces this one.
        The descriptors are ours from now on. Raises as `add_mapped`.
        """
        try:
            if self._transfer is None or grant.memory is None:
                return
            self._check_blocks(grant.instance, grant.block_bytes)
            if grant.num_blocks > grant.max_blocks:
                raise EngineError(f"{grant.instance} has {grant.num_blocks} blocks of {grant.max_blocks}")
            table = memfd.map_bytes(table_fd, generation_table_bytes(grant.max_blocks), writable=False)
            given, memory_fd = memory_fd, None
            self._transfer.open_device(grant, table.view(np.uint64), given)
        finally:
            os.close(table_fd)
            if memory_fd is not None:
                os.close(memory_fd)

    def _check_blocks(self, instance: str, block_bytes: int) -> None:
        ours = self._block_bytes
        if block_bytes != ours:
            raise EngineError(f"{instance} has blocks of {block_bytes} bytes, {self._instance} of {ours}")

    def add_sending(self, grant: PeerGrant) -> None:
        """Pull from a peer that cannot be mapped, by asking it; a later life replaces the one before.

        Raises EngineError if that is not to be done here.
        """
        if self._transfer is not None:
            self._transfer.add_sending(grant)

    def remove(self, instance: str, tier: Tier | None = None) -> None:
        """Forget a peer, or one tier of it: pulls from it that are under way still end. Unknown names are
        ignored.
        """
        self._unpopulated.pop(instance, None)
        if self._transfer is not None:
            self._transfer.remove_peer(instance, tier)

    def close(self) -> None:
        """End every pull and background thread."""
        self._closing.set()
        self._unpopulated.clear()
        if self._transfer is not None:
            self._transfer.close()
        for thread in self._populating:
            thread.join()
        self._populating.clear()

    # --- pulls, and the links that some need ---

    def pull(self, refs: BlockRefs, into: BlockIds, layers_from: int | None = None) -> Pull:
        """See `MemPool.fetch`."""
        if self._transfer is None:
            self._wake()
            return FailedPull(f"unknown peer {refs.instance}")
        return self._transfer.begin(refs, into, layers_from)

    def on_control(self, message: LinkMessage) -> None:
        """Take what another worker says of a link between it and us. Never waits."""
        if self._transfer is not None:
            self._transfer.on_control(message)

    def take_control(self) -> list[LinkMessage]:
        """What is to be said to other workers, by way of the router; `wake` tells when there is something."""
        return [] if self._transfer is None else self._transfer.take_control()

    # --- mappings are populated ---

    def take_unpopulated(self) -> tuple[PeerArena, ...]:
        """The mappings so far, each for the caller to `populate` now; later ones are populated in the
        background.
        """
        peers, self._unpopulated = tuple(self._unpopulated.values()), {}
        self._is_populated = True
        return peers

    def populate(self, peer: PeerArena, progress: Callable[[float], None] | None = None) -> None:
        """Have the mapping of a peer's arena backed by its memory; `progress` is told fractions."""
        try:
            memfd.populate(peer.blocks.reshape(-1), self._closing, progress)
        except MemserveError as error:  # only a matter of speed, until the memory is really needed
            logger.warning(
                "%s: cannot populate the arena of %s: %s", self._instance, peer.instance, str(error)
            )

    def _populate_later(self, peer: PeerArena) -> None:
        def run() -> None:
            # Of this thread alone, on Linux: serving must not wait for it.
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _POPULATE_NICENESS)
            self.populate(peer)

        self._populating = [thread for thread in self._populating if thread.is_alive()]
        thread = threading.Thread(target=run, name="memserve-populate", daemon=True)
        self._populating.append(thread)
        thread.start()
