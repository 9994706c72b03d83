"""What an index's nodes hold, and in which order they give it up: one `Candidates` for each tier.

A heap keeps every sequence end that may go, lowest rank first, so that eviction pops and never walks the
tree. Ranks change with every use, so an entry may be older than its node's: it is put back with the new rank
when it comes up. An entry whose node was cut, locked or moved meanwhile is dropped when it comes up; those
that pile up are swept out.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from memserve.messages import Tier
from memserve.pool.allocator import BlockIds
from memserve.radix_tree import RadixNode


@dataclass(slots=True)
class Held:
    """What a node owns: the blocks of its edge, all in one tier, and what decides how long they stay.

    `locks` count holders of this node or of one below. `num_device_children`: those whose blocks are in the
    device tier; a node in the host tier has none. `entry` is the number of its live heap entry.
    """

    blocks: BlockIds
    last_used: float
    num_uses: int = 0
    locks: int = 0
    tier: Tier = Tier.DEVICE
    num_device_children: int = 0
    entry: int | None = None
    root_of: str | None = None  # a root's namespace


Node = RadixNode[Held]
Rank = Callable[[Held], tuple[float, float]]


def least_recently_used(held: Held) -> tuple[float, float]:
    """Rank for eviction: the one not used for longest goes first."""
    return (held.last_used, 0.0)


def least_frequently_used(held: Held) -> tuple[float, float]:
    """Rank for eviction: the one used least often goes first; of equals, the one not used for longest."""
    return (float(held.num_uses), held.last_used)


class Candidates:
    """The ends of one tier.

    Args:
        rank: order of eviction, lowest first. A node's must never be below that of one beneath it.
        may_go: whether a node is such an end now.
        serial: numbers of entries, shared by the tiers: a node goes from one to another.
    """

    def __init__(self, rank: Rank, may_go: Callable[[Node], bool], serial: Iterator[int]) -> None:
        self._rank = rank
        self._may_go = may_go
        self._heap: list[tuple[tuple[float, float], int, Node]] = []
        self._num_live = 0
        self._serial = serial

    def __len__(self) -> int:
        """Entries, dead ones included."""
        return len(self._heap)

    def __iter__(self) -> Iterator[Node]:
        """The nodes that have a live entry."""
        return (node for _, entry, node in self._heap if node.payload.entry == entry)

    def consider(self, node: Node) -> None:
        """Take a node in if it may go, unless it is in."""
        held = node.payload
        if held.entry is not None or not self._may_go(node):
            return
        held.entry = next(self._serial)
        self._num_live += 1
        heapq.heappush(self._heap, (self._rank(held), held.entry, node))
        if len(self._heap) > 2 * self._num_live + 64:
            self._heap = [entry for entry in self._heap if entry[2].payload.entry == entry[1]]
            heapq.heapify(self._heap)

    def forget(self, node: Node) -> None:
        """A node that was cut or has left the tier."""
        if node.payload.entry is not None:
            node.payload.entry = None
            self._num_live -= 1

    def pop(self, limit: tuple[float, float] | None = None) -> Node | None:
        """Take the lowest-ranked node out; None if there is none, or none of rank `limit` or below."""
        while self._heap:
            rank, entry, node = self._heap[0]
            held = node.payload
            if held.entry == entry and limit is not None and rank > limit:
                return None
            heapq.heappop(self._heap)
            if held.entry != entry:
                continue
            self.forget(node)
            if not self._may_go(node):
                continue
            if rank == self._rank(held):
                return node
            self.consider(node)
        return None
