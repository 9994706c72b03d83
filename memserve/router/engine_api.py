"""What the HTTP layer asks of the engine, and nothing more: the seam between `server.py` and all below it.

The server validates and tokenises; the engine admits, places, runs and tells. One `submit` is one sequence:
a request with n choices or several prompts is several of them. The life of one, as its listener hears it:

    submit(request) ─► Delta ─► Delta ─► … ─► Delta(finish_reason)
           │
           └─ Overloaded or Unavailable (nothing was done), RequestError or EngineError, at any point

Whoever submits cancels what has not ended when he leaves: nothing else does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

from memserve.config import Role, Transport
from memserve.errors import MemserveError
from memserve.messages import (
    CacheCommand,
    CachedTokens,
    CacheReport,
    FinishReason,
    Load,
    SamplingParams,
    TokenLogprobs,
)
from memserve.router.request_log import Recent, RequestRecord
from memserve.router.scheduling.hindsight import Hindsight


class GenerateRequest(msgspec.Struct, frozen=True):
    """One sequence to be continued, validated: it fits the context and every id is in the vocabulary.

    `request_id` is unique within the router's life. Sequences with different `cache_salt` share no KV.
    `session` names the conversation that it belongs to; `policy` is how it is to be placed, None = as usual.
    """

    request_id: str
    token_ids: NDArray[np.int32]
    sampling: SamplingParams
    cache_salt: str = ""
    session: str | None = None
    policy: str | None = None


class Delta(msgspec.Struct, frozen=True):
    """What is new of one sequence since the delta before: at least one token, or the end.

    `token_ids` include the stop token that ended the sequence (`finish_reason` STOP); hiding its text is the
    server's part. `logprobs` runs parallel to `token_ids` and is None unless asked for. `prompt_logprobs`
    comes once, with the first delta, one entry a prompt token (the first is None). `cached` are the
    prompt tokens that did not have to be computed; that of the first delta counts. (A msgspec
    struct, as one is made for every token.)
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] | None = None
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    finish_reason: FinishReason | None = None
    cached: CachedTokens | None = None


# Called on the event loop with each delta, or with the error that ends the sequence. It takes note and
# returns: it raises nothing and does not call the engine.
Listener = Callable[[Delta | MemserveError], None]


class InstanceState(StrEnum):
    """What has become of an instance's process."""

    STARTING = "starting"
    READY = "ready"
    DOWN = "down"


@dataclass(frozen=True, slots=True)
class InstanceStatus:
    """One instance as the router sees it.

    `incarnation` counts its lives from 0; of one that is down it is the last. `load` is the last reported.
    `num_blocks`: size of its KV pool, 0 unless it is ready, in blocks of `block_bytes`. `max_host_blocks`:
    how many its host tier may have, 0 = it has none. `num_restarts`: how often it came up again.
    `pulls_from`: the instances whose KV can get here, and by which transport.
    """

    instance: str
    role: Role
    incarnation: int
    state: InstanceState
    load: Load
    num_blocks: int = 0
    num_restarts: int = 0
    block_bytes: int = 0
    max_host_blocks: int = 0
    pulls_from: tuple[tuple[str, Transport], ...] = ()


@dataclass(frozen=True, slots=True)
class EngineStatus:
    """A snapshot for /health and /metrics; the `*_total` numbers only grow.

    `num_waiting` counts requests that the router holds back, on top of those waiting at an instance;
    `num_running` all that were dispatched and have not ended. `stale_total`: answers that came for something
    that was given up, and were dropped. `prefill_pull*`: of the pulls, those by which a prompt's prefix came
    from another cache; the rest are handoffs to where it is decoded.
    """

    instances: tuple[InstanceStatus, ...] = ()
    num_waiting: int = 0
    num_running: int = 0
    pulls_total: int = 0
    pull_failures_total: int = 0
    pulled_bytes_total: int = 0
    replays_total: int = 0
    restarts_total: int = 0
    pulled_tokens_total: int = 0
    pull_ms_total: float = 0.0
    refused_total: int = 0
    abandoned_total: int = 0
    stale_total: int = 0
    salvaged_tokens_total: int = 0
    pull_backs_total: int = 0
    pull_backs_done_total: int = 0
    pull_back_misses_total: int = 0
    pulled_back_tokens_total: int = 0
    pulled_back_bytes_total: int = 0
    evicted_blocks_total: int = 0
    swapped_out_blocks_total: int = 0
    swapped_in_blocks_total: int = 0
    prefill_pulls_total: int = 0
    prefill_pull_failures_total: int = 0
    prefill_pulled_tokens_total: int = 0
    prefill_pulled_bytes_total: int = 0
    hindsight: Hindsight = field(default_factory=Hindsight)


class Engine(Protocol):
    """The router below HTTP."""

    def submit(self, request: GenerateRequest, listener: Listener) -> None:
        """Runs one sequence. What comes of it goes to `listener`, `Overloaded` perhaps before this returns.

        Until the engine was ready for the first time, and again when it ends or has lost its workers for
        good, that is `Unavailable`. In between a request waits for a worker that is being replaced.
        """
        ...

    def cancel(self, request_id: str) -> None:
        """Ends a sequence everywhere, at once; its listener hears no more. Ignores unknown and ended ids."""
        ...

    def check_room(self, num_sequences: int) -> None:
        """Raises `Overloaded` or `Unavailable` unless so many sequences, submitted right now, would all be
        admitted. Cheap.
        """
        ...

    async def command_caches(self, commands: Mapping[str, CacheCommand]) -> Mapping[str, CacheReport | None]:
        """Sends each instance a command on its cache; the answers, None where none came within seconds."""
        ...

    def explain(self, request_id: str) -> RequestRecord | None:
        """Where a sequence went and why; None if it is not known any more."""
        ...

    def explain_all(self, prefix: str) -> Sequence[RequestRecord]:
        """The same of all whose ids begin so."""
        ...

    def recent(self, limit: int) -> Recent:
        """The newest sequences: so many that go on, and so many that have ended."""
        ...

    def ready(self) -> bool:
        """Whether a request sent now would be served rather than wait for a worker to start."""
        ...

    def status(self) -> EngineStatus:
        """Cheap: no worker is asked."""
        ...
