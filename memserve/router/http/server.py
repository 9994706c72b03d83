"""The HTTP application: routes, reading of bodies, and the writing of answers and streams.

    POST /v1/completions, /v1/chat/completions     decode (schemas) ─► plan (validation)
                                                   ─► run (generation) ─► write (formats, event_stream)
    POST /v1/requests/{id}/cancel                  end one of those (active)
    GET  /v1/requests, /v1/requests/{id}           what was decided for the last requests (request_view)
    GET  /v1/models, /v1/models/{id}, /v1/workers, /health, /metrics

A handler owns its sequences: however it ends — answered, failed, the client gone and the handler cancelled —
its `Generation` is closed before it returns, and with it everything the engine runs for it. That needs an
AppRunner with `handler_cancellation=True`. Errors before the first byte become a status (`errors.py`),
later ones the last event of the stream.

A request has one id, the `x-request-id` of its answer: the answer's own id ends in it, and the engine's ids,
which are in every log line of router and workers, begin with it. A client may choose it, and repeat it; the
number after it keeps the engine's apart. Who knows it may cancel the request. One that the server chose
cannot be guessed, but whoever reaches the server can list them: there are no keys yet that a list could be
scoped to.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import re
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import closing, suppress
from typing import TypeVar

import msgspec
from aiohttp import ClientPayloadError, hdrs, web
from aiohttp.http_exceptions import HttpProcessingError

from memserve.errors import RequestError
from memserve.router.engine_api import Engine
from memserve.router.http.active import ActiveRequests
from memserve.router.http.cache_routes import CacheRoutes
from memserve.router.http.choices import Choice, ChoiceUpdate
from memserve.router.http.errors import (
    DIVERGED_AT,
    METRICS,
    REQUEST_ID,
    add_headers,
    error_object,
    errors_middleware,
)
from memserve.router.http.event_stream import ClientGone, EventStream
from memserve.router.http.fleet_view import worker_list
from memserve.router.http.formats import (
    CACHED_HEADER,
    DONE,
    ChatFormat,
    Collected,
    CompletionFormat,
    Format,
    UsageField,
    cached_header,
    cached_of,
    count_logprobs,
    event,
    usage_of,
)
from memserve.router.http.generation import Generation, make_choices
from memserve.router.http.limits import HttpLimits
from memserve.router.http.openai import CancelledObject, ModelList, ModelObject, to_json
from memserve.router.http.request_view import decision_headers, request_list, request_object
from memserve.router.http.schemas import SamplingBody, decode_chat, decode_completion
from memserve.router.http.served_model import ServedModel
from memserve.router.http.validation import Job, plan_chat, plan_completion, unknown_model
from memserve.router.metrics import CONTENT_TYPE, Metrics
from memserve.router.request_log import RequestRecord
from memserve.router.scheduling.policies.policies import POLICIES

logger = logging.getLogger(__name__)

Body = TypeVar("Body", bound=SamplingBody)
Value = TypeVar("Value")
Planner = Callable[[Body, str, ServedModel, HttpLimits], Awaitable[Job]]

SESSION_HEADER = "x-session-id"
POLICY_HEADER = "x-memserve-policy"
MAX_SESSION_LENGTH = 256
LISTED_REQUESTS, MAX_LISTED_REQUESTS = 20, 1000

# So many log-probabilities become JSON on the event loop in about the time that a thread takes to start.
_INLINE_LOGPROBS = 1024


def create_app(engine: Engine, model: ServedModel, limits: HttpLimits | None = None) -> web.Application:
    """The application that serves `model` by `engine`. Run it with `AppRunner(app,
    handler_cancellation=True)`.
    """
    limits = limits or HttpLimits()
    app = web.Application(middlewares=[errors_middleware], client_max_size=limits.max_body_bytes)
    metrics = app[METRICS] = Metrics(engine)
    app.on_response_prepare.append(add_headers)
    server = _Server(engine, model, limits, metrics)
    app.router.add_post("/v1/completions", server.completions)
    app.router.add_post("/v1/chat/completions", server.chat_completions)
    app.router.add_post("/v1/requests/{id:.+}/cancel", server.cancel)
    CacheRoutes(engine, model, limits, server.read_body).add_to(app)
    app.router.add_get("/v1/requests", server.list_requests)
    app.router.add_get("/v1/requests/{id:.+}", server.show_request)
    app.router.add_get("/v1/workers", server.list_workers)
    app.router.add_get("/v1/models", server.list_models)
    app.router.add_get("/v1/models/{id:.+}", server.show_model)
    app.router.add_get("/health", server.health)
    app.router.add_get("/metrics", server.render_metrics)
    return app


class _Server:
    """The handlers and what they share."""

    def __init__(self, engine: Engine, model: ServedModel, limits: HttpLimits, metrics: Metrics) -> None:
        self._engine = engine
        self._model = model
        self._limits = limits
        self._metrics = metrics
        self._active = ActiveRequests(limits)
        self._numbers = itertools.count(1)

    async def completions(self, request: web.Request) -> web.StreamResponse:
        """POST /v1/completions."""
        answer_id = f"cmpl-{request[REQUEST_ID]}"
        form = CompletionFormat(answer_id, int(time.time()), self._model.name, self._model.tokenizer)
        return await self._answer(request, form, decode_completion, plan_completion)

    async def chat_completions(self, request: web.Request) -> web.StreamResponse:
        """POST /v1/chat/completions."""
        answer_id = f"chatcmpl-{request[REQUEST_ID]}"
        form = ChatFormat(answer_id, int(time.time()), self._model.name, self._model.tokenizer)
        return await self._answer(request, form, decode_chat, plan_chat)

    async def cancel(self, request: web.Request) -> web.Response:
        """POST /v1/requests/{id}/cancel: 404 unless such a request is being served."""
        name = request.match_info["id"]
        if not self._active.cancel(name):
            raise RequestError(
                f"no request {name!r} is being served", status=404, code="request_not_found", param="id"
            )
        return _json(CancelledObject(name))

    async def show_request(self, request: web.Request) -> web.Response:
        """GET /v1/requests/{id}: why it went where it went; 404 if it is not known, or not any more."""
        name = request.match_info["id"]
        of_answer = name.removeprefix("chatcmpl-").removeprefix("cmpl-")
        records = self._records_of(name) or self._records_of(of_answer)
        if not records:
            raise RequestError(
                f"nothing is known of a request {name!r}", status=404, code="request_not_found", param="id"
            )
        return _json(request_object(name, records))

    def _records_of(self, request_id: str) -> list[RequestRecord]:
        """Of the sequences of one HTTP request, whose ids `_answer` makes; or of one sequence, by its own."""
        of_this = re.compile(re.escape(request_id) + r"(\.\d+-\d+)?")
        records = self._engine.explain_all(request_id)
        return [record for record in records if of_this.fullmatch(record.request_id)]

    async def list_requests(self, request: web.Request) -> web.Response:
        """GET /v1/requests?limit=N: the newest sequences, N that go on and N that have ended."""
        text = request.query.get("limit", str(LISTED_REQUESTS))
        limit = int(text) if text.isascii() and text.isdecimal() and len(text) < 6 else 0
        if not 1 <= limit <= MAX_LISTED_REQUESTS:
            raise RequestError(f"limit must be a number from 1 to {MAX_LISTED_REQUESTS}", param="limit")
        return _json(request_list(self._engine.recent(limit)))

    async def list_workers(self, request: web.Request) -> web.Response:
        """GET /v1/workers: a row an instance."""
        return _json(worker_list(self._engine.status().instances))

    async def list_models(self, request: web.Request) -> web.Response:
        """GET /v1/models."""
        return _json(ModelList([self._model_object()]))

    async def show_model(self, request: web.Request) -> web.Response:
        """GET /v1/models/{id}."""
        if request.match_info["id"] != self._model.name:
            raise unknown_model(request.match_info["id"])
        return _json(self._model_object())

    async def health(self, request: web.Request) -> web.Response:
        """GET /health: 200 when a request sent now would be served, else 503; with a row an instance."""
        ready = self._engine.ready()
        status = self._engine.status()
        body = {"status": "ok" if ready else "unavailable", "instances": status.instances}
        return web.Response(
            status=200 if ready else 503, body=msgspec.json.encode(body), content_type="application/json"
        )

    async def render_metrics(self, request: web.Request) -> web.Response:
        """GET /metrics, for Prometheus."""
        return web.Response(body=self._metrics.render(), headers={hdrs.CONTENT_TYPE: CONTENT_TYPE})

    def _model_object(self) -> ModelObject:
        return ModelObject(self._model.name, self._model.created, self._model.max_model_len)

    # --- generation ----------------------------------------------------------------------------------------

    async def _answer(
        self, request: web.Request, form: Format, decode: Callable[[bytes], Body], plan: Planner[Body]
    ) -> web.StreamResponse:
        self._engine.check_room(1)  # before any work
        with self._active.admit((request[REQUEST_ID], form.id), self._most_bytes(request)) as active:
            data = await self.read_body(request)
            active.num_bytes = len(data)
            job_id = f"{request[REQUEST_ID]}.{next(self._numbers)}"
            job = await plan(decode(data), job_id, self._model, self._limits)
            job = placed_as_asked(job, request.headers)
            choices = await make_choices(job, self._model.tokenizer)
            timer = self._metrics.start_request()
            with closing(Generation(self._engine, choices, timer, self._model.history)) as generation:
                active.start(generation)
                self._note_readings(request, job)  # while a worker computes
                response: web.StreamResponse
                if job.stream:
                    response = await self._stream(request, form, job, generation)
                else:
                    response = await self._whole(form, generation)
            if all(choice.finish_reason is not None for choice in choices):
                self._metrics.on_finished(timer, usage_of(choices), cached_of(choices))
            return response

    def _note_readings(self, request: web.Request, job: Job) -> None:
        """Tells what the history of tokens was to the prompts; the header is of the first that diverged."""
        firsts = {choice.prompt_index: choice.prompt.reading for choice in job.choices}
        for reading in firsts.values():
            if reading is None:
                continue
            diverged_at = reading.diverged_at
            self._metrics.on_prompt(reading.num_reused, diverged_at is not None)
            if diverged_at is not None and DIVERGED_AT not in request:
                request[DIVERGED_AT] = diverged_at
            logger.debug(
                "request %s: %d of %d prompt tokens are remembered ones; diverged at: %s",
                request[REQUEST_ID],
                reading.num_reused,
                len(reading.token_ids),
                diverged_at,
            )

    def _most_bytes(self, request: web.Request) -> int:
        """What the body will take at most; the whole allowance where its length is not told."""
        most = self._limits.max_body_bytes
        told = request.content_length if hdrs.CONTENT_ENCODING not in request.headers else None
        return most if told is None else min(told, most)

    async def read_body(self, request: web.Request) -> bytes:
        """A JSON body, within the limits. Raises RequestError."""
        # Other types a browser sends across sites without asking, so any web page could use a local server.
        if request.content_type != "application/json":
            raise RequestError("the content-type must be application/json", status=415)
        if (request.content_length or 0) > self._limits.max_body_bytes:
            raise web.HTTPRequestEntityTooLarge(self._limits.max_body_bytes, request.content_length or 0)
        try:
            if request.content.is_eof():  # it came with the head, as most do: no timer is needed
                return await request.read()
            async with asyncio.timeout(self._limits.body_timeout_s):
                return await request.read()
        except TimeoutError:
            raise RequestError("the body took too long to arrive", status=408) from None
        except (ClientPayloadError, HttpProcessingError, web.RequestPayloadError):
            raise RequestError("the body cannot be read: its encoding is broken") from None

    async def _whole(self, form: Format, generation: Generation) -> web.Response:
        collected = [Collected() for _ in generation.choices]
        while updates := await generation.next():
            for update in updates:
                collected[update.index].add(update)
        num_logprobs = sum(count_logprobs(choice.entries) for choice in collected)
        usage = usage_of(generation.choices)
        body = await _maybe_off_loop(num_logprobs, lambda done: form.whole(done, usage), collected)
        headers = self._explaining(generation.choices)
        return web.Response(body=body, content_type="application/json", headers=headers)

    def _explaining(self, choices: Sequence[Choice]) -> dict[str, str]:
        """Headers that say where the first choice went, and what was cached of all prompts."""
        record = self._engine.explain(choices[0].plan.request.request_id)
        return decision_headers(record) | {CACHED_HEADER: cached_header(choices)}

    async def _stream(
        self, request: web.Request, form: Format, job: Job, generation: Generation
    ) -> web.StreamResponse:
        """Until the stream opens (`EventStream`) an error can still be a status."""

        def events_of(updates: Sequence[ChoiceUpdate]) -> bytes:
            return b"".join([event(chunk) for update in updates for chunk in form.chunks(update, usage)])

        choices = generation.choices
        usage = _usage_so_far(job, choices)
        head = b"".join([event(chunk) for chunk in form.opening(len(choices), usage)])
        async with EventStream(request, self._limits) as stream:
            try:
                while updates := await generation.next():
                    if not stream.response.prepared:
                        stream.response.headers.update(self._explaining(choices))
                    usage = _usage_so_far(job, choices)
                    if choices[0].plan.num_logprobs is None:
                        data = events_of(updates)
                    else:
                        num_logprobs = sum(count_logprobs(update.entries) for update in updates)
                        data = await _maybe_off_loop(num_logprobs, events_of, updates)
                    await stream.write(head + data)
                    head = b""
                last = event(form.usage_chunk(usage_of(choices))) if job.include_usage else b""
                await stream.write(last + DONE)
            except ClientGone:
                pass  # nobody is left to be told
            except Exception as error:
                if not await stream.is_open():
                    raise
                _, body = error_object(error, request[REQUEST_ID])
                with suppress(ClientGone):
                    await stream.write(event(body))
        return stream.response


def placed_as_asked(job: Job, headers: Mapping[str, str]) -> Job:
    """With the session and the policy that the headers name. Raises RequestError on an unknown policy."""
    session, policy = headers.get(SESSION_HEADER), headers.get(POLICY_HEADER)
    if session is None and policy is None:
        return job
    if policy is not None and policy not in POLICIES:
        raise RequestError(
            f"{POLICY_HEADER}: {policy!r} is none of {', '.join(POLICIES)}", param=POLICY_HEADER
        )
    if session is not None and len(session) > MAX_SESSION_LENGTH:
        raise RequestError(f"{SESSION_HEADER}: longer than {MAX_SESSION_LENGTH}", param=SESSION_HEADER)
    choices = []
    for choice in job.choices:
        request = msgspec.structs.replace(
            choice.request, session=session or choice.request.session, policy=policy
        )
        choices.append(msgspec.structs.replace(choice, request=request))
    return msgspec.structs.replace(job, choices=tuple(choices))


async def _maybe_off_loop(num_logprobs: int, write: Callable[[Value], bytes], value: Value) -> bytes:
    """`write(value)`, in a thread if there are many log-probabilities to be written."""
    return write(value) if num_logprobs <= _INLINE_LOGPROBS else await asyncio.to_thread(write, value)


def _usage_so_far(job: Job, choices: Sequence[Choice]) -> UsageField:
    """What a chunk says of the usage: so far, null (it comes at the end), or nothing at all."""
    if job.continuous_usage:
        return usage_of(choices)
    return None if job.include_usage else msgspec.UNSET


def _json(value: msgspec.Struct) -> web.Response:
    return web.Response(body=to_json(value), content_type="application/json")
