"""What a pool no longer caches where it was, for those elsewhere who were told that it does: the router's
prompt trees, whose addresses would otherwise go stale unnoticed (a weakness that the paper names).

Noted before a block is freed, while its generation is still the one that was told. A hint: whoever misses
one finds out by a pull that does not verify.
"""

from __future__ import annotations

import itertools

from memserve.messages import BlockRefs, Removed, Tier
from memserve.pool.addresses import Addresses
from memserve.pool.allocator import BlockIds


class RemovalLog:
    """Removals since the last `take`.

    Args:
        addresses: of the pool's blocks.
    """

    def __init__(self, addresses: Addresses) -> None:
        self._addresses = addresses
        self._removed: list[Removed] = []
        self._moved: set[tuple[Tier, int]] = set()

    def moved(self, blocks: BlockIds, tier: Tier, to_blocks: BlockIds, to_tier: Tier) -> None:
        """Their content is in other blocks now. They are yet to be freed, which is no second removal."""
        if len(blocks):
            refs, moved_to = self._addresses.of(blocks, tier), self._addresses.of(to_blocks, to_tier)
            self._removed.append(Removed(refs, moved_to))
            self._moved.update((tier, block) for block in blocks.tolist())

    def gone(self, blocks: BlockIds, tier: Tier) -> None:
        """They are about to be freed."""
        if self._moved:
            keys = [(tier, block) for block in blocks.tolist()]
            blocks = blocks[[key not in self._moved for key in keys]]
            self._moved.difference_update(keys)
        if len(blocks):
            self._removed.append(Removed(self._addresses.of(blocks, tier), None))

    def take(self) -> list[Removed]:
        """The removals since the last call, in order, those of a kind in one; the caller's."""
        removed, self._removed = self._removed, []
        joined: list[Removed] = []
        for _, same in itertools.groupby(removed, key=lambda each: (each.refs.tier, each.moved_to is None)):
            alike = list(same)
            joined += alike if alike[0].moved_to is not None else [_joined(alike)]
        return joined


def _joined(removed: list[Removed]) -> Removed:
    """One removal for many of the same tier."""
    first = removed[0].refs
    blocks = tuple(block for each in removed for block in each.refs.blocks)
    generations = tuple(value for each in removed for value in each.refs.generations)
    refs = BlockRefs(first.instance, first.incarnation, first.tier, blocks, generations)
    return Removed(refs, None)
