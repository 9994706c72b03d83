"""What a worker tells the router: how its start goes and how it does, the tokens of requests, and which KV is
where.
"""

from __future__ import annotations

import msgspec

from memserve.messages.base import Message
from memserve.messages.blocks import BlockRefs, Offer
from memserve.messages.commands import CacheReport, Measured
from memserve.messages.links import LinkMessage
from memserve.messages.sequences import CachedTokens, FinishReason, TokenLogprobs


class Loading(Message, frozen=True, array_like=True, tag=True, gc=False):
    """Progress of the start-up, 0 ≤ fraction ≤ 1 within `stage`."""

    stage: str
    fraction: float


class Loaded(Message, frozen=True, array_like=True, tag=True, gc=False):
    """The loader laid the weights out in the shared memfd; `manifest` says what lies where. On a GPU it is
    empty: what lies there follows from the model, and whether others can have it from a `WeightsExport`.
    """

    manifest: bytes


class Ready(Message, frozen=True, array_like=True, tag=True, gc=False):
    """The worker takes requests from now on."""

    num_blocks: int
    block_size: int
    max_model_len: int
    fingerprint: str
    device: str
    dtype: str
    load_s: float


class Fatal(Message, frozen=True, array_like=True, tag=True, gc=False):
    """The worker cannot start or go on; `kind` is the name of a class in memserve.errors. It exits after
    this.
    """

    kind: str
    message: str


class Load(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What a worker is doing now. Times in seconds."""

    num_waiting: int = 0
    num_running: int = 0
    num_pulling: int = 0
    num_offers: int = 0
    oldest_offer_s: float = 0.0
    num_free_blocks: int = 0
    num_active_blocks: int = 0
    num_historical_blocks: int = 0
    num_preemptions: int = 0
    num_steps: int = 0
    num_prefill_tokens: int = 0
    num_decode_tokens: int = 0
    num_host_blocks: int = 0
    num_host_historical_blocks: int = 0


class Heartbeat(Message, frozen=True, array_like=True, tag=True, gc=False):
    """Sent every second by a thread of its own: alive. `in_step_s` tells a long step from an idle loop."""

    num_steps: int
    in_step_s: float
    load: Load


class Prefilled(Message, frozen=True, array_like=True, tag=True, gc=False):
    """A `Prefill` is done: its first token and, unless that token ended the request, the offer of its KV.
    `computing_ms`: since its first step began.
    """

    request_id: str
    attempt: int
    token_id: int
    logprobs: TokenLogprobs | None
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None
    cached: CachedTokens
    finish_reason: FinishReason | None
    offer: Offer | None
    load: Load
    computing_ms: float | None = None


class Stored(Message, frozen=True, array_like=True, tag=True, gc=False):
    """More blocks of a request are complete, from block `first_block` of the sequence on.

    They are mostly kept as long as the request runs here and its offer stands; their generations tell.
    With `layers_from` the step that completes them only begins: layer l of them can be read when the owner's
    progress has reached `layers_from` + l + 1.
    """

    request_id: str
    attempt: int
    first_block: int
    refs: BlockRefs
    layers_from: int | None = None


class Pulled(Message, frozen=True, array_like=True, tag=True, gc=False):
    """An offer was dealt with: the router may release it at its source.

    The KV of `num_tokens` tokens is here now, `num_cached_tokens` of them because it was before; the rest is
    recomputed because of `failure` (None when all came). `pull_ms` is the time of what was pulled once the
    offer was here, from the begin of that to its end.
    """

    request_id: str
    attempt: int
    num_tokens: int
    num_cached_tokens: int
    num_bytes: int
    pull_ms: float
    failure: str | None


class PulledBack(Message, frozen=True, array_like=True, tag=True, gc=False):
    """What became of a `PullBack`: so many tokens more are cached here. `failure` says why not all are."""

    request_id: str
    num_tokens: int
    num_bytes: int
    failure: str | None


class Removed(Message, frozen=True, array_like=True, tag=True, gc=False):
    """Blocks that are no longer cached where they were: their addresses `refs` do not verify any more. Their
    content is at `moved_to` now, in the same order (swapped out or in), or nowhere.
    """

    refs: BlockRefs
    moved_to: BlockRefs | None


class Output(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """New tokens of one request in one step (a step draws one token a request). `cached` comes with the first
    ones of an attempt, and `computing_ms`, the time since its first step began.
    """

    request_id: str
    attempt: int
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] | None = None
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    finish_reason: FinishReason | None = None
    cached: CachedTokens | None = None
    computing_ms: float | None = None


class StepOutputs(Message, frozen=True, array_like=True, tag=True, gc=False):
    """Everything one step of the loop produced for `Decode` requests, in one message."""

    outputs: tuple[Output, ...]
    load: Load


class Failed(Message, frozen=True, array_like=True, tag=True, gc=False):
    """This attempt cannot be run here (too long for the pool, say). Nothing of it is left on the worker."""

    request_id: str
    attempt: int
    message: str


ToRouter = (
    Loading
    | Loaded
    | Ready
    | Fatal
    | Heartbeat
    | Stored
    | Prefilled
    | Pulled
    | PulledBack
    | Removed
    | CacheReport
    | Measured
    | StepOutputs
    | Failed
    | LinkMessage
)
