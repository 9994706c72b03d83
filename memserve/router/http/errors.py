"""Errors as HTTP answers in OpenAI's shape, for whatever a handler raises. Deny by default: what is not
foreseen is a 500 that says nothing but the request's id; the log has the rest.
"""

from __future__ import annotations

import logging
import math
import re
import secrets
from http import HTTPStatus

from aiohttp import http_exceptions, web
from aiohttp.typedefs import Handler
from multidict import CIMultiDict

from memserve.errors import EngineError, Overloaded, RequestError
from memserve.router.http.openai import ErrorBody, ErrorObject, to_json
from memserve.router.metrics import Metrics

logger = logging.getLogger(__name__)

REQUEST_ID = web.RequestKey("request_id", str)
REQUEST_ID_HEADER = "x-request-id"
DIVERGED_AT = web.RequestKey("diverged_at", int)
DIVERGED_AT_HEADER = "x-memserve-diverged-at"
METRICS = web.AppKey("metrics", Metrics)

# What nginx calls a client that left before it was answered.
_CLIENT_LEFT = 499
_SANE_ID = re.compile(r"[\x21-\x7e]{1,128}")
_TYPES = {
    400: "invalid_request_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
}


def error_object(error: BaseException, request_id: str) -> tuple[int, ErrorObject]:
    """The status and the body that tell a client of `error`. Logs what the client is not told."""
    if isinstance(error, RequestError):
        return error.status, _object(error.status, str(error), error.param, error.code)
    if isinstance(error, web.HTTPException):
        return error.status, _object(error.status, _http_message(error), None, None)
    if isinstance(error, EngineError):  # known, and its own words say what happened
        logger.error("request %s failed: %s", request_id, error)
    else:
        logger.error("request %s failed", request_id, exc_info=error)
    return 500, _object(500, f"the server failed at this request (id {request_id})", None, "internal_error")


def error_response(error: BaseException, request_id: str) -> web.Response:
    """`error` as a whole answer."""
    status, body = error_object(error, request_id)
    headers: CIMultiDict[str] = CIMultiDict()
    if isinstance(error, Overloaded):
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s)))
    if isinstance(error, web.HTTPMethodNotAllowed):
        headers["Allow"] = error.headers["Allow"]
    return web.Response(status=status, body=to_json(body), content_type="application/json", headers=headers)


def parser_error(error: http_exceptions.HttpProcessingError) -> RequestError:
    """What to tell a client whose bytes aiohttp's parser refused; its own words would repeat them."""
    if isinstance(error, http_exceptions.LineTooLong):
        return RequestError("a line of the request's head is too long", status=431)
    if isinstance(error, http_exceptions.ContentEncodingError):
        return RequestError("the body cannot be read: its content-encoding is not supported or broken")
    return RequestError("this is not a valid HTTP request")


@web.middleware
async def errors_middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Outermost: gives the request its id, answers errors, counts the answer."""
    request_id = request[REQUEST_ID] = _id_for(request)
    status = _CLIENT_LEFT
    try:
        try:
            response = await handler(request)
        except Exception as error:
            response = error_response(error, request_id)
            if request.content.exception() is not None:  # no telling where the next request begins
                request.content.feed_eof()
                response.force_close()
        status = response.status
        return response
    finally:
        resource = request.match_info.route.resource
        endpoint = resource.canonical if resource is not None else "other"
        request.app[METRICS].on_response(endpoint, status)


async def add_headers(request: web.Request, response: web.StreamResponse) -> None:
    """Signal handler: `x-request-id` on every answer, streams included; `x-memserve-diverged-at` where a
    prompt departed from what is remembered.
    """
    # aiohttp refuses what a request expects before any middleware has seen it.
    response.headers[REQUEST_ID_HEADER] = request[REQUEST_ID] if REQUEST_ID in request else _id_for(request)
    if DIVERGED_AT in request:
        response.headers[DIVERGED_AT_HEADER] = str(request[DIVERGED_AT])


def _id_for(request: web.Request) -> str:
    sent = request.headers.get(REQUEST_ID_HEADER, "")
    return sent if _SANE_ID.fullmatch(sent) else secrets.token_hex(16)


def _object(status: int, message: str, param: str | None, code: str | None) -> ErrorObject:
    kind = _TYPES.get(status) or ("invalid_request_error" if status < 500 else "server_error")
    return ErrorObject(ErrorBody(message, kind, param, code))


def _http_message(error: web.HTTPException) -> str:
    if isinstance(error, web.HTTPRequestEntityTooLarge):
        return "the body is too large"
    if isinstance(error, web.HTTPMethodNotAllowed):
        return f"{error.method} is not allowed here"
    return HTTPStatus(error.status).phrase.lower()
