"""One life of a worker: its process and its connection, from the spawn to the proof that it is dead.

    spawn → introduced (it was sent Init) → ready → dead

Any of these ends it: the process exits, the connection closes (from either side), nothing is heard for too
long. `dead()` then kills and reaps the process, and only after that reads what it had still sent; so once
it returns, nothing of this life happens any more and all that it used may be used again.
"""

from __future__ import annotations

import asyncio
import contextlib
from asyncio import FIRST_COMPLETED
from collections.abc import Callable, Sequence

from memserve.config import WorkerConfig
from memserve.messages import Fatal, Init, Ready, ToRouter, ToWorker
from memserve.router.supervision.liveness import PingWatch
from memserve.router.supervision.worker_client import WorkerClient
from memserve.router.supervision.worker_process import WorkerProcess

# A dying process closes its socket a moment before it can be waited for: so long we wait to know its end.
EXIT_GRACE_S = 0.5
# What a dead worker had sent is in the socket already. Only a stray heir of it can keep it open longer.
DRAIN_GRACE_S = 1.0


class WorkerLife:
    """Handle of one incarnation. `ready`, `ready_at` and `fatal` are set by the supervisor, as it hears them.

    Times are the event loop's. `introduced_at` None: it waits for Init, and has nothing to say until then.
    """

    def __init__(
        self, config: WorkerConfig, incarnation: int, process: WorkerProcess, client: WorkerClient
    ) -> None:
        self.config = config
        self.incarnation = incarnation
        self.process = process
        self.client = client
        self.introduced_at: float | None = None
        self.ready: Ready | None = None
        self.ready_at = 0.0
        self.fatal: Fatal | None = None

    @classmethod
    async def spawn(
        cls,
        config: WorkerConfig,
        incarnation: int,
        command: Sequence[str],
        on_message: Callable[[WorkerLife, ToRouter], None],
        stderr: int | None = None,
    ) -> WorkerLife:
        """Start the process and open the connection. Raises OSError; leaves nothing behind if it raises."""
        process = WorkerProcess(command, f"memserve: {config.instance}", config.cpus, stderr)
        client = WorkerClient(incarnation, lambda message: on_message(life, message))
        life = cls(config, incarnation, process, client)
        try:
            await client.open(process.control)
        except BaseException:
            process.control.close()
            await process.kill()
            process.close()
            raise
        return life

    def introduce(self, init: Init) -> None:
        """Send the first message. From now on silence counts."""
        self.introduced_at = asyncio.get_running_loop().time()
        self.client.send(init)

    def send(self, message: ToWorker) -> bool:
        """Queue a message; False if the connection is closed."""
        return self.client.send(message)

    async def dead(self, ping_deadline_s: float, startup_silence_s: float) -> str:
        """Wait for the end of this life, make sure of it, and say why (reads on from the worker's name)."""
        reason = await self._end(ping_deadline_s, startup_silence_s)
        await self.process.kill()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.client.closed.wait(), DRAIN_GRACE_S)
        self.client.close("died")
        await self.client.closed.wait()
        self.process.close()
        return f"failed: {self.fatal.message}" if self.fatal is not None else reason

    def _heard_at(self) -> float | None:
        if self.introduced_at is None:
            return None
        return max(self.introduced_at, self.client.last_heard_at)

    async def _end(self, ping_deadline_s: float, startup_silence_s: float) -> str:
        """Wait for the first sign of death."""
        loop = asyncio.get_running_loop()
        watch = PingWatch(ping_deadline_s / 8, loop.time())
        exited = asyncio.create_task(self.process.exited.wait())
        closed = asyncio.create_task(self.client.closed.wait())
        try:
            while not exited.done() and not closed.done():
                await asyncio.wait({exited, closed}, timeout=watch.interval_s, return_when=FIRST_COMPLETED)
                deadline_s = startup_silence_s if self.ready is None else ping_deadline_s
                if watch.is_silent(self._heard_at(), deadline_s, loop.time()):
                    return f"was silent for more than {deadline_s:g} s"
            if self.client.fault is None:
                await asyncio.wait({exited}, timeout=EXIT_GRACE_S)
        finally:
            exited.cancel()
            closed.cancel()
        if self.client.fault is not None:
            return self.client.fault
        if self.process.returncode is None:
            return "closed its connection"
        return self.process.describe_exit()
