"""The admin routes of the cache, from the body to what the instances are told, and back."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import numpy as np
import pytest

from memserve.messages import CacheCommand, CacheReport, CacheVerb, unpack_tokens
from memserve.router.commands import Commands
from memserve.router.engine_api import Delta, GenerateRequest
from memserve.router.http import cache_routes
from memserve.router.text.tokenizer import Tokenizer

Serve = Callable[..., Awaitable[Any]]
Say = Callable[[str], Callable[[GenerateRequest], Sequence[Delta]]]


async def post(server: Any, path: str, body: object) -> tuple[int, Any]:
    async with server.session.post(f"/v1/cache/{path}", json=body) as response:
        return response.status, await response.json()


async def test_flush(serve: Serve, say: Say) -> None:
    server = await serve(say("hi"), reports={"prefill-0": CacheReport(1, num_blocks=9)})
    status, answer = await post(server, "flush", {})
    assert status == 200 and answer["object"] == "cache.flush"
    assert answer["data"] == [
        {"instance": "prefill-0", "role": "prefill", "freed_blocks": 9},
        {"instance": "decode-0", "role": "decode", "error": "the instance is down or did not answer"},
    ]
    assert [command.verb for _, command in server.engine.commands] == [CacheVerb.FLUSH] * 2
    # one instance by name, and a name that nobody has
    status, answer = await post(server, "flush", {"instance": "prefill-0"})
    assert [row["instance"] for row in answer["data"]] == ["prefill-0"]
    status, answer = await post(server, "flush", {"instance": "nobody"})
    assert status == 404 and answer["error"]["param"] == "instance"


async def test_flush_without_a_body(serve: Serve, say: Say) -> None:
    server = await serve(say("hi"), reports={"prefill-0": CacheReport(1, num_blocks=9)})
    bare = {"skip_auto_headers": ["Content-Type"]}
    async with server.session.post("/v1/cache/flush", **bare) as response:
        assert response.status == 200
    assert len(server.engine.commands) == 2
    # a web page of another site, and other routes
    for headers in ({"Origin": "http://a.example"}, {"Sec-Fetch-Site": "cross-site"}):
        async with server.session.post("/v1/cache/flush", headers=headers, **bare) as response:
            assert response.status == 415
    async with server.session.post("/v1/cache/flush", data=b'{"instance": "decode-0"}', **bare) as response:
        assert response.status == 415
    async with server.session.post("/v1/cache/resize", **bare) as response:
        assert response.status == 415
    assert len(server.engine.commands) == 2


async def test_lookup_of_a_prompt_and_of_a_chat(serve: Serve, say: Say, tiny_tokenizer: Tokenizer) -> None:
    report = CacheReport(1, num_device_tokens=16, num_host_tokens=32)
    server = await serve(say("hi"), reports={"prefill-0": report, "decode-0": report})
    status, answer = await post(server, "lookup", {"prompt": "Once upon a time", "cache_salt": "mine"})
    num_tokens = len(tiny_tokenizer.encode("Once upon a time"))
    assert status == 200 and answer["prompt_tokens"] == num_tokens
    row = {"instance": "prefill-0", "role": "prefill", "device_tokens": 16, "host_tokens": 32}
    assert answer["data"][0] == row
    _, command = server.engine.commands[0]
    assert command.cache_salt == "mine"
    assert np.array_equal(unpack_tokens(command.token_ids), tiny_tokenizer.encode("Once upon a time"))
    status, answer = await post(server, "lookup", {"messages": [{"role": "user", "content": "hi"}]})
    assert status == 200 and answer["prompt_tokens"] > 1
    assert not server.engine.requests, "a look-up runs nothing"


@pytest.mark.parametrize(
    "path, body",
    [
        ("lookup", {}),
        ("lookup", {"prompt": ["a", "b"]}),
        ("lookup", {"prompt": 3}),
        ("lookup", {"messages": []}),
        ("lookup", {"prompt": "a", "cache_slat": "mine"}),
        ("lookup", {"messages": [{"role": "user", "content": "hi"}], "instance": "p0"}),
        ("resize", {}),
        ("resize", {"host_memory": "much"}),
        ("resize", {"host_memory": "0.5"}),
        ("resize", {"host_memory": "-1GiB"}),
        ("resize", {"host_memory": "1GiB", "instance": "decode-0"}),
        ("flush", {"instance": 3}),
        ("flush", []),
        ("flush", {"instances": "prefill-0"}),
        ("flush", {"host_memory": "1GiB"}),
        ("resize", {"host_memory": "1GiB"}),
    ],
)
async def test_bad_bodies(serve: Serve, say: Say, path: str, body: object) -> None:
    server = await serve(say("hi"))
    status, answer = await post(server, path, body)
    assert status == 400 and answer["error"]["message"]
    assert not server.engine.commands


async def test_resize(serve: Serve, say: Say) -> None:
    report = CacheReport(1, num_blocks=32, num_blocks_most=64)
    server = await serve(say("hi"), reports={"prefill-0": report})
    status, answer = await post(server, "resize", {"host_memory": "32KiB"})
    assert status == 200
    assert answer["data"] == [
        {
            "instance": "prefill-0",
            "role": "prefill",
            "host_blocks": 32,
            "host_bytes": 32768,
            "max_host_blocks": 64,
        }
    ]
    assert server.engine.commands == [("prefill-0", CacheCommand(0, CacheVerb.RESIZE, num_host_blocks=32))]


async def test_tiers_grow_only_if_all_of_it_fits(
    serve: Serve, say: Say, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = CacheReport(1, num_blocks=0, num_blocks_most=64)
    server = await serve(say("hi"), reports={"prefill-0": report})
    monkeypatch.setattr(cache_routes, "available_bytes", lambda: 1000)
    status, answer = await post(server, "resize", {"host_memory": "2KiB"})
    assert status == 400 and "more are needed" in answer["error"]["message"]
    status, _ = await post(server, "resize", {"host_memory": "0"})
    assert status == 200 and server.engine.commands[0][1].num_host_blocks == 0


async def test_answers_find_who_asked() -> None:
    sent: list[tuple[str, CacheCommand]] = []
    commands = Commands(lambda instance, command: sent.append((instance, command)))
    flush = CacheCommand(0, CacheVerb.FLUSH)
    # 1. two instances are asked; an answer from the wrong one, or to nothing, is dropped
    asking = asyncio.create_task(commands.ask({"a": flush, "b": flush, "c": flush}, timeout_s=0.05))
    await asyncio.sleep(0)
    (_, of_a), (_, of_b), (_, of_c) = sent
    assert len({of_a.command_id, of_b.command_id, of_c.command_id}) == 3
    commands.on_report("b", CacheReport(of_a.command_id, num_blocks=7))
    commands.on_report("a", CacheReport(99, num_blocks=7))
    commands.on_report("a", CacheReport(of_a.command_id, num_blocks=1))
    commands.on_report("a", CacheReport(of_a.command_id, num_blocks=2))
    # 2. one dies, one stays silent
    commands.on_down("b")
    assert await asking == {"a": CacheReport(of_a.command_id, num_blocks=1), "b": None, "c": None}
    # 3. late answers are dropped, and nobody to be asked is no wait
    commands.on_report("c", CacheReport(of_c.command_id))
    assert await commands.ask({}) == {}
