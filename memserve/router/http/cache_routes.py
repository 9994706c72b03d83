"""The admin routes of the cache: POST /v1/cache/flush, /v1/cache/lookup and /v1/cache/resize.

Each answers with a row an instance; one that is down, or did not answer in time, says so in its row.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass

import msgspec
from aiohttp import hdrs, web

from memserve.errors import RequestError
from memserve.memfd import available_bytes
from memserve.messages import CacheCommand, CacheReport, CacheVerb, pack_tokens
from memserve.router.engine_api import Engine, InstanceStatus
from memserve.router.http.limits import HttpLimits
from memserve.router.http.openai import to_json
from memserve.router.http.schemas import ChatBody, decode_flush, decode_lookup, decode_resize
from memserve.router.http.served_model import ServedModel
from memserve.router.http.validation import plan_chat, plan_completion
from memserve.sizes import format_bytes, parse_memory


class CacheRow(msgspec.Struct, frozen=True, omit_defaults=True):
    """What became of a command at one instance; only the fields that belong to the command are there."""

    instance: str
    role: str
    freed_blocks: int | msgspec.UnsetType = msgspec.UNSET
    device_tokens: int | msgspec.UnsetType = msgspec.UNSET
    host_tokens: int | msgspec.UnsetType = msgspec.UNSET
    host_blocks: int | msgspec.UnsetType = msgspec.UNSET
    host_bytes: int | msgspec.UnsetType = msgspec.UNSET
    max_host_blocks: int | msgspec.UnsetType = msgspec.UNSET
    error: str | msgspec.UnsetType = msgspec.UNSET


class CacheAnswer(msgspec.Struct, frozen=True):
    """`prompt_tokens`: of a look-up."""

    object: str
    data: list[CacheRow]
    prompt_tokens: int | msgspec.UnsetType = msgspec.UNSET


@dataclass(frozen=True, slots=True)
class CacheRoutes:
    """The handlers. `read_body` reads a JSON body within the limits."""

    engine: Engine
    model: ServedModel
    limits: HttpLimits
    read_body: Callable[[web.Request], Awaitable[bytes]]

    def add_to(self, app: web.Application) -> None:
        """Register the routes."""
        app.router.add_post("/v1/cache/flush", self.flush)
        app.router.add_post("/v1/cache/lookup", self.lookup)
        app.router.add_post("/v1/cache/resize", self.resize)

    async def flush(self, request: web.Request) -> web.Response:
        """Forget all that no request uses: {"instance": NAME}, or nothing for all, and for all the ids that
        answers are read as when they come back.
        """
        body = decode_flush(b"" if _is_bare(request) else await self.read_body(request))
        if body.instance is None and self.model.history is not None:
            self.model.history.clear()
        rows = self._rows(body.instance)
        reports = await self._ask(rows, CacheCommand(0, CacheVerb.FLUSH))
        return _answer("cache.flush", rows, reports, lambda report, _: {"freed_blocks": report.num_blocks})

    async def lookup(self, request: web.Request) -> web.Response:
        """How much of a prompt is cached where; the body is that of a completion or a chat request."""
        body = decode_lookup(await self.read_body(request))
        name = "lookup"
        if isinstance(body, ChatBody):
            job = await plan_chat(body, name, self.model, self.limits)
        else:
            job = await plan_completion(body, name, self.model, self.limits)
        if len(job.choices) != 1:
            raise RequestError("one prompt is looked up at a time", param="prompt")
        asked = job.choices[0].request
        rows = self._rows(None)
        command = CacheCommand(0, CacheVerb.LOOKUP, pack_tokens(asked.token_ids), asked.cache_salt)
        reports = await self._ask(rows, command)
        return _answer(
            "cache.lookup",
            rows,
            reports,
            lambda report, _: {
                "device_tokens": report.num_device_tokens,
                "host_tokens": report.num_host_tokens,
            },
            prompt_tokens=len(asked.token_ids),
        )

    async def resize(self, request: web.Request) -> web.Response:
        """Let host tiers have {"host_memory": SIZE} each, of {"instance": NAME} or of all that have one."""
        body = decode_resize(await self.read_body(request))
        if body.host_memory is None:
            raise RequestError("host_memory is missing, such as 2GiB", param="host_memory")
        num_bytes = _size(body.host_memory)
        rows = [row for row in self._rows(body.instance) if row.max_host_blocks]
        if not rows:
            raise RequestError("no such instance has a host tier (--host-memory)", param="instance")
        self._check(rows, num_bytes)
        commands = {
            row.instance: CacheCommand(0, CacheVerb.RESIZE, num_host_blocks=num_bytes // row.block_bytes)
            for row in rows
        }
        reports = await self.engine.command_caches(commands)
        return _answer(
            "cache.resize",
            rows,
            reports,
            lambda report, row: {
                "host_blocks": report.num_blocks,
                "host_bytes": report.num_blocks * row.block_bytes,
                "max_host_blocks": report.num_blocks_most,
            },
        )

    def _check(self, rows: Sequence[InstanceStatus], num_bytes: int) -> None:
        """All together must fit, as at the start: each of them looks only for itself."""
        most = min(row.max_host_blocks * row.block_bytes for row in rows)
        if num_bytes > most:
            raise RequestError(f"host_memory: at most {format_bytes(most)} are possible", param="host_memory")
        growth = sum(max(0, num_bytes - row.load.num_host_blocks * row.block_bytes) for row in rows)
        available = available_bytes()
        if growth > available:
            raise RequestError(
                f"host_memory: {format_bytes(growth)} more are needed, {format_bytes(available)} are free",
                param="host_memory",
            )

    def _rows(self, instance: str | None) -> list[InstanceStatus]:
        rows = [row for row in self.engine.status().instances if instance in (None, row.instance)]
        if not rows:
            raise RequestError(
                f"there is no instance {instance!r}", status=404, code="instance_not_found", param="instance"
            )
        return rows

    async def _ask(
        self, rows: list[InstanceStatus], command: CacheCommand
    ) -> Mapping[str, CacheReport | None]:
        return await self.engine.command_caches({row.instance: command for row in rows})


def _is_bare(request: web.Request) -> bool:
    """Whether it says nothing but its path, as `curl -X POST` does. A web page could send that too without
    being asked, as it could other types than JSON, but a browser then tells where it comes from.
    """
    told = (hdrs.CONTENT_TYPE, hdrs.ORIGIN, "Sec-Fetch-Site")
    return not request.can_read_body and not any(name in request.headers for name in told)


def _size(text: str) -> int:
    """Bytes. Raises RequestError."""
    if text.strip() == "0":
        return 0
    try:
        num_bytes = parse_memory(text)
    except ValueError:
        num_bytes = 0.0
    if isinstance(num_bytes, float):
        raise RequestError(f"host_memory: {text!r} is no size, such as 2GiB or 0", param="host_memory")
    return num_bytes


def _answer(
    name: str,
    rows: Sequence[InstanceStatus],
    reports: Mapping[str, CacheReport | None],
    fields: Callable[[CacheReport, InstanceStatus], dict[str, int]],
    prompt_tokens: int | msgspec.UnsetType = msgspec.UNSET,
) -> web.Response:
    """A row for each of `rows`, with what `fields` makes of its report."""
    data = []
    for row in rows:
        report = reports.get(row.instance)
        given: dict[str, int] = {}
        error: str | msgspec.UnsetType = "the instance is down or did not answer"
        if report is not None:
            given, error = fields(report, row), report.error or msgspec.UNSET
        data.append(CacheRow(row.instance, row.role.value, **given, error=error))
    answer = CacheAnswer(name, data, prompt_tokens)
    return web.Response(body=to_json(answer), content_type="application/json")
