"""How many prompt tokens a cache without bounds could have served: the yardstick for a server's cache.

Block granular, as servers count: the longest run of whole blocks from the prompt's start that was there
before, at most all but the last token. Two caches stand side by side, one that keeps prompts alone
(PD-Caching-1), one that keeps answers too (PD-Caching-2 and -3), whose last token has no KV.

The prompt-only figure of a whole workload does not depend on the order of requests: every block is computed
once, whoever comes first. With answers it depends on it a little; sessions are taken in the workload's order,
one after the other.

A cache keeps eight bytes a block, a 64-bit fingerprint of its tokens, in a radix tree. A million different
blocks have two of one fingerprint with a probability of 3e-8, and even these only mislead as siblings.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from memserve.bench.text_tokens import TextTokens
from memserve.bench.tokens import Tokens, mix_bits
from memserve.bench.workload import Piece, Session, Workload, join_prompt
from memserve.radix_tree import TOKEN_BYTES, RadixTree

FINGERPRINT_BYTES = 8
_STEP = 0x9E3779B97F4A7C15


class RequestReuse(NamedTuple):
    """One request's tokens.

    `cached` could come from earlier prompts, `cached_with_answers` from earlier prompts and answers.
    """

    session: str
    turn: int
    num_prompt_tokens: int
    cached: int
    cached_with_answers: int


@dataclass(frozen=True, slots=True)
class Reuse:
    """All requests, in the order in which they were taken."""

    block_size: int
    requests: tuple[RequestReuse, ...]

    @property
    def num_prompt_tokens(self) -> int:
        """Of all requests."""
        return sum(request.num_prompt_tokens for request in self.requests)

    @property
    def ratio(self) -> float:
        """Cached tokens by prompt tokens, prompts alone being kept."""
        return sum(request.cached for request in self.requests) / max(1, self.num_prompt_tokens)

    @property
    def ratio_with_answers(self) -> float:
        """Cached tokens by prompt tokens, answers being kept too."""
        return sum(request.cached_with_answers for request in self.requests) / max(1, self.num_prompt_tokens)


class InfiniteCache:
    """Token sequences in whole blocks; nothing is ever evicted."""

    def __init__(self, block_size: int) -> None:
        assert block_size > 0
        self.block_size = block_size
        self._tree: RadixTree[None] = RadixTree(
            FINGERPRINT_BYTES // TOKEN_BYTES, lambda namespace: None, lambda payload, num_blocks: (None, None)
        )

    def match(self, ids: Sequence[int] | NDArray[np.int64]) -> int:
        """Tokens of the prompt `ids` that are cached: whole blocks, at most all but the last token."""
        key = self._key(ids, max(0, len(ids) - 1))
        return self._tree.match(self._tree.root(""), key).num_blocks * self.block_size

    def insert(self, ids: Sequence[int] | NDArray[np.int64]) -> None:
        """Keep the whole blocks of `ids`."""
        tree, key = self._tree, self._key(ids, len(ids))
        found = tree.match(tree.root(""), key)
        rest = key[found.num_blocks * FINGERPRINT_BYTES :]
        if rest:
            node = found.node
            if found.num_blocks_in_node * FINGERPRINT_BYTES < len(node.key):
                node = tree.split(node, found.num_blocks_in_node)
            tree.add(node, rest, None)

    def _key(self, ids: Sequence[int] | NDArray[np.int64], num_tokens: int) -> bytes:
        size = self.block_size
        blocks = np.asarray(ids[: num_tokens // size * size], np.int64).reshape(-1, size).astype(np.uint64)
        offsets = np.arange(1, size + 1, dtype=np.uint64) * np.uint64(_STEP)
        return mix_bits(mix_bits(blocks + offsets).sum(axis=1, dtype=np.uint64)).astype("<u8").tobytes()


def measure_reuse(workload: Workload, text: TextTokens, block_size: int = 16) -> Reuse:
    """What caches without bounds could serve of a workload whose logged answers are replayed.

    Args:
        workload: every session from its first turn to its last, in this order.
        text: makes ids of text; without a tokenizer an estimate, in blocks of four bytes a token.
        block_size: tokens.

    Costs about 20 ns a prompt token where prompts are token ids, a tokenisation of all prompts where text.
    """
    prompts, everything = InfiniteCache(block_size), InfiniteCache(block_size)
    requests = []
    for session in workload.sessions:
        for number, turn in enumerate(session.turns):
            before = _pieces_before(session, number)
            prompt = _ids([*before, turn.input], text)
            requests.append(
                RequestReuse(session.id, number, len(prompt), prompts.match(prompt), everything.match(prompt))
            )
            prompts.insert(prompt)
            if turn.output is not None:
                everything.insert(_ids([*before, turn.input, turn.output], text)[:-1])
            else:
                everything.insert(prompt)
    return Reuse(block_size, tuple(requests))


def _pieces_before(session: Session, number: int) -> list[Piece]:
    pieces: list[Piece] = []
    for turn in session.turns[:number]:
        pieces += [turn.input] if turn.output is None else [turn.input, turn.output]
    return pieces


def _ids(pieces: Iterable[Piece], text: TextTokens) -> list[int] | NDArray[np.int64]:
    parts = list(pieces)
    made_up = [piece for piece in parts if isinstance(piece, Tokens)]
    if len(made_up) == len(parts):
        return Tokens.concat(made_up).numbers()
    prompt = join_prompt(parts)
    return text.ids(prompt) if isinstance(prompt, str) else prompt
