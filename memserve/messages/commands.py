"""Commands to an instance, about no request of a client: to its cache, and to measure something. Each has one
answer, with the same `command_id`.
"""

from __future__ import annotations

from enum import StrEnum

import msgspec

from memserve.messages.base import Message
from memserve.messages.blocks import BlockRefs, Tier


class CacheVerb(StrEnum):
    """What a `CacheCommand` asks for."""

    FLUSH = "flush"
    LOOKUP = "lookup"
    RESIZE = "resize"


class CacheCommand(Message, frozen=True, array_like=True, tag=True, gc=False):
    """Something about the cache itself, answered by `CacheReport` with the same id.

    `FLUSH` forgets all that nobody uses, `LOOKUP` tells how much of `token_ids` is cached, `RESIZE` gives the
    host tier `num_host_blocks`.
    """

    command_id: int
    verb: CacheVerb
    token_ids: bytes = b""
    cache_salt: str = ""
    num_host_blocks: int = 0


class CacheReport(Message, frozen=True, array_like=True, tag=True, gc=False):
    """The answer to a `CacheCommand`: tokens found by tier, blocks freed, or the blocks that the host
    tier will have, and how many it may have. `error` says why it could not be done.
    """

    command_id: int
    num_device_tokens: int = 0
    num_host_tokens: int = 0
    num_blocks: int = 0
    num_blocks_most: int = 0
    error: str | None = None


class MeasureVerb(StrEnum):
    """What a `Measure` asks for."""

    STEP = "step"
    SWAP_IN = "swap_in"
    LEND = "lend"
    PULL = "pull"
    WAITS = "waits"


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


class Measure(Message, frozen=True, array_like=True, tag=True, gc=False):
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


class Repeat(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One repeat of a measurement. `waited_ms`: how long, of it, the thread that waited most had work but no
    core, because of other processes.
    """

    ms: float
    waited_ms: float = 0.0


class Measured(Message, frozen=True, array_like=True, tag=True, gc=False):
    """The answer to a `Measure`: its repeats in order, and the bytes that each moved; or `refs`, or why not.
    `WAITS` has one repeat for each thread, which counts from its start.
    """

    command_id: int
    repeats: tuple[Repeat, ...] = ()
    num_bytes: int = 0
    refs: BlockRefs | None = None
    error: str | None = None
