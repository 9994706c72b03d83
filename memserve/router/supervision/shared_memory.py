"""The memory that workers share, and who is granted what of it.

A CPU worker's arena and its generation table, the host tier of any worker, of the greatest size that it may
have, and the one copy of the weights, are nameless sparse memfds
made here and passed to the workers. They outlive any worker, so that a replacement finds its generations
and its peers can still read what it had computed; with the last descriptor they are gone.

    worker           own arenas, generations  peers' arenas, generations   weights
    the loader       read-write               read-only                    read-write until it has loaded them
    any other        read-write               read-only                    read-only

Workers on CUDA allocate device memory for themselves.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from memserve.config import WorkerConfig
from memserve.memfd import create_memfd, reopen_readonly
from memserve.messages import (
    ArenaGrant,
    Grant,
    PeerGrant,
    Tier,
    WeightsGrant,
    encode_grant,
    generation_table_bytes,
)
from memserve.model_config import KVGeometry, weights_bytes_upper_bound


@dataclass(frozen=True, slots=True)
class _Shared:
    """A memfd by two descriptors: for its owner, and for everybody else."""

    writable: int
    readonly: int

    @classmethod
    def create(cls, name: str, num_bytes: int, descriptors: ExitStack) -> _Shared:
        writable = create_memfd(name, num_bytes)
        descriptors.callback(os.close, writable)
        readonly = reopen_readonly(writable)
        descriptors.callback(os.close, readonly)
        return cls(writable, readonly)


@dataclass(frozen=True, slots=True)
class _Arena:
    blocks: _Shared
    generations: _Shared
    tier: Tier
    num_blocks: int
    block_bytes: int

    @classmethod
    def create(
        cls, instance: str, tier: Tier, num_blocks: int, block_bytes: int, descriptors: ExitStack
    ) -> _Arena:
        name = f"{instance}-{'host-' * (tier is Tier.HOST)}"
        blocks = _Shared.create(f"{name}arena", num_blocks * block_bytes, descriptors)
        generations = _Shared.create(f"{name}generations", generation_table_bytes(num_blocks), descriptors)
        return cls(blocks, generations, tier, num_blocks, block_bytes)

    def grant(self, instance: str, incarnation: int) -> ArenaGrant:
        return ArenaGrant(instance, incarnation, self.tier, self.num_blocks, self.block_bytes)


class SharedMemory:
    """Every memfd of one server. Made once, granted to each life of each worker, closed at the end."""

    def __init__(self, plan: Sequence[WorkerConfig]) -> None:
        """Reserve room, not memory: the files are sparse until the workers fill them."""
        self._arenas: dict[str, list[_Arena]] = {}  # of each instance, the device tier's first
        self._weights: _Shared | None = None
        self._weights_bytes = 0
        with ExitStack() as descriptors:
            for config in plan:
                self._add(config, descriptors)
            self._descriptors = descriptors.pop_all()

    def _add(self, config: WorkerConfig, descriptors: ExitStack) -> None:
        arenas = self._arenas[config.instance] = []
        block_bytes = KVGeometry.of(config.model, config.block_size, config.dtype).block_bytes
        if config.device == "cpu":
            assert config.num_blocks is not None, "the size of a CPU worker's pool is planned"
            sizes = (config.num_blocks, block_bytes)
            arenas.append(_Arena.create(config.instance, Tier.DEVICE, *sizes, descriptors))
            if self._weights is None:
                self._weights_bytes = weights_bytes_upper_bound(config.model, config.dtype)
                self._weights = _Shared.create("weights", self._weights_bytes, descriptors)
        if config.host_blocks is not None:
            sizes = (config.max_host_blocks, block_bytes)
            arenas.append(_Arena.create(config.instance, Tier.HOST, *sizes, descriptors))

    @property
    def has_weights(self) -> bool:
        """Whether one worker loads the weights for all (on CUDA each loads its own)."""
        return self._weights is not None

    def grant_own(self, sock: socket.socket, instance: str, incarnation: int) -> None:
        """Grant a worker its own arenas, to write. OSError here and below: the socket is gone or full."""
        for arena in self._arenas.get(instance, ()):
            grant = arena.grant(instance, incarnation)
            _send(sock, grant, arena.blocks.writable, arena.generations.writable)

    def grant_peer(self, sock: socket.socket, peer: str, incarnation: int) -> None:
        """Grant a worker the arenas of `peer`, now in its life `incarnation`, to read."""
        for arena in self._arenas.get(peer, ()):
            grant = arena.grant(peer, incarnation)
            _send(sock, grant, arena.blocks.readonly, arena.generations.readonly)

    def name_peer(self, sock: socket.socket, peer: str, incarnation: int) -> None:
        """Tell a worker of `peer`, which it is to ask for blocks: its arena is not for it to map."""
        sizes = {arena.tier: arena.num_blocks for arena in self._arenas.get(peer, ())}
        if Tier.DEVICE in sizes:
            _send(sock, PeerGrant(peer, incarnation, sizes[Tier.DEVICE], sizes.get(Tier.HOST, 0)))

    def grant_weights(self, sock: socket.socket, *, writable: bool) -> None:
        """Grant a worker the weights: to write for the one that loads them, else to read."""
        if self._weights is not None:
            fd = self._weights.writable if writable else self._weights.readonly
            _send(sock, WeightsGrant(self._weights_bytes), fd)

    def close(self) -> None:
        """Close this process's descriptors; the memory goes when the workers' are closed too."""
        self._descriptors.close()


def _send(sock: socket.socket, grant: Grant, *fds: int) -> None:
    if fds:
        socket.send_fds(sock, [encode_grant(grant)], list(fds))
    else:
        sock.send(encode_grant(grant))
