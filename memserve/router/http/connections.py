"""HTTP connections: how many are held, and what becomes of bytes that are no request.

One connection too many is told so and closed, whatever it wants. Without a bound, idle connections could
take every descriptor, and with them the supervisor's means to start a replacement worker. How long a
connection may be idle is aiohttp's business (`keepalive_timeout`), how many requests run at a time the
server's (limits.py). What aiohttp's parser refuses never becomes a request, so no middleware sees it: it is
answered here.
"""

from __future__ import annotations

import asyncio
import logging
import resource
import secrets
from collections.abc import Callable
from typing import cast

from aiohttp import http_exceptions, web

from memserve.router.http.errors import REQUEST_ID_HEADER, error_response, parser_error

logger = logging.getLogger(__name__)

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


class HttpConnection(web.RequestHandler):
    """One connection; what cannot be parsed is answered in OpenAI's shape, with one line in the log."""

    def __init__(self, server: web.Server, keepalive_timeout: float = 75.0) -> None:
        loop = asyncio.get_running_loop()
        super().__init__(server, loop=loop, keepalive_timeout=keepalive_timeout, access_log=None)  # type: ignore[arg-type]

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """See `aiohttp.web.RequestHandler`. The connection is closed after it."""
        if request.writer.output_size > 0:  # the answer has begun: nothing can be said any more
            raise ConnectionError("an error after the answer began")
        error = exc if exc is not None else TimeoutError("no answer in time")
        if isinstance(error, http_exceptions.HttpProcessingError):
            logger.info("refused what %s sent: %s", request.remote, type(error).__name__)
            error = parser_error(error)
        request_id = secrets.token_hex(16)
        response = error_response(error, request_id)
        response.headers[REQUEST_ID_HEADER] = request_id
        response.force_close()
        return response


def bounded(server: web.Server, limit: int, keepalive_timeout: float) -> Callable[[], asyncio.Protocol]:
    """A protocol factory that hands at most `limit` connections at a time to `server`."""

    def make() -> asyncio.Protocol:
        full = len(server.connections) >= limit
        return _Refusal() if full else HttpConnection(server, keepalive_timeout)

    return make


class _Refusal(asyncio.Protocol):
    """Answers before anything is asked, and closes."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        writable = cast(asyncio.WriteTransport, transport)
        writable.write(_REFUSAL)
        writable.close()
