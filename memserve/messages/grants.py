"""What goes over a worker's second socketpair, because descriptors come with it: memory that the supervisor
grants a worker, and memory of a GPU that a worker exports.

One message is one datagram (SOCK_SEQPACKET): msgpack of one tagged struct, its descriptors beside it by
SCM_RIGHTS. Whoever reads it owns the descriptors.
"""

from __future__ import annotations

import msgspec

from memserve.cuda.memory import DeviceExport
from memserve.messages.base import Message
from memserve.messages.blocks import Tier


class ArenaGrant(Message, frozen=True, array_like=True, tag=True, gc=False):
    """Comes with two descriptors [arena, generations] by SCM_RIGHTS: the worker's own (read-write) or a
    peer's (opened read-only). `arena` is a sparse memfd of `num_blocks * block_bytes`; `generations` of
    `generation_table_bytes(num_blocks)`: a uint64 for each block, and one for the owner's progress.
    """

    instance: str
    incarnation: int
    tier: Tier
    num_blocks: int
    block_bytes: int


class WeightsGrant(Message, frozen=True, array_like=True, tag=True, gc=False):
    """Comes with one descriptor: the memfd of the shared weights, read-write for the loader, else
    read-only; or, where there is a `memory`, that of memory of the worker's GPU, as another has filled it.
    """

    num_bytes: int
    memory: DeviceExport | None = None


class PeerGrant(Message, frozen=True, array_like=True, tag=True, gc=False):
    """A peer whose arenas cannot be mapped, but which sends its blocks over the transport torch_distributed;
    so many in its device tier, and at most in its host tier. Comes without descriptors.
    """

    instance: str
    incarnation: int
    num_blocks: int
    num_host_blocks: int = 0


class DeviceGrant(Message, frozen=True, array_like=True, tag=True, gc=False):
    """A device tier that is memory of a GPU. Comes with the descriptor of its generation table, of
    `generation_table_bytes(max_blocks)`, writable for the owner, who makes the memory (`memory` None, nor are
    the other sizes known); for a peer read-only, and with the memory's descriptor if `memory` has no handle.
    """

    instance: str
    incarnation: int
    max_blocks: int
    num_blocks: int = 0
    block_bytes: int = 0
    memory: DeviceExport | None = None


class RevokeGrant(Message, frozen=True, array_like=True, tag=True, gc=False):
    """The peer's arena, of one tier or both (None), is gone: unmap it. Comes without descriptors."""

    instance: str
    tier: Tier | None = None


Grant = ArenaGrant | WeightsGrant | PeerGrant | DeviceGrant | RevokeGrant


class ArenaExport(Message, frozen=True, array_like=True, tag=True, gc=False):
    """Worker → supervisor, on the socket of the grants and before `Ready`: its device arena is there. Comes
    with the memory's descriptor if `memory` has no handle.
    """

    num_blocks: int
    block_bytes: int
    memory: DeviceExport


class WeightsExport(Message, frozen=True, array_like=True, tag=True, gc=False):
    """Worker → supervisor, on the socket of the grants and before `Loaded`: the weights are on its GPU, for
    others there. Comes with the memory's descriptor.
    """

    num_bytes: int
    memory: DeviceExport


Export = ArenaExport | WeightsExport


def generation_table_bytes(num_blocks: int) -> int:
    """Size of the memfd that comes second with an `ArenaGrant`."""
    return 8 * (num_blocks + 1)


_encoder = msgspec.msgpack.Encoder()
_grant: msgspec.msgpack.Decoder[Grant] = msgspec.msgpack.Decoder(Grant)
_export: msgspec.msgpack.Decoder[Export] = msgspec.msgpack.Decoder(Export)


def encode_grant(grant: Grant) -> bytes:
    """Payload that accompanies the descriptors of a grant (one datagram, SOCK_SEQPACKET)."""
    return _encoder.encode(grant)


def decode_grant(body: bytes) -> Grant:
    """Inverse of `encode_grant`. Raises msgspec.DecodeError on anything malformed."""
    return _grant.decode(body)


def encode_export(export: Export) -> bytes:
    """Payload that accompanies the descriptor of an export, as for a grant."""
    return _encoder.encode(export)


def decode_export(body: bytes) -> Export:
    """Inverse of `encode_export`. Raises msgspec.DecodeError on anything malformed."""
    return _export.decode(body)
