"""The HTTP application: routes, reading of bodies, and the writing of answers and streams.

    POST /v1/completions, /v1/chat/completions     decode (schemas) ─► plan (validation) ─► run (generation)
    ─► write GET  /v1/models, /v1/models/{id}, /health, /metrics

A handler owns its sequences: however it ends — answered, failed, the client gone and the handler cancelled —
the generators are closed before it returns, and with them everything the engine runs for it. That needs an
AppRunner with `handler_cancellation=True`. Errors before the first byte become a status (`http_errors.py`),
later ones the last event of the stream.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing, suppress
from typing import TypeVar

import msgspec
from aiohttp import ClientPayloadError, hdrs, web
from aiohttp.http_exceptions import HttpProcessingError

from memserve.errors import Overloaded, RequestError
from memserve.router.choices import Choice
from memserve.router.engine_api import Engine
from memserve.router.formats import (
    DONE,
    ChatFormat,
    Collected,
    CompletionFormat,
    Format,
    UsageField,
    event,
    usage_of,
)
from memserve.router.generation import Updates, run_choices
from memserve.router.http_errors import (
    METRICS,
    REQUEST_ID,
    add_request_id,
    error_object,
    errors_middleware,
)
from memserve.router.limits import HttpLimits
from memserve.router.metrics import CONTENT_TYPE, Metrics
from memserve.router.openai import ModelList, ModelObject, to_json
from memserve.router.schemas import SamplingBody, decode_chat, decode_completion
from memserve.router.served_model import ServedModel
from memserve.router.validation import Job, plan_chat, plan_completion, unknown_model

logger = logging.getLogger(__name__)

Body = TypeVar("Body", bound=SamplingBody)
Planner = Callable[[Body, str, ServedModel, HttpLimits], Awaitable[Job]]


_STREAM_HEADERS = {
    hdrs.CONTENT_TYPE: "text/event-stream; charset=utf-8",
    hdrs.CACHE_CONTROL: "no-cache",
    "X-Accel-Buffering": "no",
}


class _ClientGone(Exception):
    """The client closed the connection, or did not read for too long."""


def create_app(engine: Engine, model: ServedModel, limits: HttpLimits | None = None) -> web.Application:
    """The application that serves `model` by `engine`. Run it with `AppRunner(app,
    handler_cancellation=True)`.
    """
    limits = limits or HttpLimits()
    app = web.Application(middlewares=[errors_middleware], client_max_size=limits.max_body_bytes)
    metrics = app[METRICS] = Metrics(engine)
    app.on_response_prepare.append(add_request_id)
    server = _Server(engine, model, limits, metrics)
    app.router.add_post("/v1/completions", server.completions)
    app.router.add_post("/v1/chat/completions", server.chat_completions)
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
        self._num_requests = 0

    async def completions(self, request: web.Request) -> web.StreamResponse:
        """POST /v1/completions."""
        answer_id = f"cmpl-{uuid.uuid4().hex}"
        form = CompletionFormat(answer_id, int(time.time()), self._model.name, self._model.tokenizer)
        return await self._answer(request, form, answer_id, decode_completion, plan_completion)

    async def chat_completions(self, request: web.Request) -> web.StreamResponse:
        """POST /v1/chat/completions."""
        answer_id = f"chatcmpl-{uuid.uuid4().hex}"
        form = ChatFormat(answer_id, int(time.time()), self._model.name, self._model.tokenizer)
        return await self._answer(request, form, answer_id, decode_chat, plan_chat)

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
        self,
        request: web.Request,
        form: Format,
        answer_id: str,
        decode: Callable[[bytes], Body],
        plan: Planner[Body],
    ) -> web.StreamResponse:
        if self._num_requests >= self._limits.max_requests:
            raise Overloaded("too many requests are being served", retry_after_s=1.0)
        self._num_requests += 1
        try:
            logger.debug("request %s is %s", request[REQUEST_ID], answer_id)
            return await self._generate(request, form, answer_id, decode, plan)
        finally:
            self._num_requests -= 1

    async def _generate(
        self,
        request: web.Request,
        form: Format,
        answer_id: str,
        decode: Callable[[bytes], Body],
        plan: Planner[Body],
    ) -> web.StreamResponse:
        body = decode(await self._read_body(request))
        job = await plan(body, answer_id, self._model, self._limits)
        choices = [Choice(choice, self._model.tokenizer) for choice in job.choices]
        timer = self._metrics.start_request()
        async with aclosing(run_choices(self._engine, choices, timer)) as updates:
            if job.stream:
                response: web.StreamResponse = await self._stream(request, form, job, choices, updates)
            else:
                response = await self._whole(form, choices, updates)
        if all(choice.finish_reason is not None for choice in choices):
            usage = usage_of(choices)
            self._metrics.on_finished(
                timer,
                prompt_tokens=usage.prompt_tokens,
                cached_tokens=usage.prompt_tokens_details.cached_tokens,
                completion_tokens=usage.completion_tokens,
            )
        return response

    async def _read_body(self, request: web.Request) -> bytes:
        # Other types a browser sends across sites without asking, so any web page could use a local server.
        if request.content_type != "application/json":
            raise RequestError("the content-type must be application/json", status=415)
        if (request.content_length or 0) > self._limits.max_body_bytes:
            raise web.HTTPRequestEntityTooLarge(self._limits.max_body_bytes, request.content_length or 0)
        try:
            async with asyncio.timeout(self._limits.body_timeout_s):
                return await request.read()
        except TimeoutError:
            raise RequestError("the body took too long to arrive", status=408) from None
        except (ClientPayloadError, HttpProcessingError, web.RequestPayloadError):
            raise RequestError("the body cannot be read: its encoding is broken") from None

    async def _whole(
        self, form: Format, choices: Sequence[Choice], updates: AsyncGenerator[Updates, None]
    ) -> web.Response:
        collected = [Collected() for _ in choices]
        async for batch in updates:
            for update in batch:
                collected[update.index].add(update)
        return web.Response(body=form.whole(collected, usage_of(choices)), content_type="application/json")

    async def _stream(
        self,
        request: web.Request,
        form: Format,
        job: Job,
        choices: Sequence[Choice],
        updates: AsyncGenerator[Updates, None],
    ) -> web.StreamResponse:
        """Headers go out with the first token: until then an error can still be a status."""
        response: web.StreamResponse | None = None
        try:
            async for batch in updates:
                usage = _usage_so_far(job, choices)
                events = [event(chunk) for update in batch for chunk in form.chunks(update, usage)]
                if response is None:
                    response = web.StreamResponse(headers=_STREAM_HEADERS)
                    events[:0] = [event(chunk) for chunk in form.opening(len(choices), usage)]
                await self._write(request, response, b"".join(events))
            assert response is not None  # the end of a choice is an update
            last = event(form.usage_chunk(usage_of(choices))) if job.include_usage else b""
            await self._write(request, response, last + DONE)
        except _ClientGone:
            pass
        except Exception as error:
            if response is None or not response.prepared:
                raise
            _, body = error_object(error, request[REQUEST_ID])
            with suppress(_ClientGone):
                await self._write(request, response, event(body))
        assert response is not None  # nobody is gone before the first write
        return response

    async def _write(self, request: web.Request, response: web.StreamResponse, data: bytes) -> None:
        """Sends `data`, and the headers first. Waits for a slow reader, up to the limit."""
        try:
            async with asyncio.timeout(self._limits.write_timeout_s):
                if not response.prepared:
                    await response.prepare(request)
                await response.write(data)
        except (ConnectionError, TimeoutError):
            if request.transport is not None:
                request.transport.abort()
            raise _ClientGone from None


def _usage_so_far(job: Job, choices: Sequence[Choice]) -> UsageField:
    """What a chunk says of the usage: so far, null (it comes at the end), or nothing at all."""
    if job.continuous_usage:
        return usage_of(choices)
    return None if job.include_usage else msgspec.UNSET


def _json(value: msgspec.Struct) -> web.Response:
    return web.Response(body=to_json(value), content_type="application/json")
