"""How KV gets from worker to worker: what each announces, what a pair uses, what that means. Pure.

Workers of one machine on CPUs have arenas that the supervisor made and that every other can map (shm). Where
that is not so, or not wanted, the owner sends its blocks over gloo (torch_distributed). The arena of a GPU's
worker is opened by the others on their GPUs (cuda_ipc), and its host tier is mapped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations

from memserve.config import ServeConfig, Transfer, Transport, TransportChoice, WorkerConfig
from memserve.errors import ConfigError

GLOO_NOTICE = (
    "KV moves over torch_distributed: gloo listens on loopback. Connections are proved by tokens, so that "
    "nobody else reads or plants KV, but any local user can hold pulls up or bring a worker down; not for a "
    "machine with users who are not trusted"
)

# Where torch reads how it takes GPU memory: the older name and the newer one.
ALLOCATOR_SETTINGS = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")


def announced(choice: TransportChoice, device: str) -> tuple[Transport, ...]:
    """What a worker on `device` can take part in, the better first. Raises ConfigError."""
    if device != "cpu":
        if choice not in ("auto", "cuda_ipc"):
            raise ConfigError(f"--transport {choice} is for workers on the CPU; those on GPUs use cuda_ipc")
        return ("cuda_ipc",)
    if choice == "cuda_ipc":
        raise ConfigError("--transport cuda_ipc is for workers on GPUs; those on the CPU use shm")
    return ("shm", "torch_distributed") if choice == "auto" else (choice,)


def between(one: WorkerConfig, other: WorkerConfig) -> Transport | None:
    """What two workers use: the first that both announce; None if KV cannot get from one to the other."""
    return next((transport for transport in one.transports if transport in other.transports), None)


def peers_of(config: WorkerConfig, plan: Sequence[WorkerConfig]) -> dict[str, Transport]:
    """How each instance of the plan that `config` can pull from is reached."""
    ways = {other.instance: between(config, other) for other in plan if other.instance != config.instance}
    return {instance: way for instance, way in ways.items() if way is not None}


def uses_gloo(plan: Sequence[WorkerConfig]) -> bool:
    """Whether some pair's KV is sent rather than mapped."""
    return any(between(one, other) == "torch_distributed" for one, other in combinations(plan, 2))


def check_allocator(plan: Sequence[WorkerConfig], environ: Mapping[str, str]) -> None:
    """Raises ConfigError if torch is told to take GPU memory in a way that processes cannot share."""
    if not any("cuda_ipc" in config.transports for config in plan):
        return
    for name in ALLOCATOR_SETTINGS:
        if asks_for_expandable_segments(environ.get(name, "")):
            raise ConfigError(
                f"{name} sets expandable_segments:True, but memory of torch's expandable segments cannot be "
                "shared between workers: set it to False, or leave it out"
            )


def asks_for_expandable_segments(settings: str) -> bool:
    """Whether torch, told this, takes GPU memory in segments that grow."""
    return "expandable_segments:true" in settings.replace(" ", "").lower().split(",")


def transfer_mode(serve: ServeConfig, plan: Sequence[WorkerConfig]) -> Transfer:
    """When a prompt's KV is pulled: as asked for, but layers cannot be followed over gloo, so by chunk."""
    return "chunk" if serve.transfer == "layer" and uses_gloo(plan) else serve.transfer
