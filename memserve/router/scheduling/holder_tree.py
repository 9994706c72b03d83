"""A radix tree whose nodes own holders: the mechanics under a prompt tree. It knows lives, spans and codes
(holders.py); whose word counts, and what it means, is the prompt tree's.

Invariants
  * A life that holds anything of a node holds all of the edge above it; of its last edge perhaps only the
    first blocks. So the deepest node in which a life appears says how far it holds a prefix.
  * Some life holds the whole of each edge: what nobody holds is cut off.
  * `life.slots[code]` is the node in whose span of that life the code stands, and in no other.
  * Every leaf is in the candidate heap exactly once. An entry may be older than its node's use: it is put
    back when it comes up.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from memserve.radix_tree import Match, RadixNode, RadixTree
from memserve.router.scheduling.holders import (
    NO_SLOT,
    UNKNOWN,
    Codes,
    Generations,
    Held,
    Holding,
    Life,
    Span,
    no_codes,
    num_in_host,
)

Node = RadixNode[Held]


class Found(NamedTuple):
    """The longest known prefix of a prompt. `live` by instance; `lost` are sources only. Good until the tree
    changes.
    """

    node: Node
    num_blocks: int
    live: dict[str, Holding]
    lost: list[Holding]


class HolderTree:
    """See the module.

    Args:
        block_size: tokens a block.
        ids_per_block: ids that stand for a block in a sequence, where they are not its tokens (a trace may
            have one for each block).
    """

    def __init__(self, block_size: int, ids_per_block: int | None = None) -> None:
        self.block_size = block_size
        self.num_blocks = 0  # summed over holders
        self._tree: RadixTree[Held] = RadixTree(ids_per_block or block_size, _new_root, _split_held)
        self.block_bytes = self._tree.block_bytes
        self._nodes: list[Node | None] = [None]  # by slot; NO_SLOT is nobody's
        self._free_slots: list[int] = []
        self.candidates: list[tuple[float, int, Node]] = []
        self._num_candidates = 0
        self._serial = itertools.count()

    def __iter__(self) -> Iterator[Node]:
        """Every node, parents first. For tests and statistics."""
        return iter(self._tree)

    # --- queries ---

    def match(self, namespace: str, tokens: bytes, fresh: float) -> Found:
        """Who holds how much of a prompt, of what was seen since `fresh`. Changes nothing."""
        found = self.find(namespace, tokens)
        live: dict[str, Holding] = {}
        lost: list[Holding] = []
        seen: set[Life] = set()
        new: Iterable[tuple[Life, Span]]
        new_tuple = tuple.__new__
        block_size, step = self.block_size, self.block_bytes
        node, take, end = found.node, found.num_blocks_in_node, found.num_blocks
        while node.parent is not None:
            spans = node.payload.spans
            above = end - take
            new = [(life, spans[life]) for life in spans.keys() - seen] if seen else spans.items()
            is_any_stale = False
            for life, span in new:
                if span.seen_at < fresh:
                    is_any_stale = True
                    continue
                num_here = len(span.codes)
                num_here = take if num_here > take else num_here
                num_host = self._num_host(life, node, num_here) if life.num_host else 0
                # half the time of `Holding(...)`
                holding = new_tuple(Holding, (life, (above + num_here) * block_size, num_host * block_size))
                if life.is_lost:
                    lost.append(holding)
                else:
                    live[life.instance] = holding
            if is_any_stale:
                seen.update(life for life, span in new if span.seen_at >= fresh)
            else:
                seen.update(spans)
            node, end = node.parent, above
            take = len(node.key) // step
        return Found(found.node, found.num_blocks, live, lost)

    def find(self, namespace: str, tokens: bytes) -> Match[Held]:
        """The longest known prefix, whoever holds it."""
        root = self._tree.root(namespace)
        found = self._tree.match(root, tokens)
        self._drop_if_empty(root)
        return found

    def codes(self, life: Life, found: Found | Match[Held]) -> Codes:
        """A life's blocks of a matched prefix, as far as it holds it; UNKNOWN ones among them."""
        parts = []
        node = found.node
        while node.parent is not None:
            span = node.payload.spans.get(life)
            if span is not None:
                parts.append(span.codes)
            node = node.parent
        return np.concatenate(parts[::-1])[: found.num_blocks] if parts else no_codes()

    # --- blocks come ---

    def believe(
        self,
        life: Life,
        namespace: str,
        tokens: bytes,
        now: float,
        first_block: int,
        codes: Codes,
        generations: Generations,
    ) -> None:
        """A life holds all of `tokens` (whole blocks), those from `first_block` on with these codes. What is
        known of others stays; a code that is placed already must be in its right place.
        """
        at = 0
        for node in self._reach(life, namespace, tokens):
            size = min(len(node.key), len(tokens) - at * self.block_bytes) // self.block_bytes
            span = self._cover(life, node, size, now)
            low, high = max(at, first_block), min(at + size, first_block + len(codes))
            if low < high:
                part = slice(low - first_block, high - first_block)
                self._place(life, node, span, low - at, codes[part], generations[part])
            at += size

    # --- blocks go ---

    def take_out(self, life: Life, codes: Codes) -> None:
        """Cut a life's spans where these blocks are."""
        slots = life.slots[codes]
        for slot in np.unique(slots[slots != NO_SLOT]).tolist():
            node = self._nodes[slot]
            span = None if node is None else node.payload.spans.get(life)
            if node is None or span is None:
                continue  # it went with what was above it
            is_gone = np.isin(span.codes, codes)
            first = int(is_gone.argmax())
            if is_gone[first]:
                self._cut(life, node, first)

    def move(self, life: Life, codes: Codes, new_codes: Codes, generations: Generations) -> None:
        """Blocks of a life, all placed, go by other codes, of which none is placed."""
        slots = life.slots[codes]
        for slot in np.unique(slots).tolist():
            node = self._nodes[slot]
            assert node is not None
            span = node.payload.spans[life]
            here = slots == slot
            order = np.argsort(codes[here])
            old, new = codes[here][order], new_codes[here][order]
            at = np.flatnonzero(np.isin(span.codes, old))
            picked = np.searchsorted(old, span.codes[at])
            num_host = num_in_host(new) - num_in_host(old)
            span.codes[at] = new[picked]
            span.num_host += num_host
            life.num_host += num_host
            life.slots[old] = NO_SLOT
            life.slots[new] = slot
        life.generations[new_codes] = generations

    def cut_at(self, life: Life, namespace: str, tokens: bytes, num_blocks: int) -> None:
        """Leave a life the first blocks of these tokens."""
        found = self.find(namespace, tokens)
        node, at = found.node, found.num_blocks - found.num_blocks_in_node
        while at > num_blocks and node.parent is not None:
            node = node.parent
            at -= len(node.key) // self.block_bytes
        if found.num_blocks > num_blocks:
            self._cut(life, node, num_blocks - at)

    def forget(self, life: Life) -> None:
        """Leave a life nothing. Walks the tree."""
        nodes = [node for node in self._tree if life in node.payload.spans]
        for node in reversed(nodes):
            self._truncate(life, node, 0)

    def shrink(self, max_blocks: int) -> None:
        """Drop the leaves that were not used for longest until no more blocks are left."""
        while self.num_blocks > max_blocks:
            self._evict_one(math.inf)

    def expire(self, before: float) -> None:
        """Drop every sequence end not used since."""
        while self.candidates and self.candidates[0][0] < before:
            self._evict_one(before)

    # --- inside: finding and making nodes ---

    def _reach(self, life: Life, namespace: str, tokens: bytes) -> list[Node]:
        """The nodes from the root's child down to the one these tokens end in, made where they lack."""
        found = self._tree.match(self._tree.root(namespace), tokens)
        node, rest = found.node, tokens[found.num_blocks * self.block_bytes :]
        if rest:
            if 0 < found.num_blocks_in_node < len(node.key) // self.block_bytes:
                node = self._split(node, found.num_blocks_in_node)
            span = node.payload.spans.get(life)
            if span is not None and not node.children and len(span.codes) * self.block_bytes == len(node.key):
                node.key += rest  # as in decoding; other holders' spans may be shorter than an edge
            else:
                node = self._tree.add(node, rest, Held({}, 0.0))
                self._register(node)
        path = []
        at: Node | None = node
        while at is not None and at.parent is not None:
            path.append(at)
            at = at.parent
        return path[::-1]

    def _register(self, node: Node) -> None:
        """Give a new node a slot."""
        if self._free_slots:
            node.payload.slot = self._free_slots.pop()
            self._nodes[node.payload.slot] = node
        else:
            node.payload.slot = len(self._nodes)
            self._nodes.append(node)

    def _split(self, node: Node, num_blocks: int) -> Node:
        upper = self._tree.split(node, num_blocks)
        self._register(upper)
        for life, span in upper.payload.spans.items():
            life.slots[span.codes[span.codes >= 0]] = upper.payload.slot
        return upper

    def _cover(self, life: Life, node: Node, num_blocks: int, now: float) -> Span:
        """Note that a life holds the first blocks of an edge, whatever their addresses."""
        held = node.payload
        held.last_used = now
        span = held.spans.get(life)
        if span is None:
            span = held.spans[life] = Span(np.full(num_blocks, UNKNOWN, dtype=np.int32), now)
            self.num_blocks += num_blocks
        elif len(span.codes) < num_blocks:
            more = np.full(num_blocks - len(span.codes), UNKNOWN, dtype=np.int32)
            self.num_blocks += len(more)
            span.codes = np.concatenate([span.codes, more])
        span.seen_at = now
        self._consider(node)
        return span

    def _place(
        self, life: Life, node: Node, span: Span, at: int, codes: Codes, generations: Generations
    ) -> None:
        """Put addresses into a span, from its block `at` on."""
        old = span.codes[at : at + len(codes)]
        life.slots[old[old != UNKNOWN]] = NO_SLOT
        num_host = num_in_host(codes) - num_in_host(old)
        span.codes[at : at + len(codes)] = codes
        span.num_host += num_host
        life.num_host += num_host
        life.slots[codes] = node.payload.slot
        life.generations[codes] = generations

    def _cut(self, life: Life, node: Node, num_blocks: int) -> None:
        """Leave a life the first blocks of an edge, and nothing below it."""
        span = node.payload.spans.get(life)
        if span is None or len(span.codes) <= num_blocks:
            return
        below = [node]
        for above in below:
            below.extend(child for child in above.children.values() if life in child.payload.spans)
        for each in reversed(below[1:]):
            self._truncate(life, each, 0)
        self._truncate(life, node, num_blocks)

    def _truncate(self, life: Life, node: Node, num_blocks: int) -> None:
        spans = node.payload.spans
        span = spans[life]
        gone = span.codes[num_blocks:]
        life.slots[gone[gone != UNKNOWN]] = NO_SLOT
        num_host = num_in_host(gone)
        life.num_host -= num_host
        self.num_blocks -= len(gone)
        if num_blocks:
            span.codes = span.codes[:num_blocks].copy()
            span.num_host -= num_host
        else:
            del spans[life]
        self._trim(node)

    def _trim(self, node: Node) -> None:
        """Cut off what nobody holds at the end of a sequence."""
        while node.parent is not None and not node.children:
            held = node.payload
            longest = max((len(span.codes) for span in held.spans.values()), default=0)
            if longest:
                node.key = node.key[: longest * self.block_bytes]
                self._consider(node)
                return
            if held.is_candidate:
                held.is_candidate = False
                self._num_candidates -= 1
            self._nodes[held.slot] = None
            self._free_slots.append(held.slot)
            node = self._tree.remove(node)
        self._drop_if_empty(node)

    def _num_host(self, life: Life, node: Node, num_here: int) -> int:
        span = node.payload.spans[life]
        count = span.num_host if num_here == len(span.codes) else num_in_host(span.codes[:num_here])
        above = node.parent
        while above is not None and above.parent is not None:
            count += above.payload.spans[life].num_host
            above = above.parent
        return count

    # --- inside: what was not used for longest ---

    def _consider(self, node: Node) -> None:
        """Make a leaf a candidate for eviction, unless it is one. An entry may be older than the node's use:
        it is put back when it comes up.
        """
        held = node.payload
        if held.is_candidate or node.children or node.parent is None:
            return
        held.is_candidate = True
        self._num_candidates += 1
        heapq.heappush(self.candidates, (held.last_used, next(self._serial), node))
        if len(self.candidates) > 2 * self._num_candidates + 64:  # mostly nodes that were cut elsewhere
            self.candidates = [entry for entry in self.candidates if entry[2].payload.is_candidate]
            heapq.heapify(self.candidates)

    def _evict_one(self, before: float) -> None:
        """Look at the candidate that was not used for longest, and drop it if that is so and before then."""
        last_used, _, node = heapq.heappop(self.candidates)
        held = node.payload
        if not held.is_candidate:
            return
        held.is_candidate = False
        self._num_candidates -= 1
        if node.children:
            return
        if last_used < held.last_used or held.last_used >= before:
            self._consider(node)
            return
        for life in list(held.spans):
            self._truncate(life, node, 0)

    def _drop_if_empty(self, node: Node) -> None:
        if node.payload.root_of is not None and not node.children:  # namespaces come from clients
            self._tree.drop_root(node.payload.root_of)


def _new_root(namespace: str) -> Held:
    return Held({}, 0.0, root_of=namespace)


def _split_held(held: Held, num_blocks: int) -> tuple[Held, Held]:
    """The lower part keeps its slot and its place among the candidates."""
    upper = Held({}, held.last_used)
    below = {}
    for life, span in held.spans.items():
        above = span.codes[:num_blocks].copy()
        num_host = num_in_host(above) if span.num_host else 0
        upper.spans[life] = Span(above, span.seen_at, num_host)
        if len(span.codes) > num_blocks:
            below[life] = Span(span.codes[num_blocks:].copy(), span.seen_at, span.num_host - num_host)
    held.spans = below
    return upper, held
