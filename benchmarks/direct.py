"""A worker without HTTP: the supervisor starts it, and this drives it message by message."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np

from memserve.config import ServeConfig, WorkerConfig, WorkerOptions
from memserve.messages import Decode, Ready, SamplingParams, StepOutputs, ToRouter, pack_tokens
from memserve.model_config import load_model_config
from memserve.router.supervision.machine import read_machine
from memserve.router.supervision.memory import plan_workers
from memserve.router.supervision.supervisor import Supervisor


class Listener:
    """Hears the worker; resolves the future of the request whose first token came."""

    def __init__(self) -> None:
        self.first: dict[str, asyncio.Future[float]] = {}
        self.ended: dict[str, asyncio.Future[None]] = {}

    def on_progress(self, instance: str, stage: str, fraction: float) -> None: ...

    def on_worker_up(self, config: WorkerConfig, incarnation: int, ready: Ready) -> None: ...

    def on_worker_down(self, instance: str, incarnation: int, reason: str) -> None: ...

    def on_worker_message(self, instance: str, incarnation: int, message: ToRouter) -> None:
        if not isinstance(message, StepOutputs):
            return
        for output in message.outputs:
            if not self.first[output.request_id].done():
                self.first[output.request_id].set_result(time.perf_counter())
            if output.finish_reason is not None:
                self.ended[output.request_id].set_result(None)


@asynccontextmanager
async def direct_worker(
    folder: Path, threads: int
) -> AsyncIterator[Callable[[np.ndarray], Awaitable[float]]]:
    """A colocated worker on `folder`; yields a function from a prompt to seconds to its first token."""
    serve = ServeConfig(
        model=str(folder), colocated=1, dtype="bfloat16", worker=WorkerOptions(threads=threads)
    )
    plan = plan_workers(serve, load_model_config(folder), folder, read_machine())
    listener, ids = Listener(), itertools.count()
    supervisor = Supervisor(plan, serve, listener)
    await supervisor.start()

    async def first_token_s(prompt: np.ndarray) -> float:
        request_id = str(next(ids))
        loop = asyncio.get_running_loop()
        first, ended = loop.create_future(), loop.create_future()
        listener.first[request_id], listener.ended[request_id] = first, ended
        started = time.perf_counter()
        params = SamplingParams(max_tokens=2, seed=0, temperature=0.0)
        supervisor.send(
            plan[0].instance,
            Decode(request_id, 0, pack_tokens(prompt.astype(np.int32)), len(prompt), params),
        )
        at = await first
        await ended
        return at - started

    try:
        yield first_token_s
    finally:
        await supervisor.shutdown()
