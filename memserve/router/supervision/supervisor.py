"""Starts the workers, keeps them alive, ends them.

Every instance of the plan is a chain of lives (`worker_life.py`), numbered by incarnation:

    spawn ─► ready ─► dead ─► pause ─► spawn, incarnation + 1 ─► …        until shutdown
               │        └─ killed and reaped first; then `on_worker_down`; then the next life
               └─ peers are granted its arena; then `on_worker_up`

All processes start at once; on CPUs the first loads the weights into shared memory, and the others are
introduced (sent Init) when that is done. A death during `start` is a StartupError and ends everything. A
restart that never becomes ready is tried a few times, then that instance is lost. All workers must have the
fingerprint of the first, since they exchange KV: one that differs does not become ready. What a worker's
life or death means for requests is the owner's business: it hears of it by `WorkerEvents`.

A grant is sent before any message that may refer to it, but on a socket of its own: a worker that, having
read messages, reads its grants before it acts on the messages has every arena they speak of.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Protocol

from memserve import errors
from memserve.config import ServeConfig, WorkerConfig
from memserve.errors import ModelError, StartupError
from memserve.messages import Fatal, Init, Loaded, Loading, Ready, Shutdown, ToRouter, ToWorker
from memserve.router.supervision.liveness import Backoff, Timing
from memserve.router.supervision.shared_memory import SharedMemory
from memserve.router.supervision.transports import between
from memserve.router.supervision.worker_life import WorkerLife
from memserve.router.supervision.worker_process import WORKER_COMMAND

logger = logging.getLogger(__name__)


class WorkerEvents(Protocol):
    """What the supervisor tells its owner. Every call comes from the event loop and must not block.

    Per incarnation: `on_worker_up`, then its messages in order (heartbeats too, the handshake not), then
    `on_worker_down`, after which nothing of that incarnation is running, writing or will be heard. A life
    that never became ready shows only as progress; one that `shutdown` or a failing `start` ended is not
    announced as down.
    """

    def on_progress(self, instance: str, stage: str, fraction: float) -> None:
        """Start-up of an instance: 0 ≤ fraction ≤ 1 within `stage`."""

    def on_worker_up(self, config: WorkerConfig, incarnation: int, ready: Ready) -> None:
        """The worker takes requests."""

    def on_worker_message(self, instance: str, incarnation: int, message: ToRouter) -> None:
        """The worker sent something."""

    def on_worker_down(self, instance: str, incarnation: int, reason: str) -> None:
        """The worker is dead: killed and waited for. `reason` reads on from its name."""

    def on_instance_lost(self, instance: str) -> None:
        """After its last `on_worker_down`: the instance will have no further life."""


class _Death(NamedTuple):
    """The end of a life. `up_s`: how long it was ready, None if never. `fatal`: its own last word, if any."""

    reason: str
    up_s: float | None
    fatal: Fatal | None = None


@dataclass(slots=True)
class _Instance:
    """One place in the plan, and who fills it now. `life` is None before, between and after lives."""

    config: WorkerConfig
    backoff: Backoff
    incarnation: int = 0
    life: WorkerLife | None = None
    task: asyncio.Task[None] | None = None


class Supervisor:
    """Owner of the worker processes of one server: `start` once, `shutdown` at the end in any case.

    `stderr`: a descriptor for the workers'; None is this process's own.
    """

    def __init__(
        self,
        plan: tuple[WorkerConfig, ...],
        serve: ServeConfig,
        events: WorkerEvents,
        *,
        command: Sequence[str] = WORKER_COMMAND,
        timing: Timing | None = None,
        stderr: int | None = None,
    ) -> None:
        self._timing = timing if timing is not None else Timing()
        self._instances = {config.instance: _Instance(config, Backoff(self._timing)) for config in plan}
        # Of the workers of a device the first loads the weights, for the others too.
        self._loaders = {config.device: config.instance for config in reversed(plan)}
        self._loaded: set[str] = set()  # devices whose loader has loaded
        self._ping_deadline_s = serve.ping_deadline_s
        self._events = events
        self._command = command
        self._stderr = stderr
        self._memory: SharedMemory | None = None
        self._weights_manifest: bytes | None = None
        self._first_ready: tuple[str, Ready] | None = None
        self._all_up: asyncio.Future[None] | None = None
        self._stopping: asyncio.Task[None] | None = None
        self._forced = asyncio.Event()

    async def start(self) -> None:
        """Return when every worker is up. Raises StartupError, with everything stopped and closed by then."""
        assert self._all_up is None, "start is called once"
        self._memory = SharedMemory([instance.config for instance in self._instances.values()])
        self._all_up = asyncio.get_running_loop().create_future()
        for instance in self._instances.values():
            instance.task = asyncio.create_task(self._keep_alive(instance))
            instance.task.add_done_callback(partial(self._on_task_done, instance))
        try:
            await self._all_up
        except BaseException:
            await self.shutdown(force=True)
            raise

    def send(self, instance: str, message: ToWorker) -> bool:
        """Queue a message for the instance's present life; never waits.

        False if it is not up, or does not read and is now given up: its `on_worker_down` has come or will.
        """
        life = self._instances[instance].life
        return life is not None and life.ready is not None and life.send(message)

    async def shutdown(self, force: bool = False) -> None:
        """End every worker: ask, then SIGTERM, then SIGKILL; return when all are reaped, all is closed.

        With `force` SIGKILL at once. May be called again, and with force to hasten a call that is under way.
        """
        if force:
            self._forced.set()
        if self._stopping is None:
            self._stopping = asyncio.create_task(self._stop())
        await asyncio.shield(self._stopping)

    # --- the lives of one instance ----------------------------------------------------------------------

    async def _keep_alive(self, instance: _Instance) -> None:
        """Life after life, until shutdown, a failed start-up, or too many lives that came to nothing."""
        assert self._all_up is not None
        name = instance.config.instance
        while self._stopping is None:
            death = await self._live(instance)
            if self._stopping is not None:
                return
            if not self._all_up.done():
                self._all_up.set_exception(_startup_error(name, death))
                return
            if death.up_s is not None:
                self._events.on_worker_down(name, instance.incarnation, death.reason)
            pause_s = instance.backoff.next_pause(death.up_s)
            if pause_s is None:
                logger.error("%s %s; it is not started any more", name, death.reason)
                self._events.on_instance_lost(name)
                return
            if death.up_s is None:  # of other deaths the owner was told
                logger.warning("%s %s while starting again", name, death.reason)
            logger.info("%s is started again in %.1f s", name, pause_s)
            await asyncio.sleep(pause_s)
            instance.incarnation += 1

    async def _live(self, instance: _Instance) -> _Death:
        """One life, from its spawn to the proof of its death."""
        config = instance.config
        try:
            life = await WorkerLife.spawn(
                config, instance.incarnation, self._command, self._on_message, self._stderr
            )
        except OSError as error:
            return _Death(f"cannot be started: {error}", None)
        instance.life = life
        self._introduce(life)
        reason = await life.dead(self._ping_deadline_s, self._timing.startup_silence_s)
        instance.life = None
        self._revoke_exports(config.instance)
        up_s = None if life.ready is None else asyncio.get_running_loop().time() - life.ready_at
        return _Death(reason, up_s, life.fatal)

    def _introduce(self, life: WorkerLife) -> None:
        """Send grants and Init; put off until the weights are loaded, unless it is the one to load them."""
        assert self._memory is not None
        name, device = life.config.instance, life.config.device
        is_shared = self._memory.has_weights or life.config.shares_weights
        loads = name == self._loaders[device] and device not in self._loaded
        if is_shared and device not in self._loaded and not loads:
            return
        sock, manifest = life.process.grants, self._weights_manifest
        with _refusal_closes(life):
            self._memory.grant_own(sock, name, life.incarnation)
            self._memory.grant_weights(sock, writable=loads)
            if self._memory.has_gpu_weights(device):
                self._memory.grant_gpu_weights(sock, device)
                manifest = b""
            for peer in self._instances.values():
                if peer.config.instance != name:
                    self._introduce_peer(life, peer.config, peer.incarnation)
        life.introduce(Init(life.config, life.incarnation, manifest))

    def _introduce_peer(self, life: WorkerLife, peer: WorkerConfig, incarnation: int) -> None:
        """Let a worker pull from another, in the way that both announce. Raises OSError."""
        assert self._memory is not None
        match between(life.config, peer):
            case "shm":
                self._memory.grant_peer(life.process.grants, peer.instance, incarnation)
            case "torch_distributed":
                self._memory.name_peer(life.process.grants, peer.instance, incarnation)
            case "cuda_ipc":
                self._memory.grant_peer(life.process.grants, peer.instance, incarnation)
                self._memory.grant_device(life.process.grants, peer.instance, incarnation)

    def _revoke_exports(self, instance: str) -> None:
        """A dead worker's GPU memory is not to be read any more: its peers let go of it."""
        assert self._memory is not None
        if self._memory.forget_exports(instance):
            for peer in self._lives():
                if peer.introduced_at is not None:
                    with _refusal_closes(peer):
                        self._memory.revoke_device(peer.process.grants, instance)

    def _on_message(self, life: WorkerLife, message: ToRouter) -> None:
        if self._stopping is not None:
            return
        match message:
            case Loading():
                self._events.on_progress(life.config.instance, message.stage, message.fraction)
            case Loaded():
                self._on_loaded(life, message)
            case Ready():
                self._on_ready(life, message)
            case Fatal():
                life.fatal = message
            case _ if life.ready is not None:
                self._events.on_worker_message(life.config.instance, life.incarnation, message)

    def _on_loaded(self, life: WorkerLife, message: Loaded) -> None:
        assert self._memory is not None
        if self._memory.has_weights:
            self._weights_manifest = message.manifest
        elif not self._take_exports(life):
            return
        self._loaded.add(life.config.device)
        for waiting in self._lives():
            if waiting.introduced_at is None:
                self._introduce(waiting)

    def _take_exports(self, life: WorkerLife) -> bool:
        """False if what the worker exported is nothing to be taken: it ends."""
        assert self._memory is not None
        try:
            self._memory.take_exports(life.process.grants, life.config.instance, life.config.device)
        except (OSError, ValueError) as error:
            life.client.close(f"exported no memory of its GPU: {error}")
            return False
        return True

    def _on_ready(self, life: WorkerLife, ready: Ready) -> None:
        assert self._memory is not None and self._all_up is not None
        if not self._fits(life, ready) or not self._take_exports(life):
            return
        life.ready = ready
        life.ready_at = asyncio.get_running_loop().time()
        for peer in self._lives():
            if peer is life or peer.introduced_at is None:
                continue
            with _refusal_closes(peer):
                if life.incarnation > 0:
                    # They hold it under the incarnation before: right until now, for what it still held.
                    self._introduce_peer(peer, life.config, life.incarnation)
                elif between(peer.config, life.config) == "cuda_ipc":
                    self._memory.grant_device(peer.process.grants, life.config.instance, 0)
        self._events.on_worker_up(life.config, life.incarnation, ready)
        if not self._all_up.done() and all(
            instance.life is not None and instance.life.ready is not None
            for instance in self._instances.values()
        ):
            self._all_up.set_result(None)

    def _fits(self, life: WorkerLife, ready: Ready) -> bool:
        """Whether it has the pool that it was given, and its KV means the same as everybody's; if not, its
        life is ended.
        """
        name, config = life.config.instance, life.config
        most = config.max_blocks if config.num_blocks is None else config.num_blocks
        if not 0 < ready.num_blocks <= most:
            life.client.close(f"told of a pool of {ready.num_blocks} blocks, and was given {most}")
            return False
        if self._first_ready is None:
            self._first_ready = name, ready
        first, expected = self._first_ready
        if ready.fingerprint == expected.fingerprint:
            return True
        life.fatal = Fatal(
            ModelError.__name__,
            f"{name} does not have the model or the KV layout that {first} started with "
            f"({_kv_of(ready)}, not {_kv_of(expected)}): did the model's files change?",
        )
        life.client.close("has another fingerprint")
        return False

    # --- the end ----------------------------------------------------------------------------------------

    async def _stop(self) -> None:
        if self._all_up is not None and not self._all_up.done():
            self._all_up.set_exception(StartupError("stopped while starting"))
        tasks = [instance.task for instance in self._instances.values() if instance.task is not None]
        for instance in self._instances.values():
            if instance.life is not None:
                instance.life.send(Shutdown())
            elif instance.task is not None:
                instance.task.cancel()  # between two lives, or in the middle of a spawn, which cleans up
        await self._exits(self._timing.shutdown_s)
        for life in self._lives():
            life.process.terminate()
        await self._exits(self._timing.terminate_s)
        for life in self._lives():
            await life.process.kill()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._memory is not None:
            self._memory.close()

    async def _exits(self, timeout_s: float) -> None:
        """Wait until all processes have exited, force is called for, or time is up."""
        lives = self._lives()

        async def all_exited() -> None:
            for life in lives:
                await life.process.exited.wait()

        waits: set[asyncio.Task[object]] = {
            asyncio.create_task(all_exited()),
            asyncio.create_task(self._forced.wait()),
        }
        await asyncio.wait(waits, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()

    def _lives(self) -> list[WorkerLife]:
        return [instance.life for instance in self._instances.values() if instance.life is not None]

    def _on_task_done(self, instance: _Instance, task: asyncio.Task[None]) -> None:
        """A task that raised is a bug, here or in the owner's events; the instance it kept is lost."""
        if task.cancelled() or (error := task.exception()) is None:
            return
        logger.error("the supervision of %s broke", instance.config.instance, exc_info=error)
        if self._all_up is not None and not self._all_up.done():
            self._all_up.set_exception(error)
        else:
            self._events.on_instance_lost(instance.config.instance)


@contextmanager
def _refusal_closes(life: WorkerLife) -> Iterator[None]:
    """A worker that takes no grants is gone or stuck: either way its connection is of no use."""
    try:
        yield
    except OSError as error:
        life.client.close(f"did not take a descriptor: {error}")


def _kv_of(ready: Ready) -> str:
    """What tells one worker's KV from another's, in words."""
    return f"{ready.dtype}, {ready.block_size} tokens a block, fingerprint {ready.fingerprint[:12]}"


def _startup_error(instance: str, death: _Death) -> StartupError:
    """What ends a start: the worker's own error where it told one."""
    if death.fatal is None:
        return StartupError(f"worker {instance} {death.reason} while starting")
    kind = getattr(errors, death.fatal.kind, None)
    if isinstance(kind, type) and issubclass(kind, StartupError):
        return kind(death.fatal.message)
    return StartupError(f"worker {instance} failed while starting: {death.fatal.message}")
