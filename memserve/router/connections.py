"""How many HTTP connections are held: one too many is told so and closed, whatever it wants.

Without a bound, idle connections could take every descriptor, and with them the supervisor's means to start a
replacement worker. How long a connection may be idle is aiohttp's business (`keepalive_timeout`), how many
requests run at a time the server's (limits.py).
"""

from __future__ import annotations

import asyncio
import resource
from collections.abc import Callable
from typing import cast

from aiohttp import web

MAX_CONNECTIONS = 4096
# For sockets and memory of the workers, and the replacements of those that die.
RESERVED_DESCRIPTORS = 256
_REFUSAL = (
    b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
)


def max_connections() -> int:
    """As many as this process's descriptors allow, up to MAX_CONNECTIONS."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return MAX_CONNECTIONS
    return max(1, min(MAX_CONNECTIONS, soft - RESERVED_DESCRIPTORS))


def bounded(server: web.Server, limit: int) -> Callable[[], asyncio.Protocol]:
    """A protocol factory that hands at most `limit` connections at a time to `server`."""

    def make() -> asyncio.Protocol:
        return server() if len(server.connections) < limit else _Refusal()

    return make


class _Refusal(asyncio.Protocol):
    """Answers before anything is asked, and closes."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        writable = cast(asyncio.WriteTransport, transport)
        writable.write(_REFUSAL)
        writable.close()
