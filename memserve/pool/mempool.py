"""The pool of one instance behind the paper's API (MemServe §MemPool API): its blocks, and pulls from peers.

    free ── alloc_mem ──► active (a request's) ── free_mem ──► free      lock, unlock: other holders, offers

Owned by the worker's loop and called from its thread alone. A block is freed when its last holder lets go;
the destination of a pull counts as written until the pull has a result. Memory and layout are arena.py's,
who holds what allocator.py's, how bytes move the transports'. Peers come and go by grants of the
supervisor.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import ArrayLike

from memserve import memfd
from memserve.errors import MemserveError
from memserve.messages import ArenaGrant, BlockRefs, Tier
from memserve.pool.allocator import BlockAllocator, BlockIds
from memserve.pool.arena import Arena, ArenaFds, PeerArena
from memserve.pool.transports.base import FailedPull, Pull
from memserve.pool.transports.shm import Copy, ShmTransfer, copy_bytes

logger = logging.getLogger(__name__)

_POPULATE_NICENESS = 10


@dataclass(frozen=True, slots=True)
class PoolStats:
    """Blocks by state; they add up to the arena. `historical`: kept by the index for reuse."""

    free: int
    active: int
    historical: int


class MemPool:
    """The pool of `instance` over `arena`.

    Args:
        arena: the memory, owned from now on.
        instance, incarnation: who we are, as part of every address given out.
        wake: called after each pull's end, from any thread, until `close` returns (see `ShmTransfer`).
        on_free: told which blocks have become free (tests poison them; no generation tells of such a write).
        copy: how the bytes of a pull are copied (tests inject faults).
    """

    def __init__(
        self,
        arena: Arena,
        instance: str,
        incarnation: int,
        wake: Callable[[], None],
        *,
        on_free: Callable[[BlockIds], None] | None = None,
        copy: Copy = copy_bytes,
    ) -> None:
        self._arena = arena
        self._instance = instance
        self._incarnation = incarnation
        self._wake = wake
        self._allocator = BlockAllocator(arena.num_blocks, arena.generations, on_free)
        # An arena the host cannot address has no way to pull yet: its peers are unknown, every pull a miss.
        self._transfer = None if arena.blocks is None else ShmTransfer(arena.blocks, wake, copy=copy)
        self._is_populated = False
        self._unpopulated: dict[str, PeerArena] = {}
        self._populating: list[threading.Thread] = []
        self._closing = threading.Event()

    @property
    def kv(self) -> torch.Tensor:
        """The arena, [num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim]. Dead after `close`."""
        return self._arena.kv

    @property
    def num_blocks(self) -> int:
        """Blocks in all."""
        return self._allocator.num_blocks

    @property
    def num_free(self) -> int:
        """Blocks that `alloc_mem` could give now."""
        return self._allocator.num_free

    @property
    def block_size(self) -> int:
        """Tokens of one block."""
        return self._arena.geometry.block_size

    # --- memory blocks -----------------------------------------------------------------------------------

    def alloc_mem(self, num_blocks: int) -> BlockIds | None:
        """Take blocks: int64 ids, ascending, held by the caller, with whatever content they had before.

        None, and nothing taken, if there are not enough.
        """
        return self._allocator.allocate(num_blocks)

    def free_mem(self, ids: ArrayLike) -> None:
        """Give blocks back; those that somebody locked stay until they are unlocked."""
        self._allocator.free(ids)

    def lock(self, ids: ArrayLike) -> None:
        """Hold blocks beside whoever holds them already."""
        self._allocator.lock(ids)

    def unlock(self, ids: ArrayLike) -> None:
        """Let go of what `lock` held."""
        self._allocator.unlock(ids)

    def addresses(self, ids: ArrayLike) -> BlockRefs:
        """Where our blocks `ids` can be pulled from; good until they are freed, so lock them."""
        blocks = np.asarray(ids, dtype=np.int64)
        return BlockRefs(
            instance=self._instance,
            incarnation=self._incarnation,
            tier=Tier.DEVICE,
            blocks=tuple(blocks.tolist()),
            generations=tuple(self._arena.generations[blocks].tolist()),
        )

    # --- other instances ----------------------------------------------------------------------------------

    def add_peer(self, grant: ArenaGrant, arena_fd: int, generations_fd: int) -> None:
        """Map a peer's arena to pull from; a second grant of the same instance replaces the first.

        Its mapping is populated by `populate`, or in the background if that was before. The descriptors are
        ours from now on: they are closed, whatever happens. Raises MemoryError_.
        """
        try:
            if self._transfer is None:
                return
            peer = PeerArena.map(grant, ArenaFds(arena_fd, generations_fd))
        finally:
            os.close(arena_fd)
            os.close(generations_fd)
        self._transfer.add_peer(peer)
        if self._is_populated:
            self._populate_later(peer)
        else:
            self._unpopulated[peer.instance] = peer

    def remove_peer(self, instance: str) -> None:
        """Forget a peer: pulls from it that are under way still end. Unknown names are ignored."""
        self._unpopulated.pop(instance, None)
        if self._transfer is not None:
            self._transfer.remove_peer(instance)

    def fetch(self, refs: BlockRefs, into: ArrayLike) -> Pull:
        """Pull blocks at `refs` into our blocks `into`, in order: the paper's `transfer`, by the receiver.

        Never raises or waits: an unknown peer, a full queue, bad addresses are results. The caller holds
        `into` and may not free it before the pull has a result.
        """
        if self._transfer is None:
            self._wake()
            return FailedPull(f"unknown peer {refs.instance}")
        return self._transfer.begin(refs, np.asarray(into, dtype=np.int64))

    # --- life --------------------------------------------------------------------------------------------

    def populate(self, progress: Callable[[float], None] | None = None) -> None:
        """Back the arena and the mappings of the peers so far with memory: half a second a GiB.

        Left to the first touch it would slow the first prompts down; done beside them it would take a core
        from them, and two threads that share one matrix product wait for the slower. `progress` is told
        fractions from 0 to 1. Raises MemoryError_ if there is not enough for our own.
        """
        peers, self._unpopulated = tuple(self._unpopulated.values()), {}
        self._is_populated = True
        num_parts = 1 + len(peers)

        def tell(part: int, fraction: float) -> None:
            if progress is not None:
                progress((part + fraction) / num_parts)

        if self._arena.blocks is not None:
            memfd.populate(self._arena.blocks.reshape(-1), progress=partial(tell, 0))
        for part, peer in enumerate(peers, start=1):
            self._populate_peer(peer, partial(tell, part))
        tell(num_parts - 1, 1.0)

    def stats(self) -> PoolStats:
        """Blocks by state, now."""
        free = self._allocator.num_free
        return PoolStats(free=free, active=self._allocator.num_blocks - free, historical=0)

    def assert_idle(self) -> None:
        """AssertionError naming the blocks, unless every block is free (DESIGN invariant 2; for tests)."""
        held = self._allocator.held_blocks()
        if len(held) or self.num_free != self.num_blocks:
            raise AssertionError(f"{len(held)} blocks are still held ({self.num_free} free): {held}")

    def close(self) -> None:
        """End every pull and background thread. The memory goes when the last view of `kv` does."""
        self._closing.set()
        self._unpopulated.clear()
        if self._transfer is not None:
            self._transfer.close()
        for thread in self._populating:
            thread.join()
        self._populating.clear()

    def _populate_peer(self, peer: PeerArena, progress: Callable[[float], None] | None = None) -> None:
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
            self._populate_peer(peer)

        self._populating = [thread for thread in self._populating if thread.is_alive()]
        thread = threading.Thread(target=run, name="memserve-populate", daemon=True)
        self._populating.append(thread)
        thread.start()
