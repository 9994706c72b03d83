"""The process that `memserve bench pool` pulls from: a pool whose blocks are filled, and does as it is told.

    python -m memserve.bench.pool_peer FD NUM_BLOCKS

Over the socket FD goes first the grant of its arena with the descriptors, then commands and control messages
of links. It ends when the socket does, without a word: who started it has ended, or was stopped.
"""

from __future__ import annotations

import contextlib
import select
import socket
import sys
import time
from pathlib import Path

import msgspec

from memserve.bench.pool_gloo import SOURCE, BareGloo
from memserve.messages import Accept, ArenaGrant, BlockRefs, Connect, Refuse, Tier
from memserve.model_config import KVGeometry

# 16 tokens of 8 layers, 4 KV heads of 64 numbers: 128 KiB a block
GEOMETRY = KVGeometry(num_layers=8, num_kv_heads=4, block_size=16, head_dim=64, dtype="bfloat16")
NAME, RECEIVER, MODEL = "source", "receiver", "model"
MAX_MESSAGE_BYTES = 1 << 20


class Offer(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Peer → bench: what it has."""

    grant: ArenaGrant
    refs: BlockRefs


class Advance(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Bench → peer: say that one layer after the other is written, `gap_s` apart."""

    gap_s: float


class Advanced(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Peer → bench: the last layer came at this time of time.perf_counter."""

    at_s: float


class Join(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Bench → peer: meet over this file (pool_gloo.py)."""

    path: str


class Send(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Bench → peer: send `num_blocks` blocks from `at` on as one tensor."""

    at: int
    num_blocks: int


Message = Offer | Advance | Advanced | Join | Send | Connect | Accept | Refuse


def run(fd: int, num_blocks: int) -> None:
    """Serve until the socket is closed."""
    from memserve.memfd import reopen_readonly
    from memserve.pool.arena import Arena
    from memserve.pool.mempool import MemPool
    from memserve.pool.transports.by_peer import PeerTransfer
    from memserve.pool.transports.torch_distributed import TorchPool

    ours = socket.socket(fileno=fd)
    ring, rung = socket.socketpair()
    ring.setblocking(False)
    arena, fds = Arena.create(NAME, GEOMETRY, num_blocks)
    wake = _Wake(ring)
    transfer = PeerTransfer(wake, None, TorchPool.of(NAME, 0, MODEL, arena, None))
    pool = MemPool(arena, NAME, 0, wake, transfer=transfer)
    pool.populate()
    pool.kv.fill_(1.0)
    ids = pool.alloc_mem(num_blocks)
    assert ids is not None
    grant = ArenaGrant(NAME, 0, Tier.DEVICE, num_blocks, GEOMETRY.block_bytes)
    encoder, decoder = msgspec.msgpack.Encoder(), msgspec.msgpack.Decoder(Message)
    bare: BareGloo | None = None
    offer = encoder.encode(Offer(grant, pool.addresses(ids)))
    socket.send_fds(ours, [offer], [reopen_readonly(each) for each in fds])
    while True:
        ready, _, _ = select.select([ours, rung], [], [])
        if rung in ready:
            rung.recv(4096)
        for message in pool.peers.take_control():
            ours.send(encoder.encode(message))
        if ours not in ready:
            continue
        data = ours.recv(MAX_MESSAGE_BYTES)
        if not data:
            break
        message = decoder.decode(data)
        if isinstance(message, Advance):
            at_s = 0.0
            for _ in range(GEOMETRY.num_layers):
                time.sleep(message.gap_s)
                pool.progress.advance()
                at_s = time.perf_counter()
            ours.send(encoder.encode(Advanced(at_s)))
        elif isinstance(message, Join):
            bare = BareGloo(Path(message.path), SOURCE)
        elif isinstance(message, Send):
            assert bare is not None and arena.blocks is not None
            bare.send(arena.blocks[message.at : message.at + message.num_blocks])
        elif isinstance(message, Connect | Accept | Refuse):
            pool.peers.on_control(message)
    pool.close()


class _Wake:
    """Rings the loop, from any thread."""

    def __init__(self, ring: socket.socket) -> None:
        self._ring = ring

    def __call__(self) -> None:
        try:
            self._ring.send(b"!")
        except BlockingIOError:
            return  # it rings already


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        run(int(sys.argv[1]), int(sys.argv[2]))
