"""A radix tree over token sequences at block granularity: match, add, split, remove; nothing about who owns
what.

A worker's index keeps block ids in its nodes, the router's prompt trees keep holders: both give a payload
type and a function that cuts a payload in two, and own everything else (locks, time, eviction). The tree
only knows tokens.

    root ──[ 512 tokens shared ]──┬──[ 1,536 tokens ]
                                  └──[ 1,024 tokens ]──…

Keys are little-endian int32 token ids as `bytes`, whole blocks only: comparing an edge is one memcmp,
finding a child one dictionary look-up by the edge's first block. Siblings differ in their first block; an
edge is never empty.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np

P = TypeVar("P")

TOKEN_BYTES = 4


class RadixNode(Generic[P]):
    """One edge and what hangs below it. `key` are the edge's tokens; a root's is empty.

    A node keeps its identity as long as its *last* block stays in the tree: a split puts a new node above it.
    Only the tree changes `children`: leaves, which most nodes are, share one dictionary.
    """

    __slots__ = ("children", "key", "parent", "payload")

    def __init__(self, key: bytes, parent: RadixNode[P] | None, payload: P) -> None:
        self.key = key
        self.parent = parent
        self.children: dict[bytes, RadixNode[P]] = _NO_CHILDREN
        self.payload = payload


_NO_CHILDREN: dict[bytes, RadixNode[Any]] = {}


class Match(NamedTuple, Generic[P]):
    """The longest cached prefix: `node` is the deepest node touched, `num_blocks_in_node` blocks of whose
    edge match (all of them unless the sequences part inside it), `num_blocks` the length of the whole prefix.
    """

    node: RadixNode[P]
    num_blocks_in_node: int
    num_blocks: int


class RadixTree(Generic[P]):
    """Token sequences under one root a namespace; namespaces share nothing.

    Args:
        block_size: tokens a block.
        new_root: what the root of a new namespace owns (a root has no tokens).
        split: cuts a payload after n blocks into (upper, lower).
    """

    def __init__(
        self, block_size: int, new_root: Callable[[str], P], split: Callable[[P, int], tuple[P, P]]
    ) -> None:
        assert block_size > 0
        self.block_bytes = block_size * TOKEN_BYTES
        self._new_root = new_root
        self._split_payload = split
        self._roots: dict[str, RadixNode[P]] = {}

    def root(self, namespace: str) -> RadixNode[P]:
        """The root of a namespace, made on first use; `drop_root` forgets it."""
        root = self._roots.get(namespace)
        if root is None:
            root = self._roots[namespace] = RadixNode(b"", None, self._new_root(namespace))
        return root

    def roots(self) -> Iterator[RadixNode[P]]:
        """The root of each namespace."""
        return iter(self._roots.values())

    def drop_root(self, namespace: str) -> None:
        """Forget a namespace in which nothing is left: salts come from clients, and must not pile up."""
        assert not self._roots[namespace].children
        del self._roots[namespace]

    def match(self, node: RadixNode[P], tokens: bytes) -> Match[P]:
        """The longest prefix of `tokens` (whole blocks) below `node`, mostly a root. Changes nothing.

        With nothing found the match is `node` itself with 0 blocks.
        """
        step = self.block_bytes
        start, at, end = node, 0, len(tokens) - len(tokens) % step
        while at < end:
            child = node.children.get(tokens[at : at + step])
            if child is None:
                break
            node = child
            key = child.key
            if tokens.startswith(key, at):
                at += len(key)
                continue
            num_bytes = _common_bytes(key, tokens[at:end]) // step * step
            return Match(child, num_bytes // step, (at + num_bytes) // step)
        return Match(node, len(node.key) // step if node is not start else 0, at // step)

    def add(self, parent: RadixNode[P], key: bytes, payload: P) -> RadixNode[P]:
        """A new leaf under `parent`, whose children must not begin with the key's first block."""
        first = key[: self.block_bytes]
        assert key and len(key) % self.block_bytes == 0 and first not in parent.children
        node = RadixNode(key, parent, payload)
        if parent.children:
            parent.children[first] = node
        else:
            parent.children = {first: node}
        return node

    def split(self, node: RadixNode[P], num_blocks: int) -> RadixNode[P]:
        """Cut an edge after `num_blocks`; returns the new upper node. `node` keeps the rest, and its
        identity.
        """
        cut = num_blocks * self.block_bytes
        parent = node.parent
        assert parent is not None and 0 < cut < len(node.key)
        above, below = self._split_payload(node.payload, num_blocks)
        upper = RadixNode(node.key[:cut], parent, above)
        parent.children[node.key[: self.block_bytes]] = upper
        node.key, node.parent, node.payload = node.key[cut:], upper, below
        upper.children = {node.key[: self.block_bytes]: node}
        return upper

    def remove(self, leaf: RadixNode[P]) -> RadixNode[P]:
        """Take a leaf out; returns its parent."""
        parent = leaf.parent
        assert parent is not None and not leaf.children
        if len(parent.children) > 1:
            del parent.children[leaf.key[: self.block_bytes]]
        else:
            parent.children = _NO_CHILDREN
        leaf.parent = None
        return parent

    def __iter__(self) -> Iterator[RadixNode[P]]:
        """Every node but the roots, parents before children. For tests, snapshots and statistics."""
        stack = [child for root in self._roots.values() for child in root.children.values()]
        while stack:
            node = stack.pop()
            yield node
            stack.extend(node.children.values())


def common_tokens(a: bytes, b: bytes) -> int:
    """Length of the common prefix of two token sequences."""
    return _common_bytes(a, b) // TOKEN_BYTES if a and b else 0


def _common_bytes(a: bytes, b: bytes) -> int:
    """Length of the common prefix. Vectorised: a byte loop in Python costs 100 times more."""
    size = min(len(a), len(b))
    differ = np.frombuffer(a, np.uint8, size) != np.frombuffer(b, np.uint8, size)
    at = int(differ.argmax())
    return at if differ[at] else size
