"""From bytes to a job: what is refused and in which words, and what a valid body becomes."""

from __future__ import annotations

import dataclasses
import json
import threading
from collections.abc import Iterator

import msgspec
import pytest

from memserve.errors import RequestError
from memserve.model_config import DefaultSampling
from memserve.router.http import prompts
from memserve.router.http.limits import HttpLimits
from memserve.router.http.schemas import decode_chat, decode_completion
from memserve.router.http.served_model import ServedModel
from memserve.router.http.validation import Job, plan_chat, plan_completion

LIMITS = HttpLimits(max_prompts=4, max_sequences=6)
USER = {"role": "user", "content": "hi"}


async def completion(model: ServedModel, /, **fields: object) -> Job:
    body = decode_completion(json.dumps({"model": "tiny", "prompt": "Hello"} | fields).encode())
    return await plan_completion(body, "cmpl-1", model, LIMITS)


async def chat(model: ServedModel, /, **fields: object) -> Job:
    body = decode_chat(json.dumps({"model": "tiny", "messages": [USER]} | fields).encode())
    return await plan_chat(body, "chatcmpl-1", model, LIMITS)


# --- bytes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not valid JSON"),
        (b"nonsense", "not valid JSON"),
        (b"[1]", "not a valid request"),
        (b'"text"', "not a valid request"),
        (b"{}", "missing required field"),
        (b'{"prompt": "\xff"}', "UTF-8"),
        (b'{"prompt": "\\ud800"}', "not valid JSON"),
        (b'{"prompt": "a", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested"),
        (b'{"prompt": "a", "tools": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested"),
        (b'{"prompt": "a", "temperature": NaN}', "not valid JSON"),
        (b'{"prompt": "a", "temperature": Infinity}', "not valid JSON"),
        (b'{"prompt": "a", "temperature": 1e999}', "temperature"),
        (b'{"prompt": "a", "presence_penalty": -1e999}', "presence_penalty"),
        (b'{"prompt": "a", "max_tokens": 99999999999999999999999}', "max_tokens"),
        (b'{"prompt": "a", "seed": 99999999999999999999999}', "seed"),
        (b'{"prompt": "a"} {"prompt": "b"}', "not valid JSON"),
    ],
)
def test_bad_bytes(data: bytes, message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        decode_completion(data)
    assert caught.value.status == 400
    assert "\n" not in str(caught.value)


def test_the_last_of_duplicate_fields_counts_and_unknown_ones_do_not() -> None:
    body = decode_completion(b'{"prompt": "a", "n": 2, "n": 3, "user": "me", "anything": {"at": ["all"]}}')
    assert body.n == 3


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prompt", None),
        ("prompt", {"a": 1}),
        ("prompt", [[1, "a"]]),
        ("prompt", [-1]),
        ("prompt", [1.5]),
        ("prompt", [True]),
        ("n", 0),
        ("n", 65),
        ("n", 10**9),
        ("best_of", 65),
        ("temperature", -0.1),
        ("temperature", 101),
        ("temperature", "1"),
        ("temperature", True),
        ("top_p", 1.1),
        ("top_p", -1),
        ("top_k", -2),
        ("min_p", 2),
        ("repetition_penalty", 0),
        ("frequency_penalty", 3),
        ("presence_penalty", -3),
        ("logit_bias", {"a": 1}),
        ("logit_bias", {"1": 101}),
        ("logit_bias", {"-1": 1}),
        ("logit_bias", {str(i): 0 for i in range(1025)}),
        ("logprobs", 21),
        ("logprobs", -1),
        ("logprobs", True),
        ("max_tokens", -1),
        ("max_tokens", 1.5),
        ("min_tokens", -1),
        ("stop", ""),
        ("stop", ["a", ""]),
        ("stop", ["a"] * 17),
        ("stop", "x" * 1025),
        ("stop", [3]),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", list(range(257))),
        ("stream", "yes"),
        ("stream_options", 3),
        ("cache_salt", "x" * 257),
        ("seed", "abc"),
    ],
)
def test_bad_fields_are_named(field: str, value: object) -> None:
    with pytest.raises(RequestError) as caught:
        decode_completion(json.dumps({"prompt": "a"} | {field: value}).encode())
    assert caught.value.param == field
    assert caught.value.status == 400


@pytest.mark.parametrize(
    "messages",
    [
        None,
        [],
        "hi",
        [{}],
        [{"role": "robot", "content": "x"}],
        [{"role": "user", "content": 3}],
        [{"role": "user", "content": ["x"]}],
        [USER] * 4097,
    ],
)
def test_bad_messages(messages: object) -> None:
    with pytest.raises(RequestError) as caught:
        decode_chat(json.dumps({"messages": messages}).encode())
    assert caught.value.param == "messages"


# --- fields against each other and the model ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 3, "n": 2}, "best_of"),
        ({"tools": [{}]}, "tools"),
        ({"guided_json": {"a": 1}}, "guided_json"),
        ({"prompt_logprobs": 1}, "prompt_logprobs"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": [4096]}, "prompt"),
        ({"prompt": [2**31 - 1]}, "prompt"),
        ({"prompt": ["a"] * 5}, "prompt"),
        ({"prompt": ["a"] * 4, "n": 2}, "n"),
        ({"logit_bias": {"4096": 1}}, "logit_bias"),
        ({"stop_token_ids": [4096]}, "stop_token_ids"),
        ({"min_tokens": 17}, "min_tokens"),
        ({"min_tokens": 3, "max_tokens": 2}, "min_tokens"),
    ],
)
async def test_refused_completions(served_model: ServedModel, fields: dict[str, object], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        await completion(served_model, **fields)
    assert (caught.value.status, caught.value.param) == (400, param)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"echo": True}, "echo"),
        ({"modalities": ["audio"]}, "modalities"),
        ({"chat_template": "x"}, "chat_template"),
        ({"continue_final_message": True}, "continue_final_message"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"id": "1"}]}]}, "messages"),
        ({"n": 7}, "n"),
    ],
)
async def test_refused_chats(served_model: ServedModel, fields: dict[str, object], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        await chat(served_model, **fields)
    assert (caught.value.status, caught.value.param) == (400, param)


async def test_fields_that_change_nothing_are_accepted(served_model: ServedModel) -> None:
    await completion(
        served_model,
        best_of=1,
        suffix=None,
        tools=[],
        guided_json=None,
        user="me",
        store=True,
        metadata={"a": "b"},
    )
    await completion(
        served_model, stream=True, stream_options={"include_usage": True, "continuous_usage_stats": True}
    )
    await chat(
        served_model, tools=None, modalities=["text"], response_format={"type": "text"}, logprobs=False
    )
    await chat(served_model, top_logprobs=0, tool_choice="none", parallel_tool_calls=True)


async def test_another_model(served_model: ServedModel) -> None:
    with pytest.raises(RequestError) as caught:
        await completion(served_model, model="gpt-4")
    assert (caught.value.status, caught.value.code) == (404, "model_not_found")
    assert await completion(served_model, model=None)


# --- length -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": [5] * 257},
        {"prompt": [5] * 256},
        {"prompt": [5] * 250, "max_tokens": 7},
        {"prompt": "word " * 500},
        {"prompt": "x" * 1_000_000},
    ],
)
async def test_too_long(served_model: ServedModel, fields: dict[str, object]) -> None:
    with pytest.raises(RequestError, match="maximum context length is 256 tokens") as caught:
        await completion(served_model, **fields)
    assert (caught.value.status, caught.value.code) == (400, "context_length_exceeded")


async def test_the_numbers_are_told(served_model: ServedModel) -> None:
    with pytest.raises(RequestError, match=r"257 tokens \(250 tokens in the prompt, 7 for the answer\)"):
        await completion(served_model, prompt=[5] * 250, max_tokens=7)


async def test_a_chat_that_is_too_long(served_model: ServedModel) -> None:
    for content in ("word " * 300, "x" * 1_000_000):
        with pytest.raises(RequestError) as caught:
            await chat(served_model, messages=[{"role": "user", "content": content}])
        assert caught.value.code == "context_length_exceeded"


@pytest.mark.parametrize(
    ("num_prompt", "max_tokens", "expected"),
    [(10, None, 16), (250, None, 6), (255, None, 1), (255, 1, 1), (256, 0, 1), (10, 0, 1), (10, 246, 246)],
)
async def test_max_tokens_of_completions(
    served_model: ServedModel, num_prompt: int, max_tokens: int | None, expected: int
) -> None:
    (choice,) = (await completion(served_model, prompt=[5] * num_prompt, max_tokens=max_tokens)).choices
    assert choice.request.sampling.max_tokens == expected
    assert choice.hide_output == (max_tokens == 0)


async def test_max_tokens_of_chats(served_model: ServedModel) -> None:
    (choice,) = (await chat(served_model)).choices
    assert choice.request.sampling.max_tokens == 256 - len(choice.request.token_ids)
    (choice,) = (await chat(served_model, max_tokens=9)).choices
    assert choice.request.sampling.max_tokens == 9
    (choice,) = (await chat(served_model, max_tokens=9, max_completion_tokens=8)).choices
    assert choice.request.sampling.max_tokens == 8


# --- what a valid body becomes -----------------------------------------------------------------------------


async def test_defaults_come_from_the_model(served_model: ServedModel) -> None:
    params = (await completion(served_model)).choices[0].request.sampling
    assert (params.temperature, params.top_p, params.top_k) == (0.5, 0.9, 0)
    assert params.stop_token_ids == (2,)
    assert (params.logprobs, params.prompt_logprobs) == (None, None)
    model = dataclasses.replace(
        served_model, default_sampling=DefaultSampling(top_k=7, repetition_penalty=1.5)
    )
    params = (await completion(model, temperature=0)).choices[0].request.sampling
    assert (params.temperature, params.top_p, params.top_k, params.repetition_penalty) == (0, 1, 7, 1.5)


async def test_every_parameter_arrives(served_model: ServedModel) -> None:
    (choice,) = (
        await completion(
            served_model,
            temperature=1.5,
            top_p=0.4,
            top_k=-1,
            min_p=0.1,
            repetition_penalty=1.1,
            presence_penalty=-1,
            frequency_penalty=2,
            logit_bias={"7": -100, "9": 3.5},
            stop_token_ids=[5, 2, 5],
            min_tokens=3,
            max_tokens=9,
            logprobs=4,
            echo=True,
            seed=-1,
            stop=["a", "bc"],
            skip_special_tokens=False,
            cache_salt="s",
        )
    ).choices
    assert msgspec.structs.asdict(choice.request.sampling) == {
        "max_tokens": 9,
        "seed": 2**63 - 1,
        "temperature": 1.5,
        "top_p": 0.4,
        "top_k": 0,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "presence_penalty": -1,
        "frequency_penalty": 2,
        "logit_bias": ((7, -100), (9, 3.5)),
        "stop_token_ids": (2, 5),
        "min_tokens": 3,
        "logprobs": 4,
        "prompt_logprobs": 4,
    }
    assert (choice.stops, choice.echo, choice.skip_special_tokens) == (("a", "bc"), True, False)
    assert choice.request.cache_salt == "s"


async def test_ignore_eos_keeps_the_clients_stop_tokens(served_model: ServedModel) -> None:
    params = (await completion(served_model, ignore_eos=True, stop_token_ids=[9])).choices[0].request.sampling
    assert params.stop_token_ids == (9,)


async def test_a_tiny_temperature_is_greedy(served_model: ServedModel) -> None:
    params = (await completion(served_model, temperature=1e-300)).choices[0].request.sampling
    assert params.temperature == 0


async def test_prompts_and_n_make_sequences_in_order(served_model: ServedModel) -> None:
    job = await completion(served_model, prompt=["a", [7, 8], "b"], n=2, seed=10)
    assert [choice.index for choice in job.choices] == list(range(6))
    assert [choice.prompt_index for choice in job.choices] == [0, 0, 1, 1, 2, 2]
    assert [choice.request.sampling.seed for choice in job.choices] == [10, 11] * 3
    assert len({choice.request.request_id for choice in job.choices}) == 6
    assert job.choices[2].request.token_ids.tolist() == [7, 8]
    assert job.choices[2].prompt.text is None
    assert job.choices[4].prompt.text == "b"


async def test_seeds_differ_where_none_was_given(served_model: ServedModel) -> None:
    seeds = {(await completion(served_model)).choices[0].request.sampling.seed for _ in range(5)}
    assert len(seeds) == 5


async def test_messages_become_the_templates_prompt(served_model: ServedModel) -> None:
    messages = [
        {"role": "developer", "content": "Be kind."},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": None},
    ]
    (choice,) = (await chat(served_model, messages=messages)).choices
    assert choice.prompt.text == (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\na\nb<|im_end|>\n"
        "<|im_start|>assistant\n<|im_end|>\n<|im_start|>assistant\n"
    )
    assert choice.request.token_ids.tolist()[0] == 1  # <|im_start|> is one token


async def test_no_chat_template(served_model: ServedModel) -> None:
    with pytest.raises(RequestError, match="no chat template"):
        await chat(dataclasses.replace(served_model, chat_template=None))


# --- work that is bounded ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [("prompt_logprobs", 0), ("truncate_prompt_tokens", 0), ("truncate_prompt_tokens", -1)],
)
async def test_zero_is_not_off(served_model: ServedModel, field: str, value: int) -> None:
    with pytest.raises(RequestError, match="not supported") as caught:
        await completion(served_model, **{field: value})
    assert caught.value.param == field


@pytest.mark.parametrize("field", ["prompt_logprobs", "truncate_prompt_tokens", "tools", "suffix"])
async def test_what_is_off_is_accepted(served_model: ServedModel, field: str) -> None:
    for value in (None, False, "", [], {}):
        await completion(served_model, **{field: value})


async def test_log_probabilities_of_prompts_are_bounded(served_model: ServedModel) -> None:
    limits = HttpLimits(max_prompt_logprobs=100)

    async def ask(**fields: object) -> Job:
        body = decode_completion(json.dumps({"max_tokens": 1, "prompt": [3] * 10} | fields).encode())
        return await plan_completion(body, "1", served_model, limits)

    # 10 tokens, each with 9 others: just as many as may be
    (plan,) = (await ask(echo=True, logprobs=9)).choices
    assert plan.request.sampling.prompt_logprobs == 9
    for fields in ({"logprobs": 10}, {"logprobs": 9, "n": 2}, {"logprobs": 4, "prompt": [[3] * 10] * 3}):
        with pytest.raises(RequestError, match="at most 100") as caught:
            await ask(echo=True, **fields)
        assert caught.value.param == "logprobs"
        await ask(**fields)  # without the prompt's own they are the client's to ask for


def test_one_request_takes_a_quarter_of_the_queue_at_most() -> None:
    for max_waiting, expected in ((512, 128), (10_000, 128), (100, 25), (1, 1)):
        assert HttpLimits.for_queue(max_waiting).max_sequences == expected


@pytest.mark.parametrize(
    "prompt",
    ["word " * 200, ["word " * 10] * 4, [[3] * 200] * 4, [3] * 200, ["a", [3, 4], "b"]],
    ids=lambda prompt: str(prompt)[:12],
)
@pytest.mark.parametrize("inline_chars", [0, 10**9])
async def test_prompts_are_the_same_read_in_a_thread_or_not(
    served_model: ServedModel, monkeypatch: pytest.MonkeyPatch, prompt: object, inline_chars: int
) -> None:
    monkeypatch.setattr(prompts, "_INLINE_CHARS", inline_chars)
    threads = []
    encode = served_model.tokenizer.encode

    def spy(text: str, *, add_special_tokens: bool) -> object:
        threads.append(threading.current_thread())
        return encode(text, add_special_tokens=add_special_tokens)

    monkeypatch.setattr(served_model.tokenizer, "encode", spy)
    model = dataclasses.replace(served_model, max_model_len=1024)
    job = await completion(model, prompt=prompt)
    sources = [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt  # type: ignore[index]
    for choice, source in zip(job.choices, sources, strict=True):  # type: ignore[arg-type]
        expected = encode(source).tolist() if isinstance(source, str) else source
        assert choice.prompt.token_ids.tolist() == expected
    if inline_chars == 0:  # all of them in one thread, which is not the loop's
        assert threading.main_thread() not in threads and len(set(threads)) <= 1


async def test_a_long_list_is_refused_before_it_is_looked_at(served_model: ServedModel) -> None:
    class Unseen(list[int]):
        def __iter__(self) -> Iterator[int]:
            raise AssertionError

    for prompt in (Unseen([3] * 300), Unseen([[3]] * 300), [Unseen([3] * 300)]):  # type: ignore[list-item]
        body = msgspec.structs.replace(decode_completion(b'{"prompt": ""}'), prompt=prompt)
        with pytest.raises(RequestError):
            await plan_completion(body, "1", served_model, LIMITS)


def test_bad_keys_are_explained_without_a_pattern() -> None:
    for decode, text, expected in (
        (
            decode_completion,
            '{"prompt": "x", "logit_bias": {"a": 1}}',
            "logit_bias: the keys must be token ids",
        ),
        (
            decode_chat,
            '{"messages": [{"role": "user"}], "chat_template_kwargs": {"A": 1}}',
            "chat_template_kwargs: the keys must be names",
        ),
    ):
        with pytest.raises(RequestError) as refused:
            decode(text.encode())
        assert str(refused.value).startswith(expected)
        assert "regex" not in str(refused.value) and "^" not in str(refused.value)
        assert refused.value.param == expected.partition(":")[0]


async def test_a_text_part_without_text(served_model: ServedModel) -> None:
    messages = [{"role": "user", "content": [{"type": "text"}]}]
    with pytest.raises(RequestError, match="of type 'text' needs a text"):
        await chat(served_model, messages=messages)


async def test_text_of_tokens_that_the_model_has_not(served_model: ServedModel) -> None:
    """A tokenizer may know more than its model."""
    smaller = dataclasses.replace(served_model, vocab_size=1)
    with pytest.raises(RequestError, match="vocabulary") as caught:
        await completion(smaller, prompt="Hello")
    assert caught.value.param == "prompt"
    await completion(served_model, prompt="Hello")
