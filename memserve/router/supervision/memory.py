"""Fits model, workers and KV pools into the machine: what the user asked for becomes one WorkerConfig each.

Pure: the machine is an argument. On a CPU every byte is planned here:

    available = one copy of the weights │ each worker's own │ the pools │ the rest, left to others

A pool that nobody sized holds as much as its worker can run at once, within bounds that leave the machine
usable, and always one sequence of `max_model_len`. When even that does not fit, an explicit length is an
error that says how much is missing, and an implicit one is shortened (and logged). A GPU's worker sizes its
pool itself, by what is free once its weights are there, unless it shares the GPU: then whoever came first
would take most, so the pools are planned here too.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from memserve.config import Caching, Role, ServeConfig, WorkerConfig
from memserve.errors import ConfigError, MemoryError_
from memserve.model_config import KVGeometry, ModelConfig, weights_bytes_upper_bound
from memserve.router.supervision.machine import Gpu, Machine
from memserve.router.supervision.placement import Seat, choose_dtype, names_roles, place
from memserve.router.supervision.transports import announced
from memserve.sizes import format_bytes, parse_memory
from memserve.step_memory import cuda_pool_blocks, cuda_step_bytes

logger = logging.getLogger(__name__)

# Interpreter, torch, threads' stacks and the tensors of one step: about 400 MiB were measured.
CPU_WORKER_BYTES = 512 << 20
# A context and the libraries' workspaces.
CUDA_CONTEXT_BYTES = 1 << 30
DEFAULT_POOLS_SHARE = 0.2
DEFAULT_POOL_BYTES = 1 << 30
DEFAULT_CUDA_FRACTION = 0.9
# Below this nothing useful can be served.
MIN_MODEL_LEN = 256

CPU_MAX_BATCH_TOKENS = 2048
CUDA_MAX_BATCH_TOKENS = 8192
CPU_MAX_STEP_MS = 200.0


@dataclass(frozen=True, slots=True)
class _Pool:
    """One worker's pool. `num_blocks` None: the worker takes `fraction` of its GPU's free memory.

    `max_tokens`: a bound on the length of a sequence that surely fits.
    """

    num_blocks: int | None
    fraction: float | None
    max_tokens: int


@dataclass(frozen=True, slots=True)
class _Host:
    """One worker's host tier: its blocks at first, and to how many it may grow."""

    num_blocks: int | None = None
    most: int = 0


def plan_workers(
    serve: ServeConfig, model: ModelConfig, model_path: Path, machine: Machine
) -> tuple[WorkerConfig, ...]:
    """One resolved WorkerConfig per instance, prefill first. Raises ConfigError or MemoryError_."""
    seats = place(serve, machine)
    dtype = choose_dtype(serve, seats, machine)
    geometry = KVGeometry.of(model, serve.block_size, dtype)
    weights_bytes = weights_bytes_upper_bound(model, dtype)
    if serve.max_model_len is not None and serve.max_model_len > model.max_position_embeddings:
        raise ConfigError(
            f"--max-model-len {serve.max_model_len} exceeds the model's context of "
            f"{model.max_position_embeddings} tokens"
        )
    wanted_len = serve.max_model_len or model.max_position_embeddings
    hosts = _hosts(serve, seats, geometry, machine.available_bytes)
    available_bytes = (
        machine.available_bytes - sum(host.num_blocks or 0 for host in hosts) * geometry.block_bytes
    )
    if seats[0].gpu is None:
        pools = _cpu_pools(serve, seats, geometry, weights_bytes, wanted_len, available_bytes)
    else:
        pools = _cuda_pools(serve, seats, model, geometry, weights_bytes, wanted_len)
    max_model_len = _model_len(serve, wanted_len, pools, geometry)
    return tuple(
        WorkerConfig(
            instance=seat.instance,
            role=seat.role,
            model_path=str(model_path),
            model=model,
            device="cpu" if seat.gpu is None else f"cuda:{seat.gpu.index}",
            dtype=dtype,
            load_format=serve.load_format,
            seed=serve.seed or 0,
            block_size=serve.block_size,
            num_blocks=pool.num_blocks,
            device_memory_fraction=pool.fraction,
            max_model_len=max_model_len,
            max_batch_tokens=_max_batch_tokens(seat),
            max_running=seat.options.max_running,
            max_step_ms=CPU_MAX_STEP_MS if seat.gpu is None else None,
            threads=seat.threads,
            cpus=seat.cpus,
            caches=_caches(serve.caching, seat.role),
            eviction=serve.eviction,
            cache_ttl_s=serve.cache_ttl_s,
            host_blocks=host.num_blocks,
            max_host_blocks=host.most,
            cuda_graphs=serve.cuda_graphs is not False,
            shares_weights=sum(seat.gpu is not None and seat.gpu == other.gpu for other in seats) > 1,
            max_blocks=0 if seat.gpu is None else max(1, seat.gpu.total_bytes // geometry.block_bytes),
            transports=announced(serve.transport, "cpu" if seat.gpu is None else "cuda"),
            log_level=serve.log_level,
        )
        for seat, pool, host in zip(seats, pools, hosts, strict=True)
    )


def _caches(caching: Caching, role: Role) -> bool:
    """Whether a worker keeps what it computed: of the decode side only from PD-Caching-2 on."""
    return caching != "off" and (role is not Role.DECODE or caching != "prefill")


def _max_batch_tokens(seat: Seat) -> int:
    if seat.options.max_batch_tokens is not None:
        return seat.options.max_batch_tokens
    return CPU_MAX_BATCH_TOKENS if seat.gpu is None else CUDA_MAX_BATCH_TOKENS


def _model_len(serve: ServeConfig, wanted_len: int, pools: Sequence[_Pool], geometry: KVGeometry) -> int:
    """The longest sequence that every worker can hold, at most `wanted_len`."""
    fitting_len = min(pool.max_tokens for pool in pools)
    if fitting_len >= wanted_len:
        return wanted_len
    needed_len = serve.max_model_len or min(wanted_len, MIN_MODEL_LEN)
    if fitting_len < needed_len:
        missing = (needed_len - fitting_len) * geometry.token_bytes
        raise MemoryError_(
            f"the KV of one request of {needed_len} tokens does not fit: "
            f"{format_bytes(missing)} are missing in a worker's pool"
        )
    logger.warning(
        "requests may have %d tokens, which is what a KV pool holds, not the model's %d "
        "(--device-memory changes that)",
        fitting_len,
        wanted_len,
    )
    return fitting_len


# --- CPU ---------------------------------------------------------------------------------------------------


def _cpu_pools(
    serve: ServeConfig,
    seats: Sequence[Seat],
    geometry: KVGeometry,
    weights_bytes: int,
    wanted_len: int,
    available_bytes: int,
) -> list[_Pool]:
    left = available_bytes - weights_bytes - len(seats) * CPU_WORKER_BYTES
    workers = f"{len(seats)} worker{'s' * (len(seats) > 1)}"
    _check_left(left, f"the weights ({format_bytes(weights_bytes)}) and {workers}", "memory")
    asked = [_asked_bytes(seat, left) for seat in seats]
    unclaimed = max(0, left - sum(size for size in asked if size is not None))
    share = int(min(DEFAULT_POOLS_SHARE * available_bytes, unclaimed)) // max(1, asked.count(None))
    pools = []
    for seat, size in zip(seats, asked, strict=True):
        if size is not None:
            num_blocks = size // geometry.block_bytes
        else:
            most = _blocks(seat.options.max_running * wanted_len, geometry)
            least = 0 if serve.max_model_len is None else _blocks(wanted_len, geometry)
            num_blocks = min(most, min(share, DEFAULT_POOL_BYTES) // geometry.block_bytes)
            num_blocks = max(num_blocks, least)
        pools.append(_Pool(num_blocks, None, num_blocks * geometry.block_size))
    pools_bytes = sum(_bytes(pool, geometry) for pool in pools)
    _check_left(left - pools_bytes, f"the weights and KV pools of {format_bytes(pools_bytes)}", "memory")
    return pools


def _hosts(
    serve: ServeConfig, seats: Sequence[Seat], geometry: KVGeometry, available_bytes: int
) -> list[_Host]:
    """The host tiers that were asked for. While it runs each may grow to what the machine has now: an arena
    is sparse.
    """
    hosts = []
    for seat in seats:
        asked = _parse("--host-memory", seat.options.host_memory)
        if asked is None or not _caches(serve.caching, seat.role):
            if asked is not None:
                logger.warning("%s caches nothing: it gets no host tier", seat.instance)
            hosts.append(_Host())
            continue
        num_bytes = int(asked * available_bytes) if isinstance(asked, float) else asked
        num_blocks = num_bytes // geometry.block_bytes
        hosts.append(_Host(num_blocks, max(1, num_blocks, available_bytes // geometry.block_bytes)))
    total = sum(host.num_blocks or 0 for host in hosts) * geometry.block_bytes
    _check_left(available_bytes - total, f"host tiers of {format_bytes(total)}", "memory")
    return hosts


def _asked_bytes(seat: Seat, free_bytes: int) -> int | None:
    asked = _parse("--device-memory", seat.options.device_memory)
    return int(asked * free_bytes) if isinstance(asked, float) else asked


# --- CUDA --------------------------------------------------------------------------------------------------


def _cuda_pools(
    serve: ServeConfig,
    seats: Sequence[Seat],
    model: ModelConfig,
    geometry: KVGeometry,
    weights_bytes: int,
    wanted_len: int,
) -> list[_Pool]:
    sharing: dict[Gpu, list[Seat]] = {}
    for seat in seats:
        assert seat.gpu is not None
        sharing.setdefault(seat.gpu, []).append(seat)
    pools: dict[str, _Pool] = {}
    for gpu, others in sharing.items():
        where = f"memory on GPU {gpu.index} ({gpu.name})"
        needed = sum(_cuda_worker_bytes(seat, model, geometry, wanted_len) for seat in others)
        left = gpu.free_bytes - weights_bytes - needed
        what = f"1 worker with {format_bytes(weights_bytes)} of weights"
        if len(others) > 1:
            what = f"{len(others)} workers with {format_bytes(weights_bytes)} of weights for all"
        if len(others) > 1 and not names_roles(serve):
            what += " (--colocated 1 needs one)"
        _check_left(left, what, where)
        for seat in others:
            asked = _parse("--device-memory", seat.options.device_memory) or DEFAULT_CUDA_FRACTION / len(
                others
            )
            if isinstance(asked, int):
                num_blocks = asked // geometry.block_bytes
            else:
                num_blocks = cuda_pool_blocks(int(asked * left), geometry)
            if isinstance(asked, float) and len(others) == 1:
                # An estimate: an explicit length is left to the worker, which will know better.
                max_tokens = serve.max_model_len or num_blocks * geometry.block_size
                pools[seat.instance] = _Pool(None, asked, max_tokens)
            else:
                pools[seat.instance] = _Pool(num_blocks, None, num_blocks * geometry.block_size)
        pools_bytes = sum(_bytes(pools[seat.instance], geometry) for seat in others)
        _check_left(left - pools_bytes, f"the weights and KV pools of {format_bytes(pools_bytes)}", where)
    return [pools[seat.instance] for seat in seats]


def _cuda_worker_bytes(seat: Seat, model: ModelConfig, geometry: KVGeometry, max_model_len: int) -> int:
    """What a worker takes beside weights and pool: its context and one full step."""
    return CUDA_CONTEXT_BYTES + cuda_step_bytes(
        model,
        geometry.dtype,
        max_batch_tokens=_max_batch_tokens(seat),
        max_running=seat.options.max_running,
        max_model_len=max_model_len,
    )


# --- arithmetic --------------------------------------------------------------------------------------------


def _check_left(left: int, what: str, where: str) -> None:
    if left < 0:
        raise MemoryError_(f"{what} do not fit in the available {where}: {format_bytes(-left)} are missing")


def _parse(option: str, value: str | None) -> int | float | None:
    """An amount of memory as bytes or as a fraction; None if it was not given."""
    if value is None:
        return None
    try:
        return parse_memory(value)
    except ValueError as error:
        raise ConfigError(f"{option}: {error}") from error


def _blocks(num_tokens: int, geometry: KVGeometry) -> int:
    return -(-num_tokens // geometry.block_size)


def _bytes(pool: _Pool, geometry: KVGeometry) -> int:
    return (pool.num_blocks or 0) * geometry.block_bytes
