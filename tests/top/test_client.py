"""A server that is not there, answers slowly, too much, or something else: a line each, never an error."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import NoReturn

import aiohttp
import pytest
from aiohttp import web

from memserve.errors import BenchError
from memserve.top import client as client_module
from memserve.top.client import TopClient
from memserve.top.snapshot import Snapshot
from tests.e2e.server_process import free_port
from tests.top.recordings import body

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@asynccontextmanager
async def serving(handler: Handler, port: int = 0) -> AsyncIterator[str]:
    """A server that answers everything by `handler`; its URL."""
    app = web.Application()
    app.router.add_get("/{path:.*}", handler)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", port).start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


async def recorded(request: web.Request) -> web.StreamResponse:
    """Answers as they were recorded."""
    name = {"/v1/workers": "workers.json", "/metrics": "metrics.txt", "/v1/requests": "requests.json"}
    return web.Response(body=body(f"after.{name[request.path]}"))


async def ask(url: str, timeout_s: float = 10.0) -> Snapshot:
    async with TopClient(url, time.monotonic, timeout_s) as client:
        return await client.ask()


async def test_a_server_that_is_well() -> None:
    async with serving(recorded) as url:
        snapshot = await ask(f"{url}/v1/")
    assert snapshot.problems == ()
    assert snapshot.workers and snapshot.samples and snapshot.requests
    assert [len(snapshot.workers.value), len(snapshot.requests.value)] == [4, 19]


async def test_nobody_is_there() -> None:
    snapshot = await ask(f"127.0.0.1:{free_port()}")
    assert snapshot[:3] == (None, None, None)
    assert len(snapshot.problems) == 3 and "Connection refused" in snapshot.problems[0]


async def _not_found(request: web.Request) -> web.StreamResponse:
    return web.json_response({"error": {"message": "no such\npath"}}, status=404)


async def _garbage(request: web.Request) -> web.StreamResponse:
    return web.Response(body=b"memserve_pulls_total {{{ \xff <html>")


async def _redirect(request: web.Request) -> web.StreamResponse:
    raise web.HTTPFound("http://127.0.0.1:1/elsewhere")


async def _endless(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse()
    await response.prepare(request)
    while True:
        await response.write(b" " * 65_536)


async def _cut(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse(headers={"content-length": "100"})
    await response.prepare(request)
    assert request.transport is not None
    request.transport.close()
    return response


async def _silent(request: web.Request) -> web.StreamResponse:
    await asyncio.sleep(60)
    raise AssertionError


@pytest.mark.parametrize(
    ("handler", "told"),
    [
        (_not_found, "404 no such path"),
        (_garbage, "an answer that makes no sense"),
        (_redirect, "302 "),
        (_endless, "more than 1 MiB"),
        (_cut, ""),
        (_silent, "no answer in time"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
async def test_a_server_that_is_not_well(
    handler: Handler, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "MAX_BODY_BYTES", 1 << 20)
    async with serving(handler) as url:
        snapshot = await ask(url, timeout_s=0.3 if handler is _silent else 10.0)
    assert snapshot[:3] == (None, None, None)
    assert {problem.partition(": ")[0] for problem in snapshot.problems} == {
        "/v1/workers",
        "/metrics",
        "/v1/requests",
    }
    for problem in snapshot.problems:
        assert told in problem and problem.isprintable()


async def test_no_http_at_all() -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"\x1b[2JSSH-2.0\r\n" * 10)
        writer.close()

    server = await asyncio.start_server(talk, "127.0.0.1", 0)
    async with server:
        host, port = server.sockets[0].getsockname()
        snapshot = await ask(f"http://{host}:{port}")
    assert snapshot[:3] == (None, None, None)
    assert all(problem.isprintable() for problem in snapshot.problems)


async def test_one_answer_of_three() -> None:
    async def only_metrics(request: web.Request) -> web.StreamResponse:
        return await (recorded if request.path == "/metrics" else _not_found)(request)

    async with serving(only_metrics) as url:
        snapshot = await ask(url)
    assert snapshot.samples is not None and snapshot.workers is snapshot.requests is None
    assert len(snapshot.problems) == 2


def test_what_is_no_url() -> None:
    with pytest.raises(BenchError, match="no URL"):
        TopClient("ftp://x", time.monotonic)


@pytest.mark.parametrize("url", ["http://[::1", "http://host:99999999", "http://:80", "http://host:0"])
def test_a_url_that_is_broken(url: str) -> None:
    with pytest.raises(BenchError, match="no URL"):
        TopClient(url, time.monotonic)


async def test_a_url_that_cannot_be_used() -> None:
    snapshot = await ask("http://a..b")
    assert snapshot[:3] == (None, None, None) and len(snapshot.problems) == 3
    assert all("no URL" in problem for problem in snapshot.problems)


async def test_a_name_that_nobody_has(monkeypatch: pytest.MonkeyPatch) -> None:
    async def resolve(*args: object, **kwargs: object) -> NoReturn:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(aiohttp.DefaultResolver, "resolve", resolve)
    snapshot = await ask("http://nobody")
    assert all(problem.endswith(": there is no host of this name") for problem in snapshot.problems)
