"""What a prompt tree's nodes own: which lives of which instances hold how much of an edge, and where.

A `Life` is one incarnation of an instance, with two tables by block: the node that the block is in, and its
generation. So an address without tokens (`Removed`) finds its place, and an address costs 4 bytes in a node
and 12 in the tables.

A block of a life is one number in a node, its *code*: block * 2 + tier; UNKNOWN where it is believed to
be there, but nobody has told its address. Nodes are many and short, so they hold codes as packed bytes, a
third of a NumPy array's size, and holders in a tuple: most have one. They are msgspec structs, which are
smaller and sooner made than others, and which the garbage collector need not walk.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from memserve.errors import EngineError
from memserve.messages import BlockRefs, Tier

Codes = NDArray[np.int32]
Generations = NDArray[np.int64]

UNKNOWN = -1
CODE_BYTES = 4
# No other four bytes in a row look like it: the highest byte of a code is below 0x80.
PACKED_UNKNOWN = b"\xff" * CODE_BYTES
MAX_BLOCK = 2**30
NO_SLOT = 0
_NO_CODES: Codes = np.empty(0, dtype=np.int32)
_NO_GENERATIONS: Generations = np.empty(0, dtype=np.int64)


class Addresses(NamedTuple):
    """Where consecutive blocks of a sequence lie on one life of an instance: parallel arrays."""

    codes: Codes
    generations: Generations

    @classmethod
    def of(cls, refs: BlockRefs) -> Addresses:
        """The same without the common part.

        Raises EngineError where a number is none of a block or a generation, or there are more of the ones
        than of the others: refs come from workers, and codes index tables here. Who sent them is then given
        up (WorkerClient), which is why it is found out now: trees enter what they are told only later.
        """
        if len(refs.blocks) != len(refs.generations):
            raise EngineError(
                f"{refs.instance} told of {len(refs.blocks)} blocks and {len(refs.generations)} generations"
            )
        try:
            codes = np.array(refs.blocks, dtype=np.int32)
            generations = np.array(refs.generations, dtype=np.int64)
        except OverflowError as error:
            raise EngineError(f"{refs.instance} told of blocks that cannot be: {error}") from error
        # all bits of all blocks: a negative number has the highest, one too large one of the two highest
        if not 0 <= np.bitwise_or.reduce(codes) < MAX_BLOCK:
            raise EngineError(f"{refs.instance} told of blocks that cannot be")
        codes *= 2
        if refs.tier is Tier.HOST:
            codes += 1
        return cls(codes, generations)

    @classmethod
    def at(cls, blocks: NDArray[np.int64], tiers: NDArray[np.uint8], generations: Generations) -> Addresses:
        """Of blocks that may lie in different tiers."""
        return cls((blocks * 2 + tiers).astype(np.int32), generations)

    @property
    def blocks(self) -> NDArray[np.int32]:
        """Numbers of blocks in their tiers."""
        return self.codes >> 1

    @property
    def tiers(self) -> NDArray[np.int32]:
        """The tier of each."""
        return self.codes & 1

    def first(self, num_blocks: int) -> Addresses:
        """Of the first blocks, at most so many."""
        return Addresses(self.codes[:num_blocks], self.generations[:num_blocks])

    def refs(self, instance: str, incarnation: int) -> tuple[BlockRefs, ...]:
        """As on the wire: one for each run of blocks in the same tier."""
        blocks, tiers = self.blocks, self.tiers
        cuts = np.flatnonzero(np.diff(tiers)) + 1
        bounds = [0, *cuts.tolist(), len(blocks)]
        return tuple(
            BlockRefs(
                instance,
                incarnation,
                Tier(int(tiers[start])),
                tuple(blocks[start:end].tolist()),
                tuple(self.generations[start:end].tolist()),
            )
            for start, end in zip(bounds, bounds[1:], strict=False)
            if end > start
        )


@dataclass(slots=True, eq=False)
class Life:
    """One incarnation of an instance, none of whose tiers has more than `max_blocks`. `slots[code]`: which
    node of the tree a block is in (NO_SLOT: none); `generations[code]`: its generation there. `num_host` of
    its blocks are in the host tier.
    """

    instance: str
    incarnation: int
    max_blocks: int = MAX_BLOCK
    is_lost: bool = False
    num_host: int = 0
    slots: NDArray[np.int32] = field(default_factory=lambda: np.zeros(0, dtype=np.int32), repr=False)
    generations: Generations = field(default_factory=lambda: np.zeros(0, dtype=np.int64), repr=False)

    def reserve(self, codes: Codes) -> None:
        """Make the tables long enough for these blocks. Raises EngineError, and changes nothing, where the
        pool has no such block.
        """
        # seen as unsigned, a negative number is larger than all others
        needed = int(codes.view(np.uint32).max()) + 1 if len(codes) else 0
        if needed > len(self.slots):
            if needed > 2 * self.max_blocks:
                raise EngineError(f"{self.instance} told of blocks that its pool does not have")
            size = max(needed, len(self.slots) * 5 // 4, 256)
            self.slots = np.concatenate([self.slots, np.zeros(size - len(self.slots), dtype=np.int32)])
            more = np.zeros(size - len(self.generations), dtype=np.int64)
            self.generations = np.concatenate([self.generations, more])


class Span(msgspec.Struct, eq=False, gc=False):
    """What a life holds of an edge: its first blocks, `packed` codes. `seen_at`: when it was last told or
    expected.
    """

    life: Life
    packed: bytes
    seen_at: float
    num_host: int = 0

    @property
    def num_blocks(self) -> int:
        """How many."""
        return len(self.packed) // CODE_BYTES

    @property
    def codes(self) -> Codes:
        """A view that cannot be written to."""
        return np.frombuffer(self.packed, dtype=np.int32)


class Held(msgspec.Struct, eq=False, gc=False):
    """What a node owns: a span for each holder. `slot` is its number in the tree, `candidate_at` the time
    with which it stands among the candidates for eviction, `root_of` a root's namespace.
    """

    spans: tuple[Span, ...]
    last_used: float
    slot: int = NO_SLOT
    candidate_at: float | None = None
    root_of: str | None = None

    def span_of(self, life: Life) -> Span | None:
        """What a life holds of the edge."""
        for span in self.spans:
            if span.life is life:
                return span
        return None


class Holding(NamedTuple):
    """How much of a matched prefix one life holds: `num_tokens` from the start, `num_host_tokens` of them in
    the host tier.
    """

    life: Life
    num_tokens: int
    num_host_tokens: int


def known(packed: bytes) -> Codes:
    """Those of the codes that are not UNKNOWN."""
    codes = np.frombuffer(packed, dtype=np.int32)
    return codes[codes != UNKNOWN] if PACKED_UNKNOWN in packed else codes


def num_in_host(codes: Codes) -> int:
    """How many of the blocks, none of them UNKNOWN, are in the host tier."""
    return int(np.count_nonzero(codes & 1))


def no_codes() -> Codes:
    """An empty array, shared: never written to."""
    return _NO_CODES


def no_generations() -> Generations:
    """An empty array, shared: never written to."""
    return _NO_GENERATIONS
