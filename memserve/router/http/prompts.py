"""The prompt of a request, as token ids: from text, from ids, or from messages through the chat template.

Lengths, in characters or ids, are checked before anything is looked at, tokenised or rendered. What is much
work, a request's prompts taken together, and all templates are dealt with in a thread, so that no request
holds up the streams of others. A text that begins like one that was remembered (`token_history.py`) begins
with the remembered ids.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

from memserve.errors import RequestError
from memserve.router.http.schemas import ChatBody, CompletionBody, Message, SamplingBody
from memserve.router.http.served_model import ServedModel
from memserve.router.text.token_history import Reading, Scope

# Encoding so many characters, or copying so many ids, takes about as long as going to a thread and back.
_INLINE_CHARS = 4096


class Prompt(msgspec.Struct, frozen=True):
    """What a sequence starts from; `text` as the client sent it, None where ids were sent.

    `reading`: what the answer is to be remembered with; None where ids were sent, or nothing is remembered.
    """

    token_ids: NDArray[np.int32]
    text: str | None = None
    reading: Reading | None = None


Source = str | list[int]


def prompt_sources(
    prompt: str | list[str | int | list[int]], model: ServedModel, max_prompts: int
) -> list[Source]:
    """The prompts of a completion, unread: a text, ids, or a list of either is one, one, or several.

    Looks at no more items than there may be. Raises RequestError if there are too many, or none.
    """
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise RequestError("prompt is an empty list", param="prompt")
    if isinstance(prompt[0], int):
        check_length(len(prompt), 0, model, "prompt")
    elif len(prompt) > max_prompts:
        raise RequestError(f"{len(prompt)} prompts; at most {max_prompts} are served", param="prompt")
    ids = [item for item in prompt if isinstance(item, int)]
    sources: list[Source] = [item for item in prompt if not isinstance(item, int)]
    if ids and sources:
        raise RequestError("a list of prompts must not hold bare token ids", param="prompt")
    return [ids] if ids else sources


async def read_prompts(sources: Sequence[Source], body: CompletionBody, model: ServedModel) -> list[Prompt]:
    """The prompts themselves. Raises RequestError if one is empty, too long or not of this vocabulary."""
    for source in sources:
        if isinstance(source, str):
            _check_num_chars(source, model, "prompt")
        else:
            check_length(len(source), 0, model, "prompt")

    def read() -> list[Prompt]:
        return [_read(source, body, model) for source in sources]

    if sum(map(len, sources)) <= _INLINE_CHARS:
        return read()
    return await asyncio.to_thread(read)


def _read(source: Source, body: CompletionBody, model: ServedModel) -> Prompt:
    if isinstance(source, str):
        # Nothing is cached for a prompt whose log-probabilities are asked for: it is scored as it stands.
        is_scored = bool(body.echo) and body.logprobs is not None
        num_asked = 1 if body.max_tokens is None else body.max_tokens
        prompt = _tokenised(
            source, body.add_special_tokens is not False, body, num_asked, model, may_reuse=not is_scored
        )
    else:
        prompt = Prompt(np.asarray(source, dtype=np.int32))
    return _checked(prompt, model, "prompt")


def _tokenised(
    text: str,
    add_special_tokens: bool,
    body: SamplingBody,
    num_asked: int,
    model: ServedModel,
    *,
    may_reuse: bool = True,
) -> Prompt:
    """`num_asked`: tokens that the answer is to have room for."""
    if model.history is None:
        return Prompt(model.tokenizer.encode(text, add_special_tokens=add_special_tokens), text)
    scope = Scope(body.cache_salt or "", add_special_tokens)
    reading = model.history.read(text, scope, may_reuse=may_reuse)
    num_asked = max(num_asked, body.min_tokens or 0)
    if reading.num_reused and len(reading.token_ids) + num_asked > model.max_model_len:
        # Remembered ids may be more than the text needs: no request is to be refused for that.
        reading = model.history.read(text, scope, may_reuse=False)
    return Prompt(reading.token_ids, text, reading)


async def render_chat(body: ChatBody, model: ServedModel) -> Prompt:
    """The prompt of a chat. Raises RequestError if the template refuses it, or as `read_prompt`."""
    template = model.chat_template
    if template is None:
        raise RequestError("this model has no chat template, so it only serves /v1/completions")
    messages = [_template_message(message) for message in body.messages]
    for message in messages:
        _check_num_chars(message["content"], model, "messages")
    max_chars = model.tokenizer.max_chars(model.max_model_len)

    max_tokens = answer_limit(body)

    def render() -> Prompt:
        text = template.render(
            messages,
            max_chars=max_chars,
            add_generation_prompt=body.add_generation_prompt is not False,
            variables=body.chat_template_kwargs,
        )
        _check_num_chars(text, model, "messages")
        # The template writes bos itself where the model wants it.
        num_asked = 1 if max_tokens is None else max_tokens
        return _tokenised(text, bool(body.add_special_tokens), body, num_asked, model)

    return _checked(await asyncio.to_thread(render), model, "messages")


def answer_limit(body: ChatBody) -> int | None:
    """The most tokens that the answer may have, by the newer of the two fields that say so."""
    return body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens


def _template_message(message: Message) -> dict[str, str]:
    """A message as templates know it: content as one text (parts joined by line breaks, as in vLLM)."""
    if message.tool_calls or message.function_call:
        raise RequestError("tool calls in messages are not supported", param="messages")
    if isinstance(message.content, list):
        texts = []
        for part in message.content:
            if part.type == "text" and part.text is None:
                raise RequestError("a content part of type 'text' needs a text", param="messages")
            if part.type != "text" or part.text is None:
                raise RequestError(
                    f"content of type {part.type!r} is not supported, only 'text'", param="messages"
                )
            texts.append(part.text)
        content = "\n".join(texts)
    else:
        content = message.content or ""
    # OpenAI's newer word for system, which most templates do not know.
    role = "system" if message.role == "developer" else message.role
    fields = {"role": role, "content": content}
    for name in ("name", "tool_call_id", "reasoning_content"):
        value = getattr(message, name)
        if value is not None:
            fields[name] = value
    return fields


def _check_num_chars(text: str, model: ServedModel, param: str) -> None:
    if len(text) > model.tokenizer.max_chars(model.max_model_len):
        raise _too_long(f"the {param} has {len(text)} characters, more than fit", model, param)


def _checked(prompt: Prompt, model: ServedModel, param: str) -> Prompt:
    if not len(prompt.token_ids):
        raise RequestError(f"the {param} must have at least one token", param=param)
    check_length(len(prompt.token_ids), 0, model, param)
    # What was tokenised is in the vocabulary, unless the tokenizer knows more than the model.
    if prompt.text is None or model.tokenizer.vocab_size > model.vocab_size:
        check_token_id(int(prompt.token_ids.max()), model, param)
    return prompt


def check_length(num_tokens: int, max_tokens: int, model: ServedModel, param: str) -> None:
    """Raises RequestError, with the numbers, if prompt and answer together exceed the context."""
    if num_tokens + max_tokens <= model.max_model_len:
        return
    asked = f"{num_tokens} tokens in the {param}"
    if max_tokens:
        asked = f"{num_tokens + max_tokens} tokens ({asked}, {max_tokens} for the answer)"
    raise _too_long(f"{asked} were asked for", model, param)


def _too_long(problem: str, model: ServedModel, param: str) -> RequestError:
    return RequestError(
        f"this model's maximum context length is {model.max_model_len} tokens, but {problem}",
        code="context_length_exceeded",
        param=param,
    )


def check_token_id(token_id: int, model: ServedModel, param: str) -> None:
    """Raises RequestError if the model has no such token."""
    if token_id >= model.vocab_size:
        raise RequestError(
            f"token id {token_id} is not in the vocabulary (0 to {model.vocab_size - 1})", param=param
        )
