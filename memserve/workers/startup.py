"""From `Init` to a worker that is ready: cores (cores.py), descriptors (start_grants.py), weights, pool, a
first step.

On a CPU the arena and the weights are memfds that come as grants; the one worker that is sent no manifest
lays the weights out for all and says so (`Loaded`), and from then on everybody, it included, maps them
read-only. On CUDA a worker loads its own, sizes its pool by what is then free, makes it and exports it
(gpu_arena.py).
"""

from __future__ import annotations

import gc
import hashlib
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from memserve.config import WorkerConfig
from memserve.errors import EngineError
from memserve.memfd import map_bytes
from memserve.messages import (
    Decode,
    Init,
    Loaded,
    Loading,
    Ready,
    SamplingParams,
    Tier,
    pack_tokens,
)
from memserve.model_config import KVGeometry, blocks_for, fingerprint
from memserve.models.transformer import Transformer
from memserve.models.weights import Weights, map_weights, write_weights
from memserve.pool.arena import Arena
from memserve.pool.eviction import least_frequently_used, least_recently_used
from memserve.pool.mempool import MemPool
from memserve.pool.pinned import CudaPins
from memserve.pool.retention import HostArena, Retention
from memserve.pool.transports.by_peer import PeerTransfer
from memserve.pool.transports.cuda_ipc import CudaTransfer
from memserve.pool.transports.device_sources import Gpu
from memserve.pool.transports.shm import ShmTransfer
from memserve.pool.transports.torch_distributed import TorchPool
from memserve.step_shapes import row_sizes
from memserve.torch_dtypes import TORCH_DTYPES
from memserve.workers.budget import StepBudget
from memserve.workers.channel import Channel, Doorbell, GrantSocket, SocketChannel
from memserve.workers.cores import keep_pages, spread, take_cores
from memserve.workers.gpu_arena import export_arena, gpu_of, make_arena
from memserve.workers.gpu_weights import GpuLoader
from memserve.workers.request import Request
from memserve.workers.runner import ModelRunner
from memserve.workers.start_grants import StartGrants
from memserve.workers.steps import Chunk, Runner
from memserve.workers.worker import Worker

if TYPE_CHECKING:
    from memserve.workers.gpu_model import GpuModel

logger = logging.getLogger(__name__)

# Steps computed before the worker is ready, and the longest of them.
NUM_WARM_UPS = 4
MAX_WARM_UP_TOKENS = 256
# Sizes of steps whose kernels are made before the worker is ready, and how long that may take.
MAX_COMPILED_ROWS = 512
COMPILE_S = 0.4
_PROGRESS_STEP = 0.01


def start(init: Init, channel: SocketChannel, grants: GrantSocket) -> tuple[Worker, Doorbell]:
    """Make the worker that `init` describes and send `Ready`. Raises StartupError, or ChannelClosed."""
    began_at = time.monotonic()
    config = init.config
    keep_pages()
    device, dtype = torch.device(config.device), TORCH_DTYPES[config.dtype]
    geometry = KVGeometry.of(config.model, config.block_size, config.dtype)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # before anything is pinned, which would wake up the first GPU too
    every_core = os.sched_getaffinity(0)
    team = take_cores(config)
    granted = StartGrants(init, grants)
    weights, digest = _weights(init, channel, granted, grants, device)
    gpu = gpu_of(config, device)
    gpu_model = None if device.type == "cpu" else _gpu_model(config, weights, device)
    arena = _arena(init, geometry, granted, gpu_model, gpu)
    host = _host_arena(config, geometry, granted, gpu)
    granted.close()

    doorbell = Doorbell()
    doorbell.watch(channel.fileno())
    doorbell.watch(grants.fileno())
    identity = fingerprint(config.model, geometry, digest)
    retention = None
    if config.caches:
        rank = least_frequently_used if config.eviction == "lfu" else least_recently_used
        retention = Retention(identity, rank, host, tells_removals=True)
    transfer = _transfer(init, arena, host, identity, doorbell.ring, every_core, gpu)
    pool = MemPool(
        arena,
        config.instance,
        init.incarnation,
        doorbell.ring,
        retention=retention,
        transfer=transfer,
        lanes=None if gpu is None else gpu.lanes,
    )
    runner: Runner
    if gpu_model is not None:
        runner = gpu_model.runner(pool.kv, pool.progress.advance)
    else:
        transformer = Transformer(config.model, weights, config.max_model_len, device, dtype)
        runner = ModelRunner(transformer, pool.kv, config.block_size, pool.progress.advance)
        _compile(transformer, config)
    worker = Worker(config, channel, grants, pool, runner)
    # Those there are now are populated before the first step is timed.
    for peer in (*granted.peers, *grants.receive()):
        worker.take_grant(peer)
    pool.populate(_Progress(channel, "memory"))
    spread(team, config)
    _warm_up(config, pool, runner, worker.budget)
    # What lives now lives to the end: a collection that walks all of torch's objects would stall a step.
    gc.collect()
    gc.freeze()
    export_arena(arena, grants)
    channel.send(
        Ready(
            num_blocks=arena.num_blocks,
            block_size=config.block_size,
            max_model_len=config.max_model_len,
            fingerprint=identity,
            device=config.device,
            dtype=config.dtype,
            load_s=time.monotonic() - began_at,
        )
    )
    return worker, doorbell


def _weights(
    init: Init, channel: Channel, granted: StartGrants, grants: GrantSocket, device: torch.device
) -> tuple[Weights, str]:
    """The weights, and what stands for their content: where they are shared, the manifest that all go by."""
    config = init.config
    progress = _Progress(channel, "weights")
    folder = Path(config.model_path)
    if device.type != "cpu":
        loader = GpuLoader(config, device, grants.send, progress)
        if (granted_memory := granted.gpu_weights()) is not None:
            return loader.open(*granted_memory), _digest(config)
        weights = loader.load()
        if config.shares_weights:
            channel.send(Loaded(b""))
        return weights, _digest(config)
    fd, num_bytes = granted.weights()
    manifest = init.weights_manifest
    if manifest is None:
        buffer = map_bytes(fd, num_bytes, writable=True)
        manifest = write_weights(
            config.model, folder, config.dtype, config.load_format, config.seed, buffer.data, progress
        )
        channel.send(Loaded(manifest))
    mapped = map_weights(config.model, manifest, map_bytes(fd, num_bytes, writable=False).data)
    return mapped, hashlib.sha256(manifest).hexdigest()


def _digest(config: WorkerConfig) -> str:
    """Stands for weights that each worker loads: names and sizes of the files, too large to be hashed."""
    if config.load_format == "dummy":
        return f"dummy {config.seed}"
    files = sorted(file for file in Path(config.model_path).glob("*.safetensors") if file.is_file())
    return " ".join(f"{file.name} {file.stat().st_size}" for file in files)


class _Progress:
    """Sends `Loading`, but not for every tensor."""

    def __init__(self, channel: Channel, stage: str) -> None:
        self._channel = channel
        self._stage = stage
        self._told = -1.0

    def __call__(self, fraction: float) -> None:
        if fraction >= self._told + _PROGRESS_STEP or fraction >= 1.0 > self._told:
            self._channel.send(Loading(self._stage, fraction))
            self._told = fraction


def _gpu_model(config: WorkerConfig, weights: Weights, device: torch.device) -> GpuModel:
    from memserve.workers.gpu_model import GpuModel  # and Triton with it, which takes its time

    return GpuModel(config, weights, device)


def _arena(
    init: Init, geometry: KVGeometry, granted: StartGrants, gpu_model: GpuModel | None, gpu: Gpu | None
) -> Arena:
    config = init.config
    if gpu_model is not None:
        num_blocks = gpu_model.num_blocks(geometry)
        if gpu is None:
            return Arena.on_device(geometry, num_blocks, torch.device(config.device))
        return make_arena(gpu, geometry, num_blocks, *granted.device_table(), init.incarnation)
    assert config.num_blocks is not None
    return _map_arena(granted, Tier.DEVICE, geometry, config.num_blocks)


def _host_arena(
    config: WorkerConfig, geometry: KVGeometry, granted: StartGrants, gpu: Gpu | None
) -> HostArena | None:
    if config.host_blocks is None:
        return None
    arena = _map_arena(granted, Tier.HOST, geometry, config.max_host_blocks)
    return HostArena(arena, config.host_blocks, pins=None if gpu is None else CudaPins(gpu.device))


def _map_arena(granted: StartGrants, tier: Tier, geometry: KVGeometry, num_blocks: int) -> Arena:
    grant, fds = granted.arena(tier)
    if grant.num_blocks != num_blocks or grant.block_bytes != geometry.block_bytes:
        raise EngineError(
            f"granted {grant.num_blocks} blocks of {grant.block_bytes} bytes, "
            f"but the config says {num_blocks} of {geometry.block_bytes}"
        )
    return Arena.map(geometry, num_blocks, fds)


def _transfer(
    init: Init,
    arena: Arena,
    host: HostArena | None,
    identity: str,
    wake: Callable[[], None],
    cores: set[int],
    gpu: Gpu | None,
) -> PeerTransfer | None:
    """What reaches the peers; None where nothing does. Before cores are shared out."""
    if gpu is not None:
        cuda = CudaTransfer(arena.as_bytes(), gpu, wake, num_layers=arena.geometry.num_layers)
        return PeerTransfer(wake, None, cuda=cuda)
    if arena.blocks is None:
        return None
    config, shm, torch_pool = init.config, None, None
    if "shm" in config.transports:
        shm = ShmTransfer(arena.blocks, wake, num_layers=arena.geometry.num_layers, cores=cores)
    if "torch_distributed" in config.transports:
        second = None if host is None else host.arena
        torch_pool = TorchPool.of(config.instance, init.incarnation, identity, arena, second)
    return PeerTransfer(wake, shm, torch_pool)


def _compile(transformer: Transformer, config: WorkerConfig) -> None:
    """Have the matrix products' kernels for steps of up to so many rows ready, as far as time allows."""
    deadline = time.monotonic() + COMPILE_S
    with torch.inference_mode():
        for num_rows in row_sizes(min(MAX_COMPILED_ROWS, config.max_batch_tokens)):
            if time.monotonic() > deadline:
                break
            transformer.compile_linear(num_rows)


def _warm_up(config: WorkerConfig, pool: MemPool, runner: Runner, budget: StepBudget) -> None:
    """Compute a few chunks: the first pays for what is made lazily, the others teach the budget.

    Nothing is known before the second, so it is small too; those after it are as long as the time allows.
    """
    longest = min(MAX_WARM_UP_TOKENS, config.max_model_len, pool.num_blocks * config.block_size)
    for attempt in range(NUM_WARM_UPS):
        tally = budget.open()
        num_tokens = min(longest, tally.room(0))
        tally.add_chunk(num_tokens, 0)
        began_at = time.monotonic()
        _run_once(config, pool, runner, num_tokens)
        step_ms = (time.monotonic() - began_at) * 1e3
        if attempt > 0:
            budget.observe(tally, step_ms)
    logger.info("a step of %d tokens takes %.1f ms", num_tokens, step_ms)


def _run_once(config: WorkerConfig, pool: MemPool, runner: Runner, num_tokens: int) -> None:
    """Prefill arbitrary tokens and draw one. Raises EngineError if that is not possible."""
    token_ids = pack_tokens(np.arange(num_tokens, dtype=np.int32) % config.model.vocab_size)
    sampling = SamplingParams(max_tokens=1, seed=0)
    request = Request.of(Decode("warm-up", 0, token_ids, num_tokens, sampling), arrival=0)
    block_ids = pool.alloc_mem(blocks_for(num_tokens, config.block_size))
    assert block_ids is not None
    request.table.append(block_ids)
    (drawn,) = runner.execute([Chunk(request, num_tokens)])
    pool.release(request.table)
    if drawn.error is not None:
        raise EngineError(f"the first step failed: {drawn.error}")
