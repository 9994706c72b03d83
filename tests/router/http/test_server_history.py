"""Chat history keeps its tokens, through HTTP: which ids reach the engine when an answer comes back."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import pytest

from memserve.router.engine_api import Delta, GenerateRequest
from memserve.router.http import generation
from memserve.router.http.served_model import ServedModel
from memserve.router.text.token_history import TokenHistory
from memserve.router.text.tokenizer import Tokenizer
from tests.router.conftest import EOS, make_deltas

Reply = Callable[[GenerateRequest], Sequence[Delta]]
Serve = Callable[..., Awaitable[Any]]

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
ANSWER = "Once upon a time"
DIVERGED_AT = "x-memserve-diverged-at"


@pytest.fixture
def model(served_model: ServedModel) -> ServedModel:
    return dataclasses.replace(served_model, history=TokenHistory(served_model.tokenizer))


@pytest.fixture
def letters(tiny_tokenizer: Tokenizer) -> list[int]:
    """ANSWER, a letter a token: not as it would be tokenised."""
    token_ids = [token_id for letter in ANSWER for token_id in tiny_tokenizer.encode(letter).tolist()]
    assert len(token_ids) == len(ANSWER) > len(tiny_tokenizer.encode(ANSWER))
    return token_ids


@pytest.fixture
def reply(letters: list[int]) -> Reply:
    return lambda request: make_deltas(request, [*letters, EOS])


async def ask(server: Any, path: str, body: Mapping[str, object]) -> tuple[str, Mapping[str, str], list[int]]:
    """Text, headers, and the prompt's ids as the engine got them."""
    async with server.session.post(path, json={"model": "tiny", **body}) as response:
        assert response.status == 200, await response.text()
        if body.get("stream"):
            lines = (await response.text()).splitlines()
            events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
            choices = [choice for event in events for choice in event["choices"] if choice["index"] == 0]
        else:
            choices = [choice for choice in (await response.json())["choices"] if choice["index"] == 0]
        texts = [
            choice.get("text") or (choice.get("message") or choice.get("delta") or {}).get("content") or ""
            for choice in choices
        ]
        return "".join(texts), response.headers, server.engine.requests[-1].token_ids.tolist()


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


async def counters(server: Any) -> list[float]:
    async with server.session.get("/metrics") as response:
        lines = dict(line.rsplit(" ", 1) for line in (await response.text()).splitlines())
    names = ("reused_histories", "reused_history_tokens", "diverged_prompts")
    return [float(lines[f"memserve_{name}_total"]) for name in names]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_chat_of_three_turns(
    serve: Serve, model: ServedModel, reply: Reply, letters: list[int], stream: bool
) -> None:
    server = await serve(reply, model=model)
    messages = [user("hi")]
    known: list[int] = []
    num_reused = 0
    for turn in range(3):
        text, headers, ids = await ask(server, CHAT, {"messages": messages, "stream": stream})
        assert text == ANSWER and DIVERGED_AT not in headers
        # 1. all that was sent and drawn, then the template's end of the answer: the token that ended it
        assert ids[: len(known)] == known
        if turn:
            assert ids[len(known)] == EOS
        num_reused += len(known)
        known = [*ids, *letters]
        messages += [assistant(text), user(f"and {turn}?")]
    assert await counters(server) == [2, num_reused, 0]
    # 2. another question after the first answer; another one altogether
    _, headers, ids = await ask(server, CHAT, {"messages": [*messages[:2], user("no")], "stream": stream})
    assert ids[: int(headers[DIVERGED_AT])] == known[: int(headers[DIVERGED_AT])]
    assert ids[int(headers[DIVERGED_AT])] != known[int(headers[DIVERGED_AT])]
    _, headers, _ = await ask(server, CHAT, {"messages": [user("well")], "stream": stream})
    assert DIVERGED_AT in headers
    num_histories, _, num_diverged = await counters(server)
    assert (num_histories, num_diverged) == (3, 2)


async def test_a_text_that_grows(serve: Serve, model: ServedModel, reply: Reply, letters: list[int]) -> None:
    server = await serve(reply, model=model)
    text, _, ids = await ask(server, COMPLETIONS, {"prompt": "Tell: ", "max_tokens": 50})
    _, headers, again = await ask(
        server, COMPLETIONS, {"prompt": f"Tell: {text}, and then", "max_tokens": 50, "cache_salt": ""}
    )
    assert again[: len(ids) + len(letters)] == ids + letters
    assert await counters(server) == [1, len(ids) + len(letters), 0]
    # as ids, for another salt, to be scored: as they are
    plain = model.tokenizer.encode(f"Tell: {text}").tolist()
    for body in (
        {"prompt": plain},
        {"prompt": f"Tell: {text}", "cache_salt": "other"},
        {"prompt": f"Tell: {text}", "echo": True, "logprobs": 0},
        {"prompt": f"Tell: {text}", "cache_salt": "another", "add_special_tokens": False},
    ):
        _, _, ids = await ask(server, COMPLETIONS, {"max_tokens": 50, **body})
        assert ids == plain
    assert (await counters(server))[0] == 1


async def test_what_was_not_delivered_is_not_reused(
    serve: Serve, model: ServedModel, reply: Reply, letters: list[int]
) -> None:
    server = await serve(reply, model=model)
    # 1. a stop string, an echo, an answer cut short: the text that the client has
    for number, (fields, shown) in enumerate(
        [({"stop": " a"}, "Once upon"), ({"echo": True}, ANSWER), ({"max_tokens": 6}, "Once u")]
    ):
        prompt = f"{number}: "
        text, _, first = await ask(server, COMPLETIONS, {"prompt": prompt, "max_tokens": 50, **fields})
        assert text.removeprefix(prompt) == shown
        _, _, ids = await ask(server, COMPLETIONS, {"prompt": prompt + shown + "?", "max_tokens": 50})
        assert ids[: len(first) + len(shown)] == first + letters[: len(shown)]
        assert ids[len(first) + len(shown) :] == model.tokenizer.encode("?").tolist()
    # 2. nothing was drawn that counts
    await ask(server, COMPLETIONS, {"prompt": "none", "max_tokens": 0})
    assert len(model.history or ()) == 3


async def test_every_choice_of_several_prompts(
    serve: Serve, model: ServedModel, tiny_tokenizer: Tokenizer
) -> None:
    def reply(request: GenerateRequest) -> Sequence[Delta]:
        number = int(request.request_id.rsplit("-", 1)[1])
        return make_deltas(request, [*tiny_tokenizer.encode(str(number) * 3).tolist()[:1] * 3, 300, EOS])

    server = await serve(reply, model=model)
    body = {"model": "tiny", "prompt": ["a: ", "b: "], "n": 2, "max_tokens": 50}
    async with server.session.post(COMPLETIONS, json=body) as response:
        choices = (await response.json())["choices"]
    assert len(model.history or ()) == 4
    drawn = [
        [*request.token_ids.tolist(), *(d.token_ids[0] for d in reply(request)[:-1])]
        for request in server.engine.requests
    ]
    for i, choice in enumerate(choices):
        _, _, ids = await ask(
            server, COMPLETIONS, {"prompt": f"{'ab'[i // 2]}: {choice['text']}", "max_tokens": 50}
        )
        assert ids == drawn[i]


async def test_the_header_is_of_the_first_prompt_that_departs(
    serve: Serve, model: ServedModel, reply: Reply, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG", "memserve.router.http.server")
    server = await serve(reply, model=model)
    _, _, known = await ask(server, COMPLETIONS, {"prompt": "1 2 3 4", "max_tokens": 50})
    prompts = ["nothing", "1 2 3 4", "1 2 x", "1 x", "1 2 3 x"]
    _, headers, _ = await ask(server, COMPLETIONS, {"prompt": prompts, "max_tokens": 50, "n": 2})
    plain = model.tokenizer.encode("1 2 x").tolist()
    assert int(headers[DIVERGED_AT]) == len(plain) - 1
    assert plain[:-1] == known[: len(plain) - 1]
    assert await counters(server) == [0, 0, 3]
    said = [record.message for record in caplog.records if "prompt tokens are remembered" in record.message]
    assert [line.rsplit(": ")[-1] for line in said][1:4] == ["None", "None", headers[DIVERGED_AT]]


async def test_a_long_answer_is_remembered_too(
    serve: Serve, model: ServedModel, reply: Reply, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generation, "_INLINE_TOKENS", 3)
    server = await serve(reply, model=model)
    await ask(server, CHAT, {"messages": [user("hi")]})
    await ask(server, CHAT, {"messages": [user("hi"), assistant(ANSWER), user("so")]})
    assert (await counters(server))[0] == 1


async def test_no_request_is_refused_for_its_history(
    serve: Serve, model: ServedModel, reply: Reply, letters: list[int]
) -> None:
    server = await serve(reply, model=model)
    _, _, first = await ask(server, COMPLETIONS, {"prompt": "a", "max_tokens": 50})
    prompt = "a" + ANSWER
    plain = model.tokenizer.encode(prompt).tolist()
    room = model.max_model_len - len(first) - len(letters)
    # 1. as much as fits behind the remembered ids, by either field
    _, _, ids = await ask(server, COMPLETIONS, {"prompt": prompt, "max_tokens": room})
    assert ids == first + letters
    _, _, ids = await ask(server, COMPLETIONS, {"prompt": prompt, "min_tokens": 1, "max_tokens": room})
    assert ids == first + letters
    # 2. a token more, or as much as fits behind the plain ones
    for max_tokens in (room + 1, model.max_model_len - len(plain)):
        _, _, ids = await ask(server, COMPLETIONS, {"prompt": prompt, "max_tokens": max_tokens})
        assert ids == plain
    # 3. what a chat asks for, or the least that it asks for
    for number, field in enumerate(("max_completion_tokens", "max_tokens", "min_tokens")):
        question = user(f"hi {number}")
        await ask(server, CHAT, {"messages": [question], "max_tokens": 50})
        body = {"messages": [question, assistant(ANSWER)]}
        _, _, reused = await ask(server, CHAT, body | {"max_tokens": 50})
        _, _, ids = await ask(server, CHAT, body | {field: model.max_model_len - len(reused)})
        assert ids == reused
        _, _, ids = await ask(server, CHAT, body | {field: model.max_model_len - len(reused) + 1})
        assert len(ids) < len(reused)


async def test_a_flush_of_all_forgets_it(
    serve: Serve, model: ServedModel, reply: Reply, letters: list[int]
) -> None:
    server = await serve(reply, model=model)
    assert model.history is not None
    await ask(server, COMPLETIONS, {"prompt": "Tell: ", "max_tokens": 50})
    for body, num_left in (({"instance": "prefill-0"}, 1), ({}, 0)):
        async with server.session.post("/v1/cache/flush", json=body) as response:
            assert response.status == 200
        assert len(model.history) == num_left
    assert model.history.num_bytes == 0
    _, _, ids = await ask(server, COMPLETIONS, {"prompt": f"Tell: {ANSWER}", "max_tokens": 50})
    assert ids == model.tokenizer.encode(f"Tell: {ANSWER}").tolist()


async def test_without_a_history(serve: Serve, served_model: ServedModel, reply: Reply) -> None:
    server = await serve(reply)
    _, headers, _ = await ask(server, COMPLETIONS, {"prompt": "Tell: ", "max_tokens": 50})
    _, headers, ids = await ask(server, COMPLETIONS, {"prompt": f"Tell: {ANSWER}!", "max_tokens": 50})
    assert ids == served_model.tokenizer.encode(f"Tell: {ANSWER}!").tolist()
    assert DIVERGED_AT not in headers and await counters(server) == [0, 0, 0]


async def test_a_cancelled_answer_is_remembered_as_far_as_it_went(
    serve: Serve, model: ServedModel, reply: Reply, letters: list[int]
) -> None:
    server = await serve(reply, model=model, free_deltas=5)
    server.engine.gate.clear()
    # 1. five tokens, then the stream is cancelled by its id
    body = {"model": "tiny", "prompt": "Tell: ", "max_tokens": 50, "stream": True}
    async with server.session.post(COMPLETIONS, json=body, headers={"x-request-id": "one"}) as response:
        shown = ""
        while len(shown) < 5:
            line = (await response.content.readline()).decode()
            if line.startswith("data: {"):
                shown += json.loads(line[6:])["choices"][0]["text"]
        async with server.session.post("/v1/requests/one/cancel") as cancelled:
            assert cancelled.status == 200
        await response.read()
    server.engine.gate.set()
    # 2. they are there when the text is sent again
    _, _, ids = await ask(server, COMPLETIONS, {"prompt": f"Tell: {shown}", "max_tokens": 50})
    assert ids[-5:] == letters[:5]
