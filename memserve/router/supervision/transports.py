"""How KV gets from worker to worker: what each announces, what a pair uses, what that means. Pure.

Workers of one machine on CPUs have arenas that the supervisor made and that every other can map (shm). Where
that is not so, or not wanted, the owner sends its blocks over gloo (torch_distributed). The arena of a GPU's
worker cannot be read by the host: nothing carries its KV yet.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

from memserve.config import ServeConfig, Transfer, Transport, TransportChoice, WorkerConfig
from memserve.errors import ConfigError

GLOO_NOTICE = (
    "KV moves over torch_distributed: gloo listens on loopback. Connections are proved by tokens, so that "
    "nobody else reads or plants KV, but any local user can hold pulls up or bring a worker down; not for a "
    "machine with users who are not trusted"
)


def announced(choice: TransportChoice, device: str) -> tuple[Transport, ...]:
    """What a worker on `device` can take part in, the better first. Raises ConfigError."""
    if device != "cpu":
        if choice != "auto":
            raise ConfigError(
                f"--transport {choice} is for workers on the CPU: nothing carries a GPU's KV yet"
            )
        return ()
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


def transfer_mode(serve: ServeConfig, plan: Sequence[WorkerConfig]) -> Transfer:
    """When a prompt's KV is pulled: as asked for, but layers cannot be followed over gloo, so by chunk."""
    return "chunk" if serve.transfer == "layer" and uses_gloo(plan) else serve.transfer
