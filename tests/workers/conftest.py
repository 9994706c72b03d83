"""Fakes for the workers' tests: a channel without sockets, a model whose next token is a hash of the KV
in the arena.

`LateRunner` is that model on a device that computes later than it is told to.

The hash model makes every mistake with a block visible: a wrong, stale or freed block, or a wrong order,
changes the tokens. `Rig` is one worker over a real pool; `link` grants rigs each other's arenas, as the
supervisor would.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from memserve.config import Role, WorkerConfig
from memserve.memfd import create_memfd, reopen_readonly
from memserve.messages import (
    ArenaGrant,
    Decode,
    Failed,
    FinishReason,
    Load,
    Offer,
    Output,
    Prefill,
    Prefilled,
    Pulled,
    SamplingParams,
    StepOutputs,
    Tier,
    encode_frame,
    generation_table_bytes,
    pack_tokens,
)
from memserve.model_config import KVGeometry, ModelConfig, RopeConfig, load_model_config
from memserve.models.checkpoint import tensor_shapes
from memserve.pool.arena import Arena, ArenaFds
from memserve.pool.mempool import MemPool
from memserve.pool.retention import HostArena, Retention
from memserve.pool.transports.by_peer import PeerTransfer
from memserve.pool.transports.shm import ShmTransfer
from memserve.workers.channel import MessageTooLong, ReceivedGrant
from memserve.workers.request import Request
from memserve.workers.steps import Chunk, Computed, Drawn
from memserve.workers.worker import Worker

VOCAB_SIZE = 997


def hash_tokens(token_ids: Sequence[int]) -> int:
    """The token that the hash model draws after `token_ids`."""
    state = 1
    for position, token_id in enumerate(token_ids):
        state = (state * 31 + (token_id + 1) * (position + 7)) % 1000003
    return state % VOCAB_SIZE


class HashRunner:
    """Stores token ids as "KV" and hashes what it finds there; raises where a `poisonous` request is."""

    overlaps = False

    def __init__(self, kv: torch.Tensor, block_size: int) -> None:
        self.kv = kv
        self.block_size = block_size
        self.poisonous: set[str] = set()
        self.bad_requests: set[str] = set()
        self.batches: list[list[tuple[str, int]]] = []
        self.on_layer: Callable[[], None] = lambda: None

    def begin(self, chunks: Sequence[Chunk]) -> Computed:
        return Computed(self.execute(chunks))

    def execute(self, chunks: Sequence[Chunk]) -> list[Drawn]:
        self.batches.append([(chunk.request.request_id, chunk.num_new) for chunk in chunks])
        if any(chunk.request.request_id in self.poisonous for chunk in chunks):
            raise RuntimeError("broken kernel")
        drawn = [self._run(chunk) for chunk in chunks]
        self.on_layer()
        return drawn

    def _run(self, chunk: Chunk) -> Drawn:
        request, num_new = chunk
        assert num_new > 0
        start = request.num_computed_tokens
        stop = start + num_new
        table = request.table.ids(-(-stop // self.block_size))
        slots = table[np.arange(stop) // self.block_size], np.arange(stop) % self.block_size
        lane = self.kv[:, 0, 0, 0, :, 0]
        lane[slots[0][start:], slots[1][start:]] = torch.from_numpy(
            request.tokens(start, stop).astype(np.float32)
        )
        if stop < request.num_tokens:
            return Drawn()
        if request.request_id in self.bad_requests:
            return Drawn(error="not a number")
        stored = lane[slots[0], slots[1]]
        assert torch.isfinite(stored).all(), "a freed block was read"
        return Drawn(hash_tokens([int(value) for value in stored]))


class Stream:
    """Work that a device does later, in order: whatever is put in is done by the time it is waited for.

    Freed blocks are poisoned when what was enqueued before is done, as no earlier can anybody write there.
    """

    def __init__(self) -> None:
        # Each with what is to be done when it is done.
        self._work: deque[tuple[Callable[[], None], list[Callable[[], None]]]] = deque()
        self._num_done = self._num_put = 0

    def put(self, work: Callable[[], None]) -> int:
        """Enqueue; the count to wait for."""
        self._work.append((work, []))
        self._num_put += 1
        return self._num_put

    def wait(self, count: int) -> None:
        """Until that much has been done."""
        while self._num_done < count:
            self._num_done += 1
            work, after = self._work.popleft()
            for each in (work, *after):
                each()

    def after(self, work: Callable[[], None]) -> None:
        """Do it when nothing is enqueued: now, or with the end of the last that is."""
        if self._work:
            self._work[-1][1].append(work)
        else:
            work()


class LateStep:
    """A step of a `LateRunner`; `rows` are filled when the stream gets there."""

    def __init__(self, runner: LateRunner, chunks: Sequence[Chunk], previous: LateStep | None) -> None:
        self._runner = runner
        self._names = [request.request_id for request, _ in chunks]
        self.rows: dict[Request, Drawn] = {}
        pieces = [self._piece(chunk, previous) for chunk in chunks]
        self._end = runner.stream.put(lambda: [run() for run in pieces])

    def _piece(self, chunk: Chunk, previous: LateStep | None) -> Callable[[], None]:
        """Read all that is needed of a request now; compute it later."""
        request, num_new = chunk
        assert num_new > 0 and not (request.is_drawing and request.looks_back)
        start = request.num_computed_tokens
        stop = start + num_new
        tokens = request.tokens(start, stop).copy()
        block_ids = request.table.ids(-(-stop // self._runner.block_size)).copy()
        draws = stop == request.num_tokens
        is_drawing = draws and request.is_drawing

        def run() -> None:
            if is_drawing:
                assert previous is not None
                token_id = previous.rows[request].token_id
                tokens[-1] = 0 if token_id is None else token_id
            drawn = self._runner.hash_chunk(tokens, block_ids, start)
            if draws and request.request_id in self._runner.bad_requests:
                drawn = Drawn(error="not a number")
            self.rows[request] = drawn if draws else Drawn()

        return run

    def result(self) -> list[Drawn]:
        self._runner.num_waiting -= 1
        self._runner.stream.wait(self._end)
        if self._runner.poisonous & {*self._names}:
            raise RuntimeError("broken kernel")
        return list(self.rows.values())


class LateRunner(HashRunner):
    """The hash model on a device that works later: a step has an effect only when somebody waits for it.

    `unbeginnable` requests fail their step when it begins, `poisonous` ones when it ends.
    """

    overlaps = True

    def __init__(self, kv: torch.Tensor, block_size: int) -> None:
        super().__init__(kv, block_size)
        self.stream = Stream()
        self.unbeginnable: set[str] = set()
        self.num_waiting = self.most_waiting = 0
        self._last: LateStep | None = None

    def begin(self, chunks: Sequence[Chunk]) -> LateStep:
        names = {request.request_id for request, _ in chunks}
        if self.unbeginnable & names:
            raise RuntimeError("no such kernel")
        self.batches.append([(chunk.request.request_id, chunk.num_new) for chunk in chunks])
        self.num_waiting += 1
        self.most_waiting = max(self.most_waiting, self.num_waiting)
        self._last = LateStep(self, chunks, self._last)
        return self._last

    def execute(self, chunks: Sequence[Chunk]) -> list[Drawn]:
        assert not self.num_waiting and not any(request.is_drawing for request, _ in chunks)
        return self.begin(chunks).result()

    def hash_chunk(self, tokens: np.ndarray, block_ids: np.ndarray, start: int) -> Drawn:
        """Store the tokens at `start` of these blocks, and hash all up to their end."""
        slots = np.arange(start + len(tokens))
        blocks, offsets = block_ids[slots // self.block_size], slots % self.block_size
        lane = self.kv[:, 0, 0, 0, :, 0]
        lane[blocks[start:], offsets[start:]] = torch.from_numpy(tokens.astype(np.float32))
        stored = lane[blocks, offsets]
        assert torch.isfinite(stored).all(), "a freed block was read"
        return Drawn(hash_tokens([int(value) for value in stored]))


class FakeChannel:
    """Messages to the worker are put in `inbox`; what it sends piles up in `sent`.

    `max_bytes` stands for the limit of a frame.
    """

    def __init__(self) -> None:
        self.inbox: list = []
        self.sent: list = []
        self.max_bytes: int | None = None

    def receive(self) -> list:
        received, self.inbox = self.inbox, []
        return received

    def send(self, message) -> None:
        if self.max_bytes is not None and len(encode_frame(message, 0)) > self.max_bytes:
            raise MessageTooLong("too long")
        self.sent.append(message)


class FakeGrants:
    def __init__(self) -> None:
        self.inbox: list[ReceivedGrant] = []

    def receive(self) -> list[ReceivedGrant]:
        received, self.inbox = self.inbox, []
        return received


class Clock:
    """Time that moves only when told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def make_model(**changes) -> ModelConfig:
    """The smallest model whose KV the hash model can use."""
    model = ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=VOCAB_SIZE,
        hidden_size=8,
        intermediate_size=16,
        num_layers=1,
        num_heads=1,
        num_kv_heads=1,
        head_dim=8,
        rms_norm_eps=1e-5,
        rope=RopeConfig(),
        tie_word_embeddings=False,
        qkv_bias=False,
        o_bias=False,
        mlp_bias=False,
        qk_norm=False,
        sliding_window=(None,),
        max_position_embeddings=4096,
        dtype="float32",
        eos_token_ids=(),
        bos_token_id=None,
    )
    return msgspec.structs.replace(model, **changes)


def make_worker_config(**changes) -> WorkerConfig:
    """A CPU worker of the hash model."""
    fields = {
        "instance": "worker-0",
        "role": Role.COLOCATED,
        "model_path": "/nowhere",
        "model": make_model(),
        "device": "cpu",
        "dtype": "float32",
        "load_format": "dummy",
        "seed": 0,
        "block_size": 4,
        "num_blocks": 64,
        "device_memory_fraction": None,
        "max_model_len": 200,
        "max_batch_tokens": 64,
        "max_running": 8,
        "max_step_ms": None,
        "threads": 1,
        "caches": False,
    }
    return WorkerConfig(**{**fields, **changes})


def make_fds(num_blocks: int, geometry: KVGeometry) -> ArenaFds:
    """The memfds of an arena."""
    return ArenaFds(
        create_memfd("arena", num_blocks * geometry.block_bytes),
        create_memfd("generations", generation_table_bytes(num_blocks)),
    )


def poison(arena: Arena) -> Callable[[np.ndarray], None]:
    """Spoils the content of blocks."""

    def spoil(block_ids) -> None:
        arena.kv[torch.from_numpy(np.asarray(block_ids))] = torch.nan

    return spoil


def poison_in_order(arena: Arena, stream: Stream) -> Callable[[np.ndarray], None]:
    """Spoils the content of blocks when all that was begun before is done."""
    spoil = poison(arena)

    def enqueue(block_ids) -> None:
        freed = np.array(block_ids)
        stream.after(lambda: spoil(freed))

    return enqueue


def make_retention(config: WorkerConfig, geometry: KVGeometry, host_fds: ArenaFds | None) -> Retention | None:
    """What `workers.startup` makes of a config."""
    if not config.caches:
        return None
    host = None
    if host_fds is not None:
        arena = Arena.map(geometry, config.max_host_blocks, host_fds)
        host = HostArena(arena, config.host_blocks, on_free=poison(arena))
    return Retention(host=host, tells_removals=True)


@dataclasses.dataclass
class Rig:
    """One worker over a real pool, driven by hand."""

    config: WorkerConfig
    worker: Worker
    channel: FakeChannel
    grants: FakeGrants
    pool: MemPool
    runner: HashRunner
    clock: Clock
    fds: ArenaFds
    host_fds: ArenaFds | None = None

    def send(self, *messages) -> None:
        """To the worker."""
        self.channel.inbox.extend(messages)

    def take(self) -> list:
        """Everything the worker has said since the last time."""
        sent, self.channel.sent = self.channel.sent, []
        return sent

    def run(self, max_steps: int = 2000) -> None:
        """Step until there is nothing to do, waiting for pulls that are under way."""
        for _ in range(max_steps):
            if not self.worker.step():
                if not self.worker._scheduler.pulling and not self._is_pulling():
                    return
                time.sleep(0.001)
        raise AssertionError(f"still busy after {max_steps} steps")

    def _is_pulling(self) -> bool:
        return bool(self.worker._pulls or self.worker._pull_backs)

    def grant_to(self, other: Rig, incarnation: int = 0) -> None:
        """Let another worker read this one's arena."""
        block_bytes = KVGeometry.of(self.config.model, self.config.block_size, self.config.dtype).block_bytes
        sizes = {Tier.DEVICE: self.pool.num_blocks, Tier.HOST: self.config.max_host_blocks}
        for tier, fds in ((Tier.DEVICE, self.fds), (Tier.HOST, self.host_fds)):
            if fds is not None:
                grant = ArenaGrant(self.config.instance, incarnation, tier, sizes[tier], block_bytes)
                other.grants.inbox.append(ReceivedGrant(grant, tuple(map(reopen_readonly, fds))))

    def assert_idle(self) -> None:
        """No request, no offer, no block in use."""
        load = self.worker.gauges.load()
        assert (load.num_waiting, load.num_running, load.num_pulling, load.num_offers) == (0, 0, 0, 0)
        assert not len(self.worker._register) and not self._is_pulling()
        self.pool.assert_idle()


@pytest.fixture(autouse=True, scope="session")
def single_thread() -> None:
    """Tiny tensors gain nothing from threads, and the threads of a busy machine wait for one another."""
    torch.set_num_threads(1)


class Rigs:
    """Makes rigs and closes them, descriptors too."""

    def __init__(self) -> None:
        self._made: list[Rig] = []

    def make(self, copy=None, runner_of=HashRunner, **changes) -> Rig:
        config = make_worker_config(**changes)
        geometry = KVGeometry.of(config.model, config.block_size, config.dtype)
        assert config.num_blocks is not None
        fds = make_fds(config.num_blocks, geometry)
        host_fds = None if config.host_blocks is None else make_fds(config.max_host_blocks, geometry)
        arena = Arena.map(geometry, config.num_blocks, fds)
        transfer = None
        if copy is not None:
            shm = ShmTransfer(arena.blocks, lambda: None, num_layers=geometry.num_layers, copy=copy)
            transfer = PeerTransfer(lambda: None, shm)
        channel, grants, clock = FakeChannel(), FakeGrants(), Clock()
        spoil = poison(arena)
        runner = runner_of(arena.kv, config.block_size)
        if isinstance(runner, LateRunner):
            spoil = poison_in_order(arena, runner.stream)
        pool = MemPool(
            arena,
            config.instance,
            0,
            lambda: None,
            retention=make_retention(config, geometry, host_fds),
            clock=clock,
            on_free=spoil,
            transfer=transfer,
        )
        if isinstance(runner, HashRunner):
            runner.on_layer = pool.progress.advance
        worker = Worker(config, channel, grants, pool, runner, clock)
        rig = Rig(config, worker, channel, grants, pool, runner, clock, fds, host_fds)
        self._made.append(rig)
        return rig

    def close(self) -> None:
        for rig in self._made:
            rig.worker.close()
            rig.pool.close()
            for fd in (*rig.fds, *(rig.host_fds or ())):
                os.close(fd)


@pytest.fixture
def make_rig() -> Iterator[Callable[..., Rig]]:
    """Rigs whose freed blocks are poisoned; `copy` injects faults into pulls."""
    rigs = Rigs()
    yield rigs.make
    rigs.close()


@pytest.fixture(scope="module")
def make_module_rig() -> Iterator[Callable[..., Rig]]:
    """As `make_rig`, for what the tests of a module compare with."""
    rigs = Rigs()
    yield rigs.make
    rigs.close()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory) -> Path:
    """A folder with a small float32 model of weights so large that every token of context matters."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 199,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
    }
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(0)
    shapes = tensor_shapes(load_model_config(folder))
    tensors = {
        name: torch.randn(shape, generator=generator) * (0.3 if len(shape) > 1 else 1.0)
        for name, shape in shapes.items()
    }
    save_file(tensors, folder / "model.safetensors")
    return folder


@dataclasses.dataclass
class Transcript:
    """What was heard about one attempt of a request, in order."""

    token_ids: list[int] = dataclasses.field(default_factory=list)
    finish_reason: FinishReason | None = None
    offer: Offer | None = None
    pulled: list[Pulled] = dataclasses.field(default_factory=list)
    failed: str | None = None
    outputs: list[Output | Prefilled] = dataclasses.field(default_factory=list)

    @classmethod
    def of(cls, messages: Sequence, request_id: str) -> Transcript:
        transcript = cls()
        for message in messages:
            if isinstance(message, StepOutputs):
                for output in message.outputs:
                    if output.request_id == request_id:
                        transcript._take(output, output.token_ids)
            elif getattr(message, "request_id", None) != request_id:
                continue
            elif isinstance(message, Prefilled):
                transcript._take(message, (message.token_id,))
                transcript.offer = message.offer
            elif isinstance(message, Pulled):
                transcript.pulled.append(message)
            elif isinstance(message, Failed):
                transcript.failed = message.message
        return transcript

    def _take(self, output: Output | Prefilled, token_ids: Sequence[int]) -> None:
        assert self.finish_reason is None, "tokens after the end"
        self.token_ids += token_ids
        self.finish_reason = output.finish_reason
        self.outputs.append(output)


class Tools:
    """The helpers above, for tests that cannot import a conftest."""

    vocab_size = VOCAB_SIZE
    Load = Load
    Clock = Clock
    Transcript = Transcript
    HashRunner = HashRunner
    LateRunner = LateRunner
    make_config = staticmethod(make_worker_config)
    make_model = staticmethod(make_model)

    @staticmethod
    def prompt(length: int, seed: int = 0) -> list[int]:
        """Token ids of a prompt."""
        return np.random.default_rng(seed).integers(0, VOCAB_SIZE, length).tolist()

    @staticmethod
    def expected(prompt: Sequence[int], max_tokens: int) -> list[int]:
        """What the hash model says after `prompt`."""
        tokens = list(prompt)
        for _ in range(max_tokens):
            tokens.append(hash_tokens(tokens))
        return tokens[len(prompt) :]

    @staticmethod
    def sampling(max_tokens: int = 8, **changes) -> SamplingParams:
        return SamplingParams(max_tokens=max_tokens, seed=changes.pop("seed", 1), **changes)

    @classmethod
    def prefill(cls, request_id: str, tokens: Sequence[int], *, attempt: int = 0, **sampling) -> Prefill:
        return Prefill(request_id, attempt, pack_tokens(tokens), len(tokens), cls.sampling(**sampling))

    @classmethod
    def decode(
        cls,
        request_id: str,
        tokens: Sequence[int],
        *,
        num_prompt: int | None = None,
        attempt: int = 0,
        offer: Offer | None = None,
        **sampling,
    ) -> Decode:
        return Decode(
            request_id,
            attempt,
            pack_tokens(tokens),
            len(tokens) if num_prompt is None else num_prompt,
            cls.sampling(**sampling),
            offer=offer,
        )


@pytest.fixture(scope="session")
def tools() -> type[Tools]:
    return Tools
