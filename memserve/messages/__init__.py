"""Every struct that crosses a socket between the router and a worker, and the frame around it.

    to_worker.py   router → worker  ─┐                    blocks.py      addresses of KV, offers
    to_router.py   worker → router  ─┤ over frames.py,    sequences.py   sampling, logprobs, cached tokens
    commands.py    and the answers  ─┤ made of            tokens.py      token ids as bytes
    links.py       worker → worker  ─┘
    grants.py      both ways over the second socketpair, with descriptors

Requests carry an `attempt`: an answer to an attempt that was given up is dropped, as is a frame of a worker's
earlier incarnation. What a message says is on the wire as it stands here, in order, with its class's name: to
rename a class or to move a field changes the protocol. Everyone imports from here, not from the modules.
"""

from __future__ import annotations

from memserve.messages.blocks import BlockRefs, Offer, Tier, Transfer
from memserve.messages.commands import (
    CacheCommand,
    CacheReport,
    CacheVerb,
    Measure,
    Measured,
    MeasureVerb,
    Repeat,
    StepSpec,
)
from memserve.messages.frames import (
    FRAME_HEADER,
    MAX_FRAME_BYTES,
    decode_to_router,
    decode_to_worker,
    encode_frame,
)
from memserve.messages.grants import (
    ArenaExport,
    ArenaGrant,
    DeviceGrant,
    Export,
    Grant,
    PeerGrant,
    RevokeGrant,
    WeightsExport,
    WeightsGrant,
    decode_export,
    decode_grant,
    encode_export,
    encode_grant,
    generation_table_bytes,
)
from memserve.messages.links import (
    LINK_TOKEN_BYTES,
    Accept,
    Connect,
    LinkAddress,
    LinkMessage,
    LinkToken,
    Refuse,
)
from memserve.messages.sequences import (
    NO_CACHED_TOKENS,
    CachedTokens,
    FinishReason,
    SamplingParams,
    TokenLogprobs,
)
from memserve.messages.to_router import (
    Failed,
    Fatal,
    Heartbeat,
    Load,
    Loaded,
    Loading,
    Output,
    Prefilled,
    Pulled,
    PulledBack,
    Ready,
    Removed,
    StepOutputs,
    Stored,
    ToRouter,
)
from memserve.messages.to_worker import (
    Cancel,
    Decode,
    Init,
    Prefill,
    PullAhead,
    PullBack,
    Release,
    Reserve,
    Shutdown,
    ToWorker,
)
from memserve.messages.tokens import num_packed, pack_tokens, unpack_tokens

__all__ = [
    "Accept",
    "ArenaExport",
    "ArenaGrant",
    "BlockRefs",
    "CacheCommand",
    "CacheReport",
    "CacheVerb",
    "CachedTokens",
    "Cancel",
    "Connect",
    "Decode",
    "DeviceGrant",
    "Export",
    "FRAME_HEADER",
    "Failed",
    "Fatal",
    "FinishReason",
    "Grant",
    "Heartbeat",
    "Init",
    "LINK_TOKEN_BYTES",
    "LinkAddress",
    "LinkMessage",
    "LinkToken",
    "Load",
    "Loaded",
    "Loading",
    "MAX_FRAME_BYTES",
    "Measure",
    "MeasureVerb",
    "Measured",
    "NO_CACHED_TOKENS",
    "Offer",
    "Output",
    "PeerGrant",
    "Prefill",
    "Prefilled",
    "PullAhead",
    "PullBack",
    "Pulled",
    "PulledBack",
    "Ready",
    "Refuse",
    "Release",
    "Removed",
    "Repeat",
    "Reserve",
    "RevokeGrant",
    "SamplingParams",
    "Shutdown",
    "StepOutputs",
    "StepSpec",
    "Stored",
    "Tier",
    "ToRouter",
    "ToWorker",
    "TokenLogprobs",
    "Transfer",
    "WeightsExport",
    "WeightsGrant",
    "decode_export",
    "decode_grant",
    "decode_to_router",
    "decode_to_worker",
    "encode_export",
    "encode_frame",
    "encode_grant",
    "generation_table_bytes",
    "num_packed",
    "pack_tokens",
    "unpack_tokens",
]
