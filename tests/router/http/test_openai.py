"""Through OpenAI's own client: every answer parses, streamed and whole, sync and async."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest

from memserve.errors import EngineError, Overloaded
from memserve.router.engine_api import Delta, GenerateRequest

openai = pytest.importorskip("openai")

Reply = Callable[[GenerateRequest], Sequence[Delta]]
Say = Callable[[str], Reply]
Serve = Callable[..., Awaitable[Any]]

TEXT = "Hello 👩‍👩‍👧‍👦, über alles"
MESSAGES = [{"role": "user", "content": "hi"}]


async def test_async_chat(serve: Serve, say: Say) -> None:
    server = await serve(say(TEXT))
    async with openai.AsyncOpenAI(base_url=server.url, api_key="none", max_retries=0) as client:
        whole = await client.chat.completions.create(
            model="tiny", messages=MESSAGES, logprobs=True, top_logprobs=3, n=2, seed=7
        )
        assert [choice.message.content for choice in whole.choices] == [TEXT, TEXT]
        assert whole.usage.prompt_tokens_details.cached_tokens == 1
        content = whole.choices[0].logprobs.content
        assert len(content) == whole.usage.completion_tokens // 2
        stream = await client.chat.completions.create(
            model="tiny", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
        assert "".join(c.delta.content or "" for chunk in chunks for c in chunk.choices) == TEXT
        assert chunks[0].choices[0].delta.role == "assistant"
        assert chunks[-2].choices[0].finish_reason == "stop"
        assert chunks[-1].usage.completion_tokens == len(content)


async def test_the_clients_own_accumulator(serve: Serve, say: Say) -> None:
    server = await serve(say(TEXT))
    async with (
        openai.AsyncOpenAI(base_url=server.url, api_key="none", max_retries=0) as client,
        client.chat.completions.stream(model="tiny", messages=MESSAGES, logprobs=True) as stream,
    ):
        async for _ in stream:
            pass
        final = await stream.get_final_completion()
    assert final.choices[0].message.content == TEXT
    tokens = b"".join(bytes(token.bytes) for token in final.choices[0].logprobs.content)
    assert tokens.decode().startswith(TEXT)


async def test_async_completions(serve: Serve, say: Say) -> None:
    server = await serve(say(TEXT))
    async with openai.AsyncOpenAI(base_url=server.url, api_key="none", max_retries=0) as client:
        whole = await client.completions.create(
            model="tiny", prompt=["a", "b"], max_tokens=64, logprobs=2, echo=True
        )
        assert [choice.text for choice in whole.choices] == ["a" + TEXT, "b" + TEXT]
        assert whole.choices[0].logprobs.text_offset[0] == 0
        stream = await client.completions.create(model="tiny", prompt="a", max_tokens=64, n=3, stream=True)
        texts = ["", "", ""]
        async for chunk in stream:
            for choice in chunk.choices:
                texts[choice.index] += choice.text
        assert texts == [TEXT] * 3


async def test_sync(serve: Serve, say: Say) -> None:
    server = await serve(say(TEXT))

    def use() -> None:
        with openai.OpenAI(base_url=server.url, api_key="none", max_retries=0) as client:
            assert [model.id for model in client.models.list()] == ["tiny"]
            assert client.models.retrieve("tiny").created == 1
            whole = client.chat.completions.create(model="tiny", messages=MESSAGES, stop=["über"])
            assert whole.choices[0].message.content == TEXT[: TEXT.index("über")]
            chunks = list(client.chat.completions.create(model="tiny", messages=MESSAGES, stream=True))
            assert "".join(c.delta.content or "" for chunk in chunks for c in chunk.choices) == TEXT
            completion = client.completions.create(
                model="tiny", prompt=[5, 6], max_tokens=64, extra_body={"top_k": 5, "min_p": 0.1}
            )
            assert completion.choices[0].text == TEXT

    await asyncio.to_thread(use)
    assert server.engine.requests[-1].sampling.top_k == 5


async def test_errors_are_the_clients_exceptions(serve: Serve, say: Say) -> None:
    server = await serve(say(TEXT))
    async with openai.AsyncOpenAI(base_url=server.url, api_key="none", max_retries=0) as client:
        with pytest.raises(openai.NotFoundError) as missing:
            await client.chat.completions.create(model="other", messages=MESSAGES)
        assert missing.value.code == "model_not_found"
        with pytest.raises(openai.BadRequestError) as too_long:
            await client.completions.create(model="tiny", prompt="word " * 400)
        assert too_long.value.code == "context_length_exceeded"
        with pytest.raises(openai.BadRequestError):
            await client.chat.completions.create(model="tiny", messages=MESSAGES, temperature=-1)
        server.engine.error = Overloaded("full", retry_after_s=0.1)
        with pytest.raises(openai.RateLimitError):
            await client.chat.completions.create(model="tiny", messages=MESSAGES)
        server.engine.error = RuntimeError("broken")
        with pytest.raises(openai.InternalServerError):
            await client.chat.completions.create(model="tiny", messages=MESSAGES)
        server.engine.error, server.engine.error_after = EngineError("broken"), 3
        stream = await client.chat.completions.create(model="tiny", messages=MESSAGES, stream=True)
        with pytest.raises(openai.APIError):
            async for _ in stream:
                pass


async def test_closing_a_stream_frees_the_request(serve: Serve, say: Say) -> None:
    server = await serve(say(TEXT), free_deltas=3)
    server.engine.gate.clear()
    async with openai.AsyncOpenAI(base_url=server.url, api_key="none", max_retries=0) as client:
        stream = await client.chat.completions.create(model="tiny", messages=MESSAGES, stream=True)
        async for _ in stream:
            break
        await stream.close()
        while server.engine.active:
            await asyncio.sleep(0.005)
