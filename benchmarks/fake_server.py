"""An OpenAI-compatible server without a model: tokens at set times, and every way of failing.

For tests of clients, and to measure a load generator (`load_generator.py`). Token k of an answer is written
`ttft_s + k * itl_s` after the request came, by an absolute clock, however many streams there are. As a
program it prints its URL:

    python benchmarks/fake_server.py [--port N] [--ttft-s S] [--itl-s S]
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from enum import Enum, auto

from aiohttp import web

Prompt = str | tuple[int, ...] | tuple[tuple[str, str], ...]


class Mode(Enum):
    """How a request is answered."""

    WELL = auto()
    NO_USAGE = auto()
    LIKE_SSE_STARLETTE = auto()  # CR LF, pings, no usage: llama-cpp-python and others on that package
    NO_DONE = auto()  # ended well, but without [DONE]
    STAYS_OPEN = auto()  # after [DONE]
    STATUS_500 = auto()
    STATUS_PLAIN = auto()  # 503 with a body that is no JSON
    STALL_AT_ONCE = auto()
    STALL = auto()  # after half of the answer
    CUT = auto()  # the connection breaks after half of the answer
    CUT_AT_ONCE = auto()  # the connection breaks before the headers
    SHORT = auto()  # the stream ends cleanly after half of the answer, unfinished
    HALF_EVENT = auto()  # the stream ends cleanly in the middle of an event
    NO_STREAM = auto()  # a JSON object
    BAD_JSON = auto()
    BAD_TYPES = auto()
    BAD_USAGE = auto()
    NOT_HTTP = auto()
    ERROR_EVENT = auto()
    EMPTY = auto()


@dataclass
class Seen:
    """One request as it came; times by `time.perf_counter`."""

    prompt: Prompt
    body: dict[str, object]
    at: float
    session: str | None
    ended: float | None = None


@dataclass
class FakeServer:
    """Behaviour, and what was seen. `mode` is asked at every request, with its number from 0."""

    ttft_s: float = 0.01
    itl_s: float = 0.002
    mode: Callable[[int], Mode] = lambda number: Mode.WELL
    refuses: Sequence[str] = ()  # fields that are answered with 400
    can_flush: bool = True
    tells_cached: bool = True
    keep: bool = True  # remember what was seen
    seen: list[Seen] = field(default_factory=list)
    num_flushes: int = 0
    connections: set[object] = field(default_factory=set)
    url: str = ""
    _num: int = 0
    _cached: list[Prompt] = field(default_factory=list)

    def app(self) -> web.Application:
        """The routes."""
        app = web.Application(client_max_size=1 << 28)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/health", self._health)
        app.router.add_post("/v1/completions", self._complete)
        app.router.add_post("/v1/chat/completions", self._complete)
        if self.can_flush:
            app.router.add_post("/v1/cache/flush", self._flush)
        return app

    async def _models(self, request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": "fake", "object": "model"}]})

    async def _health(self, request: web.Request) -> web.Response:
        return web.Response()

    async def _flush(self, request: web.Request) -> web.Response:
        self.num_flushes += 1
        self._cached.clear()
        return web.json_response({})

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        at = time.perf_counter()
        body = await request.json()
        for name in self.refuses:
            if name in body:
                return web.json_response({"error": {"message": f"unknown field {name}"}}, status=400)
        chat = "messages" in body
        prompt: Prompt = (
            tuple((message["role"], message["content"]) for message in body["messages"])
            if chat
            else body["prompt"]
            if isinstance(body["prompt"], str)
            else tuple(body["prompt"])
        )
        seen = Seen(prompt, body, at, request.headers.get("x-session-id"))
        if self.keep:
            self.seen.append(seen)
            self.connections.add(request.transport)
        number, self._num = self._num, self._num + 1
        try:
            return await self._answer(request, body, prompt, chat, self.mode(number), at)
        finally:
            seen.ended = time.perf_counter()

    async def _answer(
        self,
        request: web.Request,
        body: dict[str, object],
        prompt: Prompt,
        chat: bool,
        mode: Mode,
        at: float,
    ) -> web.StreamResponse:
        if mode is Mode.STATUS_500:
            return web.json_response({"error": {"message": "out of order"}}, status=500)
        if mode is Mode.STATUS_PLAIN:
            return web.Response(status=503, text="<html>\nno   server\x00 here</html>")
        if mode is Mode.NO_STREAM:
            return web.json_response({"choices": [{"text": "x", "finish_reason": "length"}]})
        if mode is Mode.STALL_AT_ONCE:
            await asyncio.sleep(3600)
        assert request.transport is not None
        if mode is Mode.CUT_AT_ONCE:
            request.transport.abort()
            return web.Response()
        if mode is Mode.NOT_HTTP:
            request.transport.write(b"what is this?\r\n\r\n")  # type: ignore[attr-defined]
            request.transport.close()
            return web.Response()
        cached = self._take_from_cache(prompt)
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        num_tokens = int(str(body["max_tokens"])) if mode is not Mode.EMPTY else 0
        until = num_tokens // 2 if mode in _HALF else num_tokens
        crlf = mode is Mode.LIKE_SSE_STARLETTE
        if crlf:
            await response.write(b": ping - 2026-01-01 00:00:00+00:00\r\n\r\n")
        if chat:
            await _write(response, {"choices": [{"delta": {"role": "assistant", "content": ""}}]})
        for index in range(until):
            delay = at + self.ttft_s + index * self.itl_s - time.perf_counter()
            if delay > 0:
                await asyncio.sleep(delay)
            text = f" t{index}"
            choice: dict[str, object] = {"index": 0, "finish_reason": None}
            choice |= {"delta": {"content": text}} if chat else {"text": text}
            if body.get("return_token_ids"):
                choice["token_ids"] = [1000 + index]
            await _write(response, {"choices": [choice]}, b"\r\n" if crlf else b"\n")
        if mode is Mode.STALL:
            await asyncio.sleep(3600)
        if mode is Mode.CUT:
            request.transport.abort()
            return response
        if mode is Mode.BAD_JSON:
            await response.write(b"data: {nonsense\n\n")
        if mode is Mode.BAD_TYPES:
            await _write(response, {"choices": [{"text": 7}]})
        if mode is Mode.BAD_USAGE:
            await _write(response, {"choices": [], "usage": {"completion_tokens": -1}})
        if mode is Mode.ERROR_EVENT:
            await _write(response, {"error": {"message": "it broke", "code": 500}})
        if mode is Mode.HALF_EVENT:
            await response.write(b'data: {"choices": [{"te')
        if mode in _HALF:
            return response
        last = {"index": 0, "finish_reason": "length"} | ({"delta": {}} if chat else {"text": ""})
        await _write(response, {"choices": [last]})
        if body.get("stream_options") and mode not in (Mode.NO_USAGE, Mode.LIKE_SSE_STARLETTE):
            usage: dict[str, object] = {"prompt_tokens": len(prompt), "completion_tokens": num_tokens}
            if self.tells_cached:
                usage["prompt_tokens_details"] = {"cached_tokens": cached}
            await _write(response, {"choices": [], "usage": usage})
        if mode is not Mode.NO_DONE:
            await response.write(b"data: [DONE]\n\n")
        if mode is Mode.STAYS_OPEN:
            await asyncio.sleep(3600)
        return response

    def _take_from_cache(self, prompt: Prompt) -> int:
        """How much of the prompt earlier ones have in common with it, but for its last token."""
        if not self.keep:
            return 0
        common = 0
        for other in self._cached:
            pairs = zip(prompt, other, strict=False)
            length = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(prompt), len(other)))
            common = max(common, length)
        self._cached.append(prompt)
        return min(common, len(prompt) - 1)


_HALF = {
    Mode.STALL,
    Mode.CUT,
    Mode.SHORT,
    Mode.HALF_EVENT,
    Mode.BAD_JSON,
    Mode.BAD_TYPES,
    Mode.BAD_USAGE,
    Mode.ERROR_EVENT,
}


async def _write(response: web.StreamResponse, event: dict[str, object], end: bytes = b"\n") -> None:
    await response.write(b"data: " + json.dumps(event).encode() + 2 * end)


@asynccontextmanager
async def serving(server: FakeServer, port: int = 0) -> AsyncIterator[FakeServer]:
    """Listen on a loopback port, 0 for a free one, while the body runs; `server.url` says where."""
    # what a client left is cancelled, so that stalled answers end with it
    runner = web.AppRunner(server.app(), handler_cancellation=True, shutdown_timeout=0.1, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", port, backlog=1024)
    await site.start()
    try:
        server.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        yield server
    finally:
        await runner.cleanup()


async def _main(ttft_s: float, itl_s: float, port: int) -> None:
    async with serving(FakeServer(ttft_s, itl_s, keep=False), port) as server:
        print(server.url, flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    import argparse
    import contextlib

    import uvloop

    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--ttft-s", type=float, default=0.01)
    parser.add_argument("--itl-s", type=float, default=0.002)
    with contextlib.suppress(KeyboardInterrupt):
        uvloop.run(_main(**vars(parser.parse_args())))
