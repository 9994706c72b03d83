"""The router process from its first line to its last: resolve, start, serve, drain, stop.

    resolve   model folder, config, tokenizer, the port; everything that can be refused before a process
    exists start     supervisor and workers, while the display shows how far they are
    serve     HTTP on one uvloop; SIGINT or SIGTERM ends it
    drain     /health says 503, running requests may finish; a second signal, or the time limit, ends that
    stop      HTTP, workers, descriptors; nothing stays

Errors at start-up are `StartupError`s, for one line on the terminal.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import time
from collections.abc import Coroutine
from dataclasses import dataclass
from pathlib import Path

import setproctitle
import uvloop
from aiohttp import web

from memserve.config import ServeConfig, WorkerConfig
from memserve.display import Display
from memserve.errors import ConfigError
from memserve.model_config import default_sampling, load_model_config
from memserve.model_files import resolve_model, resolve_tokenizer, served_model_name
from memserve.router.chat_template import ChatTemplate
from memserve.router.dispatcher import Dispatcher, DispatcherLimits
from memserve.router.engine import ServingEngine
from memserve.router.machine import read_machine
from memserve.router.memory import plan_workers
from memserve.router.served_model import ServedModel
from memserve.router.server import create_app
from memserve.router.supervisor import Supervisor
from memserve.router.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

STATUS_INTERVAL_S = 5.0


@dataclass(frozen=True, slots=True)
class Run:
    """What `resolve` found: enough to start, and nothing started yet."""

    config: ServeConfig
    plan: tuple[WorkerConfig, ...]
    model: ServedModel


def run(config: ServeConfig) -> int:
    """Serve until a signal ends it; the process's exit status. Raises StartupError."""
    setproctitle.setproctitle("memserve: router")
    resolved = resolve(config)
    with bind(config.host, config.port) as sock:
        return uvloop.run(serve(resolved, sock))


def resolve(config: ServeConfig) -> Run:
    """Read the model and fit the workers into the machine. Raises StartupError."""
    folder = resolve_model(config.model, config.revision, config.load_format)
    model = load_model_config(folder)
    plan = plan_workers(config, model, folder, read_machine())
    tokenizer_source = folder if config.tokenizer is None else resolve_tokenizer(config.tokenizer)
    served = ServedModel(
        name=config.served_model_name or served_model_name(config.model),
        created=int(time.time()),
        max_model_len=plan[0].max_model_len,
        vocab_size=model.vocab_size,
        eos_token_ids=model.eos_token_ids,
        tokenizer=Tokenizer.load(tokenizer_source),
        chat_template=ChatTemplate.load(
            tokenizer_source, None if config.chat_template is None else Path(config.chat_template)
        ),
        default_sampling=default_sampling(folder),
    )
    return Run(config, plan, served)


def bind(host: str, port: int) -> socket.socket:
    """The listening socket, before any worker is started. Raises ConfigError if the address cannot be had."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        sock = socket.socket(family, kind, proto)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
    except OSError as error:
        raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror or error}") from error
    return sock


async def serve(run: Run, sock: socket.socket) -> int:
    """Everything after `resolve`, inside the loop; the process's exit status. Raises StartupError."""
    config = run.config
    limits = DispatcherLimits(max_waiting=config.max_waiting, request_timeout_s=config.request_timeout_s)
    display = Display(config, run.plan, run.model.name)
    engine = ServingEngine(Dispatcher(limits=limits), run.plan, on_progress=display.on_progress)
    supervisor = Supervisor(run.plan, config, engine)
    engine.connect(supervisor.send)
    stop = StopSignals()
    app = create_app(engine, run.model)
    # by the time it is cleaned up, requests have been drained or given up: a second for their last bytes
    runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=1.0)
    background = [asyncio.create_task(engine.tick_forever())]
    try:
        if not await _start(supervisor, stop, display):
            return 130
        await runner.setup()
        await web.SockSite(runner, sock).start()
        display.ready(sock.getsockname()[1])
        background.append(asyncio.create_task(_report_status(engine, display)))
        await stop.first.wait()
        logger.info("draining: no new requests; press Ctrl-C again to stop at once")
        await stop.or_second(engine.drain(config.drain_timeout_s))
    finally:
        for task in background:
            task.cancel()
        display.close()
        await stop.or_second(runner.cleanup())
        await supervisor.shutdown(force=stop.second.is_set())
    return 0


class StopSignals:
    """The first SIGINT or SIGTERM asks for a drain, the second for an end at once."""

    def __init__(self) -> None:
        self.first = asyncio.Event()
        self.second = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._on_signal)

    def _on_signal(self) -> None:
        (self.second if self.first.is_set() else self.first).set()

    async def or_second(self, work: Coroutine[object, object, object]) -> bool:
        """Await `work` unless a second signal comes first; whether it was done."""
        return await _unless(self.second, work)


async def _unless(event: asyncio.Event, work: Coroutine[object, object, object]) -> bool:
    """Run `work` until it is done (True; raises what it raises) or `event` is set (False; it is
    cancelled).
    """
    working, waiting = asyncio.ensure_future(work), asyncio.ensure_future(event.wait())
    try:
        await asyncio.wait({working, waiting}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            working.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await working
            return False
        await working
        return True
    finally:
        waiting.cancel()


async def _start(supervisor: Supervisor, stop: StopSignals, display: Display) -> bool:
    """Bring the workers up under the display; False if a signal came first."""
    with display.starting():
        return await _unless(stop.first, supervisor.start())


async def _report_status(engine: ServingEngine, display: Display) -> None:
    while True:
        await asyncio.sleep(STATUS_INTERVAL_S)
        display.status(engine.status())
