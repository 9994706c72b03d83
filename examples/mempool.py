"""Two processes share a prefix: MemPool on its own, without the server.

    python examples/mempool.py

Process `a` fills blocks with what would be the KV of a prompt, and publishes them. Process `b` maps a's
memory read-only, pulls the blocks, and finds the prompt in its own index. Between them goes one socket, for
the descriptors of the memory and for small messages; the blocks themselves are copied once, straight out of
a's memory. Then `b` swaps the prompt out to its host tier and in again.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time

import msgspec
import numpy as np

from memserve.memfd import reopen_readonly
from memserve.messages import ArenaGrant, Tier, Transfer, pack_tokens
from memserve.model_config import KVGeometry
from memserve.pool.arena import Arena
from memserve.pool.mempool import MemPool
from memserve.pool.retention import HostArena, Retention

# 16 tokens of 8 layers, 4 KV heads of 64 numbers: 128 KiB a block, in one piece
GEOMETRY = KVGeometry(num_layers=8, num_kv_heads=4, block_size=16, head_dim=64, dtype="bfloat16")
NUM_BLOCKS = 256
PROMPT = pack_tokens(np.arange(100 * 16))


def make_pool(instance: str) -> tuple[MemPool, ArenaGrant, list[int]]:
    """A pool, and what another process needs to pull from it: a grant and two read-only descriptors."""
    arena, fds = Arena.create(instance, GEOMETRY, NUM_BLOCKS)
    host, _ = Arena.create(f"{instance}-host", GEOMETRY, NUM_BLOCKS)
    retention = Retention(host=HostArena(host, num_blocks=NUM_BLOCKS))
    pool = MemPool(arena, instance, incarnation=0, wake=lambda: None, retention=retention)
    grant = ArenaGrant(instance, 0, Tier.DEVICE, NUM_BLOCKS, GEOMETRY.block_bytes)
    return pool, grant, [reopen_readonly(fd) for fd in fds]


def a() -> None:
    """Compute, publish, offer."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    peer = subprocess.Popen([sys.executable, __file__, str(theirs.fileno())], pass_fds=[theirs.fileno()])
    theirs.close()
    pool, grant, fds = make_pool("a")
    socket.send_fds(ours, [msgspec.msgpack.encode(grant)], fds)

    ids = pool.alloc_mem(100)
    assert ids is not None
    for value, block in enumerate(ids):
        pool.kv[block] = value
    pool.insert(PROMPT, ids)
    print(f"a: computed and published {pool.match(PROMPT).num_tokens} tokens; {pool.stats()}")

    offered, lock = pool.transfer_with_insert("b", PROMPT)
    assert lock is not None
    ours.send(msgspec.msgpack.encode(offered))
    ours.recv(1)  # b has answered: nobody reads the blocks any more
    pool.unlock(lock)
    print(f"a: done; {pool.stats()}")
    pool.close()
    sys.exit(peer.wait())


def b(fd: int) -> None:
    """Pull, verify, find."""
    ours = socket.socket(fileno=fd)
    pool, _, _ = make_pool("b")
    data, fds, _, _ = socket.recv_fds(ours, 65536, 2)
    pool.peers.add_mapped(msgspec.msgpack.decode(data, type=ArenaGrant), *fds)
    pool.populate()  # touched once now, copied at full speed later

    offered = msgspec.msgpack.decode(ours.recv(65536), type=Transfer)
    print(
        f"b: {pool.match(PROMPT).num_tokens} tokens are here, {len(offered.refs.blocks)} blocks are offered"
    )
    incoming = pool.receive(offered)
    while (received := incoming.poll()) is None:
        time.sleep(0.0005)
    found = pool.match(PROMPT)
    assert received.failure is None and found.num_tokens == 1600
    assert all((pool.kv[block] == value).all() for value, block in enumerate(found.device_blocks))
    print(f"b: pulled {received.num_bytes / 1e6:.1f} MB, found {found.num_tokens} tokens; {pool.stats()}")

    pool.swap_out(40)
    print(f"b: swapped out; {pool.stats()}")
    pool.swap_in(PROMPT)
    found = pool.match(PROMPT)
    assert all((pool.kv[block] == value).all() for value, block in enumerate(found.device_blocks))
    print(f"b: swapped in;  {pool.stats()}")
    ours.send(b"!")
    pool.close()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    b(int(sys.argv[1])) if len(sys.argv) > 1 else a()
