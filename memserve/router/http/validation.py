"""From a decoded body to the sequences the engine is to run: defaults filled in, fields held against each
other.

Order matters for safety: everything cheap is checked before a prompt is looked at (`prompts.py`). Every
refusal is a RequestError that names the field. The result, a `Job`, is complete: nothing after this looks at
the body again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import msgspec

from memserve.errors import RequestError
from memserve.messages import SamplingParams
from memserve.router.engine_api import GenerateRequest
from memserve.router.http.limits import HttpLimits
from memserve.router.http.prompts import (
    Prompt,
    answer_limit,
    check_length,
    check_token_id,
    prompt_sources,
    read_prompts,
    render_chat,
)
from memserve.router.http.schemas import ChatBody, CompletionBody, SamplingBody, Unsupported
from memserve.router.http.served_model import ServedModel
from memserve.router.request_seeds import NUM_SEEDS

DEFAULT_COMPLETION_TOKENS = 16
# Below this a softmax in float32 is an argmax, or overflows (vLLM draws the same line).
GREEDY_TEMPERATURE = 1e-5


class ChoicePlan(msgspec.Struct, frozen=True):
    """One choice of the answer: the sequence to run and how its output is shown.

    `num_logprobs` None = not asked for. `hide_output`: max_tokens was 0; the engine draws one token all the
    same.
    """

    index: int
    prompt_index: int
    prompt: Prompt
    request: GenerateRequest
    stops: tuple[str, ...]
    echo: bool
    skip_special_tokens: bool
    num_logprobs: int | None
    hide_output: bool
    return_token_ids: bool = False


class Job(msgspec.Struct, frozen=True):
    """One HTTP request, ready to run. Choices in the order of their index: prompt by prompt, n of each."""

    choices: tuple[ChoicePlan, ...]
    stream: bool
    include_usage: bool
    continuous_usage: bool


async def plan_completion(body: CompletionBody, job_id: str, model: ServedModel, limits: HttpLimits) -> Job:
    """What a /v1/completions body asks for. Raises RequestError."""
    _check_common(body, model)
    n = body.n or 1
    if body.best_of not in (None, 1, n):
        raise RequestError("best_of other than 1 or n is not supported", param="best_of")
    sources = prompt_sources(body.prompt, model, limits.max_prompts)
    _check_num_sequences(len(sources) * n, limits)
    prompts = await read_prompts(sources, body, model)
    if body.echo and body.logprobs is not None:
        _check_prompt_logprobs(prompts, n, body.logprobs, limits)
    return _make_job(
        body,
        job_id,
        model,
        prompts,
        max_tokens=body.max_tokens,
        default_max_tokens=DEFAULT_COMPLETION_TOKENS,
        num_logprobs=body.logprobs,
        echo=bool(body.echo),
    )


async def plan_chat(body: ChatBody, job_id: str, model: ServedModel, limits: HttpLimits) -> Job:
    """What a /v1/chat/completions body asks for. Raises RequestError."""
    _check_common(body, model)
    if body.echo:
        raise RequestError("echo is not supported here", param="echo")
    if body.modalities not in (None, [], ["text"]):
        raise RequestError("only the modality 'text' is supported", param="modalities")
    if body.top_logprobs and not body.logprobs:
        raise RequestError("top_logprobs needs logprobs to be true", param="top_logprobs")
    _check_num_sequences(body.n or 1, limits)
    prompt = await render_chat(body, model)
    return _make_job(
        body,
        job_id,
        model,
        [prompt],
        max_tokens=answer_limit(body),
        default_max_tokens=model.max_model_len,
        num_logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        echo=False,
    )


# --- checks ------------------------------------------------------------------------------------------------


def _check_common(body: SamplingBody, model: ServedModel) -> None:
    if body.model is not None and body.model != model.name:
        raise unknown_model(body.model)
    for field in Unsupported.__struct_fields__:
        value = getattr(body, field)  # 0 is a value: `prompt_logprobs: 0` asks for something
        if not (value is None or value is False or value in ("", [], {})):
            raise RequestError(f"{field} is not supported", param=field)
    if body.response_format is not None and body.response_format.type != "text":
        kind = body.response_format.type
        raise RequestError(f"response_format {kind!r} is not supported, only 'text'", param="response_format")
    if body.stream_options is not None and not body.stream:
        raise RequestError("stream_options needs stream to be true", param="stream_options")
    for token_id in body.stop_token_ids or ():
        check_token_id(token_id, model, "stop_token_ids")
    for token in body.logit_bias or ():
        check_token_id(int(token), model, "logit_bias")


def unknown_model(name: str) -> RequestError:
    """The 404 for a model that is not served here."""
    return RequestError(
        f"the model {name!r} does not exist here", status=404, code="model_not_found", param="model"
    )


def _check_prompt_logprobs(prompts: Sequence[Prompt], n: int, top: int, limits: HttpLimits) -> None:
    num_reported = n * sum(len(prompt.token_ids) for prompt in prompts) * (top + 1)
    if num_reported > limits.max_prompt_logprobs:
        raise RequestError(
            f"{num_reported} log-probabilities of prompt tokens (tokens times logprobs + 1); at most "
            f"{limits.max_prompt_logprobs} are reported: ask for fewer logprobs or fewer prompts at a time",
            param="logprobs",
        )


def _check_num_sequences(num_sequences: int, limits: HttpLimits) -> None:
    if num_sequences > limits.max_sequences:
        raise RequestError(
            f"{num_sequences} choices (prompts times n); at most {limits.max_sequences} are served", param="n"
        )


# --- sequences ---------------------------------------------------------------------------------------------


def _make_job(
    body: SamplingBody,
    job_id: str,
    model: ServedModel,
    prompts: Sequence[Prompt],
    *,
    max_tokens: int | None,
    default_max_tokens: int,
    num_logprobs: int | None,
    echo: bool,
) -> Job:
    n = body.n or 1
    stops = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    seed = model.seeds.next() if body.seed is None else body.seed % NUM_SEEDS
    params = _sampling(body, model, num_logprobs, echo)
    param = "messages" if isinstance(body, ChatBody) else "prompt"
    choices = []
    for prompt_index, prompt in enumerate(prompts):
        num_tokens = len(prompt.token_ids)
        room = model.max_model_len - num_tokens
        check_length(num_tokens, 1 if max_tokens is None else max_tokens, model, param)
        limit = min(default_max_tokens, room) if max_tokens is None else max_tokens
        if params.min_tokens > limit:
            raise RequestError(f"min_tokens exceeds the {limit} tokens of the answer", param="min_tokens")
        for i in range(n):
            index = prompt_index * n + i
            request = GenerateRequest(
                request_id=f"{job_id}-{index}",
                token_ids=prompt.token_ids,
                sampling=msgspec.structs.replace(
                    params, max_tokens=max(1, limit), seed=(seed + i) % NUM_SEEDS
                ),
                cache_salt=body.cache_salt or "",
                session=body.session_id,
            )
            choices.append(
                ChoicePlan(
                    index=index,
                    prompt_index=prompt_index,
                    prompt=prompt,
                    request=request,
                    stops=stops,
                    echo=echo,
                    skip_special_tokens=body.skip_special_tokens is not False,
                    num_logprobs=num_logprobs,
                    hide_output=limit == 0,
                    return_token_ids=bool(body.return_token_ids),
                )
            )
    options = body.stream_options
    return Job(
        choices=tuple(choices),
        stream=bool(body.stream),
        include_usage=bool(options and options.include_usage),
        continuous_usage=bool(options and options.continuous_usage_stats),
    )


def _sampling(body: SamplingBody, model: ServedModel, num_logprobs: int | None, echo: bool) -> SamplingParams:
    """Everything but max_tokens and seed. Client over generation_config.json over OpenAI's defaults."""
    default = model.default_sampling
    temperature = _or(body.temperature, default.temperature)
    eos_ids = () if body.ignore_eos else model.eos_token_ids
    return SamplingParams(
        max_tokens=1,
        seed=0,
        temperature=0.0 if temperature < GREEDY_TEMPERATURE else temperature,
        top_p=_or(body.top_p, default.top_p),
        top_k=max(0, _or(body.top_k, default.top_k)),
        min_p=_or(body.min_p, default.min_p),
        repetition_penalty=_or(body.repetition_penalty, default.repetition_penalty),
        presence_penalty=_or(body.presence_penalty, 0.0),
        frequency_penalty=_or(body.frequency_penalty, 0.0),
        logit_bias=tuple((int(token), bias) for token, bias in (body.logit_bias or {}).items()),
        stop_token_ids=tuple(dict.fromkeys((*eos_ids, *(body.stop_token_ids or ())))),
        min_tokens=body.min_tokens or 0,
        logprobs=num_logprobs,
        prompt_logprobs=num_logprobs if echo else None,
    )


Number = TypeVar("Number", int, float)


def _or(value: Number | None, default: Number) -> Number:
    return default if value is None else value
