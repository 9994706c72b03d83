"""Every struct that crosses a socket between the router and a worker, and the frame around it.

A frame is `u32 body length | u32 incarnation | body`, little-endian; the body is msgpack of one tagged,
array-like struct. The length is capped before anything is allocated for it. The incarnation is that of the
worker, in both directions: a frame of a worker's earlier life is dropped by whoever reads it.
Requests carry an `attempt` for the same reason: an answer to an attempt that was given up is dropped.

Token ids travel as little-endian int32 bytes (`pack_tokens`, `unpack_tokens`): ten times quicker than a list.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from enum import IntEnum, StrEnum
from typing import Annotated

import msgspec
import numpy as np
from numpy.typing import NDArray

from memserve.config import WorkerConfig
from memserve.cuda.memory import DeviceExport

MAX_FRAME_BYTES = 64 << 20
FRAME_HEADER = struct.Struct("<II")


class Tier(IntEnum):
    """Where a block lives: `DEVICE` is HBM, or a CPU worker's main arena; `HOST` is DRAM beside it."""

    DEVICE = 0
    HOST = 1


class FinishReason(StrEnum):
    """Why a request ended, in OpenAI's words where they have one."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"


class CacheVerb(StrEnum):
    """What a `CacheCommand` asks for."""

    FLUSH = "flush"
    LOOKUP = "lookup"
    RESIZE = "resize"


class MeasureVerb(StrEnum):
    """What a `Measure` asks for."""

    STEP = "step"
    SWAP_IN = "swap_in"
    LEND = "lend"
    PULL = "pull"
    WAITS = "waits"


class _Message(msgspec.Struct, frozen=True, array_like=True, tag=True, gc=False):
    """Base of the wire structs: positional msgpack, tagged with the class name.

    `gc=False` throughout: they are made by the thousand a second, and can hold no cycles.
    """


# --- parts ---


class SamplingParams(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """How tokens are drawn; validated and completed by the router, so a worker trusts it.

    `seed` is always set (the router draws one for requests without): token at absolute position p of the
    sequence is drawn with the number (seed, p), so a replay or another batch mix draws the same.
    `stop_token_ids` already holds the model's eos ids unless the client said ignore_eos. `top_k` 0 means off.
    `temperature` 0 means greedy. `logprobs`/`prompt_logprobs`: None = off, k = the token's and the top k's,
    of the raw model distribution (before penalties and temperature).
    """

    max_tokens: int
    seed: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Log-probability of one token, and of the most likely ones at its position (best first)."""

    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()


class BlockRefs(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Addresses of blocks in one arena: (instance, incarnation, tier, block, generation) with the common
    part once.

    `blocks` and `generations` run in parallel, in sequence order. An address is good as long as the owner's
    generation table still shows the same generation for the block.
    """

    instance: str
    incarnation: int
    tier: Tier
    blocks: tuple[int, ...]
    generations: tuple[int, ...]

    def tail(self, start: int) -> BlockRefs:
        """The addresses from the `start`th on."""
        return BlockRefs(
            self.instance, self.incarnation, self.tier, self.blocks[start:], self.generations[start:]
        )


class Transfer(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Blocks that one pool offers to another, `target`, which pulls them: those at `refs`, from block
    `first_block` of a sequence on (MemServe §MemPool API). With `tokens`, whole blocks from the sequence's
    beginning, the receiver publishes what it has pulled; else it goes `into` blocks of its own, or into new
    ones.
    """

    target: str
    refs: BlockRefs
    tokens: bytes = b""
    salt: str = ""
    first_block: int = 0
    into: tuple[int, ...] | None = None


class Offer(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """KV of the first `num_tokens` tokens of a request: `refs` are its blocks from `first_block` on, and
    `more` those after them, where the same instance has them in another tier, and so on.

    Those of a prefill are locked there until `Release`; others are good while their generations are.
    """

    refs: BlockRefs
    num_tokens: int
    first_block: int = 0
    more: tuple[BlockRefs, ...] = ()

    @property
    def num_blocks(self) -> int:
        """Addresses in all."""
        return len(self.refs.blocks) + sum(len(refs.blocks) for refs in self.more)

    def parts(self, start: int) -> Iterator[BlockRefs]:
        """The addresses from the `start`th on, those of each tier by themselves."""
        for refs in (self.refs, *self.more):
            if start < len(refs.blocks):
                yield refs.tail(start) if start else refs
            start = max(0, start - len(refs.blocks))


class StepSpec(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A step to be timed: a chunk of `num_new` tokens after `context_len` others, and `num_decodes` decodes
    that attend to `decode_context` tokens before their own. `draws`: the chunk ends its prompt, so that a
    token is drawn.
    """

    num_new: int = 0
    context_len: int = 0
    draws: bool = True
    num_decodes: int = 0
    decode_context: int = 0


class CachedTokens(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Prompt tokens that were not computed, by where their KV was: the worker's `device` tier, its `host`
    tier, or another instance, `pulled_from`, from which they were pulled.
    """

    device: int = 0
    host: int = 0
    pulled: int = 0
    pulled_from: str = ""

    @property
    def total(self) -> int:
        """All of them."""
        return self.device + self.host + self.pulled


NO_CACHED_TOKENS = CachedTokens()


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


# --- worker → router → worker: forming a link of the transport torch_distributed ---

# Of a link's secret, and at most of what gloo says of where it listens (170 bytes were seen).
LINK_TOKEN_BYTES = 32
_MAX_LINK_ADDRESS_BYTES = 4096
LinkToken = Annotated[bytes, msgspec.Meta(min_length=LINK_TOKEN_BYTES, max_length=LINK_TOKEN_BYTES)]
LinkAddress = Annotated[bytes, msgspec.Meta(max_length=_MAX_LINK_ADDRESS_BYTES)]


class Connect(_Message, frozen=True, array_like=True, tag=True, gc=False):
    """Receiver → source: meet me at `address`, to send me the blocks that I ask for.

    One pair is formed for each `attempt`; of two, the later counts. `token` is the pair's secret, to which
    each end holds the other before it believes or sends anything; never to be logged. `layout` (in words),
    `block_bytes` and `fingerprint` are the receiver's KV.
    """

    receiver: str
    receiver_incarnation: int
    source: str
    source_incarnation: int
    attempt: int
    address: LinkAddress
    token: LinkToken
    layout: str
    block_bytes: int
    fingerprint: str


class Accept(_Message, frozen=True, array_like=True, tag=True, gc=False):
    """Source → receiver: I come to the pair of this attempt, from `address`."""

    receiver: str
    receiver_incarnation: int
    source: str
    source_incarnation: int
    attempt: int
    address: LinkAddress


class Refuse(_Message, frozen=True, array_like=True, tag=True, gc=False):
    """Source → receiver, or the router for a source that is not there: no pair for this attempt."""

    receiver: str
    receiver_incarnation: int
    source: str
    source_incarnation: int
    attempt: int
    reason: str


LinkMessage = Connect | Accept | Refuse


# --- router → worker ---


class Init(_Message, frozen=True, array_like=True, tag=True, gc=False):
    """First message on a connection: who the worker is and what it runs.

    `weights_manifest` is None for the worker that loads the weights and lays them out for the others (it
    answers `Loaded`); the others get the manifest of what lies in the shared weights memfd. On a GPU it is
    empty if the weights are granted, and None if the worker is to load its own.
    """

    config: WorkerConfig
    incarnation: int
    weights_manifest: bytes | None = None


class Prefill(_Message, frozen=True, array_like=True, tag=True, gc=False):
    """Compute the KV of `token_ids`, draw one token, answer `Prefilled`, keep the blocks locked until
    `Release`.

    `token_ids` are the prompt and, on a replay, the tokens drawn so far; `num_prompt_tokens` says where the
    prompt ends (penalties, max_tokens and logprobs count from there). With `tell_blocks` every block is told
    by `Stored` as soon as it is complete, so that it can be pulled while the rest is computed; with
    `tell_layers` already when the step begins that will complete it. `offer` is KV to be had elsewhere.
    """

    request_id: str
    attempt: int
    token_ids: bytes
    num_prompt_tokens: int
    sampling: SamplingParams
    cache_salt: str = ""
    tell_blocks: bool = False
    tell_layers: bool = False
    offer: Offer | None = None


class Reserve(_Message, frozen=True, array_like=True, tag=True, gc=False):
    """A request with these tokens is being prefilled elsewhere and will decode here: keep what is cached of
    it, and expect `PullAhead` of the rest. Only a hint; ended by its `Decode` or by `Cancel`.
    """

    request_id: str
    attempt: int
    token_ids: bytes
    cache_salt: str = ""


class PullAhead(_Message, frozen=True, array_like=True, tag=True, gc=False):
    """Blocks of a request that was reserved: start to pull them, from block `first_block` of the sequence on.
    Only a hint: what is not pulled ahead is pulled, or recomputed, with the `Decode`. With `layers_from` they
    are being computed (see `Stored`).
    """

    request_id: str
    attempt: int
    first_block: int
    refs: BlockRefs
    layers_from: int | None = None


class Decode(_Message, frozen=True, array_like=True, tag=True, gc=False):
    """Run a request to its end: pull what `offer` holds, compute what is lacking, stream the rest.

    Without an offer it is a colocated run (prefill and decode in one place), or a replay. With `tell_blocks`
    every block is told by `Stored` once it is complete.
    """

    request_id: str
    attempt: int
    token_ids: bytes
    num_prompt_tokens: int
    sampling: SamplingParams
    cache_salt: str = ""
    tell_blocks: bool = False
    offer: Offer | None = None


class PullBack(_Message, frozen=True, array_like=True, tag=True, gc=False):
    """Another instance has computed what continues a prefix cached here: pull it, if there is room, and cache
    it too (MemServe §Context caching, PD-Caching-3). `token_ids` are whole blocks, `refs` those from block
    `first_block` on; nothing keeps them but their generations. Answered by `PulledBack`.
    """

    request_id: str
    token_ids: bytes
    cache_salt: str
    first_block: int
    refs: BlockRefs


class CacheCommand(_Message, frozen=True, array_like=True, tag=True, gc=False):
    """Something about the cache itself, answered by `CacheReport` with the same id.

    `FLUSH` forgets all that nobody uses, `LOOKUP` tells how much of `token_ids` is cached, `RESIZE` gives the
    host tier `num_host_blocks`.
    """

    command_id: int
    verb: CacheVerb
    token_ids: bytes = b""
    cache_salt: str = ""
    num_host_blocks: int = 0


class Measure(_Message, frozen=True, array_like=True, tag=True, gc=False):
    """Time something on an idle worker, `num_repeats` times; answered by `Measured` with the same id.

    `STEP` times `step`, `SWAP_IN` copies of `num_blocks` blocks from the own host tier, `PULL` pulls of what
    is at `refs` of another instance. `LEND` gives addresses of `num_blocks` free blocks of a tier to pull
    from, good until somebody needs them. `WAITS` tells how long the worker's threads had to wait for a core.
    """

    command_id: int
    verb: MeasureVerb
    num_repeats: int = 1
    step: StepSpec | None = None
    num_blocks: int = 0
    tier: Tier = Tier.DEVICE
    refs: BlockRefs | None = None


class Cancel(_Message, frozen=True, array_like=True, tag=True, gc=False):
    """Forget this attempt in whatever phase it is and give its blocks back. Unknown ids are ignored."""

    request_id: str
    attempt: int


class Release(_Message, frozen=True, array_like=True, tag=True, gc=False):
    """The offer of this attempt was pulled or is no longer wanted: unlock its blocks. Unknown ids are
    ignored.
    """

    request_id: str
    attempt: int


class Shutdown(_Message, frozen=True, array_like=True, tag=True, gc=False):
    """Stop the loop and exit with status 0; what still runs is dropped (the router drains first)."""


# --- worker → router ---


class Loading(_Message, frozen=True, array_like=True, tag=True, gc=False):
    """Progress of the start-up, 0 ≤ fraction ≤ 1 within `stage`."""

    stage: str
    fraction: float


class Loaded(_Message, frozen=True, array_like=True, tag=True, gc=False):
    """The loader laid the weights out in the shared memfd; `manifest` says what lies where. On a GPU it is
    empty: what lies there follows from the model, and whether others can have it from a `WeightsExport`.
    """

    manifest: bytes


class Ready(_Message, frozen=True, array_like=True, tag=True, gc=False):
    """The worker takes requests from now on."""

    num_blocks: int
    block_size: int
    max_model_len: int
    fingerprint: str
    device: str
    dtype: str
    load_s: float


class Fatal(_Message, frozen=True, array_like=True, tag=True, gc=False):
    """The worker cannot start or go on; `kind` is the name of a class in memserve.errors. It exits after
    this.
    """

    kind: str
    message: str


class Heartbeat(_Message, frozen=True, array_like=True, tag=True, gc=False):
    """Sent every second by a thread of its own: alive. `in_step_s` tells a long step from an idle loop."""

    num_steps: int
    in_step_s: float
    load: Load


class Prefilled(_Message, frozen=True, array_like=True, tag=True, gc=False):
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


class Stored(_Message, frozen=True, array_like=True, tag=True, gc=False):
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


class Pulled(_Message, frozen=True, array_like=True, tag=True, gc=False):
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


class PulledBack(_Message, frozen=True, array_like=True, tag=True, gc=False):
    """What became of a `PullBack`: so many tokens more are cached here. `failure` says why not all are."""

    request_id: str
    num_tokens: int
    num_bytes: int
    failure: str | None


class Removed(_Message, frozen=True, array_like=True, tag=True, gc=False):
    """Blocks that are no longer cached where they were: their addresses `refs` do not verify any more. Their
    content is at `moved_to` now, in the same order (swapped out or in), or nowhere.
    """

    refs: BlockRefs
    moved_to: BlockRefs | None


class CacheReport(_Message, frozen=True, array_like=True, tag=True, gc=False):
    """The answer to a `CacheCommand`: tokens found by tier, blocks freed, or the blocks that the host
    tier will have, and how many it may have. `error` says why it could not be done.
    """

    command_id: int
    num_device_tokens: int = 0
    num_host_tokens: int = 0
    num_blocks: int = 0
    num_blocks_most: int = 0
    error: str | None = None


class Repeat(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One repeat of a measurement. `waited_ms`: how long, of it, the thread that waited most had work but no
    core, because of other processes.
    """

    ms: float
    waited_ms: float = 0.0


class Measured(_Message, frozen=True, array_like=True, tag=True, gc=False):
    """The answer to a `Measure`: its repeats in order, and the bytes that each moved; or `refs`, or why not.
    `WAITS` has one repeat for each thread, which counts from its start.
    """

    command_id: int
    repeats: tuple[Repeat, ...] = ()
    num_bytes: int = 0
    refs: BlockRefs | None = None
    error: str | None = None


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


class StepOutputs(_Message, frozen=True, array_like=True, tag=True, gc=False):
    """Everything one step of the loop produced for `Decode` requests, in one message."""

    outputs: tuple[Output, ...]
    load: Load


class Failed(_Message, frozen=True, array_like=True, tag=True, gc=False):
    """This attempt cannot be run here (too long for the pool, say). Nothing of it is left on the worker."""

    request_id: str
    attempt: int
    message: str


ToWorker = (
    Init
    | Prefill
    | Reserve
    | PullAhead
    | Decode
    | PullBack
    | CacheCommand
    | Measure
    | Cancel
    | Release
    | Shutdown
    | LinkMessage
)
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


# --- descriptors, over the second socketpair ---


class ArenaGrant(_Message, frozen=True, array_like=True, tag=True, gc=False):
    """Comes with two descriptors [arena, generations] by SCM_RIGHTS: the worker's own (read-write) or a
    peer's (opened read-only). `arena` is a sparse memfd of `num_blocks * block_bytes`; `generations` of
    `generation_table_bytes(num_blocks)`: a uint64 for each block, and one for the owner's progress.
    """

    instance: str
    incarnation: int
    tier: Tier
    num_blocks: int
    block_bytes: int


class WeightsGrant(_Message, frozen=True, array_like=True, tag=True, gc=False):
    """Comes with one descriptor: the memfd of the shared weights, read-write for the loader, else
    read-only; or, where there is a `memory`, that of memory of the worker's GPU, as another has filled it.
    """

    num_bytes: int
    memory: DeviceExport | None = None


class PeerGrant(_Message, frozen=True, array_like=True, tag=True, gc=False):
    """A peer whose arenas cannot be mapped, but which sends its blocks over the transport torch_distributed;
    so many in its device tier, and at most in its host tier. Comes without descriptors.
    """

    instance: str
    incarnation: int
    num_blocks: int
    num_host_blocks: int = 0


class DeviceGrant(_Message, frozen=True, array_like=True, tag=True, gc=False):
    """A device tier that is memory of a GPU. Comes with the descriptor of its generation table, of
    `generation_table_bytes(max_blocks)`, writable for the owner, who makes the memory (`memory` None, nor are
    the other sizes known); for a peer read-only, and with the memory's descriptor if `memory` has no handle.
    """

    instance: str
    incarnation: int
    max_blocks: int
    num_blocks: int = 0
    block_bytes: int = 0
    memory: DeviceExport | None = None


class RevokeGrant(_Message, frozen=True, array_like=True, tag=True, gc=False):
    """The peer's arena, of one tier or both (None), is gone: unmap it. Comes without descriptors."""

    instance: str
    tier: Tier | None = None


Grant = ArenaGrant | WeightsGrant | PeerGrant | DeviceGrant | RevokeGrant


class ArenaExport(_Message, frozen=True, array_like=True, tag=True, gc=False):
    """Worker → supervisor, on the socket of the grants and before `Ready`: its device arena is there. Comes
    with the memory's descriptor if `memory` has no handle.
    """

    num_blocks: int
    block_bytes: int
    memory: DeviceExport


class WeightsExport(_Message, frozen=True, array_like=True, tag=True, gc=False):
    """Worker → supervisor, on the socket of the grants and before `Loaded`: the weights are on its GPU, for
    others there. Comes with the memory's descriptor.
    """

    num_bytes: int
    memory: DeviceExport


Export = ArenaExport | WeightsExport


def generation_table_bytes(num_blocks: int) -> int:
    """Size of the memfd that comes second with an `ArenaGrant`."""
    return 8 * (num_blocks + 1)


_encoder = msgspec.msgpack.Encoder()
_to_worker: msgspec.msgpack.Decoder[ToWorker] = msgspec.msgpack.Decoder(ToWorker)
_to_router: msgspec.msgpack.Decoder[ToRouter] = msgspec.msgpack.Decoder(ToRouter)
_grant: msgspec.msgpack.Decoder[Grant] = msgspec.msgpack.Decoder(Grant)
_export: msgspec.msgpack.Decoder[Export] = msgspec.msgpack.Decoder(Export)


def encode_frame(message: ToWorker | ToRouter, incarnation: int) -> bytes:
    """One frame, ready for the socket. Raises ValueError if the body exceeds MAX_FRAME_BYTES."""
    body = _encoder.encode(message)
    if len(body) > MAX_FRAME_BYTES:
        raise ValueError(f"a message of {len(body)} bytes exceeds the frame limit of {MAX_FRAME_BYTES}")
    return FRAME_HEADER.pack(len(body), incarnation) + body


def decode_to_worker(body: bytes | memoryview) -> ToWorker:
    """Body of a frame read by a worker. Raises msgspec.DecodeError on anything malformed."""
    return _to_worker.decode(body)


def decode_to_router(body: bytes | memoryview) -> ToRouter:
    """Body of a frame read by the router. Raises msgspec.DecodeError on anything malformed."""
    return _to_router.decode(body)


def encode_grant(grant: Grant) -> bytes:
    """Payload that accompanies the descriptors of a grant (one datagram, SOCK_SEQPACKET)."""
    return _encoder.encode(grant)


def decode_grant(body: bytes) -> Grant:
    """Inverse of `encode_grant`. Raises msgspec.DecodeError on anything malformed."""
    return _grant.decode(body)


def encode_export(export: Export) -> bytes:
    """Payload that accompanies the descriptor of an export, as for a grant."""
    return _encoder.encode(export)


def decode_export(body: bytes) -> Export:
    """Inverse of `encode_export`. Raises msgspec.DecodeError on anything malformed."""
    return _export.decode(body)


def pack_tokens(token_ids: NDArray[np.int32] | list[int] | tuple[int, ...]) -> bytes:
    """Token ids as little-endian int32 bytes."""
    return np.asarray(token_ids, dtype="<i4").tobytes()


def num_packed(data: bytes) -> int:
    """How many tokens `pack_tokens` packed."""
    return len(data) // 4


def unpack_tokens(data: bytes) -> NDArray[np.int32]:
    """Inverse of `pack_tokens`; a read-only view of `data`."""
    return np.frombuffer(data, dtype="<i4")
