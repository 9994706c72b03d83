"""A radix tree whose nodes own holders: the mechanics under a prompt tree. It knows lives, spans and codes
(holders.py); whose word counts, and what it means, is the prompt tree's.

Invariants
  * A life that holds anything of a node holds all of the edge above it; of its last edge perhaps only the
    first blocks. So the deepest node in which a life appears says how far it holds a prefix.
  * Some life holds the whole of each edge: what nobody holds is cut off.
  * `life.slots[code]` is the node in whose span of that life the code stands, and in no other.
  * Every leaf is in the candidate heap, with the time that it knows of (`candidate_at`); entries with another
    are void. An entry may be older than its node's use: it is put back when it comes up.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from memserve.radix_tree import Match, RadixNode, RadixTree
from memserve.router.scheduling.holders import (
    CODE_BYTES,
    NO_SLOT,
    PACKED_UNKNOWN,
    UNKNOWN,
    Codes,
    Generations,
    Held,
    Holding,
    Life,
    Span,
    known,
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
    """

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.num_blocks = 0  # summed over holders
        self._tree: RadixTree[Held] = RadixTree(block_size, _new_root, _split_held)
        self.block_bytes = self._tree.block_bytes
        self._nodes: list[Node | None] = [None]  # by slot; NO_SLOT is nobody's
        self._free_slots: list[int] = []
        self.candidates: list[tuple[float, int]] = []  # when it was last used, and a node's slot
        self._num_candidates = 0

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
        new_tuple = tuple.__new__
        block_size, step = self.block_size, self.block_bytes
        node, take, end = found.node, found.num_blocks_in_node, found.num_blocks
        while node.parent is not None:
            above = end - take
            # what is the same for all that hold all of it, as most do
            all_tokens, all_packed = end * block_size, take * CODE_BYTES
            for span in node.payload.spans:
                life = span.life
                if life in seen or span.seen_at < fresh:
                    continue
                seen.add(life)
                num_tokens, num_host = all_tokens, 0
                if len(span.packed) < all_packed:
                    num_tokens = (above + span.num_blocks) * block_size
                if life.num_host:
                    num_host = self._num_host(node, span, min(take, span.num_blocks)) * block_size
                # half the time of `Holding(...)`
                holding = new_tuple(Holding, (life, num_tokens, num_host))
                if life.is_lost:
                    lost.append(holding)
                else:
                    live[life.instance] = holding
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
        return np.frombuffer(self._packed(life, found), dtype=np.int32)

    def num_known(self, life: Life, found: Found | Match[Held]) -> int:
        """How many of them come before the first UNKNOWN one."""
        packed = self._packed(life, found)
        first = packed.find(PACKED_UNKNOWN)
        return (len(packed) if first < 0 else first) // CODE_BYTES

    def _packed(self, life: Life, found: Found | Match[Held]) -> bytes:
        parts = []
        node = found.node
        while node.parent is not None:
            span = node.payload.span_of(life)
            if span is not None:
                parts.append(span.packed)
            node = node.parent
        return b"".join(reversed(parts))[: found.num_blocks * CODE_BYTES]

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
        slots = set(life.slots[codes].tolist())
        life.slots[codes] = NO_SLOT
        for slot in slots - {NO_SLOT}:
            node = self._nodes[slot]
            span = None if node is None else node.payload.span_of(life)
            if node is None or span is None:
                continue  # it went with what was above it
            here = span.codes
            is_gone = (here != UNKNOWN) & (life.slots[here] != slot)
            first = int(is_gone.argmax())
            if is_gone[first]:
                self._cut(life, node, first)

    def take_out_end(self, life: Life, codes: Codes, generations: Generations) -> bool:
        """The same where these blocks, of these generations, are the end of one span, as they mostly are;
        False, and nothing was done, if they are not.
        """
        is_known = len(codes) and codes[0] < len(life.slots)
        node = self._nodes[life.slots[codes[0]]] if is_known else None
        span = None if node is None else node.payload.span_of(life)
        if node is None or span is None or not span.packed.endswith(codes.tobytes()):
            return False
        if life.generations[codes].tobytes() != generations.tobytes():
            return False
        self._cut(life, node, span.num_blocks - len(codes))
        return True

    def move(self, life: Life, codes: Codes, new_codes: Codes, generations: Generations) -> None:
        """Blocks of a life, all placed, go by other codes, of which none is placed."""
        slots = life.slots[codes]
        for slot in np.unique(slots).tolist():
            node = self._nodes[slot]
            assert node is not None
            span = node.payload.span_of(life)
            assert span is not None
            here = slots == slot
            order = np.argsort(codes[here])
            old, new = codes[here][order], new_codes[here][order]
            moved = span.codes.copy()
            at = np.flatnonzero(np.isin(moved, old))
            moved[at] = new[np.searchsorted(old, moved[at])]
            num_host = num_in_host(new) - num_in_host(old)
            span.packed = moved.tobytes()
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
        nodes = [node for node in self._tree if node.payload.span_of(life) is not None]
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
            span = node.payload.span_of(life)
            if span is not None and not node.children and span.num_blocks * self.block_bytes == len(node.key):
                node.key += rest  # as in decoding; other holders' spans may be shorter than an edge
            else:
                node = self._tree.add(node, rest, Held((), 0.0))
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
        for span in upper.payload.spans:
            span.life.slots[known(span.packed)] = upper.payload.slot
        return upper

    def _cover(self, life: Life, node: Node, num_blocks: int, now: float) -> Span:
        """Note that a life holds the first blocks of an edge, whatever their addresses."""
        held = node.payload
        held.last_used = now
        span = held.span_of(life)
        if span is None:
            span = Span(life, PACKED_UNKNOWN * num_blocks, now)
            held.spans = (*held.spans, span)
            self.num_blocks += num_blocks
        elif (num_more := num_blocks - span.num_blocks) > 0:
            span.packed += PACKED_UNKNOWN * num_more
            self.num_blocks += num_more
        span.seen_at = now
        self._consider(node)
        return span

    def _place(
        self, life: Life, node: Node, span: Span, at: int, codes: Codes, generations: Generations
    ) -> None:
        """Put addresses into a span, from its block `at` on."""
        packed, start = codes.tobytes(), at * CODE_BYTES
        end = start + len(packed)
        num_host = num_in_host(codes)
        if span.packed[start:end] != PACKED_UNKNOWN * len(codes):
            old = known(span.packed[start:end])
            life.slots[old] = NO_SLOT
            num_host -= num_in_host(old)
        span.packed = span.packed[:start] + packed + span.packed[end:]
        span.num_host += num_host
        life.num_host += num_host
        life.slots[codes] = node.payload.slot
        life.generations[codes] = generations

    def _cut(self, life: Life, node: Node, num_blocks: int) -> None:
        """Leave a life the first blocks of an edge, and nothing below it."""
        span = node.payload.span_of(life)
        if span is None or span.num_blocks <= num_blocks:
            return
        if node.children:
            below = [node]
            for above in below:
                below.extend(child for child in above.children.values() if child.payload.span_of(life))
            for each in reversed(below[1:]):
                self._truncate(life, each, 0)
        self._truncate(life, node, num_blocks)

    def _truncate(self, life: Life, node: Node, num_blocks: int) -> None:
        held = node.payload
        span = held.span_of(life)
        assert span is not None
        self.num_blocks -= span.num_blocks - num_blocks
        cut = num_blocks * CODE_BYTES
        gone = known(span.packed[cut:])
        life.slots[gone] = NO_SLOT
        num_host = num_in_host(gone) if span.num_host else 0
        life.num_host -= num_host
        if num_blocks:
            span.packed = span.packed[:cut]
            span.num_host -= num_host
        else:
            held.spans = tuple(each for each in held.spans if each is not span)
        self._trim(node)

    def _trim(self, node: Node) -> None:
        """Cut off what nobody holds at the end of a sequence."""
        while node.parent is not None and not node.children:
            held = node.payload
            if held.spans:
                longest = max([span.num_blocks for span in held.spans])
                node.key = node.key[: longest * self.block_bytes]
                self._consider(node)
                return
            if held.candidate_at is not None:
                held.candidate_at = None
                self._num_candidates -= 1
            self._nodes[held.slot] = None
            self._free_slots.append(held.slot)
            node = self._tree.remove(node)
        self._drop_if_empty(node)

    def _num_host(self, node: Node, span: Span, num_here: int) -> int:
        """How many of a life's first blocks, down to so many of this node, are in its host tier."""
        count = span.num_host
        if count and num_here < span.num_blocks:
            count = num_in_host(known(span.packed[: num_here * CODE_BYTES]))
        above = node.parent
        while above is not None and above.parent is not None:
            whole = above.payload.span_of(span.life)
            assert whole is not None
            count += whole.num_host
            above = above.parent
        return count

    # --- inside: what was not used for longest ---

    def _consider(self, node: Node) -> None:
        """Make a leaf a candidate for eviction, unless it is one. An entry may be older than the node's use:
        it is put back when it comes up.
        """
        held = node.payload
        if held.candidate_at is not None or node.children or node.parent is None:
            return
        held.candidate_at = held.last_used
        self._num_candidates += 1
        heapq.heappush(self.candidates, (held.last_used, held.slot))
        if len(self.candidates) > 2 * self._num_candidates + 64:  # mostly nodes that were cut elsewhere
            self.candidates = [entry for entry in set(self.candidates) if self._candidate(*entry) is not None]
            heapq.heapify(self.candidates)

    def _candidate(self, candidate_at: float, slot: int) -> Node | None:
        """The node of an entry; None if it is void."""
        node = self._nodes[slot]
        return node if node is not None and node.payload.candidate_at == candidate_at else None

    def _evict_one(self, before: float) -> None:
        """Look at the candidate that was not used for longest, and drop it if that is so and before then."""
        node = self._candidate(*heapq.heappop(self.candidates))
        if node is None:
            return
        held = node.payload
        is_used_since, held.candidate_at = held.last_used != held.candidate_at, None
        self._num_candidates -= 1
        if node.children:
            return
        if is_used_since or held.last_used >= before:
            self._consider(node)
            return
        for span in held.spans:
            self._truncate(span.life, node, 0)

    def _drop_if_empty(self, node: Node) -> None:
        if node.payload.root_of is not None and not node.children:  # namespaces come from clients
            self._tree.drop_root(node.payload.root_of)


def _new_root(namespace: str) -> Held:
    return Held((), 0.0, root_of=namespace)


def _split_held(held: Held, num_blocks: int) -> tuple[Held, Held]:
    """The lower part keeps its slot and its place among the candidates."""
    cut = num_blocks * CODE_BYTES
    above, below = [], []
    for span in held.spans:
        packed, rest = span.packed[:cut], span.packed[cut:]
        num_host = num_in_host(known(packed)) if span.num_host else 0
        above.append(Span(span.life, packed, span.seen_at, num_host))
        if rest:
            below.append(Span(span.life, rest, span.seen_at, span.num_host - num_host))
    held.spans = tuple(below)
    return Held(tuple(above), held.last_used), held
