"""Real worker processes, with the test as their router: start-up, a hand-off, faults at start, ends."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import msgspec
import pytest

from memserve.config import Role, WorkerConfig
from memserve.memfd import create_memfd, reopen_readonly
from memserve.messages import (
    FRAME_HEADER,
    ArenaGrant,
    Fatal,
    Heartbeat,
    Init,
    Loaded,
    Loading,
    Prefilled,
    Pulled,
    Ready,
    Release,
    Shutdown,
    StepOutputs,
    Tier,
    ToWorker,
    WeightsGrant,
    decode_to_router,
    encode_frame,
    encode_grant,
)
from memserve.model_config import KVGeometry, load_model_config, weights_bytes_upper_bound
from memserve.workers.heartbeat import ORPHAN_STATUS

NUM_BLOCKS = 64
TIMEOUT_S = 60.0
INCARNATION = 2


class Memory:
    """The memfds of one server: an arena and generations per instance, and the weights."""

    def __init__(self, config: WorkerConfig, instances: tuple[str, ...]) -> None:
        self.block_bytes = KVGeometry.of(config.model, config.block_size, config.dtype).block_bytes
        self.weights_bytes = weights_bytes_upper_bound(config.model, config.dtype)
        self.weights = create_memfd("weights", self.weights_bytes)
        self.arenas = {
            instance: (
                create_memfd(f"{instance}-arena", NUM_BLOCKS * self.block_bytes),
                create_memfd(f"{instance}-generations", (NUM_BLOCKS + 1) * 8),
            )
            for instance in instances
        }

    def close(self) -> None:
        for fd in (self.weights, *(fd for fds in self.arenas.values() for fd in fds)):
            os.close(fd)


class Process:
    """One worker process and the router's ends of its sockets."""

    def __init__(self, config: WorkerConfig) -> None:
        self.config = config
        self.control, control_end = socket.socketpair()
        self.grants, grants_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        fds = (control_end.fileno(), grants_end.fileno())
        command = [sys.executable, "-m", "memserve.workers.process"]
        arguments = ["--control-fd", str(fds[0]), "--grants-fd", str(fds[1]), "--title", "memserve: test"]
        self.popen = subprocess.Popen(
            [*command, *arguments], pass_fds=fds, start_new_session=True, stderr=subprocess.PIPE
        )
        control_end.close()
        grants_end.close()
        self.control.settimeout(TIMEOUT_S)
        self._received = b""
        self.num_heartbeats = 0

    def send(self, *messages: ToWorker) -> None:
        for message in messages:
            self.control.sendall(encode_frame(message, INCARNATION))

    def receive(self):
        """The next message that is no heartbeat."""
        while True:
            while len(self._received) < FRAME_HEADER.size or len(self._received) < self._frame_end():
                data = self.control.recv(1 << 16)
                assert data, f"the worker ended: {self.popen.stderr.read().decode()}"
                self._received += data
            end = self._frame_end()
            body, self._received = self._received[FRAME_HEADER.size : end], self._received[end:]
            message = decode_to_router(body)
            if not isinstance(message, Heartbeat):
                return message
            self.num_heartbeats += 1

    def receive_ready(self) -> Ready:
        """`Ready`, after the progress of making the pool's memory there."""
        told = []
        while isinstance(message := self.receive(), Loading):
            assert message.stage == "memory"
            told.append(message.fraction)
        assert told == sorted(told) and told[-1] == 1.0
        assert isinstance(message, Ready)
        return message

    def _frame_end(self) -> int:
        num_bytes, incarnation = FRAME_HEADER.unpack_from(self._received)
        assert incarnation == INCARNATION
        return FRAME_HEADER.size + num_bytes

    def grant_arena(self, memory: Memory, instance: str) -> None:
        """Its own to write, another's to read."""
        fds = memory.arenas[instance]
        own = instance == self.config.instance
        sent = fds if own else tuple(map(reopen_readonly, fds))
        grant = ArenaGrant(instance, INCARNATION, Tier.DEVICE, NUM_BLOCKS, memory.block_bytes)
        socket.send_fds(self.grants, [encode_grant(grant)], sent)
        if not own:
            for fd in sent:
                os.close(fd)

    def grant_weights(self, memory: Memory, *, writable: bool) -> None:
        fd = memory.weights if writable else reopen_readonly(memory.weights)
        socket.send_fds(self.grants, [encode_grant(WeightsGrant(memory.weights_bytes))], [fd])
        if not writable:
            os.close(fd)

    def wait(self) -> int:
        return self.popen.wait(TIMEOUT_S)

    def close(self) -> None:
        self.popen.kill()
        self.popen.wait()
        self.popen.stderr.close()
        self.control.close()
        self.grants.close()


@pytest.fixture
def spawn() -> Iterator:
    processes: list[Process] = []

    def spawn(config: WorkerConfig) -> Process:
        processes.append(Process(config))
        return processes[-1]

    yield spawn
    for process in processes:
        process.close()


@pytest.fixture
def config(model_folder, tools) -> WorkerConfig:
    model = load_model_config(model_folder)
    return tools.make_config(
        instance="prefill-0",
        role=Role.PREFILL,
        model_path=str(model_folder),
        model=model,
        load_format="auto",
        num_blocks=NUM_BLOCKS,
        max_step_ms=200.0,
        cpus=tuple(sorted(os.sched_getaffinity(0)))[:1],
    )


@pytest.fixture
def memory(config) -> Iterator[Memory]:
    memory = Memory(config, ("prefill-0", "decode-0"))
    yield memory
    memory.close()


def start_loader(process: Process, memory: Memory) -> bytes:
    """Bring the first worker up; the manifest for the others."""
    process.send(Init(process.config, INCARNATION))
    process.grant_arena(memory, process.config.instance)
    process.grant_weights(memory, writable=True)
    fractions = []
    while isinstance(message := process.receive(), Loading):
        fractions.append(message.fraction)
    assert fractions == sorted(fractions) and fractions[-1] == 1.0
    assert isinstance(message, Loaded)
    ready = process.receive_ready()
    assert ready.num_blocks == NUM_BLOCKS and ready.device == "cpu"
    return message.manifest


def collect(process: Process, tools, request_id: str):
    """Messages until the request has ended, and its transcript."""
    messages = []
    while (heard := tools.Transcript.of(messages, request_id)).finish_reason is None:
        messages.append(process.receive())
    return messages, heard


def test_handoff_between_processes_equals_a_colocated_run(spawn, config, memory, tools):
    # 1. Both are spawned at once; the prefill worker loads the weights, the decode worker maps them.
    p = spawn(config)
    d = spawn(msgspec.structs.replace(config, instance="decode-0", role=Role.DECODE))
    manifest = start_loader(p, memory)
    d.grant_weights(memory, writable=False)
    d.grant_arena(memory, "prefill-0")  # a peer may come before the worker's own
    d.grant_arena(memory, "decode-0")
    p.grant_arena(memory, "decode-0")
    d.send(Init(d.config, INCARNATION, manifest))
    d.receive_ready()
    assert os.sched_getaffinity(d.popen.pid) == set(config.cpus)

    # 2. A colocated run for comparison.
    prompt = [token % config.model.vocab_size for token in tools.prompt(70)]
    sampling = {"max_tokens": 50, "temperature": 1.0, "seed": 3, "logprobs": 2}
    p.send(tools.decode("alone", prompt, **sampling))
    _, alone = collect(p, tools, "alone")
    assert len(alone.token_ids) == 50

    # 3. The same request handed over.
    p.send(tools.prefill("a", prompt, **sampling))
    answer = p.receive()
    assert isinstance(answer, Prefilled) and answer.offer is not None
    tokens = [*prompt, answer.token_id]
    d.send(tools.decode("a", tokens, num_prompt=len(prompt), offer=answer.offer, **sampling))
    pulled = d.receive()
    assert isinstance(pulled, Pulled)
    assert (pulled.num_tokens, pulled.failure) == (70, None)
    assert pulled.num_bytes == 18 * memory.block_bytes
    p.send(Release("a", 0))
    messages, heard = collect(d, tools, "a")
    assert all(isinstance(message, StepOutputs) for message in messages)
    assert [answer.token_id, *heard.token_ids] == alone.token_ids
    assert messages[-1].load.num_free_blocks == NUM_BLOCKS

    # 4. The offer is gone: the prefill worker's pool is as good as new. Then both end by themselves.
    p.send(tools.decode("b", prompt, max_tokens=1))
    messages, _ = collect(p, tools, "b")
    assert messages[-1].load.num_free_blocks == NUM_BLOCKS
    for process in (p, d):
        process.send(Shutdown())
        assert process.wait() == 0


def test_a_worker_ends_with_its_router_even_in_a_long_step(spawn, config, memory, tools):
    p = spawn(config)
    start_loader(p, memory)
    # 1. Heartbeats come while nothing happens.
    deadline = time.monotonic() + TIMEOUT_S
    p.send(tools.decode("a", [1], max_tokens=1))
    collect(p, tools, "a")
    while p.num_heartbeats == 0 and time.monotonic() < deadline:
        time.sleep(0.1)
        p.send(tools.decode("a", [1], max_tokens=1))
        collect(p, tools, "a")
    assert p.num_heartbeats > 0
    # 2. Ctrl-C is not for workers.
    p.popen.send_signal(signal.SIGINT)
    p.send(tools.decode("a", [1], max_tokens=1))
    collect(p, tools, "a")
    # 3. The router's end closes in the midst of work.
    p.send(*(tools.decode(f"r{i}", [1] * 100, max_tokens=90) for i in range(8)))
    p.control.close()
    assert p.wait() == ORPHAN_STATUS


def test_a_router_that_is_gone_before_init(spawn, config):
    p = spawn(config)
    p.control.close()
    assert p.wait() == ORPHAN_STATUS


def test_a_broken_model_is_told_in_one_line(spawn, config, memory, tmp_path):
    p = spawn(msgspec.structs.replace(config, model_path=str(tmp_path)))
    p.send(Init(p.config, INCARNATION))
    p.grant_arena(memory, "prefill-0")
    p.grant_weights(memory, writable=True)
    while isinstance(message := p.receive(), Loading):
        pass
    assert isinstance(message, Fatal) and message.kind == "ModelError" and "\n" not in message.message
    assert p.wait() == 1
    assert b"Traceback" not in p.popen.stderr.read()


def test_a_wrong_grant_and_a_malformed_message_are_fatal(spawn, config, memory):
    p = spawn(msgspec.structs.replace(config, num_blocks=NUM_BLOCKS + 1))
    p.send(Init(p.config, INCARNATION))
    p.grant_arena(memory, "prefill-0")
    p.grant_weights(memory, writable=True)
    while isinstance(message := p.receive(), Loading | Loaded):
        pass
    assert isinstance(message, Fatal) and message.kind == "EngineError"
    assert p.wait() == 1

    p = spawn(config)
    start_loader(p, memory)
    p.control.sendall(FRAME_HEADER.pack(3, INCARNATION) + b"\xff" * 3)
    message = p.receive()
    assert isinstance(message, Fatal) and message.kind == "EngineError"
    assert p.wait() == 1
