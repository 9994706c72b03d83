"""A whole cluster in one thread: the router's dispatcher joined to workers over real pools, by hand.

Nothing moves unless it is told to: `step` lets a worker read its mail and take one turn, `hear` gives the
router what a worker has said. `kill` ends a life as SIGKILL does: nothing is given back, the memory stays,
and what was said may still be heard, late; `up` starts the next life over the same memory. A `Gate` stops
the copies of a worker's pulls where a test wants to look. The client is checked throughout: every stream is
at any time a prefix of what the hash model says, and ends once. Pools map each other, or with `transport`
"torch_distributed" send each other their blocks, over links whose messages the router relays.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto

import numpy as np

from memserve.config import Role, Transport
from memserve.errors import MemserveError
from memserve.messages import (
    FinishReason,
    LinkMessage,
    PeerGrant,
    SamplingParams,
    decode_to_router,
    decode_to_worker,
    encode_frame,
)
from memserve.model_config import KVGeometry
from memserve.pool.arena import Arena, ArenaFds
from memserve.pool.mempool import MemPool
from memserve.pool.retention import Retention
from memserve.pool.transports.by_peer import PeerTransfer
from memserve.pool.transports.shm import ShmTransfer
from memserve.pool.transports.torch_distributed import Options, TorchPool
from memserve.router.dispatcher import Dispatcher, DispatcherLimits
from memserve.router.events import (
    Abandon,
    Action,
    Emit,
    Event,
    FromWorker,
    Refuse,
    Send,
    Submit,
    WorkerDown,
    WorkerUp,
)
from memserve.router.scheduling.global_scheduler import GlobalScheduler
from memserve.router.supervision.link_relay import LinkRelay
from memserve.workers.channel import ReceivedGrant
from memserve.workers.worker import Worker
from tests.workers.conftest import (
    Clock,
    FakeChannel,
    FakeGrants,
    HashRunner,
    Rig,
    hash_tokens,
    make_fds,
    make_retention,
    make_worker_config,
    poison,
)

FRAME_HEADER_BYTES = 8
# Turns without any progress, a millisecond each, after which a cluster counts as stuck.
STUCK_TURNS = 3000
# Three blocks of four tokens of the hash model.
MAX_CHUNK_BYTES = 768


class Killed(BaseException):
    """Ends a life in the middle of a step. No `Exception`: nothing in a worker may survive it."""


class Step(Enum):
    """Of a pull. With shm all are the receiver's; over gloo the last two are the source's."""

    BEGUN = auto()  # over gloo: before there is a connection
    CHECKED = auto()  # the generations were looked at, nothing is copied
    COPIED = auto()  # all is copied, the generations are not looked at again


class Gate:
    """The copies into one worker's arena, and over gloo out of it: held while it is shut, where pulls begin
    or at another step; cut short while it is torn.
    """

    def __init__(self) -> None:
        self.step = Step.BEGUN
        self._opened = threading.Event()
        self._opened.set()
        self.entered = threading.Event()
        self.is_torn = False
        self.is_dead = False

    @property
    def is_open(self) -> bool:
        return self._opened.is_set()

    def shut(self, step: Step = Step.BEGUN) -> None:
        self.step = step
        self.entered.clear()
        self._opened.clear()

    def open(self) -> None:
        self._opened.set()

    def reach(self, step: Step) -> None:
        """A thread that copies is there: it waits, if that is where the gate is."""
        if step is self.step:
            self.entered.set()
            assert self._opened.wait(60), "nobody opened the gate"

    def copy(self, destination: np.ndarray, source: np.ndarray) -> int:
        """Of the transport shm."""
        self.reach(Step.BEGUN)
        self.reach(Step.CHECKED)
        if self.is_dead:
            return 0
        num_blocks = len(source) // 2 if self.is_torn else len(source)
        destination[:num_blocks] = source[:num_blocks]
        destination[num_blocks:] = 0xFF  # NaN, for whoever takes it for KV
        self.reach(Step.COPIED)
        return num_blocks * source[:1].nbytes

    def options(self, **changes) -> Options:
        """Of the transport torch_distributed."""

        def send(step: Step) -> None:
            self.reach(step)
            if self.is_dead or self.is_torn:
                raise OSError("cut short")

        return Options(
            chunk_bytes=MAX_CHUNK_BYTES,
            on_pull=lambda: self.reach(Step.BEGUN),
            on_chunk=lambda blocks: send(Step.CHECKED),
            on_sent=lambda blocks: send(Step.COPIED),
            **changes,
        )


@dataclass
class Life:
    """One incarnation of a worker, and the messages on the way to it and from it."""

    instance: str
    role: Role
    incarnation: int
    rig: Rig
    gate: Gate
    mail: deque = field(default_factory=deque)
    said: deque = field(default_factory=deque)

    @property
    def pulls(self) -> list:
        """Every copy that has not been settled."""
        pulls, pull_backs = self.rig.worker._pulls, self.rig.worker._pull_backs
        parts = [part for running in pulls._running.values() for part in running.parts]
        parts += [part for ahead in pulls._ahead.values() for part in ahead.parts]
        parts += [part for claimed in pulls._claimed.values() for part in claimed.parts]
        parts += [part for cancelled, _ in pulls._cancelled for part in cancelled]
        return [part.pull for part in parts] + [running.incoming for running in pull_backs._running]

    @property
    def is_copying(self) -> bool:
        return any(pull.poll() is None for pull in self.pulls)

    def assert_idle(self) -> None:
        self.rig.assert_idle()
        assert not self.rig.worker._pulls._ahead and not self.rig.worker._pulls._claimed


class Cluster:
    """See the module. `roles` names the instances; `worker` are fields of every WorkerConfig, `options` those
    of links. Messages of links that `lose` picks never arrive.
    """

    def __init__(
        self,
        roles: dict[str, Role],
        *,
        limits: DispatcherLimits,
        policy: str = "least-load",
        transport: Transport = "shm",
        options: dict[str, float] | None = None,
        **worker,
    ) -> None:
        self.roles = roles
        self.transport = transport
        self.lose: Callable[[LinkMessage], bool] = lambda message: False
        self._options = options or {}
        self._links = LinkRelay()
        self.dispatcher = Dispatcher(limits, GlobalScheduler(policy))
        self.lives: dict[str, Life] = {}
        self.prompts: dict[str, list[int]] = {}
        self.expected: dict[str, list[int]] = {}
        self.tokens: dict[str, list[int]] = {}
        self.ended: dict[str, FinishReason | MemserveError] = {}
        self.abandoned: set[str] = set()
        self._worker_fields = worker
        self._fds: dict[str, ArenaFds] = {}
        self._host_fds: dict[str, ArenaFds] = {}
        self._clock = Clock()
        self._incarnation = 0
        for instance in roles:
            self.up(instance)

    # --- clients ---

    def submit(self, request_id: str, prompt: Sequence[int], max_tokens: int = 12, salt: str = "") -> None:
        tokens = list(prompt)
        for _ in range(max_tokens):
            tokens.append(hash_tokens(tokens))
        self.prompts[request_id] = list(prompt)
        self.expected[request_id] = tokens[len(prompt) :]
        self.tokens[request_id] = []
        sampling = SamplingParams(max_tokens=max_tokens, seed=1)
        self._feed(Submit(request_id, np.array(prompt, dtype=np.int32), sampling, salt))

    def cancel(self, request_id: str) -> None:
        self.abandoned.add(request_id)
        self._feed(Abandon(request_id))

    # --- workers ---

    def step(self, instance: str, num_messages: int | None = None) -> bool:
        """One turn of a worker, after it has read so many messages (None: all); whether it did a thing."""
        life = self.lives[instance]
        self._clock.now += 1.0
        num_read = len(life.mail) if num_messages is None else min(num_messages, len(life.mail))
        life.rig.send(*(life.mail.popleft() for _ in range(num_read)))
        busy = life.rig.worker.step()
        life.said.extend(life.rig.take())
        return busy or num_read > 0

    def hear(self, life: Life, num_messages: int | None = None) -> int:
        """The router reads so many messages of a worker, all by default; how many there were."""
        num_heard = len(life.said) if num_messages is None else min(num_messages, len(life.said))
        for _ in range(num_heard):
            body = encode_frame(life.said.popleft(), life.incarnation)[FRAME_HEADER_BYTES:]
            event = FromWorker(life.instance, life.incarnation, decode_to_router(body))
            if not isinstance(event.message, LinkMessage):
                self._feed(event)
            elif not self.lose(event.message):
                alive = {name: life.incarnation for name, life in self.lives.items()}
                if (send := self._links.relay(event, event.message, alive)) is not None:
                    self._carry_out([send])
        return num_heard

    def up(self, instance: str) -> Life:
        """Start a life, over the memory of the one before if there was one, and tell the router."""
        self._incarnation += 1
        life = self._make_life(instance, self._incarnation)
        for other in self.lives.values():
            self._introduce(life, other)
            self._introduce(other, life)
        self.lives[instance] = life
        config = life.rig.config
        self._feed(
            WorkerUp(
                instance,
                life.role,
                life.incarnation,
                config.num_blocks,
                config.block_size,
                config.max_running,
                caches=config.caches,
                max_host_blocks=config.max_host_blocks,
            )
        )
        return life

    def kill(self, instance: str, *, in_step: bool = False) -> Life:
        """End a life; with `in_step`, after a last step has begun that never tells how far it got."""
        if in_step:

            def die() -> None:
                raise Killed

            self.lives[instance].rig.runner.on_layer = die
            try:
                self.step(instance)
            except Killed:
                self.lives[instance].said.extend(self.lives[instance].rig.take())
        life = self.lives.pop(instance)
        self._close(life)
        self._carry_out(self._links.on_worker_down(instance))
        self._feed(WorkerDown(instance, life.incarnation, "killed"))
        return life

    # --- all together ---

    def turn(self) -> bool:
        """Everybody's turn, in order; whether anything happened."""
        busy = False
        for life in tuple(self.lives.values()):
            busy |= self.step(life.instance)
            busy |= self.hear(life) > 0
        return busy

    def settle(self, instance: str) -> None:
        """Wait until the pulls of a worker have ended, but for those that are held or whose source stands."""
        life = self.lives[instance]
        for _ in range(20):
            if not life.gate.is_open or not life.is_copying:
                return
            time.sleep(0.0005)

    def run_out(self, max_idle_turns: int = STUCK_TURNS) -> None:
        """Go on until nothing is left to do. AssertionError if nothing happens for so many turns."""
        num_idle = 0
        while num_idle < max_idle_turns:
            if self.turn():
                num_idle = 0
            elif not self.dispatcher.requests and not any(
                life.rig._is_pulling() for life in self.lives.values()
            ):
                return
            else:
                num_idle += 1
                time.sleep(0.001)
        raise AssertionError(f"stuck: {self.dispatcher.requests}")

    def assert_done(self) -> None:
        """Every request that was not cancelled has ended with its tokens, and nobody holds anything."""
        assert not self.dispatcher.requests and not self.dispatcher.num_waiting
        for request_id, expected in self.expected.items():
            if request_id not in self.abandoned:
                assert self.ended[request_id] is FinishReason.LENGTH, (
                    f"{request_id}: {self.ended[request_id]}"
                )
                assert self.tokens[request_id] == expected
        for view in self.dispatcher.fleet:
            assert (view.reserved_blocks, view.num_placed, view.outstanding_tokens) == (0, 0, 0)
        for life in self.lives.values():
            life.assert_idle()

    def close(self) -> None:
        for life in self.lives.values():
            self._close(life)
        for fds in (*self._fds.values(), *self._host_fds.values()):
            for fd in fds:
                os.close(fd)

    # --- inside ---

    def _introduce(self, life: Life, other: Life) -> None:
        """Let `other` pull from `life`."""
        if self.transport == "shm":
            life.rig.grant_to(other.rig, life.incarnation)
        else:
            grant = PeerGrant(
                life.instance, life.incarnation, life.rig.pool.num_blocks, life.rig.pool.host_capacity
            )
            other.rig.grants.inbox.append(ReceivedGrant(grant, ()))

    def _feed(self, event: Event) -> None:
        self._carry_out(self.dispatcher.on_event(event, self._clock.now))

    def _carry_out(self, actions: Sequence[Action]) -> None:
        for action in actions:
            match action:
                case Send(instance, incarnation, message):
                    life = self.lives.get(instance)
                    if life is not None and life.incarnation == incarnation:
                        life.mail.append(
                            decode_to_worker(encode_frame(message, incarnation)[FRAME_HEADER_BYTES:])
                        )
                case Emit(request_id, output):
                    assert request_id not in self.ended and request_id not in self.abandoned, (
                        "said after its end"
                    )
                    tokens = self.tokens[request_id]
                    tokens.extend(output.token_ids)
                    assert tokens == self.expected[request_id][: len(tokens)], f"{request_id}: wrong tokens"
                    if output.finish_reason is not None:
                        self.ended[request_id] = output.finish_reason
                case Refuse(request_id, error):
                    assert request_id not in self.ended and request_id not in self.abandoned, (
                        "said after its end"
                    )
                    self.ended[request_id] = error

    def _make_life(self, instance: str, incarnation: int) -> Life:
        config = make_worker_config(instance=instance, role=self.roles[instance], **self._worker_fields)
        geometry = KVGeometry.of(config.model, config.block_size, config.dtype)
        assert config.num_blocks is not None
        if instance not in self._fds:
            self._fds[instance] = make_fds(config.num_blocks, geometry)
            if config.host_blocks is not None:
                self._host_fds[instance] = make_fds(config.max_host_blocks, geometry)
        fds, host_fds = self._fds[instance], self._host_fds.get(instance)
        gate, channel, grants = Gate(), FakeChannel(), FakeGrants()
        arena = Arena.map(geometry, config.num_blocks, fds)
        retention = make_retention(config, geometry, host_fds)
        pool = MemPool(
            arena,
            instance,
            incarnation,
            lambda: None,
            retention=retention,
            clock=self._clock,
            on_free=poison(arena),
            transfer=self._make_transfer(arena, instance, incarnation, gate, retention),
        )
        runner = HashRunner(pool.kv, config.block_size)
        runner.on_layer = pool.progress.advance
        worker = Worker(config, channel, grants, pool, runner, self._clock)
        rig = Rig(config, worker, channel, grants, pool, runner, self._clock, fds, host_fds)
        return Life(instance, config.role, incarnation, rig, gate)

    def _make_transfer(
        self, arena: Arena, instance: str, incarnation: int, gate: Gate, retention: Retention | None
    ) -> PeerTransfer:
        def wake() -> None:
            return

        assert arena.blocks is not None
        if self.transport == "shm":
            shm = ShmTransfer(arena.blocks, wake, num_layers=arena.geometry.num_layers, copy=gate.copy)
            return PeerTransfer(wake, shm)
        host = None if retention is None or retention.host is None else retention.host.arena
        pool = TorchPool.of(instance, incarnation, "", arena, host)
        return PeerTransfer(wake, None, pool, gate.options(**self._options))

    @staticmethod
    def _close(life: Life) -> None:
        life.gate.is_dead = True
        life.gate.open()
        life.rig.pool.close()
        for received in life.rig.grants.receive():
            for fd in received.fds:
                os.close(fd)
