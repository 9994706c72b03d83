"""The local index of a pool: which token prefixes are cached, in which blocks (MemServe §MemPool API, index).

It owns historical blocks: `insert` and `extend` take them over (active → historical), `evict`, `expire` and
`delete` hand them back to whoever frees them. Pure: no torch, no clock; times come in as arguments, in
seconds. Below the device tier there may be a second one, the host's, whose memory the index is lent as
`LowerTier`: then what is evicted goes there, and from there to nowhere.

    namespace ─► root ──[ prefix of 32 blocks ]──┬──[ 96 blocks ]   ← a request holds a Lock here
                       locks=1                   ├──[ 12 blocks ]   ← an end: a candidate for eviction
                                                 └──[ 7 blocks ]──[ 5 blocks, host tier ]

Invariants
  * A lock counts on its node and on every node above: a locked block's whole prefix stays.
  * A node without locks has none below it either, so all its blocks can be evicted, ends first.
  * Blocks of one node are in one tier, and below a node of the host tier all are: so of every sequence the
    beginning is in the device tier, and the host tier holds what comes after. Host blocks are never locked.
  * Every unlocked end of a tier is among its candidates exactly once; eviction never walks the tree.
  * Namespaces (model fingerprint and cache_salt) have roots of their own and never share a block.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from memserve.messages import Tier
from memserve.pool.allocator import BlockIds
from memserve.pool.eviction import Candidates, Held, Node, Rank, least_recently_used
from memserve.radix_tree import RadixTree

_NO_BLOCKS: BlockIds = np.empty(0, dtype=np.int64)


class LowerTier(Protocol):
    """The memory of the host tier: what the index needs of it."""

    @property
    def num_free(self) -> int:
        """Blocks that `store` could take."""

    def store(self, blocks: BlockIds, /) -> BlockIds:
        """Copy device blocks, at most `num_free`, into as many host blocks: their ids, the index's."""

    def free(self, blocks: BlockIds, /) -> None:
        """Host blocks that the index has given up."""


class Prefix(NamedTuple):
    """A cached prefix: its blocks in sequence order. Good until the index changes, unless locked before."""

    node: Node
    num_blocks_in_node: int
    num_blocks: int

    def blocks(self) -> tuple[BlockIds, BlockIds]:
        """Block ids of the prefix: those in the device tier, then those in the host tier; new arrays."""
        device: list[BlockIds] = []
        host: list[BlockIds] = []
        node: Node | None = self.node
        part = self.node.payload.blocks[: self.num_blocks_in_node]
        while node is not None:
            (device if node.payload.tier is Tier.DEVICE else host).append(part)
            node = node.parent
            if node is not None:
                part = node.payload.blocks
        return np.concatenate(device[::-1]), np.concatenate(host[::-1]) if host else _NO_BLOCKS


class Match(NamedTuple):
    """The longest cached prefix of some tokens: whole blocks, in sequence order, the first in the device
    tier and those after them in the host tier. Good until the pool is used again.
    """

    num_tokens: int
    device_blocks: BlockIds
    host_blocks: BlockIds


@dataclass(slots=True)
class Lock:
    """Keeps the prefix that ends with `node` from eviction until `Index.unlock`. `extend` moves it along."""

    node: Node


class Extended(NamedTuple):
    """What became of blocks given to the index: `blocks[i]` is the one to use from now on; `duplicates`
    were not taken, because the same tokens were there already, and go back to the caller.
    """

    blocks: BlockIds
    duplicates: BlockIds


class Index:
    """See the module.

    Args:
        block_size: tokens a block.
        rank: order of eviction, lowest first.
        lower: the host tier; None = what is evicted is gone.
    """

    def __init__(
        self, block_size: int, rank: Rank = least_recently_used, lower: LowerTier | None = None
    ) -> None:
        self.block_size = block_size
        self.num_blocks = 0  # in the device tier
        self.num_evictable = 0  # of those
        self.num_host_blocks = 0
        self._rank = rank
        self._lower = lower
        self._tree: RadixTree[Held] = RadixTree(block_size, _new_root, _split_held)
        serial = itertools.count()
        self._device = Candidates(rank, _is_device_end, serial)
        self._host = Candidates(rank, _is_host_end, serial)

    def blocks(self, tier: Tier = Tier.DEVICE) -> BlockIds:
        """Every block of a tier that the index owns, in no order. It walks the tree."""
        held = (node.payload for node in self._tree)
        return np.concatenate([_NO_BLOCKS, *(each.blocks for each in held if each.tier is tier)])

    def num_locked_roots(self) -> int:
        """Namespaces in which something is locked, be it nothing but their root. For tests."""
        return sum(root.payload.locks > 0 for root in self._tree.roots())

    # --- match and lock ---

    def match(self, namespace: str, tokens: bytes, now: float) -> Prefix:
        """The longest cached prefix of `tokens` (little-endian int32), in whole blocks; counts as a use."""
        found = self._tree.match(self._tree.root(namespace), tokens)
        node: Node | None = found.node
        while node is not None:
            node.payload.last_used = now
            node.payload.num_uses += 1
            node = node.parent
        self._drop_if_empty(found.node)
        return Prefix(*found)

    def lock(self, prefix: Prefix) -> Lock:
        """Keep what is in the device tier of a prefix that was just matched; an edge that matched in part is
        split for it.
        """
        node = prefix.node
        if node.payload.tier is Tier.HOST:
            while node.payload.tier is Tier.HOST:
                assert node.parent is not None
                node = node.parent
        elif 0 < prefix.num_blocks_in_node < len(node.payload.blocks):
            node = self._tree.split(node, prefix.num_blocks_in_node)
        if node.payload.root_of is not None:
            node = self._tree.root(node.payload.root_of)
        self._add_locks(node, None)
        return Lock(node)

    def unlock(self, lock: Lock) -> None:
        """Give a lock back; once."""
        node: Node | None = lock.node
        while node is not None:
            held = node.payload
            assert held.locks > 0
            held.locks -= 1
            if held.locks == 0:
                self.num_evictable += len(held.blocks)
            node = node.parent
        self._device.consider(lock.node)
        self._drop_if_empty(lock.node)

    # --- blocks come in ---

    def extend(self, lock: Lock, tokens: bytes, blocks: BlockIds, now: float) -> Extended:
        """Publish device blocks that continue a locked prefix, and move the lock to their end.

        What the host tier holds of the same tokens is given up for them: that is how it is swapped in.

        Args:
            lock: where they continue.
            tokens: theirs alone, whole blocks.
            blocks: one a block of tokens; the index owns those it does not hand back.
        """
        step = self._tree.block_bytes
        assert len(tokens) == len(blocks) * step
        if not len(blocks):
            return Extended(_NO_BLOCKS, _NO_BLOCKS)
        start = lock.node
        found = self._tree.match(start, tokens)
        node, done = found.node, found.num_blocks
        if found.num_blocks_in_node < len(node.payload.blocks) and node is not start:
            node = self._tree.split(node, found.num_blocks_in_node)
        kept, duplicates = self._replace(start, node, blocks[:done])
        if done < len(blocks):
            node = self._append(node, start, tokens[done * step :], blocks[done:], now)
        if node is not start:
            self._add_locks(node, start)
            lock.node = node
        above: Node | None = node
        while above is not None:  # no node is older than what is below it
            above.payload.last_used = max(above.payload.last_used, now)
            above = above.parent
        return Extended(np.concatenate([kept, blocks[done:]]), duplicates)

    def insert(self, namespace: str, tokens: bytes, blocks: BlockIds, now: float) -> Extended:
        """Publish a whole prefix; as `extend` from the root, without keeping a lock."""
        lock = Lock(self._tree.root(namespace))
        self._add_locks(lock.node, None)
        extended = self.extend(lock, tokens, blocks, now)
        self.unlock(lock)
        return extended

    # --- blocks go out ---

    def evict(self, num_blocks: int) -> BlockIds:
        """Give up the `num_blocks` lowest-ranked device blocks, or all that can be; the ends of sequences
        first. With a host tier their content goes there, as far as it is not colder than all that is there.
        """
        freed, wanted = [_NO_BLOCKS], num_blocks
        while wanted > 0 and (node := self._device.pop()) is not None:
            count = min(wanted, len(node.payload.blocks))
            freed.append(self._cut(node, count) if self._lower is None else self._lower_end(node, count))
            wanted -= count
        return np.concatenate(freed)

    def evict_host(self, num_blocks: int) -> int:
        """Give up the `num_blocks` lowest-ranked host blocks, or all there are; how many those were."""
        wanted = num_blocks
        while wanted > 0 and (node := self._host.pop()) is not None:
            wanted -= self._drop_host(node, wanted)
        return num_blocks - wanted

    def expire(self, before: float) -> BlockIds:
        """Give up every unlocked sequence end not used since `before` (time to live), in either tier. Returns
        the device blocks.
        """
        freed = [_NO_BLOCKS]
        for node in [*self._host, *self._device]:
            self._cut_upwards(node, before, freed)
        return np.concatenate(freed)

    def delete(self, namespace: str, tokens: bytes) -> BlockIds:
        """Drop a prefix that is cached to its last whole block, with all that continues it, and those blocks
        before it that no other sequence shares. Locked blocks stay. Returns the device blocks given up.
        """
        found = self._tree.match(self._tree.root(namespace), tokens)
        if found.num_blocks == 0 or found.num_blocks < len(tokens) // self._tree.block_bytes:
            self._drop_if_empty(found.node)
            return _NO_BLOCKS
        below = [found.node]
        for node in below:
            below.extend(node.children.values())
        freed = [_NO_BLOCKS]
        for node in reversed(below):
            self._cut_upwards(node, math.inf, freed)
        return np.concatenate(freed)

    def relocate_host(self, move: Callable[[BlockIds], BlockIds]) -> None:
        """Let `move` say under which ids the host blocks of each node are from now on. It walks the tree."""
        for node in self._tree:
            if node.payload.tier is Tier.HOST:
                node.payload.blocks = move(node.payload.blocks)

    # --- inside ---

    def _replace(self, start: Node, node: Node, blocks: BlockIds) -> tuple[BlockIds, BlockIds]:
        """`blocks` hold the same as the edges below `start` down to `node`: take them for host blocks.

        Returns the blocks of those edges, and those of `blocks` that are not taken.
        """
        if node is start:
            return _NO_BLOCKS, _NO_BLOCKS
        kept, duplicates, stop = [], [], len(blocks)
        while node is not start:
            held, given = node.payload, blocks[stop - len(node.payload.blocks) : stop]
            stop -= len(given)
            if held.tier is Tier.DEVICE:
                duplicates.append(given)
            else:
                self._raise(node, given)
            kept.append(held.blocks)
            assert node.parent is not None
            node = node.parent
        return np.concatenate(kept[::-1]), np.concatenate(duplicates) if duplicates else _NO_BLOCKS

    def _raise(self, node: Node, blocks: BlockIds) -> None:
        """A host node is a device node from now on, with these blocks."""
        assert self._lower is not None and node.parent is not None
        held = node.payload
        self._host.forget(node)
        self._lower.free(held.blocks)
        held.blocks, held.tier = blocks.copy(), Tier.DEVICE
        node.parent.payload.num_device_children += 1
        self.num_host_blocks -= len(blocks)
        self.num_blocks += len(blocks)
        self.num_evictable += len(blocks)  # until the caller's lock reaches it

    def _lower_end(self, node: Node, num_blocks: int) -> BlockIds:
        """Move the last blocks of an end to the host tier, or drop those that are colder than all there."""
        lower, held = self._lower, node.payload
        assert lower is not None
        rank = self._rank(held)
        while (num_lacking := num_blocks - lower.num_free) > 0:
            coldest = self._host.pop(limit=rank)
            if coldest is None:
                break
            self._drop_host(coldest, num_lacking)
        num_lowered = min(num_blocks, lower.num_free)
        num_dropped = num_blocks - num_lowered
        # Nothing hangs below a node that is dropped: it would be as cold, and have made room.
        dropped = self._cut(node, num_dropped) if num_dropped else _NO_BLOCKS
        if num_lowered == 0:
            return dropped
        if num_lowered < len(held.blocks):
            self._tree.split(node, len(held.blocks) - num_lowered)
        lowered = held.blocks
        above = node.parent
        assert above is not None
        self._device.forget(node)
        held.blocks, held.tier = lower.store(lowered), Tier.HOST
        above.payload.num_device_children -= 1
        self.num_blocks -= num_lowered
        self.num_evictable -= num_lowered
        self.num_host_blocks += num_lowered
        self._host.consider(node)
        self._device.consider(above)
        return np.concatenate((lowered, dropped))

    def _drop_host(self, leaf: Node, num_blocks: int) -> int:
        """Take up to `num_blocks` off a leaf of the host tier; how many those were."""
        assert self._lower is not None
        taken = self._cut(leaf, min(num_blocks, len(leaf.payload.blocks)))
        self._lower.free(taken)
        return len(taken)

    def _cut_upwards(self, leaf: Node, before: float, freed: list[BlockIds]) -> None:
        """Take a leaf off, and what then is a leaf above it, while they are unlocked and not used since.
        Device blocks go to `freed`.
        """
        at: Node | None = leaf
        while at is not None and at.payload.last_used < before and _is_leaf(at):
            above = at.parent
            if at.payload.tier is Tier.HOST:
                self._drop_host(at, len(at.payload.blocks))
            else:
                freed.append(self._cut(at, len(at.payload.blocks)))
            at = above

    def _append(
        self,
        node: Node,
        start: Node,
        tokens: bytes,
        blocks: BlockIds,
        now: float,
    ) -> Node:
        """Hang blocks below `node`. A leaf that only this lock keeps just grows, as in decoding."""
        self.num_blocks += len(blocks)
        held = node.payload
        if node is start and node.parent is not None and not node.children and held.locks == 1:
            node.key += tokens
            held.blocks = np.concatenate((held.blocks, blocks))
            return node
        self.num_evictable += len(blocks)  # until the caller's lock reaches it
        held.num_device_children += 1
        return self._tree.add(node, tokens, Held(blocks.copy(), now))

    def _add_locks(self, node: Node | None, until: Node | None) -> None:
        while node is not until:
            assert node is not None
            held = node.payload
            if held.locks == 0:
                self.num_evictable -= len(held.blocks)
            held.locks += 1
            node = node.parent

    def _cut(self, leaf: Node, num_blocks: int) -> BlockIds:
        """Take the last `num_blocks` off an unlocked leaf; the leaf goes when nothing is left of it."""
        held = leaf.payload
        assert not held.locks and not leaf.children
        is_device = held.tier is Tier.DEVICE
        if is_device:
            self.num_blocks -= num_blocks
            self.num_evictable -= num_blocks
        else:
            self.num_host_blocks -= num_blocks
        candidates = self._device if is_device else self._host
        keep = len(held.blocks) - num_blocks
        taken = held.blocks[keep:]
        if keep:
            leaf.key = leaf.key[: keep * self.block_size * 4]
            held.blocks = held.blocks[:keep].copy()
            candidates.consider(leaf)
            return taken
        candidates.forget(leaf)
        above = self._tree.remove(leaf)
        above.payload.num_device_children -= is_device
        (self._device if above.payload.tier is Tier.DEVICE else self._host).consider(above)
        self._drop_if_empty(above)
        return taken

    def _drop_if_empty(self, root: Node) -> None:
        held = root.payload  # salts come from clients: namespaces must not pile up
        if held.root_of is not None and not root.children and not held.locks:
            self._tree.drop_root(held.root_of)


def _is_leaf(node: Node) -> bool:
    return node.parent is not None and not node.children and not node.payload.locks


def _is_device_end(node: Node) -> bool:
    held = node.payload
    is_end = node.parent is not None and not held.num_device_children
    return is_end and not held.locks and held.tier is Tier.DEVICE


def _is_host_end(node: Node) -> bool:
    return _is_leaf(node) and node.payload.tier is Tier.HOST


def _new_root(namespace: str) -> Held:
    return Held(_NO_BLOCKS, 0.0, root_of=namespace)


def _split_held(held: Held, num_blocks: int) -> tuple[Held, Held]:
    upper = Held(
        held.blocks[:num_blocks].copy(),
        held.last_used,
        held.num_uses,
        held.locks,
        held.tier,
        num_device_children=held.tier is Tier.DEVICE,
    )
    held.blocks = held.blocks[num_blocks:].copy()
    return upper, held
