"""The memory that workers share, and who is granted what of it.

A CPU worker's arena and its generation table, the host tier of any worker, of the greatest size that it may
have, and the one copy of the weights, are nameless sparse memfds
made here and passed to the workers. They outlive any worker, so that a replacement finds its generations
and its peers can still read what it had computed; with the last descriptor they are gone.

    worker           own arenas, generations  peers' arenas, generations   weights
    the loader       read-write               read-only                    read-write until it has loaded them
    any other        read-write               read-only                    read-only

A worker on a GPU makes its arena itself and hands an export of it over before it is ready (`take_exports`):
as long as it lives, its peers are granted that. Its generation table is a memfd made here, like those above.
Where several workers share a GPU, the first exports its weights too, and the others are granted them.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from memserve.config import WorkerConfig
from memserve.memfd import create_memfd, reopen_readonly
from memserve.messages import (
    ArenaExport,
    ArenaGrant,
    DeviceGrant,
    Grant,
    PeerGrant,
    RevokeGrant,
    Tier,
    WeightsExport,
    WeightsGrant,
    decode_export,
    encode_grant,
    generation_table_bytes,
)
from memserve.model_config import KVGeometry, weights_bytes_upper_bound

_MAX_EXPORT_BYTES = 1 << 16
_FD = struct.Struct("@i")


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


@dataclass(slots=True)
class _OnGpu:
    """The device tier of a GPU's worker: its table, and what its present life has exported."""

    table: _Shared
    max_blocks: int
    exported: ArenaExport | None = None
    fd: int | None = None

    def forget(self) -> None:
        self.exported = None
        if self.fd is not None:
            os.close(self.fd)
            self.fd = None


@dataclass(frozen=True, slots=True)
class _GpuWeights:
    """The weights on one GPU, which no worker's death ends: the descriptor keeps them."""

    exported: WeightsExport
    fd: int


class SharedMemory:
    """Every memfd of one server. Made once, granted to each life of each worker, closed at the end."""

    def __init__(self, plan: Sequence[WorkerConfig]) -> None:
        """Reserve room, not memory: the files are sparse until the workers fill them."""
        self._arenas: dict[str, list[_Arena]] = {}  # of each instance, the device tier's first
        self._on_gpus: dict[str, _OnGpu] = {}
        self._weights: _Shared | None = None
        self._weights_bytes = 0
        self._gpu_weights: dict[str, _GpuWeights] = {}  # by the workers' name of the GPU
        with ExitStack() as descriptors:
            for config in plan:
                self._add(config, descriptors)
            descriptors.callback(self._forget_gpu_weights)
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
        elif "cuda_ipc" in config.transports:
            table_bytes = generation_table_bytes(config.max_blocks)
            table = _Shared.create(f"{config.instance}-generations", table_bytes, descriptors)
            on_gpu = self._on_gpus[config.instance] = _OnGpu(table, config.max_blocks)
            descriptors.callback(on_gpu.forget)
        if config.host_blocks is not None:
            sizes = (config.max_host_blocks, block_bytes)
            arenas.append(_Arena.create(config.instance, Tier.HOST, *sizes, descriptors))

    @property
    def has_weights(self) -> bool:
        """Whether one worker loads the weights for all, in memory made here (not on GPUs)."""
        return self._weights is not None

    def has_gpu_weights(self, device: str) -> bool:
        """Whether a worker on that GPU has exported its weights."""
        return device in self._gpu_weights

    def grant_own(self, sock: socket.socket, instance: str, incarnation: int) -> None:
        """Grant a worker its own arenas, to write. OSError here and below: the socket is gone or full."""
        if (on_gpu := self._on_gpus.get(instance)) is not None:
            _send(sock, DeviceGrant(instance, incarnation, on_gpu.max_blocks), on_gpu.table.writable)
        for arena in self._arenas.get(instance, ()):
            grant = arena.grant(instance, incarnation)
            _send(sock, grant, arena.blocks.writable, arena.generations.writable)

    def take_exports(self, sock: socket.socket, instance: str, device: str) -> None:
        """Read what a worker on `device` has exported by now. Raises OSError, ValueError if it is
        nothing that a worker sends.
        """
        while (received := _receive(sock)) is not None:
            body, fds = received
            on_gpu = self._on_gpus.get(instance)
            try:
                exported = decode_export(body)
                if on_gpu is None or len(fds) != (not exported.memory.handle):
                    raise ValueError(f"an export of {instance} with {len(fds)} descriptors")
                if isinstance(exported, WeightsExport) and not fds:
                    raise ValueError(f"weights of {instance} that would end with it")
            except ValueError:
                for fd in fds:
                    os.close(fd)
                raise
            if isinstance(exported, ArenaExport):
                on_gpu.forget()
                on_gpu.exported, on_gpu.fd = exported, (fds[0] if fds else None)
            elif device in self._gpu_weights:  # who was told of them has them
                os.close(fds[0])
            else:
                self._gpu_weights[device] = _GpuWeights(exported, fds[0])

    def _forget_gpu_weights(self) -> None:
        for weights in self._gpu_weights.values():
            os.close(weights.fd)
        self._gpu_weights.clear()

    def forget_exports(self, instance: str) -> bool:
        """A worker is dead: its GPU memory is free when its peers have let go of it too. Whether it had
        exported any.
        """
        on_gpu = self._on_gpus.get(instance)
        if on_gpu is None or on_gpu.exported is None:
            return False
        on_gpu.forget()
        return True

    def grant_device(self, sock: socket.socket, peer: str, incarnation: int) -> None:
        """Grant a worker what `peer`, now in its life `incarnation`, has exported, if that is anything."""
        on_gpu = self._on_gpus.get(peer)
        if on_gpu is None or (exported := on_gpu.exported) is None:
            return
        grant = DeviceGrant(
            instance=peer,
            incarnation=incarnation,
            max_blocks=on_gpu.max_blocks,
            num_blocks=exported.num_blocks,
            block_bytes=exported.block_bytes,
            memory=exported.memory,
        )
        _send(sock, grant, on_gpu.table.readonly, *(() if on_gpu.fd is None else (on_gpu.fd,)))

    def grant_peer(self, sock: socket.socket, peer: str, incarnation: int) -> None:
        """Grant a worker the arenas of `peer`, now in its life `incarnation`, to read."""
        for arena in self._arenas.get(peer, ()):
            grant = arena.grant(peer, incarnation)
            _send(sock, grant, arena.blocks.readonly, arena.generations.readonly)

    def revoke_device(self, sock: socket.socket, peer: str) -> None:
        """Tell a worker that the device tier of `peer` is gone; its host tier is not."""
        _send(sock, RevokeGrant(peer, Tier.DEVICE))

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

    def grant_gpu_weights(self, sock: socket.socket, device: str) -> None:
        """Grant a worker on `device` what another there has exported."""
        weights = self._gpu_weights[device]
        _send(sock, WeightsGrant(weights.exported.num_bytes, weights.exported.memory), weights.fd)

    def close(self) -> None:
        """Close this process's descriptors; the memory goes when the workers' are closed too."""
        self._descriptors.close()


def _receive(sock: socket.socket) -> tuple[bytes, list[int]] | None:
    """One datagram with its descriptors, if one has arrived."""
    try:
        body, ancillary, _, _ = sock.recvmsg(
            _MAX_EXPORT_BYTES, socket.CMSG_SPACE(2 * _FD.size), socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
        )
    except BlockingIOError:
        return None
    if not body:
        return None
    rights = (data for _, kind, data in ancillary if kind == socket.SCM_RIGHTS)
    return body, [fd for data in rights for (fd,) in _FD.iter_unpack(data[: len(data) // 4 * 4])]


def _send(sock: socket.socket, grant: Grant, *fds: int) -> None:
    if fds:
        socket.send_fds(sock, [encode_grant(grant)], list(fds))
    else:
        sock.send(encode_grant(grant))
