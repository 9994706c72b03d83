"""The HTTP application on a loopback port: routes, errors, streams, clients that leave."""

from __future__ import annotations

import asyncio
import gzip
import io
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any
from urllib.parse import quote

import aiohttp
import pytest
from aiohttp import web
from aiohttp.http import StreamWriter

from memserve.errors import EngineError, Overloaded, RequestError
from memserve.messages import CachedTokens
from memserve.router.engine_api import Delta, GenerateRequest
from memserve.router.http import generation
from memserve.router.http import server as server_module
from memserve.router.http.limits import HttpLimits
from memserve.router.http.request_view import decision_headers
from memserve.router.request_log import Happening
from memserve.router.scheduling.policies.decision import Decision, PrefillRow
from memserve.router.scheduling.policy import Placement
from memserve.router.text.tokenizer import Tokenizer
from tests.router.conftest import make_deltas

Reply = Callable[[GenerateRequest], Sequence[Delta]]
Say = Callable[[str], Reply]
Serve = Callable[..., Awaitable[Any]]

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
PROMPT = {"model": "tiny", "prompt": "Once", "max_tokens": 50}
CHAT_BODY = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
JSON = {"content-type": "application/json"}


def events_of(text: str) -> list[Any]:
    """The events of a stream; "[DONE]" as a string."""
    assert text.endswith("\n\n")
    events = []
    for block in text[:-2].split("\n\n"):
        assert block.startswith("data: ")
        data = block.removeprefix("data: ")
        events.append(data if data == "[DONE]" else json.loads(data))
    return events


async def post(server: Any, path: str, body: Mapping[str, object]) -> tuple[int, Any]:
    async with server.session.post(path, json=body) as response:
        assert response.headers["x-request-id"]
        return response.status, await response.json()


async def stream(server: Any, path: str, body: Mapping[str, object]) -> list[Any]:
    async with server.session.post(path, json={**body, "stream": True}) as response:
        assert response.status == 200
        assert response.content_type == "text/event-stream"
        return events_of(await response.text())


# --- answers in one piece ----------------------------------------------------------------------------------


async def test_completion(serve: Serve, say: Say) -> None:
    server = await serve(say(" upon a time"))
    status, answer = await post(server, COMPLETIONS, PROMPT)
    assert status == 200
    num_prompt = len(server.engine.requests[0].token_ids)
    num_tokens = answer["usage"]["completion_tokens"]
    assert answer["id"].startswith("cmpl-")
    assert {key: answer[key] for key in ("object", "model", "choices", "usage")} == {
        "object": "text_completion",
        "model": "tiny",
        "choices": [{"index": 0, "text": " upon a time", "logprobs": None, "finish_reason": "stop"}],
        "usage": {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_tokens,
            "total_tokens": num_prompt + num_tokens,
            "prompt_tokens_details": {"cached_tokens": 1},
        },
    }


async def test_chat(serve: Serve, say: Say) -> None:
    server = await serve(say("Hello 👋"))
    status, answer = await post(server, CHAT, CHAT_BODY)
    assert status == 200
    assert answer["object"] == "chat.completion"
    assert answer["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "Hello 👋", "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]


async def test_prompts_and_n_in_order(serve: Serve, say: Say) -> None:
    server = await serve(say("x"))
    _, answer = await post(server, COMPLETIONS, PROMPT | {"prompt": ["a", "bb cc"], "n": 3})
    assert [choice["index"] for choice in answer["choices"]] == list(range(6))
    num_prompts = [len(server.engine.requests[i].token_ids) for i in (0, 3)]
    assert answer["usage"]["prompt_tokens"] == sum(num_prompts)
    assert answer["usage"]["completion_tokens"] == 6 * 2
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 2


async def test_length(serve: Serve, say: Say) -> None:
    server = await serve(say("a much longer answer than that"))
    _, answer = await post(server, COMPLETIONS, PROMPT | {"max_tokens": 2})
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 2


async def test_stop_string_closes_the_sequence(serve: Serve, say: Say) -> None:
    server = await serve(say("one two three four five six seven"))
    _, answer = await post(server, COMPLETIONS, PROMPT | {"stop": ["three", "never"]})
    assert answer["choices"][0]["text"] == "one two "
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert server.engine.num_closed_early == 1


async def test_echo_and_logprobs_as_evaluations_send_them(
    serve: Serve, say_tokens: Callable[..., Reply]
) -> None:
    server = await serve(say_tokens([500, 2]))
    prompts = [[300, 301, 302], [303, 304]]
    body = {"prompt": prompts, "max_tokens": 1, "echo": True, "logprobs": 1, "temperature": 0, "seed": 1234}
    _, answer = await post(server, COMPLETIONS, {"model": "tiny"} | body)
    for prompt, choice in zip(prompts, answer["choices"], strict=True):
        logprobs = choice["logprobs"]
        lengths = {len(values) for values in logprobs.values()}
        assert lengths == {len(prompt) + 1}
        assert logprobs["token_logprobs"][0] is None
        assert logprobs["top_logprobs"][0] is None
        for logprob, top in zip(logprobs["token_logprobs"][1:], logprobs["top_logprobs"][1:], strict=True):
            assert logprob == max(top.values())  # how lm-eval tells that a token was greedy
        assert "".join(logprobs["tokens"]) == choice["text"]
    # max_tokens 0 is the prompt alone
    _, answer = await post(server, COMPLETIONS, {"model": "tiny"} | body | {"max_tokens": 0})
    assert [len(choice["logprobs"]["tokens"]) for choice in answer["choices"]] == [3, 2]
    assert answer["usage"]["completion_tokens"] == 0


async def test_chat_logprobs_join_to_the_text(serve: Serve, say: Say) -> None:
    server = await serve(say("Hi 👍!"))
    _, answer = await post(server, CHAT, CHAT_BODY | {"logprobs": True, "top_logprobs": 2})
    content = answer["choices"][0]["logprobs"]["content"]
    assert b"".join(bytes(token["bytes"]) for token in content[:-1]).decode() == "Hi 👍!"
    assert [len(token["top_logprobs"]) for token in content] == [2] * len(content)
    assert content[0]["top_logprobs"][0] == {key: content[0][key] for key in ("token", "logprob", "bytes")}
    assert answer["choices"][0]["logprobs"]["refusal"] is None


# --- streams ----------------------------------------------------------------------------------------------


async def test_chat_stream(serve: Serve, say: Say) -> None:
    server = await serve(say("Hello 👩‍👩‍👧‍👦!"))
    events = await stream(server, CHAT, CHAT_BODY)
    assert events.pop() == "[DONE]"
    assert len({event["id"] for event in events}) == 1
    assert {event["object"] for event in events} == {"chat.completion.chunk"}
    assert not any("usage" in event for event in events)
    choices = [event["choices"][0] for event in events]
    assert choices[0]["delta"] == {"role": "assistant", "content": ""}
    assert choices[-1]["delta"] == {}
    assert [choice["finish_reason"] for choice in choices] == [None] * (len(choices) - 1) + ["stop"]
    pieces = [choice["delta"]["content"] for choice in choices[:-1]]
    assert "".join(pieces) == "Hello 👩‍👩‍👧‍👦!"
    assert not any("\ufffd" in piece for piece in pieces)


async def test_completion_stream_with_usage(serve: Serve, say: Say) -> None:
    server = await serve(say("one two"))
    events = await stream(server, COMPLETIONS, PROMPT | {"stream_options": {"include_usage": True}})
    assert events.pop() == "[DONE]"
    last = events.pop()
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 3
    assert [event["usage"] for event in events] == [None] * len(events)
    assert "".join(event["choices"][0]["text"] for event in events) == "one two"


async def test_usage_with_every_chunk(serve: Serve, say: Say) -> None:
    server = await serve(say("one two"))
    options = {"include_usage": True, "continuous_usage_stats": True}
    events = await stream(server, CHAT, CHAT_BODY | {"stream_options": options})
    counts = [event["usage"]["completion_tokens"] for event in events[:-1]]
    assert counts == sorted(counts)
    assert counts[-1] == 3


@pytest.mark.parametrize(
    "fields", [{}, {"stop": "four"}, {"logprobs": 2}, {"echo": True, "logprobs": 1}, {"n": 3}]
)
@pytest.mark.parametrize("off_loop", [False, True])
async def test_a_stream_says_the_same_as_the_whole(
    serve: Serve, say: Say, monkeypatch: pytest.MonkeyPatch, fields: Mapping[str, object], off_loop: bool
) -> None:
    if off_loop:  # as if each prompt and list of log-probabilities were a long one
        monkeypatch.setattr(server_module, "_INLINE_LOGPROBS", -1)
        monkeypatch.setattr(generation, "_INLINE_TOKENS", -1)
    server = await serve(say("one two 👍🏽 three four five"))
    _, whole = await post(server, COMPLETIONS, {**PROMPT, **fields})
    events = await stream(server, COMPLETIONS, {**PROMPT, **fields})
    for expected in whole["choices"]:
        parts = [
            choice
            for event in events[:-1]
            for choice in event["choices"]
            if choice["index"] == expected["index"]
        ]
        assert "".join(part["text"] for part in parts) == expected["text"]
        assert [part["finish_reason"] for part in parts if part["finish_reason"]] == [
            expected["finish_reason"]
        ]
        if expected["logprobs"] is not None:
            for key, values in expected["logprobs"].items():
                assert [v for part in parts if part["logprobs"] for v in part["logprobs"][key]] == values


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
async def test_token_ids_on_demand(
    serve: Serve, say: Say, tiny_tokenizer: Tokenizer, path: str, n: int
) -> None:
    server = await serve(say("one two 👍🏽 three"))
    drawn = [*tiny_tokenizer.encode("one two 👍🏽 three").tolist(), 2]
    body = (PROMPT if path == COMPLETIONS else CHAT_BODY) | {"n": n}
    # 1. only those who ask get them
    _, answer = await post(server, path, body)
    assert not any("token_ids" in choice for choice in answer["choices"])
    events = await stream(server, path, body)
    assert not any("token_ids" in choice for event in events[:-1] for choice in event["choices"])
    # 2. whole
    body["return_token_ids"] = True
    _, answer = await post(server, path, body)
    assert [choice["token_ids"] for choice in answer["choices"]] == [drawn] * n
    # 3. streamed
    events = await stream(server, path, body)
    for index in range(n):
        choices = [c for event in events[:-1] for c in event["choices"] if c["index"] == index]
        assert [token for choice in choices for token in choice.get("token_ids", ())] == drawn


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
async def test_every_drawn_token_gives_a_chunk(
    serve: Serve, say: Say, tiny_tokenizer: Tokenizer, path: str
) -> None:
    """Clients measure the time between chunks, so a token whose text is held back has one too."""
    text = "👩‍👩‍👧‍👦 stop"  # many tokens of half a character, and the start of a stop string
    server = await serve(say(text))
    drawn = [*tiny_tokenizer.encode(text).tolist(), 2]
    body = (PROMPT if path == COMPLETIONS else CHAT_BODY) | {"return_token_ids": True, "stop": "stopped"}
    events = await stream(server, path, body)
    choices = [event["choices"][0] for event in events[:-1]]
    assert [choice["token_ids"] for choice in choices if "token_ids" in choice] == [[t] for t in drawn]


async def test_a_stream_that_waits_is_kept_alive(serve: Serve, say: Say) -> None:
    limits = HttpLimits(headers_after_s=0.02, ping_interval_s=0.02)
    server = await serve(say("one two"), limits=limits)
    server.engine.gate.clear()
    # 1. headers and pings come before any token
    async with server.session.post(CHAT, json=CHAT_BODY | {"stream": True}) as response:
        assert response.status == 200
        for _ in range(3):
            assert await response.content.readuntil(b"\n\n") == b": ping\n\n"
        # 2. then the stream, as if there had been none
        server.engine.gate.set()
        text = await response.text()
    events = events_of("".join(f"{e}\n\n" for e in text.split("\n\n")[:-1] if e != ": ping"))
    assert events[0]["choices"][0]["delta"]["role"] == "assistant"
    assert "".join(e["choices"][0]["delta"].get("content", "") for e in events[:-1]) == "one two"
    assert events[-1] == "[DONE]"


async def test_an_error_after_a_ping_is_an_event(serve: Serve, say: Say) -> None:
    limits = HttpLimits(headers_after_s=0.02, ping_interval_s=60)
    server = await serve(say("one"), limits=limits, error=Overloaded("x", retry_after_s=1), error_after=1)
    server.engine.gate.clear()
    server.engine.free_deltas = 0
    async with server.session.post(CHAT, json=CHAT_BODY | {"stream": True}) as response:
        assert await response.content.readuntil(b"\n\n") == b": ping\n\n"
        server.engine.gate.set()
        events = events_of(await response.text())
    assert events[-1]["error"]["code"] == "rate_limit_exceeded"


async def test_a_waiting_client_that_vanishes_is_noticed_by_a_ping(
    serve: Serve, say: Say, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken(StreamWriter):
        async def write(self, *args: object, **kwargs: object) -> None:
            raise ConnectionResetError

    async def prepare(self: web.StreamResponse, request: web.Request) -> StreamWriter:
        return Broken(request.protocol, asyncio.get_running_loop())

    server = await serve(say("one"), limits=HttpLimits(headers_after_s=0.02, ping_interval_s=0.02))
    server.engine.gate.clear()
    with monkeypatch.context() as patch:
        patch.setattr(web.StreamResponse, "prepare", prepare)
        with pytest.raises(aiohttp.ClientError):
            async with server.session.post(COMPLETIONS, json=PROMPT | {"stream": True}) as response:
                await response.read()
        await until_idle(server)
    assert server.engine.num_closed_early == 1


# --- errors -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize(
    ("error", "status", "kind", "code"),
    [
        (Overloaded("queues are full", retry_after_s=1.2), 429, "rate_limit_error", "rate_limit_exceeded"),
        (RequestError("too big", code="x", param="prompt"), 400, "invalid_request_error", "x"),
        (EngineError("/secret/path at 0x7f00"), 500, "server_error", "internal_error"),
        (ValueError("/secret/path"), 500, "server_error", "internal_error"),
    ],
)
async def test_errors_of_the_engine(
    serve: Serve, say: Say, streamed: bool, n: int, error: Exception, status: int, kind: str, code: str
) -> None:
    server = await serve(say("x"), error=error)
    body = PROMPT | {"stream": streamed, "n": n}
    async with server.session.post(COMPLETIONS, json=body) as response:
        answer = await response.json()
        assert response.status == status
        assert response.headers.get("Retry-After") == ("2" if status == 429 else None)
        request_id = response.headers["x-request-id"]
    assert set(answer) == {"error"}
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    assert (answer["error"]["type"], answer["error"]["code"]) == (kind, code)
    if status == 500:
        assert "secret" not in answer["error"]["message"]
        assert request_id in answer["error"]["message"]


@pytest.mark.parametrize("n", [1, 3])
async def test_an_error_in_a_stream_is_its_last_event(serve: Serve, say: Say, n: int) -> None:
    server = await serve(say("one two three four"), error=EngineError("secret"), error_after=2)
    events = await stream(server, CHAT, CHAT_BODY | {"n": n})
    assert events[-1]["error"]["type"] == "server_error"
    assert "secret" not in str(events)
    assert "[DONE]" not in events
    assert not server.engine.active


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 404),
        ("GET", "/v1", 404),
        ("POST", "/v1/embeddings", 404),
        ("GET", "/v1/models/other", 404),
        ("GET", "/v1/completions", 405),
        ("DELETE", "/health", 405),
        ("GET", "/../../etc/passwd", 404),
    ],
)
async def test_unknown_routes_and_methods(
    serve: Serve, say: Say, method: str, path: str, status: int
) -> None:
    server = await serve(say("x"))
    async with server.session.request(method, path) as response:
        assert response.status == status
        assert response.headers["x-request-id"]
        assert (await response.json())["error"]["message"]
        assert ("Allow" in response.headers) == (status == 405)


async def test_too_many_requests(serve: Serve, say: Say) -> None:
    server = await serve(say("x"), limits=HttpLimits(max_requests=2))
    server.engine.gate.clear()
    # 1. two are being served, the third is refused
    tasks = [asyncio.create_task(post(server, COMPLETIONS, PROMPT)) for _ in range(2)]
    while len(server.engine.active) < 2:
        await asyncio.sleep(0.005)
    assert (await post(server, CHAT, CHAT_BODY))[0] == 429
    # 2. once they are done there is room again
    server.engine.gate.set()
    assert [status for status, _ in await asyncio.gather(*tasks)] == [200, 200]
    assert (await post(server, CHAT, CHAT_BODY))[0] == 200


async def test_too_many_bytes_at_a_time(serve: Serve, say: Say) -> None:
    server = await serve(say("x"), limits=HttpLimits(max_body_bytes=1 << 20, max_held_bytes=1 << 20))
    server.engine.gate.clear()
    # 1. one of half the bytes is being served: another is refused, as is one that does not tell its length
    large = PROMPT | {"user": "u" * (1 << 19)}
    task = asyncio.create_task(post(server, COMPLETIONS, large))
    while not server.engine.active:
        await asyncio.sleep(0.005)
    assert (await post(server, COMPLETIONS, large))[0] == 429

    async def of_unknown_length() -> AsyncIterator[bytes]:
        yield b"{}"

    async with server.session.post(COMPLETIONS, data=of_unknown_length(), headers=JSON) as response:
        assert response.status == 429
    # 2. a small one is served beside it, and all when it is done
    server.engine.gate.set()
    assert (await post(server, COMPLETIONS, PROMPT))[0] == 200
    assert (await task)[0] == 200
    assert (await post(server, COMPLETIONS, large))[0] == 200


async def test_all_choices_are_admitted_or_none(serve: Serve, say: Say) -> None:
    server = await serve(say("x"), room=3)
    for streamed in (False, True):
        async with server.session.post(COMPLETIONS, json=PROMPT | {"n": 4, "stream": streamed}) as response:
            assert response.status == 429
    assert not server.engine.requests
    assert (await post(server, COMPLETIONS, PROMPT | {"n": 3}))[0] == 200


async def test_bad_bodies(serve: Serve, say: Say, caplog: pytest.LogCaptureFixture) -> None:
    server = await serve(say("x"), limits=HttpLimits(max_body_bytes=1 << 20))
    for data, headers, status in [
        (b"nonsense", JSON, 400),
        (b"[]", JSON, 400),
        (b"", JSON, 400),
        (json.dumps(PROMPT).encode(), {"content-type": "text/plain"}, 415),
        (json.dumps(PROMPT).encode(), {"content-type": "application/x-www-form-urlencoded"}, 415),
        (b"garbage", JSON | {"content-encoding": "gzip"}, 400),
        (gzip.compress(json.dumps(PROMPT).encode())[:20], JSON | {"content-encoding": "gzip"}, 400),
        (gzip.compress(b" " * (20 << 20)), JSON | {"content-encoding": "gzip"}, 413),
        (b"garbage", JSON | {"content-encoding": "br"}, 400),
        (b"garbage", JSON | {"content-encoding": "zstd"}, 400),
        (io.BytesIO(b" " * (20 << 20)), JSON, 413),
    ]:
        async with server.session.post(COMPLETIONS, data=data, headers=headers) as response:
            assert (response.status, data) == (status, data)
            assert "error" in await response.json()
    assert not caplog.records, "a client can fill the log"
    async with server.session.post(
        COMPLETIONS,
        data=gzip.compress(json.dumps(PROMPT).encode()),
        headers=JSON | {"content-encoding": "gzip"},
    ) as response:
        assert response.status == 200


async def test_a_body_that_never_comes(serve: Serve, say: Say) -> None:
    server = await serve(say("x"), limits=HttpLimits(body_timeout_s=0.05))
    port = int(server.url.split(":")[2].split("/")[0])
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: 100\r\n\r\n{{".encode())
    assert b" 408 " in await reader.readline()
    writer.close()
    await writer.wait_closed()


async def test_request_ids(serve: Serve, say: Say) -> None:
    server = await serve(say("x"))
    for sent, kept in [
        ("my-id_1", True),
        ("x" * 128, True),
        ("x" * 129, False),
        ("a b", False),
        ("é", False),
    ]:
        async with server.session.get("/v1/models", headers={"x-request-id": sent}) as response:
            assert (response.headers["x-request-id"] == sent) == kept
    # the engine's own ids begin with it, but differ however often a client repeats it
    for path, body in [(COMPLETIONS, PROMPT | {"n": 2}), (CHAT, CHAT_BODY), (COMPLETIONS, PROMPT)]:
        async with server.session.post(path, json=body, headers={"x-request-id": "same"}) as response:
            assert response.headers["x-request-id"] == "same"
            assert (await response.json())["id"] == ("chatcmpl-same" if path == CHAT else "cmpl-same")
    ids = [request.request_id for request in server.engine.requests]
    assert len(set(ids)) == 4
    assert all(request_id.startswith("same.") for request_id in ids)
    # one that the server chose is in all three places too
    _, answer = await post(server, COMPLETIONS, PROMPT)
    assert server.engine.requests[-1].request_id.startswith(answer["id"].removeprefix("cmpl-"))


# --- the other routes --------------------------------------------------------------------------------------


async def test_models(serve: Serve, say: Say) -> None:
    server = await serve(say("x"))
    row = {"id": "tiny", "object": "model", "created": 1, "owned_by": "memserve", "max_model_len": 256}
    async with server.session.get("/v1/models") as response:
        assert await response.json() == {"object": "list", "data": [row]}
    async with server.session.get("/v1/models/tiny") as response:
        assert await response.json() == row


async def test_health(serve: Serve, say: Say) -> None:
    server = await serve(say("x"))
    async with server.session.get("/health") as response:
        assert response.status == 200
        body = await response.json()
    assert body["status"] == "ok"
    assert body["instances"][0]["instance"] == "prefill-0"
    server.engine.is_ready = False
    async with server.session.get("/health") as response:
        assert response.status == 503


async def test_metrics(serve: Serve, say: Say) -> None:
    server = await serve(say("one two"))
    await post(server, COMPLETIONS, PROMPT)
    await post(server, "/v1/nothing", {})
    async with server.session.get("/metrics") as response:
        assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
        lines = (await response.text()).splitlines()
    assert 'memserve_http_requests_total{endpoint="/v1/completions",status="200"} 1.0' in lines
    assert 'memserve_http_requests_total{endpoint="other",status="404"} 1.0' in lines
    assert "memserve_completion_tokens_total 3.0" in lines


# --- clients that leave ------------------------------------------------------------------------------------


async def until_idle(server: Any) -> None:
    while server.engine.active:
        await asyncio.sleep(0.005)


@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("num_deltas", [0, 2])
async def test_a_client_that_leaves_cancels_everything(
    serve: Serve, say: Say, n: int, streamed: bool, num_deltas: int
) -> None:
    server = await serve(say("word " * 20), free_deltas=num_deltas)
    server.engine.gate.clear()
    # 1. the request is running and waits for its next token
    async with aiohttp.ClientSession(server.url.removesuffix("/v1")) as session:

        async def ask() -> None:
            async with session.post(COMPLETIONS, json=PROMPT | {"n": n, "stream": streamed}) as response:
                await response.content.readuntil(b"\n\n")
                first_event.set()
                await response.read()

        first_event = asyncio.Event()
        task = asyncio.create_task(ask())
        while len(server.engine.active) < n:
            await asyncio.sleep(0.005)
        if streamed and num_deltas:
            await first_event.wait()
        # 2. the client goes
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    # 3. so does everything that was run for it
    await until_idle(server)
    assert server.engine.num_closed_early == n
    # 4. and others are served
    server.engine.gate.set()
    status, _ = await post(server, COMPLETIONS, PROMPT)
    assert status == 200


async def open_stream(server: Any) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A raw connection with a small window, on which a stream was asked for and nothing is read."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.setblocking(False)
    port = int(server.url.split(":")[2].split("/")[0])
    await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", port))
    reader, writer = await asyncio.open_connection(sock=sock, limit=1024)
    body = json.dumps(PROMPT | {"stream": True}).encode()
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    return reader, writer


async def test_a_client_that_never_reads_holds_up_nobody_and_is_dropped(
    serve: Serve, tiny_tokenizer: Tokenizer
) -> None:
    longest = max(
        range(tiny_tokenizer.vocab_size), key=lambda token_id: len(tiny_tokenizer.token_bytes(token_id))
    )

    def reply(request: GenerateRequest) -> list[Delta]:
        if request.sampling.max_tokens == 3:
            return make_deltas(request, [300, 301, 302])
        return [Delta((longest,) * 1000)] * 1000

    server = await serve(reply, limits=HttpLimits(write_timeout_s=1.0), free_deltas=999)
    server.engine.gate.clear()
    # 1. a client takes nothing of a long stream, until the router holds no more for it
    _, writer = await open_stream(server)
    while not any(connection.writing_paused for connection in server.http.connections):
        await asyncio.sleep(0.005)
    # 2. others are served
    for _ in range(3):
        events = await stream(server, COMPLETIONS, PROMPT | {"max_tokens": 3})
        assert events[-1] == "[DONE]"
    (stuck,) = [connection for connection in server.http.connections if connection.writing_paused]
    assert stuck.transport.get_write_buffer_size() < 64 * 1024 + 16 * 1000 * len(
        tiny_tokenizer.token_bytes(longest)
    )
    # 3. in the end it is cut off, and its sequence cancelled
    await until_idle(server)
    assert server.engine.num_closed_early == 1
    writer.close()
    await asyncio.gather(writer.wait_closed(), return_exceptions=True)


# --- cancelling by id -------------------------------------------------------------------------------------


async def cancel(server: Any, name: str) -> tuple[int, Any]:
    return await post(server, f"/v1/requests/{quote(name, safe='')}/cancel", {})


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("num_deltas", [0, 2])
async def test_cancel_by_id_answers_what_there_is(
    serve: Serve, say: Say, n: int, streamed: bool, num_deltas: int
) -> None:
    server = await serve(say("one two three four"), free_deltas=num_deltas)
    server.engine.gate.clear()
    body = PROMPT | {"n": n, "stream": streamed}
    headers = {"x-request-id": "mine/1"}
    asking = asyncio.create_task(server.session.post(COMPLETIONS, json=body, headers=headers))
    # 1. it runs, and waits for its next token
    while len(server.engine.active) < n:
        await asyncio.sleep(0.005)
    for _ in range(20):
        await asyncio.sleep(0)
    # 2. cancelled by either id, twice
    assert (await cancel(server, "mine/1"))[0] == 200
    assert (await cancel(server, "cmpl-mine/1"))[0] in (200, 404)  # it may be answered already
    # 3. nothing runs for it any more, and the client has what there is
    await until_idle(server)
    assert server.engine.num_closed_early == n
    async with await asking as response:
        assert response.status == 200
        if streamed:
            events = events_of(await response.text())
            assert events.pop() == "[DONE]"
            choices = [choice for event in events for choice in event["choices"]]
        else:
            choices = (await response.json())["choices"]
    ends = [choice["finish_reason"] for choice in choices if choice["finish_reason"]]
    assert ends == ["abort"] * n
    assert any(choice["text"] for choice in choices) == bool(num_deltas)
    # 4. later it is unknown
    status, answer = await cancel(server, "mine/1")
    assert (status, answer["error"]["code"]) == (404, "request_not_found")


async def test_cancel_before_the_body_is_there(serve: Serve, say: Say) -> None:
    server = await serve(say("one"))
    arrive = asyncio.Event()

    async def body() -> AsyncIterator[bytes]:
        yield b" "
        await arrive.wait()
        yield json.dumps(PROMPT).encode()

    headers = JSON | {"x-request-id": "early"}
    asking = asyncio.create_task(server.session.post(COMPLETIONS, data=body(), headers=headers))
    while (await cancel(server, "early"))[0] == 404:
        await asyncio.sleep(0.005)
    arrive.set()
    async with await asking as response:
        answer = await response.json()
    assert answer["choices"][0]["finish_reason"] == "abort"
    assert not server.engine.requests


async def test_cancel_means_all_of_the_same_id_and_nobody_else(serve: Serve, say: Say) -> None:
    server = await serve(say("one two"), free_deltas=0)
    server.engine.gate.clear()
    tasks = [
        asyncio.create_task(server.session.post(COMPLETIONS, json=PROMPT, headers={"x-request-id": name}))
        for name in ("same", "same", "other")
    ]
    while len(server.engine.active) < 3:
        await asyncio.sleep(0.005)
    assert (await cancel(server, "same")) == (200, {"id": "same", "object": "request", "status": "cancelled"})
    server.engine.gate.set()
    answers = [await response.json() for response in await asyncio.gather(*tasks)]
    assert [a["choices"][0]["finish_reason"] for a in answers] == ["abort", "abort", "stop"]


# --- what is refused before it is a request ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"nonsense\r\n\r\n", 400),
        (b"GET / HTTP/9\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: x\r\nX-Long: " + b"x" * 10000 + b"\r\n\r\n", 431),
        (b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: x\r\nbad header\r\n\r\n", 400),
    ],
)
async def test_bytes_that_are_no_request(
    serve: Serve, say: Say, caplog: pytest.LogCaptureFixture, data: bytes, status: int
) -> None:
    server = await serve(say("x"))
    caplog.set_level("INFO")
    port = int(server.url.split(":")[2].split("/")[0])
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(data)
    head, _, body = (await reader.read()).partition(b"\r\n\r\n")
    writer.close()
    assert int(head.split()[1]) == status
    assert b"application/json" in head and b"x-request-id" in head.lower()
    error = json.loads(body)["error"]
    assert error["type"] == "invalid_request_error"
    assert "nonsense" not in error["message"] and "xxx" not in error["message"]
    (record,) = caplog.records
    assert record.exc_info is None and "\n" not in record.getMessage()


async def test_what_cannot_be_expected_is_refused(
    serve: Serve, say: Say, caplog: pytest.LogCaptureFixture
) -> None:
    server = await serve(say("x"))
    headers = {"Expect": "more", "x-request-id": "mine"}
    async with server.session.post("/v1/completions", headers=headers, data=b"{}") as response:
        assert response.status == 417 and response.headers["x-request-id"] == "mine"
    assert not caplog.records


async def test_a_full_queue_is_told_before_the_prompt_is_looked_at(
    serve: Serve, say: Say, monkeypatch: pytest.MonkeyPatch, tiny_tokenizer: Tokenizer
) -> None:
    def untouched(*args: object, **kwargs: object) -> None:
        raise AssertionError("work was done")

    server = await serve(say("x"), room=0)
    monkeypatch.setattr(type(tiny_tokenizer), "encode", untouched)
    for path, body in ((COMPLETIONS, PROMPT), (CHAT, CHAT_BODY), (COMPLETIONS, {"not": "valid"})):
        async with server.session.post(path, json=body) as response:
            assert response.status == 429
            assert int(response.headers["Retry-After"]) >= 1
            assert (await response.json())["error"]["code"] == "rate_limit_exceeded"
    assert not server.engine.requests


async def test_workers(serve: Serve, say: Say) -> None:
    server = await serve(say("x"))
    async with server.session.get("/v1/workers") as response:
        assert response.status == 200
        body = await response.json()
    assert body["object"] == "list"
    first, second = body["data"]
    load = first.pop("load")
    assert first == {
        "id": "prefill-0",
        "object": "worker",
        "role": "prefill",
        "state": "ready",
        "incarnation": 1,
        "restarts": 0,
        "pulls_from": {"decode-0": "shm"},
        "block_bytes": 1024,
        "max_host_blocks": 64,
    }
    assert (load["running"], load["free_blocks"], load["active_blocks"], load["offers"]) == (3, 7, 2, 1)
    assert (second["id"], second["state"]) == ("decode-0", "starting")


async def test_cached_tokens_by_source_are_in_a_header(serve: Serve, say: Say) -> None:
    server = await serve(say("hi"))
    for stream_it in (False, True):
        for path, body in ((COMPLETIONS, PROMPT), (CHAT, CHAT_BODY)):
            async with server.session.post(path, json={**body, "stream": stream_it}) as response:
                assert response.headers["x-memserve-cached"] == "device=1, host=0, pulled=0"
                await response.read()


async def test_where_a_request_goes_can_be_asked_for_and_is_told(serve: Serve, say: Say) -> None:
    server = await serve(say("hi"))
    headers = {"x-session-id": "me", "x-memserve-policy": "session", "x-request-id": "mine"}
    async with server.session.post(COMPLETIONS, json=PROMPT, headers=headers) as response:
        assert response.status == 200 and "x-memserve-policy" not in response.headers  # nothing was decided
    (request,) = server.engine.requests
    assert (request.session, request.policy) == ("me", "session")
    status, _ = await post(server, COMPLETIONS, {**PROMPT, "session_id": "body"})
    assert server.engine.requests[-1].session == "body" and server.engine.requests[-1].policy is None
    for bad in ({"x-memserve-policy": "best"}, {"x-session-id": "x" * 257}):
        async with server.session.post(COMPLETIONS, json=PROMPT, headers=bad) as response:
            assert response.status == 400 and list(bad)[0] in (await response.json())["error"]["message"]
    # the whole story of a request, under the id of its answer or of the request
    row = PrefillRow("prefill-0", 9.0, 1.0, 8.0, 0.0, 0.0, 16, 0, 0, None)
    other = row._replace(instance="prefill-1", total_ms=20.0)
    decision = Decision("session", Placement("prefill-0", "decode-0"), row, None, [row, other], [])
    log = server.engine.log
    log.submitted("mine.1-0", 5, now=100.0)
    log.placed("mine.1-0", decision, now=100.001)
    log.first_token("mine.1-0", CachedTokens(16), 100.012, 5.0)
    for name in ("mine", "mine.1-0", "cmpl-mine", "chatcmpl-mine"):
        async with server.session.get(f"/v1/requests/{name}") as response:
            (choice,) = (await response.json())["choices"]
    assert choice["cached_tokens"] == {"device": 16, "host": 0, "pulled": 0, "pulled_from": None}
    assert choice["ttft_ms"] == 11.0
    assert [event["at_ms"] for event in choice["timeline"]] == [0.0, 1.0, 7.0, 12.0]
    assert [event["event"] for event in choice["timeline"]] == [
        "submitted",
        "placed",
        "computing",
        "first_token",
    ]
    (told,) = choice["decisions"]
    assert (told["prefill"], told["decode"], told["predicted_ttft_ms"]) == ("prefill-0", "decode-0", 9.0)
    assert [each["chosen"] for each in told["prefill_candidates"]] == [True, False]
    # a decode worker that does all of it is named on both sides, as in the headers
    alone = row._replace(instance="decode-0")
    log.submitted("alone.1-0", 5, now=100.0)
    log.placed("alone.1-0", Decision("session", Placement(None, "decode-0"), alone, None, [alone], []), 100.0)
    async with server.session.get("/v1/requests/alone") as response:
        ((both,),) = [choice["decisions"] for choice in (await response.json())["choices"]]
    assert (both["prefill"], both["decode"]) == ("decode-0", "decode-0")
    assert decision_headers(log.get("mine.1-0")) == {
        "x-memserve-policy": "session",
        "x-memserve-prefill": "prefill-0",
        "x-memserve-decode": "decode-0",
        "x-memserve-predicted-ttft-ms": "9.0",
    }
    async with server.session.get("/v1/requests/nobody") as response:
        assert response.status == 404


async def test_the_last_requests_are_listed(serve: Serve, say: Say) -> None:
    server = await serve(say("hi"))
    row = PrefillRow("prefill-0", 9.0, 1.0, 8.0, 0.0, 0.0, 16, 4, 0, None)
    decision = Decision("prompt-tree", Placement("prefill-0", "decode-0"), row, None, [row], [])
    alone = Decision("prompt-tree", Placement(None, "decode-0"), row, None, [row], [])
    log = server.engine.log
    for name in ("ended-1", "ended-2", "ended-3", "runs"):
        log.submitted(name, 30, now=100.0)
    for name in ("ended-1", "ended-2", "ended-3"):
        log.note(name, 100.5, Happening.FINISHED, "stop")
    log.placed("runs", decision, now=100.001)
    log.first_token("runs", CachedTokens(16, 0, 8, "prefill-1"), now=100.012)
    log.submitted("waits", 5, now=100.75)
    log.submitted("alone", 5, now=100.8)
    log.placed("alone", alone, now=100.8)
    # the newest first: 2 of those that have ended, all that go on
    async with server.session.get("/v1/requests?limit=3") as response:
        assert response.status == 200
        body = await response.json()
    assert body["object"] == "list"
    names = ["alone", "waits", "runs", "ended-3", "ended-2", "ended-1"]
    assert [row["id"] for row in body["data"]] == names
    async with server.session.get("/v1/requests?limit=2") as response:
        names = [row["id"] for row in (await response.json())["data"]]
    assert names == ["alone", "waits", "ended-3", "ended-2"]
    rows = {row["id"]: row for row in body["data"]}
    assert rows["runs"] == {
        "id": "runs",
        "state": "decoding",
        "prompt_tokens": 30,
        "age_ms": 1000.0,
        "duration_ms": None,
        "attempts": 1,
        "policy": "prompt-tree",
        "prefill": "prefill-0",
        "decode": "decode-0",
        "expected_cached_tokens": 20,
        "cached_tokens": {"device": 16, "host": 0, "pulled": 8, "pulled_from": "prefill-1"},
        "predicted_ttft_ms": 9.0,
        "ttft_ms": 11.0,
    }
    assert (rows["ended-1"]["state"], rows["ended-1"]["duration_ms"]) == ("finished", 500.0)
    assert rows["waits"]["state"] == "waiting"
    assert [rows["waits"][key] for key in ("policy", "prefill", "decode", "predicted_ttft_ms")] == [None] * 4
    assert (rows["alone"]["state"], rows["alone"]["prefill"]) == ("prefilling", "decode-0")
    for bad in ("0", "1001", "-1", "x", "1e3", "", "9" * 5000, "%C2%B2"):
        async with server.session.get(f"/v1/requests?limit={bad}") as response:
            assert response.status == 400, bad
