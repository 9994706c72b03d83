"""HTTP requests with next to no client: bytes made beforehand, kept connections, answers counted, not parsed.

One request costs this process some tens of microseconds, so that what is measured is the server.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from typing import cast

END_OF_HEAD = b"\r\n\r\n"
_LENGTH = b"content-length: "
_END_OF_CHUNKS = b"\r\n0\r\n\r\n"


def request_bytes(path: str, body: dict[str, object]) -> bytes:
    """A POST, ready for the socket."""
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\n"
    return head.encode() + f"Content-Length: {len(data)}\r\n\r\n".encode() + data


def content_length(head: bytes) -> int:
    """What the head of a request or an answer says of the body's length; 0 = nothing."""
    _, found, rest = head.lower().partition(_LENGTH)
    return int(rest.partition(b"\r\n")[0]) if found else 0


class Answer:
    """One answer as it came. Times are seconds of `time.perf_counter`."""

    def __init__(self, sent_at: float) -> None:
        self.sent_at = sent_at
        self.first_at = 0.0  # when the first of its body was there
        self.ended_at = 0.0
        self.data = bytearray()

    @property
    def num_events(self) -> int:
        """Server-sent events, `[DONE]` among them."""
        return self.data.count(b"data: ")


class RawConnection(asyncio.Protocol):
    """One kept connection: a request at a time, of those that `take` hands out until it has no more."""

    def __init__(self, requests: _Requests) -> None:
        self._requests = requests
        self._transport: asyncio.WriteTransport | None = None
        self._answer: Answer | None = None
        self._wants = -1  # length of the whole answer; -1 = not known yet, 0 = it is chunked

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.WriteTransport, transport)
        self._next()

    def data_received(self, data: bytes) -> None:
        answer = self._answer
        assert answer is not None
        answer.data += data
        if self._wants < 0:
            head_end = answer.data.find(END_OF_HEAD)
            if head_end < 0:
                return
            head = bytes(answer.data[:head_end])
            if not head.startswith(b"HTTP/1.1 200"):
                raise RuntimeError(answer.data.decode())
            length = content_length(head)
            self._wants = head_end + len(END_OF_HEAD) + length if length else 0
        if not answer.first_at and (self._wants > 0 or b"data: " in answer.data):
            answer.first_at = time.perf_counter()
        if len(answer.data) >= self._wants if self._wants else answer.data.endswith(_END_OF_CHUNKS):
            answer.ended_at = time.perf_counter()
            self._requests.answers.append(answer)
            self._next()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._answer is not None:
            self._requests.fail(exc or ConnectionError("the server closed a connection"))

    def _next(self) -> None:
        assert self._transport is not None
        request = self._requests.take()
        if request is None:
            self._answer = None
            self._transport.close()
            return
        self._wants = -1
        self._answer = Answer(time.perf_counter())
        self._transport.write(request)


class _Requests:
    """Those of one run, and their answers."""

    def __init__(self, requests: Sequence[bytes]) -> None:
        self._left = list(reversed(requests))
        self._num = len(requests)
        self.answers: list[Answer] = []
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def take(self) -> bytes | None:
        """The next to be sent."""
        if len(self.answers) == self._num and not self.done.done():
            self.done.set_result(None)
        return self._left.pop() if self._left else None

    def fail(self, error: Exception) -> None:
        """A connection broke."""
        if not self.done.done():
            self.done.set_exception(error)


async def run_requests(
    port: int, requests: Sequence[bytes], concurrency: int, timeout_s: float = 120
) -> list[Answer]:
    """Send all, so many at a time; the answers in the order of their ends. Raises what went wrong."""
    loop = asyncio.get_running_loop()
    run = _Requests(requests)
    for _ in range(min(concurrency, len(requests))):
        await loop.create_connection(lambda: RawConnection(run), "127.0.0.1", port)
    await asyncio.wait_for(run.done, timeout_s)
    return run.answers
