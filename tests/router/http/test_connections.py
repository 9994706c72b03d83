"""The bound on connections."""

from __future__ import annotations

import asyncio
import resource

import pytest
from aiohttp import web

from memserve.router.http.connections import MAX_CONNECTIONS, bounded, max_connections

GET = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"


async def test_one_too_many_is_told_so() -> None:
    async def answer(request: web.BaseRequest) -> web.Response:
        return web.Response(text="served")

    server = web.Server(answer)
    listening = await asyncio.get_running_loop().create_server(bounded(server, 2, 75.0), "127.0.0.1", 0)
    address = listening.sockets[0].getsockname()
    # 1. Two are served, and stay connected.
    kept = []
    for _ in range(2):
        reader, writer = await asyncio.open_connection(*address)
        writer.write(GET)
        assert (await reader.readline()).split()[1] == b"200"
        kept.append(writer)
    # 2. The third is not.
    reader, writer = await asyncio.open_connection(*address)
    refusal = await reader.read()
    assert refusal.startswith(b"HTTP/1.1 503 ") and b"Retry-After" in refusal
    writer.close()
    # 3. When one of them has left there is room again.
    kept.pop().close()
    while len(server.connections) > 1:
        await asyncio.sleep(0.01)
    reader, writer = await asyncio.open_connection(*address)
    writer.write(GET)
    assert (await reader.readline()).split()[1] == b"200"
    for open_one in (*kept, writer):
        open_one.close()
    listening.close()
    await server.shutdown()
    await asyncio.sleep(0)


@pytest.mark.parametrize(
    ("soft", "expected"),
    [(1024, 768), (100, 1), (1 << 20, MAX_CONNECTIONS), (resource.RLIM_INFINITY, MAX_CONNECTIONS)],
)
def test_descriptors_are_left_for_workers(soft: int, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda which: (soft, soft))
    assert max_connections() == expected
