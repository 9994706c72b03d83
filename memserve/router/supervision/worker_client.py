"""One connection to one life of a worker: frames in, frames out, never waiting.

Life cycle: constructed → `open` (takes the socket over) → `closed` set, after the last message. It closes
when the worker closes it, or with a `fault` when the worker sends garbage or lets our messages pile up.
Messages are handed over in order, from the event loop; frames of another incarnation are dropped. What a
closed connection means, and the end of the process behind it, is the supervisor's business.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable
from typing import cast

import msgspec

from memserve.messages import (
    FRAME_HEADER,
    MAX_FRAME_BYTES,
    ToRouter,
    ToWorker,
    decode_to_router,
    encode_frame,
)

logger = logging.getLogger(__name__)

# A worker reads its socket once a step. One that leaves so much unread has not done so for thousands of them.
MAX_UNSENT_BYTES = MAX_FRAME_BYTES


class WorkerClient(asyncio.Protocol):
    """Framing, decoding and flow control of one connection.

    `last_heard_at`: when, by the loop's clock, anything was last received (at first: when this was made).
    `fault`: why this side closed it, reading on from the worker's name; None as long as it did not.
    """

    def __init__(
        self,
        incarnation: int,
        on_message: Callable[[ToRouter], None],
        *,
        max_unsent_bytes: int = MAX_UNSENT_BYTES,
    ) -> None:
        self._incarnation = incarnation
        self._on_message = on_message
        self._max_unsent_bytes = max_unsent_bytes
        self._loop = asyncio.get_running_loop()
        self._received = bytearray()
        self._transport: asyncio.WriteTransport | None = None
        self.last_heard_at = self._loop.time()
        self.fault: str | None = None
        self.closed = asyncio.Event()

    async def open(self, sock: socket.socket) -> None:
        """Speak over a connected stream socket, which the connection owns from now on."""
        await self._loop.create_unix_connection(lambda: self, sock=sock)

    def send(self, message: ToWorker) -> bool:
        """Queue a message without waiting. False if closed, or closed now as the worker does not read."""
        if self._transport is None or self._transport.is_closing():
            return False
        self._transport.write(encode_frame(message, self._incarnation))
        num_unsent = self._transport.get_write_buffer_size()
        if num_unsent > self._max_unsent_bytes:
            self.close(f"left {num_unsent} bytes of messages unread")
            return False
        return True

    def close(self, fault: str) -> None:
        """Drop the connection with all that is queued. The first fault is the one that counts."""
        if self._transport is not None and not self._transport.is_closing():
            self.fault = fault
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.WriteTransport, transport)

    def data_received(self, data: bytes) -> None:
        self.last_heard_at = self._loop.time()
        received, done = self._received, 0
        received += data
        while self.fault is None and len(received) - done >= FRAME_HEADER.size:
            num_bytes, incarnation = FRAME_HEADER.unpack_from(received, done)
            if num_bytes > MAX_FRAME_BYTES:
                self.close(f"sent a frame of {num_bytes} bytes")
                break
            start = done + FRAME_HEADER.size
            if len(received) < start + num_bytes:
                break
            done = start + num_bytes
            self._deliver(bytes(received[start:done]), incarnation)
        del received[:done]

    def connection_lost(self, exc: Exception | None) -> None:
        if exc is not None:
            logger.debug("a worker's connection broke: %s", exc)
        self.closed.set()

    def _deliver(self, body: bytes, incarnation: int) -> None:
        if incarnation != self._incarnation:
            logger.warning("dropped a frame of incarnation %d, now %d", incarnation, self._incarnation)
            return
        try:
            message = decode_to_router(body)
        except msgspec.DecodeError as error:
            self.close(f"sent a malformed message: {error}")
            return
        try:
            self._on_message(message)
        except Exception as error:
            # The router's state for this worker is no longer to be trusted: fence it, replay its requests.
            logger.exception("failed to handle a %s", type(message).__name__)
            self.close(f"sent a {type(message).__name__} that the router failed to handle: {error!r}")
