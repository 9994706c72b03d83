"""Every parameter of a request, through real processes: disaggregated says what colocated says.

What a parameter needs has to survive the hand-off: the first token is drawn by one worker, the others by
another.
"""

from __future__ import annotations

import asyncio
import json
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.server_process import Server

OPTIONS = ("--dtype", "float32", "--max-model-len", "1024")
IDS = [5, 70, 901, 12, 5, 70, 901, 12, 5, 70, 33, 2047, 8, 5, 70, 901, 12, 5]
SAMPLED = {"temperature": 1.0, "seed": 3}
# Forty tokens of which the same few win, unless something is held against their being there already
RIVALS = {"temperature": 0, "logit_bias": {str(token_id): 100 for token_id in range(100, 140)}}

BOTH: dict[str, dict[str, Any]] = {
    "defaults and seed": {"seed": 11},
    "greedy": {"temperature": 0},
    "temperature": {"temperature": 1.7, "seed": 4},
    "top_p": SAMPLED | {"top_p": 0.5},
    "top_p 0": SAMPLED | {"top_p": 0},
    "top_k": SAMPLED | {"top_k": 5},
    "top_k -1": SAMPLED | {"top_k": -1},
    "min_p": SAMPLED | {"min_p": 0.1},
    "all filters": SAMPLED | {"top_p": 0.9, "top_k": 50, "min_p": 0.01, "temperature": 0.7},
    "repetition_penalty": RIVALS | {"repetition_penalty": 1.5},
    "presence_penalty": RIVALS | {"presence_penalty": 2},
    "frequency_penalty": RIVALS | {"frequency_penalty": 2},
    "penalties, sampled": SAMPLED
    | {"repetition_penalty": 1.2, "presence_penalty": 0.5, "frequency_penalty": -0.5},
    "logit_bias": {"temperature": 0, "logit_bias": {"100": 100}},
    "logit_bias, sampled": SAMPLED | {"logit_bias": {"100": 5, "101": 5, "102": -100}},
    "seed": {"temperature": 1, "seed": 123456789},
    "negative seed": {"temperature": 1, "seed": -5},
    "stop strings": SAMPLED | {"stop": [" ", "e", "a", "o"]},
    "one stop string": SAMPLED | {"stop": "e", "max_tokens": 64},
    "stop_token_ids": {"temperature": 0, "logit_bias": {"100": 100}, "stop_token_ids": [100]},
    "min_tokens": {"temperature": 0, "logit_bias": {"100": 100}, "stop_token_ids": [100], "min_tokens": 5},
    "min_tokens before a stop string": SAMPLED | {"stop": ["e", "a", " "], "min_tokens": 9},
    "eos": SAMPLED | {"logit_bias": {"1": 9}, "max_tokens": 64},
    "ignore_eos": SAMPLED | {"logit_bias": {"1": 9}, "ignore_eos": True},
    "eos at the first token": {"temperature": 0, "logit_bias": {"1": 100}},
    "max_tokens 1": SAMPLED | {"max_tokens": 1},
    "max_tokens 2": SAMPLED | {"max_tokens": 2},
    "n": SAMPLED | {"n": 4},
    "skip_special_tokens": SAMPLED
    | {"logit_bias": {"1": 9}, "ignore_eos": True, "skip_special_tokens": False},
    "add_special_tokens": SAMPLED | {"add_special_tokens": False},
    "cache_salt": SAMPLED | {"cache_salt": "mine"},
}
COMPLETIONS: dict[str, dict[str, Any]] = {
    "text": SAMPLED | {"prompt": "def main():"},
    "texts and n": SAMPLED | {"prompt": ["def main():", "import os", "é👋"], "n": 2},
    "lists of ids": SAMPLED | {"prompt": [IDS, IDS[:1], IDS[3:9]]},
    "logprobs 0": SAMPLED | {"logprobs": 0},
    "logprobs": SAMPLED | {"logprobs": 5},
    "logprobs 20, penalised": SAMPLED | {"logprobs": 20, "repetition_penalty": 1.5},
    "echo": SAMPLED | {"echo": True},
    "echo of text": SAMPLED | {"echo": True, "prompt": "def main():"},
    "prompt logprobs": {"echo": True, "logprobs": 3, "temperature": 0},
    "prompt logprobs alone": {"echo": True, "logprobs": 1, "max_tokens": 0},
    "prompt logprobs as evaluations ask": {
        "prompt": [IDS, IDS[::-1], IDS[:2]],
        "echo": True,
        "logprobs": 1,
        "max_tokens": 1,
        "temperature": 0,
    },
    "prompt logprobs of a long prompt": {"prompt": IDS * 40, "echo": True, "logprobs": 20, "temperature": 0},
    "best_of": SAMPLED | {"best_of": 1},
}
CHATS: dict[str, dict[str, Any]] = {
    "logprobs": SAMPLED | {"logprobs": True},
    "top_logprobs": SAMPLED | {"logprobs": True, "top_logprobs": 20},
    "max_completion_tokens": SAMPLED | {"max_completion_tokens": 3},
    "add_generation_prompt": SAMPLED | {"add_generation_prompt": False},
    "conversation": SAMPLED
    | {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
            {"role": "assistant", "content": "Hello"},
            {"role": "user", "content": "And now?"},
        ]
    },
}
CASES = [("/v1/completions", name, fields) for name, fields in {**BOTH, **COMPLETIONS}.items()]
CASES += [("/v1/chat/completions", name, fields) for name, fields in {**BOTH, **CHATS}.items()]


@pytest.fixture(scope="module")
def disaggregated(start: Callable[..., Server], random_model: Path) -> Server:
    return start("--model", str(random_model), "--prefill", "1", "--decode", "1", *OPTIONS)


@pytest.fixture(scope="module")
def colocated(start: Callable[..., Server], random_model: Path) -> Server:
    return start("--model", str(random_model), "--colocated", "1", *OPTIONS)


def body_of(path: str, fields: dict[str, Any]) -> dict[str, Any]:
    base: dict[str, Any] = {"max_tokens": 12, "return_token_ids": True}
    if path == "/v1/completions":
        return base | {"prompt": IDS} | fields
    return base | {"messages": [{"role": "user", "content": "Hello"}]} | fields


def whole(server: Server, path: str, body: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    status, answer = server.post(path, body)
    assert status == 200, answer
    usage: dict[str, Any] = answer["usage"]  # type: ignore[assignment]
    return answer["choices"], usage  # type: ignore[return-value]


def streamed(server: Server, path: str, body: dict[str, Any]) -> tuple[dict[int, Any], dict[str, Any]]:
    """By choice: text, token ids and reason joined from all chunks; and the usage."""
    body = body | {"stream": True, "stream_options": {"include_usage": True}}
    request = urllib.request.Request(
        server.url + path, json.dumps(body).encode(), {"content-type": "application/json"}
    )
    choices: dict[int, Any] = {}
    usage: dict[str, Any] = {}
    with urllib.request.urlopen(request, timeout=60) as answer:
        for line in answer:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            usage = event["usage"] or usage
            for choice in event["choices"]:
                text, ids, _ = choices.get(choice["index"], ("", [], None))
                text += choice["text"] if "text" in choice else choice["delta"].get("content", "")
                ids = ids + choice.get("token_ids", [])
                choices[choice["index"]] = (text, ids, choice["finish_reason"])
    return choices, usage


def near(ours: object, theirs: object, path: str = "") -> None:
    """Equal, but for the last digits of numbers that are computed in another batch."""
    if isinstance(ours, float) and isinstance(theirs, float):
        assert ours == pytest.approx(theirs, abs=1e-4), path
    elif isinstance(ours, dict) and isinstance(theirs, dict):
        assert ours.keys() == theirs.keys(), path
        for key in ours:
            near(ours[key], theirs[key], f"{path}.{key}")
    elif isinstance(ours, list) and isinstance(theirs, list):
        assert len(ours) == len(theirs), path
        for i, pair in enumerate(zip(ours, theirs, strict=True)):
            near(*pair, f"{path}[{i}]")
    else:
        assert ours == theirs, path


@pytest.mark.parametrize(("path", "name", "fields"), CASES, ids=lambda value: str(value)[:40])
def test_the_same_answer(
    disaggregated: Server, colocated: Server, path: str, name: str, fields: dict[str, Any]
) -> None:
    body = body_of(path, fields)
    # 1. whole, by one worker and by two
    expected, usage = whole(colocated, path, body)
    choices, usage_of_two = whole(disaggregated, path, body)
    near(choices, expected)
    assert usage_of_two["completion_tokens"] == usage["completion_tokens"]
    assert usage_of_two["prompt_tokens"] == usage["prompt_tokens"]
    assert {choice["finish_reason"] for choice in choices} <= {"stop", "length"}
    # 2. streamed
    pieces, usage_of_stream = streamed(disaggregated, path, body)
    assert usage_of_stream["completion_tokens"] == usage["completion_tokens"]
    assert len(pieces) == len(expected)
    for choice in expected:
        text = choice["text"] if "text" in choice else choice["message"]["content"]
        assert pieces[choice["index"]] == (text, choice.get("token_ids", []), choice["finish_reason"])


def test_the_cases_do_what_they_are_named_after(disaggregated: Server) -> None:
    """A parameter that did nothing would be equal everywhere too."""

    def ask(name: str, **more: object) -> dict[str, Any]:
        fields = {**BOTH, **COMPLETIONS}[name] | more
        return dict(whole(disaggregated, "/v1/completions", body_of("/v1/completions", fields))[0][0])

    greedy = ask("greedy")["token_ids"]
    assert ask("logit_bias")["token_ids"] == [100] * 12
    for name, neutral in (("repetition_penalty", 1), ("presence_penalty", 0), ("frequency_penalty", 0)):
        assert ask(name)["token_ids"] != ask(name, **{name: neutral})["token_ids"], name
    assert ask("top_k", top_k=1)["token_ids"] == ask("top_p 0")["token_ids"] == greedy
    assert ask("min_p", min_p=1)["token_ids"] == greedy
    assert ask("temperature")["token_ids"] != ask("temperature", seed=5)["token_ids"]
    assert ask("stop_token_ids")["token_ids"] == [100]
    assert len(ask("min_tokens")["token_ids"]) > 5
    assert ask("min_tokens")["token_ids"][5] == 100
    assert ask("eos at the first token")["finish_reason"] == "stop"
    assert len(ask("eos")["token_ids"]) < 64
    assert ask("one stop string")["finish_reason"] == "stop"
    assert len(ask("prompt logprobs")["logprobs"]["tokens"]) == len(IDS) + 12


def test_openais_own_client(disaggregated: Server) -> None:
    openai = pytest.importorskip("openai")
    messages = [{"role": "user", "content": "Hello"}]

    async def ask() -> None:
        url = f"{disaggregated.url}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
            model = (await client.models.list()).data[0].id
            chat = {"model": model, "messages": messages, "max_tokens": 24, "seed": 9, "logprobs": True}
            whole = await client.chat.completions.create(**chat)
            async with client.chat.completions.stream(**chat) as stream:
                async for _ in stream:
                    pass
                final = stream.current_completion_snapshot
            assert final.choices[0].message.content == whole.choices[0].message.content
            assert final.choices[0].finish_reason == whole.choices[0].finish_reason
            tokens = [token.token for token in final.choices[0].logprobs.content]
            assert tokens == [token.token for token in whole.choices[0].logprobs.content]
            completion = {"model": model, "prompt": "def", "max_tokens": 24, "seed": 9}
            text = (await client.completions.create(**completion)).choices[0].text
            chunks = [chunk async for chunk in await client.completions.create(**completion, stream=True)]
            assert "".join(chunk.choices[0].text for chunk in chunks) == text
            with pytest.raises(openai.BadRequestError, match="maximum context length"):
                await client.completions.create(model=model, prompt=IDS, max_tokens=5000)

    asyncio.run(ask())


def test_nothing_of_it_stays(disaggregated: Server, colocated: Server) -> None:
    for server in (disaggregated, colocated):
        server.wait_idle()
    assert disaggregated.gauges()["memserve_pull_failures_total"] == 0
