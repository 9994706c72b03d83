"""What the dispatcher remembers of a request, and of how fast requests leave.

Plain state: the transitions are the dispatcher's.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import NamedTuple

from memserve.messages import BlockRefs, Offer, SamplingParams, Tier
from memserve.router.fleet import Seat
from memserve.router.scheduling.policies.decision import Decision

# Tokens of growth reserved on a decode worker beside the prompt. More would leave the pool empty when clients
# send large max_tokens and stop early; less would preempt often. Growth beyond it is the worker's own
# business.
DECODE_HEADROOM_TOKENS = 128


class Phase(Enum):
    """Where a request is; see the module's picture."""

    QUEUED = auto()
    PREFILLING = auto()
    HANDOFF = auto()
    DECODING = auto()


class Origin(NamedTuple):
    """Who prefilled a request, and how many whole blocks of it are there."""

    instance: str
    incarnation: int
    num_blocks: int


@dataclass(slots=True)
class StoredBlocks:
    """Addresses of a request's blocks on one instance, from the first on, as it told them."""

    instance: str
    incarnation: int
    tier: Tier = Tier.DEVICE
    blocks: list[int] = field(default_factory=list)
    generations: list[int] = field(default_factory=list)

    def add(self, first_block: int, refs: BlockRefs) -> None:
        """Take more, or anew what was computed again; a gap, or what comes from elsewhere, is ignored."""
        place = (refs.instance, refs.incarnation, refs.tier)
        if first_block <= len(self.blocks) and place == (self.instance, self.incarnation, self.tier):
            self.blocks[first_block:] = refs.blocks
            self.generations[first_block:] = refs.generations

    def refs(self, start: int = 0) -> BlockRefs:
        """The addresses from block `start` on."""
        blocks, generations = tuple(self.blocks[start:]), tuple(self.generations[start:])
        return BlockRefs(self.instance, self.incarnation, self.tier, blocks, generations)


@dataclass(slots=True)
class RequestState:
    """One request between admission and its end. `tokens` (int32) are the prompt and what was drawn so far.

    While `offer` is set, `prefill` is the seat of the worker that holds it. `is_reserved`: the decode worker
    was told of this attempt before its `Decode`. `origin`: the instance and incarnation that prefilled it,
    and how many whole blocks it has. `stored`: where the decode worker holds it, from the first block on.
    `salvage`: what a dead worker held of it, to be pulled as long as its memory is not used again.
    `decision`: why it is where it is. `num_decoding_tokens`: what it counts as among its worker's decodes;
    None while it is none of them.
    """

    request_id: str
    tokens: array[int]
    num_prompt_tokens: int
    sampling: SamplingParams
    cache_salt: str
    submitted_at: float
    attempt: int = 0
    num_deaths: int = 0
    num_deaths_in_vain: int = 0
    phase: Phase = Phase.QUEUED
    prefill: Seat | None = None
    decode: Seat | None = None
    offer: Offer | None = None
    offer_attempt: int = 0
    is_reserved: bool = False
    origin: Origin | None = None
    stored: StoredBlocks | None = None
    salvage: Offer | None = None
    session: str | None = None
    policy: str | None = None
    decision: Decision | None = None
    num_decoding_tokens: int | None = None

    def token_bytes(self, start: int = 0, stop: int | None = None) -> bytes:
        """Tokens [start, stop) packed (`pack_tokens`)."""
        return self.tokens[start:stop].tobytes()

    @property
    def num_remaining(self) -> int:
        """Tokens that may still be drawn."""
        return self.sampling.max_tokens - (len(self.tokens) - self.num_prompt_tokens)

    @property
    def num_decode_tokens(self) -> int:
        """Tokens to reserve room for where it decodes."""
        return len(self.tokens) + min(self.num_remaining, DECODE_HEADROOM_TOKENS)


@dataclass(slots=True)
class DepartureRate:
    """How fast requests leave the workers, for whatever reason, to tell a refused client when to come
    back.
    """

    per_s: float = 0.0
    last_at: float | None = None

    def note(self, now: float) -> None:
        """A request left."""
        if self.last_at is not None and now > self.last_at:
            self.per_s += 0.2 * (1.0 / (now - self.last_at) - self.per_s)
        self.last_at = now

    def retry_after_s(self, num_waiting: int) -> float:
        """Seconds until about a tenth of the queue is gone, between 1 and 60."""
        if self.per_s <= 0:
            return 5.0
        return min(60.0, max(1.0, 0.1 * num_waiting / self.per_s))
