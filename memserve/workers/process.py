"""`python -m memserve.workers.process`: one worker process, from its descriptors to its end.

    spawned ─► sockets, heartbeat ─► imports ─► Init ─► start-up (Loading, Loaded) ─► Ready ─► loop ─► exit

Torch is imported while `Init` is on its way, so that all workers of a server import at the same time. The
process ends with its router whatever happens: by the kernel's signal, by the end of the control socket,
by Shutdown. Ctrl-C is the router's to interpret. What goes wrong is told in a `Fatal` and ends the
process with status 1.
"""

from __future__ import annotations

import argparse
import ctypes
import logging
import os
import signal
import socket
import sys
from collections.abc import Sequence

from setproctitle import setproctitle

from memserve.errors import MemserveError
from memserve.messages import Fatal
from memserve.workers.channel import ChannelClosed, GrantSocket, SocketChannel
from memserve.workers.heartbeat import ORPHAN_STATUS, HeartbeatThread

logger = logging.getLogger(__name__)

_PR_SET_PDEATHSIG = 1


def main(argv: Sequence[str] | None = None) -> int:
    """Run a worker on the descriptors named in the arguments; returns the exit status."""
    parser = argparse.ArgumentParser(prog="memserve.workers.process", description="One memserve worker.")
    parser.add_argument("--control-fd", type=int, required=True)
    parser.add_argument("--grants-fd", type=int, required=True)
    parser.add_argument("--title", required=True)
    arguments = parser.parse_args(argv)

    setproctitle(arguments.title)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    instance = arguments.title.removeprefix("memserve: ").replace("%", "%%")
    logging.basicConfig(format=f"%(asctime)s %(levelname)s {instance} %(name)s: %(message)s")
    channel = SocketChannel(_adopt(arguments.control_fd))
    grants = GrantSocket(_adopt(arguments.grants_fd))
    heartbeat = HeartbeatThread(channel)
    # A router that died before this is seen at the end of the control socket.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    try:
        _serve(channel, grants, heartbeat)
    except ChannelClosed as error:
        logger.info("%s", error)
        return ORPHAN_STATUS
    except Exception as error:
        return _tell_fatal(channel, error)
    return 0


def _serve(channel: SocketChannel, grants: GrantSocket, heartbeat: HeartbeatThread) -> None:
    from memserve.workers.startup import start

    init = channel.receive_init()
    logging.getLogger().setLevel(init.config.log_level.upper())
    worker, doorbell = start(init, channel, grants)
    heartbeat.report = worker.gauges.heartbeat
    worker.run(doorbell)


def _tell_fatal(channel: SocketChannel, error: Exception) -> int:
    if isinstance(error, MemserveError):
        fatal = Fatal(kind=type(error).__name__, message=str(error))
    else:
        logger.exception("the worker failed", exc_info=error)
        fatal = Fatal(kind="EngineError", message=f"{type(error).__name__}: {error}")
    try:
        if channel.incarnation is not None:
            channel.send(fatal)
    except ChannelClosed:
        logger.error("%s", fatal.message)
    return 1


def _adopt(fd: int) -> socket.socket:
    sock = socket.socket(fileno=fd)
    sock.setblocking(True)
    sock.set_inheritable(False)
    return sock


if __name__ == "__main__":
    status = main()
    # At once: nothing of the process needs tidying up, and torch's and the daemon threads' own end can hang.
    logging.shutdown()
    sys.stderr.flush()
    os._exit(status)
