"""The router process from its first line to its last: resolve, start, serve, drain, stop.

    resolve   model folder, config, tokenizer, the port: all that can be refused before a process exists
    start     HTTP, which answers 503; then the workers, while the display shows how far they are
    serve     on one uvloop, until SIGINT or SIGTERM, or until the last worker is lost for good (status 1)
    drain     /health says 503, running requests may finish; the time limit, or a second signal (then with
              status 130), ends that
    stop      HTTP, workers, descriptors; nothing stays

Errors at start-up are `StartupError`s, for one line on the terminal.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import signal
import socket
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import setproctitle
import uvloop
from aiohttp import web
from rich.console import Console

from memserve.config import ServeConfig, WorkerConfig
from memserve.errors import ConfigError
from memserve.model_config import default_sampling, load_model_config
from memserve.model_files import resolve_model, resolve_tokenizer, served_model_name
from memserve.router.calibration.models import calibration_folder, cost_models
from memserve.router.dispatcher import Dispatcher, DispatcherLimits
from memserve.router.display import Display, log_through, print_plain
from memserve.router.engine import TICK_S, ServingEngine
from memserve.router.http.connections import bounded, max_connections
from memserve.router.http.limits import HttpLimits
from memserve.router.http.served_model import ServedModel
from memserve.router.http.server import create_app
from memserve.router.request_seeds import RequestSeeds
from memserve.router.scheduling.global_scheduler import GlobalScheduler
from memserve.router.supervision.log_relay import LogRelay
from memserve.router.supervision.machine import read_machine
from memserve.router.supervision.memory import plan_workers
from memserve.router.supervision.supervisor import Supervisor
from memserve.router.supervision.transports import (
    GLOO_NOTICE,
    check_allocator,
    peers_of,
    transfer_mode,
    uses_gloo,
)
from memserve.router.supervision.worker_process import WORKER_COMMAND
from memserve.router.text.chat_template import ChatTemplate
from memserve.router.text.token_history import TokenHistory
from memserve.router.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

STATUS_INTERVAL_S = 5.0
# Exit status where a signal cut work off, as shells have it for SIGINT.
INTERRUPTED = 130
# For a client to begin a request: the first, by when its headers are here, or another on the same connection.
IDLE_CONNECTION_S = 75.0
LISTEN_BACKLOG = 1024
# Objects between two collections. Streams leave next to no cycles: at Python's 700 a tenth of their time went
# into looking for some.
YOUNG_OBJECTS = 20_000


@dataclass(frozen=True, slots=True)
class Run:
    """What `resolve` found: enough to start, and nothing started yet."""

    config: ServeConfig
    plan: tuple[WorkerConfig, ...]
    model: ServedModel


def run(config: ServeConfig) -> int:
    """Serve until a signal ends it; the process's exit status. Raises StartupError."""
    setproctitle.setproctitle("memserve: router")
    console = Console(stderr=True)
    log_through(console, config.log_level)
    resolved = resolve(config)
    with bind(config.host, config.port) as sock:
        return uvloop.run(serve(resolved, sock, console))


def resolve(config: ServeConfig) -> Run:
    """Read the model and fit the workers into the machine. Raises StartupError."""
    folder = resolve_model(config.model, config.revision, config.load_format)
    model = load_model_config(folder)
    plan = plan_workers(config, model, folder, read_machine(with_gpus=config.device != "cpu"))
    check_allocator(plan, os.environ)
    tokenizer_source = folder if config.tokenizer is None else resolve_tokenizer(config.tokenizer)
    tokenizer = Tokenizer.load(tokenizer_source)
    reuses_history = config.reuse_history_tokens and config.caching != "off"
    served = ServedModel(
        name=config.served_model_name or served_model_name(config.model),
        created=int(time.time()),
        max_model_len=plan[0].max_model_len,
        vocab_size=model.vocab_size,
        eos_token_ids=model.eos_token_ids,
        tokenizer=tokenizer,
        chat_template=ChatTemplate.load(
            tokenizer_source, None if config.chat_template is None else Path(config.chat_template)
        ),
        default_sampling=default_sampling(folder),
        seeds=RequestSeeds(config.seed),
        history=TokenHistory(tokenizer) if reuses_history else None,
    )
    return Run(config, plan, served)


def bind(host: str, port: int) -> socket.socket:
    """The listening socket, before any worker is started. Raises ConfigError if the address cannot be had.

    It listens at once: two sockets may be bound to one address as long as neither does.
    """
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        sock = socket.socket(family, kind, proto)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind(address)
            sock.listen(LISTEN_BACKLOG)
        except OSError:
            sock.close()
            raise
    except OSError as error:
        raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror or error}") from error
    except UnicodeError as error:  # a name that no DNS can hold
        raise ConfigError(f"cannot listen on {host!a}: this is no host name") from error
    return sock


async def serve(
    run: Run, sock: socket.socket, console: Console, *, worker_command: Sequence[str] = WORKER_COMMAND
) -> int:
    """Everything after `resolve`, inside the loop; the process's exit status. Raises StartupError.

    `worker_command`: what the supervisor starts, for measurements of the router alone.
    """
    config = run.config
    transfer = transfer_mode(config, run.plan)
    if uses_gloo(run.plan):
        logger.warning(GLOO_NOTICE)
    if transfer != config.transfer:
        logger.info(
            "over gloo no layer can be pulled before its chunk is done: as with --transfer %s", transfer
        )
    limits = DispatcherLimits(
        max_waiting=config.max_waiting,
        transfer=transfer,
        pull_back=config.caching == "full",
        request_timeout_s=config.request_timeout_s,
    )
    display = Display(config, run.plan, run.model.name, console)
    reach = {each.instance: peers_of(each, run.plan) for each in run.plan}
    scheduler = GlobalScheduler(config.policy, seed=config.seed or 0, reach=reach)
    engine = ServingEngine(Dispatcher(limits, scheduler), run.plan, on_progress=display.on_progress)
    relay = LogRelay(partial(print_plain, console)) if console.is_terminal else None
    stderr = None if relay is None else relay.write_fd
    supervisor = Supervisor(run.plan, config, engine, command=worker_command, stderr=stderr)
    engine.connect(supervisor.send)
    stop = StopSignals()
    http = HttpSite(engine, run.model, HttpLimits.for_queue(config.max_waiting))
    background = [asyncio.create_task(_every(TICK_S, engine.tick))]
    try:
        await http.start(sock)
        engine.is_calibrating = config.policy == "prompt-tree"
        if not await start_workers(supervisor, stop, display):
            return INTERRUPTED
        if engine.is_calibrating and not await stop.or_first(_calibrate(engine, scheduler, run)):
            return INTERRUPTED
        gc.collect()
        gc.freeze()  # modules and tables stay: collections need not walk them while requests stream
        gc.set_threshold(YOUNG_OBJECTS)
        display.ready(sock.getsockname()[1], engine.status())
        background.append(
            asyncio.create_task(_every(STATUS_INTERVAL_S, lambda: display.status(engine.status())))
        )
        if not await _unless(engine.all_lost, stop.first.wait()):
            logger.error("no worker is left, and none will be started: the server ends")
            return 1
        logger.info("draining: no new requests; press Ctrl-C again to stop at once")
        drained = await stop.or_second(engine.drain(config.drain_timeout_s))
        return 0 if drained else INTERRUPTED
    finally:
        for task in background:
            task.cancel()
        display.close()
        await stop.or_second(http.stop())
        await stop_workers(supervisor, stop)
        if relay is not None:
            relay.close()


async def _calibrate(engine: ServingEngine, scheduler: GlobalScheduler, run: Run) -> None:
    """Let the scheduler predict by this machine's own figures: measured now, or at an earlier start."""
    scheduler.use(await cost_models(engine, run.plan, calibration_folder(run.config.calibration)))


class HttpSite:
    """The application on a listening socket: `start` once, `stop` in any case."""

    def __init__(self, engine: ServingEngine, model: ServedModel, limits: HttpLimits) -> None:
        # by the time it is cleaned up, requests have been drained or given up: a second for their last bytes
        self._runner = web.AppRunner(
            create_app(engine, model, limits),
            handler_cancellation=True,
            access_log=None,
            shutdown_timeout=1.0,
        )
        self._listening: asyncio.Server | None = None

    async def start(self, sock: socket.socket) -> None:
        """Take connections."""
        await self._runner.setup()
        server = self._runner.server
        assert server is not None
        self._listening = await asyncio.get_running_loop().create_server(
            bounded(server, max_connections(), IDLE_CONNECTION_S), sock=sock, backlog=LISTEN_BACKLOG
        )

    async def stop(self) -> None:
        """Take no more connections, give requests a moment to end, close all."""
        if self._listening is not None:
            self._listening.close()
        await self._runner.cleanup()


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

    async def or_first(self, work: Coroutine[object, object, object]) -> bool:
        """Await `work` unless a signal comes first; whether it was done."""
        return await _unless(self.first, work)

    async def or_second(self, work: Coroutine[object, object, object]) -> bool:
        """Await `work` unless a second signal comes first; whether it was done."""
        return await _unless(self.second, work)


async def _unless(event: asyncio.Event, work: Coroutine[object, object, object]) -> bool:
    """Run `work` until it is done (True; raises what it raises) or `event` is set (False; cancels it)."""
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


async def start_workers(supervisor: Supervisor, stop: StopSignals, display: Display) -> bool:
    """Bring the workers up under the display; False if a signal came first."""
    with display.starting():
        return await _unless(stop.first, supervisor.start())


async def stop_workers(supervisor: Supervisor, stop: StopSignals) -> None:
    """End the workers politely; at once when a second signal has come, or comes meanwhile."""
    if not await stop.or_second(supervisor.shutdown()):
        await supervisor.shutdown(force=True)


async def _every(interval_s: float, work: Callable[[], None]) -> None:
    """Call `work` again and again until cancelled; an error of one call is logged and does not end that."""
    while True:
        await asyncio.sleep(interval_s)
        try:
            work()
        except Exception:
            logger.exception("a periodic task failed")
