"""The local index of a pool: which token prefixes are cached, in which blocks (MemServe §MemPool API, index).

It owns historical blocks: `insert` and `extend` take them over (active → historical), `evict`, `expire` and
`delete` hand them back to whoever frees them. Pure: no torch, no clock; times come in as arguments, in
seconds.

    namespace ─► root ──[ prefix of 32 blocks ]──┬──[ 96 blocks ]   ← a request holds a Lock here
                       locks=1                   └──[ 12 blocks ]   ← unlocked leaf: a candidate for eviction

Invariants
  * A lock counts on its node and on every node above: a locked block's whole prefix stays.
  * A node without locks has none below it either, so all its blocks can be evicted, leaves first.
  * Every unlocked leaf is in the candidate heap exactly once; eviction pops it and never walks the tree. An
    entry may be older than its node's last use: it is put back with its new rank when it comes up.
  * Namespaces (model fingerprint and cache_salt) have roots of their own and never share a block.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from memserve.pool.allocator import BlockIds
from memserve.radix_tree import RadixNode, RadixTree

_NO_BLOCKS: BlockIds = np.empty(0, dtype=np.int64)


@dataclass(slots=True)
class Held:
    """What a node owns: the blocks of its edge, how often it is locked (itself or below), and its use."""

    blocks: BlockIds
    last_used: float
    num_uses: int = 0
    locks: int = 0
    is_candidate: bool = False
    root_of: str | None = None  # a root's namespace


Node = RadixNode[Held]
Rank = Callable[[Held], tuple[float, float]]


def least_recently_used(held: Held) -> tuple[float, float]:
    """Rank for eviction: the one not used for longest goes first."""
    return (held.last_used, 0.0)


def least_frequently_used(held: Held) -> tuple[float, float]:
    """Rank for eviction: the one used least often goes first; of equals, the one not used for longest."""
    return (float(held.num_uses), held.last_used)


class Prefix(NamedTuple):
    """A cached prefix: its blocks in sequence order. Good until the index changes, unless locked before."""

    node: Node
    num_blocks_in_node: int
    num_blocks: int

    def blocks(self) -> BlockIds:
        """Block ids of the whole prefix, a new array."""
        parts = [self.node.payload.blocks[: self.num_blocks_in_node]]
        node = self.node.parent
        while node is not None:
            parts.append(node.payload.blocks)
            node = node.parent
        return np.concatenate(parts[::-1])


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
    """

    def __init__(self, block_size: int, rank: Rank = least_recently_used) -> None:
        self.block_size = block_size
        self.num_blocks = 0
        self.num_evictable = 0
        self._rank = rank
        self._tree: RadixTree[Held] = RadixTree(block_size, _new_root, _split_held)
        self._candidates: list[tuple[tuple[float, float], int, Node]] = []
        self._num_candidates = 0
        self._serial = itertools.count()

    def blocks(self) -> BlockIds:
        """Every block that the index owns, in no order. For tests and statistics: it walks the tree."""
        return np.concatenate([_NO_BLOCKS, *(node.payload.blocks for node in self._tree)])

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
        """Keep a prefix that was just matched; an edge that matched in part is split for it."""
        node = prefix.node
        if 0 < prefix.num_blocks_in_node < len(node.payload.blocks):
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
        self._consider(lock.node)
        self._drop_if_empty(lock.node)

    # --- blocks come in ---

    def extend(self, lock: Lock, tokens: bytes, blocks: BlockIds, now: float) -> Extended:
        """Publish blocks that continue a locked prefix, and move the lock to their end.

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
        kept = self._blocks_between(start, node)
        if done < len(blocks):
            node = self._append(node, start, tokens[done * step :], blocks[done:], now)
        if node is not start:
            self._add_locks(node, start)
            lock.node = node
        return Extended(np.concatenate([kept, blocks[done:]]), blocks[:done])

    def insert(self, namespace: str, tokens: bytes, blocks: BlockIds, now: float) -> Extended:
        """Publish a whole prefix; as `extend` from the root, without keeping a lock."""
        lock = Lock(self._tree.root(namespace))
        self._add_locks(lock.node, None)
        extended = self.extend(lock, tokens, blocks, now)
        self.unlock(lock)
        return extended

    # --- blocks go out ---

    def evict(self, num_blocks: int) -> BlockIds:
        """Give up the `num_blocks` lowest-ranked blocks, or all that can be; the ends of sequences first."""
        freed, wanted = [_NO_BLOCKS], num_blocks
        while wanted > 0 and self._candidates:
            rank, _, node = heapq.heappop(self._candidates)
            held = node.payload
            held.is_candidate = False
            self._num_candidates -= 1
            if not self._is_evictable(node):
                continue
            if rank != self._rank(held):
                self._consider(node)
                continue
            taken = self._cut(node, min(wanted, len(held.blocks)))
            freed.append(taken)
            wanted -= len(taken)
        return np.concatenate(freed)

    def expire(self, before: float) -> BlockIds:
        """Give up every unlocked sequence end not used since `before` (time to live)."""
        freed = [_NO_BLOCKS]
        for node in [node for _, _, node in self._candidates]:
            freed.extend(self._cut_upwards(node, before))
        return np.concatenate(freed)

    def delete(self, namespace: str, tokens: bytes) -> BlockIds:
        """Drop a prefix that is cached to its last whole block, with all that continues it, and those blocks
        before it that no other sequence shares. Locked blocks stay. Returns the blocks given up.
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
            freed.extend(self._cut_upwards(node, before=math.inf))
        return np.concatenate(freed)

    # --- inside ---

    def _cut_upwards(self, leaf: Node, before: float) -> Iterator[BlockIds]:
        """Take a leaf off, and what then is a leaf above it, while they are unlocked and not used since."""
        at: Node | None = leaf
        while at is not None and at.payload.last_used < before and self._is_evictable(at):
            above = at.parent
            yield self._cut(at, len(at.payload.blocks))
            at = above

    def _is_evictable(self, node: Node) -> bool:
        return node.parent is not None and not node.children and not node.payload.locks

    def _blocks_between(self, start: Node, node: Node) -> BlockIds:
        """Blocks of the edges below `start` down to `node`."""
        parts = [_NO_BLOCKS]
        while node is not start:
            parts.append(node.payload.blocks)
            assert node.parent is not None
            node = node.parent
        return np.concatenate(parts[::-1])

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
            held.last_used = now
            return node
        self.num_evictable += len(blocks)  # until the caller's lock reaches it
        return self._tree.add(node, tokens, Held(blocks.copy(), now))

    def _add_locks(self, node: Node | None, until: Node | None) -> None:
        while node is not until:
            assert node is not None
            held = node.payload
            if held.locks == 0:
                self.num_evictable -= len(held.blocks)
            held.locks += 1
            node = node.parent

    def _consider(self, node: Node) -> None:
        """Make an unlocked leaf a candidate for eviction, unless it is one."""
        held = node.payload
        if held.is_candidate or not self._is_evictable(node):
            return
        held.is_candidate = True
        self._num_candidates += 1
        heapq.heappush(self._candidates, (self._rank(held), next(self._serial), node))
        if len(self._candidates) > 2 * self._num_candidates + 64:  # mostly nodes that were cut elsewhere
            self._candidates = [entry for entry in self._candidates if entry[2].payload.is_candidate]
            heapq.heapify(self._candidates)

    def _cut(self, leaf: Node, num_blocks: int) -> BlockIds:
        """Take the last `num_blocks` off an unlocked leaf; the leaf goes when nothing is left of it."""
        held = leaf.payload
        assert not held.locks and not leaf.children
        self.num_blocks -= num_blocks
        self.num_evictable -= num_blocks
        keep = len(held.blocks) - num_blocks
        taken = held.blocks[keep:]
        if keep:
            leaf.key = leaf.key[: keep * self.block_size * 4]
            held.blocks = held.blocks[:keep].copy()
            self._consider(leaf)
        else:
            if held.is_candidate:
                held.is_candidate = False
                self._num_candidates -= 1
            above = self._tree.remove(leaf)
            self._consider(above)
            self._drop_if_empty(above)
        return taken

    def _drop_if_empty(self, root: Node) -> None:
        held = root.payload  # salts come from clients: namespaces must not pile up
        if held.root_of is not None and not root.children and not held.locks:
            self._tree.drop_root(held.root_of)


def _new_root(namespace: str) -> Held:
    return Held(_NO_BLOCKS, 0.0, root_of=namespace)


def _split_held(held: Held, num_blocks: int) -> tuple[Held, Held]:
    upper = Held(held.blocks[:num_blocks].copy(), held.last_used, held.num_uses, held.locks)
    held.blocks = held.blocks[num_blocks:].copy()
    return upper, held
