"""Blocks pulled out of another process's pool through shared memory, as between CPU workers."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator

import msgspec

from memserve.bench.pool_peer import GEOMETRY, MAX_MESSAGE_BYTES, RECEIVER, Offer
from memserve.doctor.report import Finding, Verdict
from memserve.errors import MemserveError

SECTION = "transfer"
_NUM_BLOCKS = 64  # 8 MiB
_WAIT_S = 90.0


def check_loopback() -> Iterator[Finding]:
    """One pull, verified and compared."""
    name, meaning = "shared memory", "Prefill and decode workers on the CPU cannot pass KV: use --colocated."
    try:
        gb_per_s = _pull()
    except (MemserveError, OSError, ValueError, subprocess.SubprocessError) as error:
        yield Finding(SECTION, name, Verdict.BAD, f"{type(error).__name__}: {error}", meaning)
        return
    found = f"{_NUM_BLOCKS} blocks of another process, {gb_per_s:.1f} GB/s"
    yield Finding(SECTION, name, Verdict.GOOD, found)


def _pull() -> float:
    """GB/s. Raises what goes wrong."""
    from memserve.pool.arena import Arena
    from memserve.pool.mempool import MemPool

    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.settimeout(_WAIT_S)
    command = [sys.executable, "-m", "memserve.bench.pool_peer", str(theirs.fileno()), str(_NUM_BLOCKS)]
    peer = subprocess.Popen(command, pass_fds=(theirs.fileno(),), start_new_session=True)
    try:
        theirs.close()
        body, fds, _, _ = socket.recv_fds(ours, MAX_MESSAGE_BYTES, 2)
        if not body or len(fds) != 2:
            raise ValueError("the other process ended early")
        offer = msgspec.msgpack.decode(body, type=Offer)
        arena, own_fds = Arena.create(RECEIVER, GEOMETRY, _NUM_BLOCKS)
        woken = threading.Semaphore(0)
        pool = MemPool(arena, RECEIVER, 0, woken.release)
        try:
            pool.peers.add_mapped(offer.grant, fds[0], fds[1])
            pool.populate()
            into = pool.alloc_mem(_NUM_BLOCKS)
            assert into is not None
            pull = pool.fetch(offer.refs, into)
            if not woken.acquire(timeout=_WAIT_S) or (result := pull.poll()) is None:
                raise ValueError("the copy did not end")
            if result.failure is not None:
                raise ValueError(result.failure)
            if not bool((pool.kv[into] == 1.0).all()):
                raise ValueError("what was read is not what was written")
            return result.num_bytes / result.elapsed_ms / 1e6
        finally:
            pool.close()
            for fd in own_fds:
                os.close(fd)
    finally:
        ours.close()
        peer.wait(_WAIT_S)
