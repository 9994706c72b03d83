"""A stream of server-sent events: its headers, its pings, and clients that do not read or are gone.

    silent ─ first `write`, or headers_after_s without one ─► open: events, `: ping` in long silences ─► end

Until it is open nothing was sent, so an error can still become a status. Pings (comments, which clients skip)
keep proxies from cutting a request that waits, and find out that a client vanished: the write fails, the
connection is aborted, and aiohttp cancels the handler.

A write hands its event to the transport in one piece and returns at once, unless the transport holds more
than its high-water mark (64 KiB): then it waits until the client has read. So no event is cut by another,
what is held of a client that does not read is bounded, and an ordinary event costs no timer and no task
switch.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from types import TracebackType

from aiohttp import hdrs, web
from aiohttp.http import StreamWriter

from memserve.router.http.limits import HttpLimits

PING = b": ping\n\n"
_HEADERS = {
    hdrs.CONTENT_TYPE: "text/event-stream; charset=utf-8",
    hdrs.CACHE_CONTROL: "no-cache",
    "X-Accel-Buffering": "no",
}


class ClientGone(Exception):
    """The client closed the connection, or did not read for too long."""


class EventStream:
    """The answer to `request`. Use as an async context: pings are sent inside of it."""

    def __init__(
        self, request: web.Request, limits: HttpLimits, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.response = web.StreamResponse(headers=_HEADERS)
        self._request = request
        self._limits = limits
        self._clock = clock
        self._opening = asyncio.Lock()
        self._writer: StreamWriter | None = None
        self._last_write = clock()
        self._pinging: asyncio.Task[None] | None = None

    async def __aenter__(self) -> EventStream:
        self._pinging = asyncio.create_task(self._ping())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._pinging is not None
        self._pinging.cancel()
        await asyncio.gather(self._pinging, return_exceptions=True)

    async def write(self, data: bytes) -> None:
        """Sends `data`, the headers before it. Waits for a slow reader up to the limit; raises ClientGone."""
        try:
            writer = self._writer or await self._open()
            await writer.write(data, drain=False)
            if self._request.protocol.writing_paused:
                async with asyncio.timeout(self._limits.write_timeout_s):
                    await writer.drain()
        except (ConnectionError, TimeoutError):
            if self._request.transport is not None:
                self._request.transport.abort()
            raise ClientGone from None
        self._last_write = self._clock()

    async def is_open(self) -> bool:
        """Whether anything was sent. If not, nothing will be, provided that the caller leaves at once."""
        async with self._opening:  # by a ping, perhaps
            return self._writer is not None

    async def _open(self) -> StreamWriter:
        """The headers; they leave with the first data."""
        async with self._opening:
            if self._writer is None:
                writer = await self.response.prepare(self._request)
                assert isinstance(writer, StreamWriter)
                self._writer = writer
            return self._writer

    async def _ping(self) -> None:
        while True:
            opened = self._writer is not None
            patience_s = self._limits.ping_interval_s if opened else self._limits.headers_after_s
            wait_s = self._last_write + patience_s - self._clock()
            if wait_s > 0:
                await asyncio.sleep(wait_s)
                continue
            try:
                await self.write(PING)
            except ClientGone:
                return  # the connection is aborted, which ends the handler
