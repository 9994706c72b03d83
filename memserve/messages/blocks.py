"""Where KV is: the addresses of blocks, and what one instance offers to another for pulling.

An address names one content of one block (DESIGN §The block): it says where, and by its generation whether
what is there is still what was meant. None of these is a message of its own; they are parts of messages.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import IntEnum

import msgspec


class Tier(IntEnum):
    """Where a block lives: `DEVICE` is HBM, or a CPU worker's main arena; `HOST` is DRAM beside it."""

    DEVICE = 0
    HOST = 1


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
