"""Bodies of requests, as clients send them: OpenAI's fields, and those of vLLM that evaluation tools rely on.

Everything a field alone can say about its own validity is written here as a constraint and checked while the
JSON is decoded: types, finite numbers in bounds, lengths of lists. What needs the model or a second field is
left to `validation.py`. Unknown fields are ignored, but for the cache's admin routes, where a misspelt one
would quietly give the wrong answer; known ones that would change the answer and are not implemented are
declared (`Unsupported`) so that they can be refused by name. `null` always means "not given".
"""

from __future__ import annotations

import re
from typing import Annotated, Literal, TypeVar

import msgspec
from msgspec import Meta

from memserve.errors import RequestError

MAX_CHOICES = 64
MAX_LOGPROBS = 20

TokenId = Annotated[int, Meta(ge=0, lt=1 << 31)]
Name = Annotated[str, Meta(max_length=512)]
Count = Annotated[int, Meta(ge=0, lt=1 << 31)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
Probability = Annotated[float, Meta(ge=0, le=1)]
StopString = Annotated[str, Meta(min_length=1, max_length=1024)]
TokenIdText = Annotated[str, Meta(pattern=r"^\d{1,9}$")]


class StreamOptions(msgspec.Struct, frozen=True):
    """`include_usage`: a last chunk with the usage. `continuous_usage_stats`: the usage so far with every
    chunk.
    """

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class ResponseFormat(msgspec.Struct, frozen=True):
    """Only `text` is served."""

    type: Name = "text"


class Unsupported(msgspec.Struct, frozen=True, kw_only=True):
    """Fields that would change the answer and are not implemented. Refused unless they are empty or off."""

    suffix: object = None
    tools: object = None
    functions: object = None
    audio: object = None
    web_search_options: object = None
    structured_outputs: object = None
    guided_json: object = None
    guided_regex: object = None
    guided_choice: object = None
    guided_grammar: object = None
    use_beam_search: object = None
    bad_words: object = None
    prompt_embeds: object = None
    prompt_logprobs: object = None
    truncate_prompt_tokens: object = None
    include_stop_str_in_output: object = None
    chat_template: object = None
    continue_final_message: object = None
    documents: object = None


class SamplingBody(Unsupported, frozen=True, kw_only=True):
    """What both endpoints know about how tokens are drawn and delivered."""

    model: Name | None = None
    n: Annotated[int, Meta(ge=1, le=MAX_CHOICES)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Count | None = None
    min_tokens: Count | None = None
    temperature: Annotated[float, Meta(ge=0, le=100)] | None = None
    top_p: Probability | None = None
    top_k: Annotated[int, Meta(ge=-1, lt=1 << 31)] | None = None
    min_p: Probability | None = None
    repetition_penalty: Annotated[float, Meta(ge=0.01, le=100)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: (
        Annotated[dict[TokenIdText, Annotated[float, Meta(ge=-100, le=100)]], Meta(max_length=1024)] | None
    ) = None
    seed: Annotated[int, Meta(ge=-(1 << 63), le=(1 << 63) - 1)] | None = None
    stop: StopString | Annotated[list[StopString], Meta(max_length=16)] | None = None
    stop_token_ids: Annotated[list[TokenId], Meta(max_length=256)] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    add_special_tokens: bool | None = None
    return_token_ids: bool | None = None
    response_format: ResponseFormat | None = None
    cache_salt: Annotated[str, Meta(max_length=256)] | None = None
    session_id: Annotated[str, Meta(max_length=256)] | None = None


class CompletionBody(SamplingBody, frozen=True, kw_only=True):
    """POST /v1/completions. `prompt`: a text, token ids, or a list of either."""

    prompt: str | list[str | TokenId | list[TokenId]]
    best_of: Annotated[int, Meta(ge=1, le=MAX_CHOICES)] | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)] | None = None


class TextPart(msgspec.Struct, frozen=True):
    """A part of a message's content; only `text` is served."""

    type: Name
    text: str | None = None


class Message(msgspec.Struct, frozen=True):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | Annotated[list[TextPart], Meta(max_length=1024)] | None = None
    name: str | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    tool_calls: object = None
    function_call: object = None


class ChatBody(SamplingBody, frozen=True, kw_only=True):
    """POST /v1/chat/completions. `chat_template_kwargs` are variables of the model's template
    (enable_thinking).
    """

    messages: Annotated[list[Message], Meta(min_length=1, max_length=4096)]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)] | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: (
        Annotated[
            dict[Annotated[str, Meta(pattern=r"^[a-z][a-z0-9_]{0,63}$")], str | int | float | bool | None],
            Meta(max_length=16),
        ]
        | None
    ) = None
    echo: object = None
    modalities: list[str] | None = None


class CompletionLookup(CompletionBody, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """POST /v1/cache/lookup, as a completion."""


class ChatLookup(ChatBody, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """POST /v1/cache/lookup, as a chat."""


class FlushBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """POST /v1/cache/flush: which instance (all, if none is named)."""

    instance: Name | None = None


class ResizeBody(FlushBody, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """POST /v1/cache/resize: also how much for each."""

    host_memory: Name | None = None


class _MaybeChat(msgspec.Struct, frozen=True):
    messages: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET


Body = TypeVar(
    "Body", CompletionBody, ChatBody, CompletionLookup, ChatLookup, FlushBody, ResizeBody, _MaybeChat
)

_COMPLETION = msgspec.json.Decoder(CompletionBody)
_CHAT = msgspec.json.Decoder(ChatBody)
_FLUSH = msgspec.json.Decoder(FlushBody)
_RESIZE = msgspec.json.Decoder(ResizeBody)
_COMPLETION_LOOKUP = msgspec.json.Decoder(CompletionLookup)
_CHAT_LOOKUP = msgspec.json.Decoder(ChatLookup)
_MAYBE_CHAT = msgspec.json.Decoder(_MaybeChat)
# How msgspec says where: "… - at `$.stop[2]`", "… - at `key` in `$.logit_bias`", "… required field `model`".
_FIELD = re.compile(r"`\$\.((\w+)[^`]*)`")
_MISSING = re.compile(r"missing required field `((\w+))`")
# The only patterns are those of keys; what to say in place of one.
_PATTERN = "matching regex"
_KEYS = {
    "logit_bias": "the keys must be token ids, as strings of digits",
    "chat_template_kwargs": "the keys must be names in small letters, digits and underscores",
}


def decode_completion(data: bytes) -> CompletionBody:
    """The body of a completion request. Raises RequestError on anything that is not one."""
    return _decode(data, _COMPLETION)


def decode_chat(data: bytes) -> ChatBody:
    """The body of a chat request. Raises RequestError on anything that is not one."""
    return _decode(data, _CHAT)


def decode_flush(data: bytes) -> FlushBody:
    """The body of a flush; nothing at all is one too. Raises RequestError otherwise."""
    return _decode(data or b"{}", _FLUSH)


def decode_resize(data: bytes) -> ResizeBody:
    """The body of a resize; nothing at all is read as {}. Raises RequestError otherwise."""
    return _decode(data or b"{}", _RESIZE)


def decode_lookup(data: bytes) -> CompletionBody | ChatBody:
    """The body of a look-up: a chat's if it has messages, else a completion's. Raises RequestError on
    anything that is neither.
    """
    if _decode(data, _MAYBE_CHAT).messages is not msgspec.UNSET:
        return _decode(data, _CHAT_LOOKUP)
    return _decode(data, _COMPLETION_LOOKUP)


def _decode(data: bytes, decoder: msgspec.json.Decoder[Body]) -> Body:
    try:
        return decoder.decode(data)
    except msgspec.ValidationError as error:
        problem, _, place = str(error).partition(" - at ")
        field = _FIELD.search(place) or _MISSING.search(problem)
        if _PATTERN in problem and field is not None:
            problem = _KEYS[field[2]]
        where = "the body is not a valid request" if field is None else field[1]
        raise RequestError(f"{where}: {problem}", param=None if field is None else field[2]) from None
    except UnicodeDecodeError:
        raise RequestError("the body is not valid UTF-8") from None
    except msgspec.DecodeError as error:
        raise RequestError(f"the body is not valid JSON: {error}") from None
    except RecursionError:
        raise RequestError("the body is nested too deeply") from None
