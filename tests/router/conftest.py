"""Fixtures of the HTTP layer's tests: an engine that plays a script, the application on a loopback port."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web

import memserve
from memserve.config import Role
from memserve.errors import MemserveError, Overloaded
from memserve.messages import CacheCommand, CachedTokens, CacheReport, FinishReason, Load, TokenLogprobs
from memserve.model_config import DefaultSampling
from memserve.router.engine_api import (
    Delta,
    EngineStatus,
    GenerateRequest,
    InstanceState,
    InstanceStatus,
    Listener,
)
from memserve.router.http.connections import HttpConnection
from memserve.router.http.limits import HttpLimits
from memserve.router.http.served_model import ServedModel
from memserve.router.http.server import create_app
from memserve.router.request_log import Recent, RequestLog, RequestRecord
from memserve.router.text.chat_template import ChatTemplate
from memserve.router.text.tokenizer import Tokenizer

TINY_MODEL = Path(memserve.__file__).parent / "tiny_model"
EOS = 2

Reply = Callable[[GenerateRequest], Sequence[Delta]]


@dataclass
class FakeEngine:
    """Plays `reply(request)`, a delta at a time; counts who is being served.

    `error` is raised after `error_after` deltas. While `gate` is clear, only `free_deltas` come.
    """

    reply: Reply
    is_ready: bool = True
    error: Exception | None = None
    error_after: int = 0
    free_deltas: int = 0
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    requests: list[GenerateRequest] = field(default_factory=list)
    active: dict[str, asyncio.Task[None]] = field(default_factory=dict)
    num_closed_early: int = 0
    room: int = 512
    log: RequestLog = field(default_factory=RequestLog)
    commands: list[tuple[str, CacheCommand]] = field(default_factory=list)
    reports: dict[str, CacheReport | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.gate.set()

    def submit(self, request: GenerateRequest, listener: Listener) -> None:
        assert request.request_id not in self.active
        if self.error is not None and not isinstance(self.error, MemserveError):
            raise self.error  # a bug
        self.requests.append(request)
        self.active[request.request_id] = asyncio.create_task(self._play(request, listener))

    def cancel(self, request_id: str) -> None:
        task = self.active.pop(request_id, None)
        if task is not None:
            self.num_closed_early += 1
            task.cancel()

    async def _play(self, request: GenerateRequest, listener: Listener) -> None:
        deltas = self.reply(request)
        for i, delta in enumerate(deltas):
            if i >= self.free_deltas:
                await self.gate.wait()
            await asyncio.sleep(0)
            failed = self.error is not None and i == self.error_after
            if failed or i == len(deltas) - 1:
                del self.active[request.request_id]
            if failed:
                assert isinstance(self.error, MemserveError)
                listener(self.error)
                return
            listener(delta)

    def check_room(self, num_sequences: int) -> None:
        if num_sequences > self.room:
            raise Overloaded("no room", retry_after_s=1.0)

    async def command_caches(self, commands: Mapping[str, CacheCommand]) -> Mapping[str, CacheReport | None]:
        self.commands += commands.items()
        return {instance: self.reports.get(instance) for instance in commands}

    def explain(self, request_id: str) -> RequestRecord | None:
        return self.log.get(request_id)

    def explain_all(self, prefix: str) -> Sequence[RequestRecord]:
        return self.log.of_prefix(prefix)

    def recent(self, limit: int) -> Recent:
        return self.log.recent(limit, now=101.0)

    def ready(self) -> bool:
        return self.is_ready

    def status(self) -> EngineStatus:
        load = Load(num_running=3, num_free_blocks=7, num_active_blocks=2, num_offers=1)
        rows = (
            InstanceStatus(
                "prefill-0",
                Role.PREFILL,
                1,
                InstanceState.READY,
                load,
                block_bytes=1024,
                max_host_blocks=64,
                pulls_from=(("decode-0", "shm"),),
            ),
            InstanceStatus("decode-0", Role.DECODE, 2, InstanceState.STARTING, Load()),
        )
        return EngineStatus(instances=rows, num_waiting=4, num_running=5, pulls_total=6)


def _logprobs(token_id: int, k: int) -> TokenLogprobs:
    """The token and its successors, each half as likely as the one before."""
    return TokenLogprobs(-0.5, 1, tuple((token_id + i, -0.5 - i) for i in range(k)))


def make_deltas(request: GenerateRequest, token_ids: Sequence[int]) -> list[Delta]:
    """One delta a token, cut as an engine would cut it: at a stop token, or at max_tokens."""
    params = request.sampling
    prompt_logprobs = None
    if params.prompt_logprobs is not None:
        ids = request.token_ids.tolist()
        prompt_logprobs = (None, *(_logprobs(i, params.prompt_logprobs) for i in ids[1:]))
    deltas: list[Delta] = []
    for i, token_id in enumerate(token_ids):
        reason = None
        if token_id in params.stop_token_ids:
            reason = FinishReason.STOP
        elif i + 1 == params.max_tokens:
            reason = FinishReason.LENGTH
        logprobs = None if params.logprobs is None else (_logprobs(token_id, params.logprobs),)
        deltas.append(
            Delta((token_id,), logprobs, prompt_logprobs if i == 0 else None, reason, cached=CachedTokens(1))
        )
        if reason is not None:
            return deltas
    raise AssertionError("the script of a fake reply must end in a stop token")


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Tokenizer:
    return Tokenizer.load(TINY_MODEL)


@pytest.fixture(scope="session")
def served_model(tiny_tokenizer: Tokenizer) -> ServedModel:
    return ServedModel(
        name="tiny",
        created=1,
        max_model_len=256,
        vocab_size=tiny_tokenizer.vocab_size,
        eos_token_ids=(EOS,),
        tokenizer=tiny_tokenizer,
        chat_template=ChatTemplate.load(TINY_MODEL),
        default_sampling=DefaultSampling(temperature=0.5, top_p=0.9),
    )


@pytest.fixture
def say(tiny_tokenizer: Tokenizer) -> Callable[[str], Reply]:
    """A reply of this text, followed by eos."""

    def make(text: str) -> Reply:
        token_ids = [*tiny_tokenizer.encode(text).tolist(), EOS]
        return lambda request: make_deltas(request, token_ids)

    return make


@pytest.fixture
def say_tokens() -> Callable[[Sequence[int]], Reply]:
    """A reply of these tokens, which must include a stop token or be cut by max_tokens."""
    return lambda token_ids: lambda request: make_deltas(request, token_ids)


@dataclass
class Running:
    """The application on a port."""

    url: str
    engine: FakeEngine
    session: aiohttp.ClientSession
    http: web.Server


Serve = Callable[..., Awaitable[Running]]


@pytest.fixture
async def serve(served_model: ServedModel) -> AsyncIterator[Serve]:
    """`await serve(reply, …)` starts the application; its engine must be idle at the end."""
    closing = []

    @asynccontextmanager
    async def running(
        reply: Reply,
        *,
        model: ServedModel | None = None,
        limits: HttpLimits | None = None,
        **engine_options: object,
    ) -> AsyncIterator[Running]:
        engine = FakeEngine(reply, **engine_options)  # type: ignore[arg-type]
        app = create_app(engine, model or served_model, limits)
        runner = web.AppRunner(app, handler_cancellation=True)
        await runner.setup()
        server = runner.server
        assert server is not None
        listening = await asyncio.get_running_loop().create_server(
            lambda: HttpConnection(server), "127.0.0.1", 0
        )
        host, port = listening.sockets[0].getsockname()[:2]
        async with aiohttp.ClientSession(f"http://{host}:{port}") as session:
            yield Running(f"http://{host}:{port}/v1", engine, session, server)
        engine.gate.set()
        listening.close()
        await runner.cleanup()
        assert not engine.active

    async def start(reply: Reply, **options: object) -> Running:
        context = running(reply, **options)  # type: ignore[arg-type]
        closing.append(context)
        return await context.__aenter__()

    yield start
    for context in reversed(closing):
        await context.__aexit__(None, None, None)
