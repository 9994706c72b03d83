"""Every option and its default, once, as one frozen tree; and what a worker is told of it.

`ServeConfig` is what the user asked for (command line over TOML file over these defaults). The router
resolves it, with the model's config and the machine, into one `WorkerConfig` per instance. What is no
option, such as the bounds on HTTP requests, stands with the code that it bounds.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Literal

import msgspec

from memserve.model_config import ModelConfig


class Role(StrEnum):
    """What an instance is used for. Every worker can do everything: the role is policy, not code."""

    PREFILL = "prefill"
    DECODE = "decode"
    COLOCATED = "colocated"


DeviceKind = Literal["auto", "cpu", "cuda"]
DtypeName = Literal["auto", "float32", "bfloat16", "float16"]
LoadFormat = Literal["auto", "dummy"]
Transfer = Literal["request", "chunk", "layer"]
# How KV gets from one pool to another: out of its mapped memory, sent by its owner over gloo, or out of GPU
# memory that its owner shares.
Transport = Literal["shm", "torch_distributed", "cuda_ipc"]
TransportChoice = Literal["auto", "shm", "torch_distributed", "cuda_ipc"]
# The paper's milestones PD-Basic, PD-Caching-1, -2 and -3.
Caching = Literal["off", "prefill", "both", "full"]
Eviction = Literal["lru", "lfu"]
PolicyName = Literal["random", "round-robin", "least-load", "session", "prompt-tree"]
LogLevel = Literal["debug", "info", "warning", "error"]


class WorkerOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Options that may differ between roles (`--prefill-OPTION`, `--decode-OPTION`). None = chosen for the
    machine.

    `devices`: GPU indices; several may share one. `device_memory`: KV pool of one worker, as bytes ("2GiB")
    or as a fraction of what is free ("0.5"). `host_memory`: a second tier for what the pool has no room for;
    None = there is none. `threads`: CPU threads of one worker.
    """

    devices: tuple[int, ...] | None = None
    device_memory: str | None = None
    host_memory: str | None = None
    max_batch_tokens: int | None = None
    max_running: int = 64
    threads: int | None = None


class ServeConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`memserve serve`, as asked for. Field names are the option names with underscores.

    `seed` makes a server repeatable: the seeds of requests that bring none follow from it (None: each is
    drawn at random), and dummy weights (None: those of seed 0). `reuse_history_tokens`: an answer that comes
    back in a prompt is read as the ids that were generated, unless nothing is cached. `calibration`: folder
    for the cost models that are measured at the first start, None = the user's cache folder; "off" = nothing
    is measured, they are guessed. `cuda_graphs`: None = where there are GPUs.
    """

    model: str | None = None
    revision: str | None = None
    tokenizer: str | None = None
    chat_template: str | None = None
    load_format: LoadFormat = "auto"
    served_model_name: str | None = None

    prefill: int | None = None
    decode: int | None = None
    colocated: int | None = None
    device: DeviceKind = "auto"
    dtype: DtypeName = "auto"
    block_size: int = 16
    max_model_len: int | None = None
    transfer: Transfer = "layer"
    transport: TransportChoice = "auto"
    cuda_graphs: bool | None = None
    caching: Caching = "full"
    reuse_history_tokens: bool = True
    eviction: Eviction = "lru"
    cache_ttl_s: float | None = None
    policy: PolicyName = "prompt-tree"
    seed: int | None = None
    calibration: str | None = None
    worker: WorkerOptions = WorkerOptions()
    prefill_worker: WorkerOptions | None = None
    decode_worker: WorkerOptions | None = None

    host: str = "127.0.0.1"
    port: int = 8000
    max_waiting: int = 512
    drain_timeout_s: float = 30.0
    request_timeout_s: float = 3600.0
    ping_deadline_s: float = 10.0
    log_level: LogLevel = "info"


class WorkerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What one worker process is told in `Init`: everything resolved, nothing left to choose but CUDA's
    pool size.

    `num_blocks` is None on CUDA only (the worker profiles its GPU's memory and reports in `Ready`);
    `device` is "cpu" or "cuda:N". `max_batch_tokens` bounds one step; on a CPU `max_step_ms` does too, so
    that a cancel never waits long. `cpus`: the cores this worker is pinned to (empty = not pinned). `caches`:
    the KV of finished requests is kept and reused, until it was not used for `cache_ttl_s` or room is needed.
    `host_blocks`: size of the host tier at first, None = there is none; `max_host_blocks`: to which it can
    grow. `max_blocks`: more than a pool on its GPU can ever have. `transports`: how its KV can get to others,
    and theirs here, the better first; two workers use the first that both have. `shares_weights`: others are
    on its GPU, and need the same. `cuda_graphs`: decode steps are replayed.
    """

    instance: str
    role: Role
    model_path: str
    model: ModelConfig
    device: str
    dtype: str
    load_format: LoadFormat
    seed: int
    block_size: int
    num_blocks: int | None
    device_memory_fraction: float | None
    max_model_len: int
    max_batch_tokens: int
    max_running: int
    max_step_ms: float | None
    threads: int
    cpus: tuple[int, ...] = ()
    caches: bool = True
    eviction: Eviction = "lru"
    cache_ttl_s: float | None = None
    host_blocks: int | None = None
    max_host_blocks: int = 0
    max_blocks: int = 0
    transports: tuple[Transport, ...] = ("shm",)
    shares_weights: bool = False
    cuda_graphs: bool = True
    log_level: LogLevel = "info"
