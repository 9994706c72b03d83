"""What the dispatcher is told and what it asks for: the whole surface between it and the world.

Events come from clients, workers, the supervisor and the clock; actions go to workers and clients. The
engine, a simulator or a test carries them.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec
import numpy as np
from numpy.typing import NDArray

from memserve.config import Role
from memserve.errors import MemserveError
from memserve.messages import Output, SamplingParams, ToRouter, ToWorker

# --- events ---


class Submit(msgspec.Struct, frozen=True):
    """A validated request. `request_id` is unique among those alive. `session`: the conversation that it
    belongs to; `policy`: by which it is placed, None = by the server's.
    """

    request_id: str
    token_ids: NDArray[np.int32]
    sampling: SamplingParams
    cache_salt: str = ""
    session: str | None = None
    policy: str | None = None


@dataclass(frozen=True, slots=True)
class Abandon:
    """The client left, or a stop string was found: nobody wants more of this request."""

    request_id: str


@dataclass(frozen=True, slots=True)
class WorkerUp:
    """A worker takes requests; its tiers have `num_blocks` and at most `max_host_blocks`."""

    instance: str
    role: Role
    incarnation: int
    num_blocks: int
    block_size: int
    max_running: int
    kv_token_bytes: int = 1
    caches: bool = False
    max_host_blocks: int = 0


@dataclass(frozen=True, slots=True)
class WorkerDown:
    """A worker is dead: killed and waited for, so that it does nothing any more."""

    instance: str
    incarnation: int
    reason: str


class FromWorker(msgspec.Struct, frozen=True, gc=False):
    """A message from a worker's incarnation. (A msgspec struct, like those below: one is made for every
    message, or token.)
    """

    instance: str
    incarnation: int
    message: ToRouter


@dataclass(frozen=True, slots=True)
class Tick:
    """Time passes: about once a second."""


Event = Submit | Abandon | WorkerUp | WorkerDown | FromWorker | Tick

# --- actions ---


class Send(msgspec.Struct, frozen=True, gc=False):
    """Send to that incarnation of the worker; if it is gone, drop it."""

    instance: str
    incarnation: int
    message: ToWorker


class Emit(msgspec.Struct, frozen=True, gc=False):
    """Tokens for the client; with a finish reason, the last."""

    request_id: str
    output: Output


@dataclass(frozen=True, slots=True)
class Refuse:
    """The request ends with an error."""

    request_id: str
    error: MemserveError


Action = Send | Emit | Refuse
