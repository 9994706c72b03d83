"""What the two ends of a gloo link say to each other: the tensors of a chunk.

    receiver ── ask ──────► source      which blocks of which tier, in which order, in which pieces
             ◄── data ──────            each piece [num_blocks, block_bytes]
             ◄── proof ─────            their generations before and after they were sent

A pull is a stream of chunks, each asked for on its own; an ask says whether another one follows, whatever
becomes of it. Two are under way at a time. Where the blocks of a chunk are long runs at both ends, each run
is a piece, sent out of one arena into the other; else the chunk is one piece, staged where it is not a run.
All but the data are int64 tensors of a fixed size, so nothing on the link is ever parsed; sizes are checked
before anything is indexed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from memserve.messages import Tier
from memserve.pool.allocator import BlockIds
from memserve.pool.runs import run_ends, runs
from memserve.pool.transports.gloo_pair import FIRST_TAG
from memserve.pool.transports.pull import num_same

ASK_TAG, DATA_TAG, PROOF_TAG = range(FIRST_TAG, FIRST_TAG + 3)
CHUNKS_UNDER_WAY = 2
MAX_CHUNK_BLOCKS = 1024
MAX_PIECES = 64
_MIN_PIECE_BYTES = 512 << 10  # a message more costs what copying so much at both ends does

_NUM_BLOCKS, _MORE, _NUM_PIECES, _TIER, _BLOCKS = 0, 1, 2, 3, 4  # layout of an ask
_ENDS = _BLOCKS + MAX_CHUNK_BLOCKS  # of its pieces, as positions
_BEFORE, _AFTER = 0, 1  # rows of a proof

Bytes = NDArray[np.uint8]


class TierMemory(NamedTuple):
    """One tier of a pool: `blocks` [num_blocks, block_bytes], `generations` [num_blocks]."""

    blocks: Bytes
    generations: NDArray[np.uint64]


def _nothing(blocks: BlockIds) -> None:
    return


@dataclass(frozen=True, slots=True)
class Options:
    """How links behave. Times in seconds.

    `connect_s` to form a pair; `stall_s` for one chunk, then the link is given up; `chunk_bytes` at most in
    one message (and in each of the two staging buffers of a link), but at least a block; `max_queued` pulls
    that wait for one source; `max_senders` receivers that may be connected. Tests inject faults into the
    links' threads: `on_pull` is called when a pull begins, before there is a connection; `on_chunk` and
    `on_sent` at the source, with the blocks of a chunk, between the first look at their generations and the
    copy, and between the copy and the second look.
    """

    connect_s: float = 5.0
    stall_s: float = 5.0
    chunk_bytes: int = 8 << 20
    max_queued: int = 1024
    max_senders: int = 64
    on_pull: Callable[[], None] = lambda: None
    on_chunk: Callable[[BlockIds], None] = _nothing
    on_sent: Callable[[BlockIds], None] = _nothing

    def chunk_blocks(self, block_bytes: int) -> int:
        """Blocks of a full chunk. Both ends may differ: the source takes what is asked for."""
        return min(MAX_CHUNK_BLOCKS, max(1, self.chunk_bytes // block_bytes))


class Ask:
    """An ask, in a tensor of its own that is used again and again."""

    def __init__(self) -> None:
        self.tensor = torch.zeros(_ENDS + MAX_PIECES, dtype=torch.int64)
        self._words: NDArray[np.int64] = self.tensor.numpy()

    def set(self, blocks: BlockIds, ends: list[int], *, more: bool, tier: Tier = Tier.DEVICE) -> None:
        """Ask for `blocks` in pieces that end there; without any, the stream just ends."""
        self._words[_TIER] = tier
        self._words[_NUM_BLOCKS] = len(blocks)
        self._words[_MORE] = more
        self._words[_NUM_PIECES] = len(ends)
        self._words[_BLOCKS : _BLOCKS + len(blocks)] = blocks
        self._words[_ENDS : _ENDS + len(ends)] = ends

    def blocks(self, num_blocks_there: int) -> BlockIds | None:
        """A copy of the ids, checked against an arena of so many; None if they cannot be."""
        num_blocks = int(self._words[_NUM_BLOCKS])
        if not 0 <= num_blocks <= MAX_CHUNK_BLOCKS:
            return None
        blocks = self._words[_BLOCKS : _BLOCKS + num_blocks].copy()
        if num_blocks and not 0 <= blocks.min() <= blocks.max() < num_blocks_there:
            return None
        return blocks

    def ends(self) -> list[int] | None:
        """Where the pieces end; None if they cannot end there."""
        num_pieces = int(self._words[_NUM_PIECES])
        if not 0 <= num_pieces <= MAX_PIECES:
            return None
        ends: list[int] = self._words[_ENDS : _ENDS + num_pieces].tolist()
        starts = [0, *ends[:-1]]
        if any(start >= end for start, end in zip(starts, ends, strict=False)):
            return None
        return ends if (ends or [0])[-1] == int(self._words[_NUM_BLOCKS]) else None

    @property
    def tier(self) -> Tier | None:
        """Whose blocks; None if it cannot be."""
        tier = int(self._words[_TIER])
        return Tier(tier) if tier in list(Tier) else None

    @property
    def more(self) -> bool:
        """Whether another ask follows in any case."""
        return bool(self._words[_MORE])


class Proof:
    """Generations of a chunk's blocks at the source before and after they were sent."""

    def __init__(self) -> None:
        self.tensor = torch.zeros(2, MAX_CHUNK_BLOCKS, dtype=torch.int64)
        self._words: NDArray[np.uint64] = self.tensor.numpy().view(np.uint64)

    def set_before(self, generations: NDArray[np.uint64]) -> None:
        self._words[_BEFORE, : len(generations)] = generations

    def set_after(self, generations: NDArray[np.uint64]) -> None:
        self._words[_AFTER, : len(generations)] = generations

    def num_verified(self, expected: NDArray[np.uint64]) -> tuple[int, bool]:
        """How many blocks, from the first on, are what was asked for; was the next one gone before?"""
        num_before = num_same(self._words[_BEFORE, : len(expected)], expected)
        num_after = num_same(self._words[_AFTER, : len(expected)], expected)
        return min(num_before, num_after), num_before <= num_after and num_before < len(expected)


def cut(blocks: BlockIds, into: BlockIds, block_bytes: int) -> list[int]:
    """Where the pieces of a chunk end: with each run of both `blocks` and `into` if those are long enough."""
    ends = run_ends(blocks, into)
    if len(ends) > MAX_PIECES or len(ends) * _MIN_PIECE_BYTES > len(blocks) * block_bytes:
        return [len(blocks)]
    return ends


class Staging:
    """Where the pieces of a chunk lie while they are sent or received: in the arena if they are runs, else in
    one of `CHUNKS_UNDER_WAY` buffers, which exist once they are needed. Chunks take turns: the k-th uses the
    same buffer as the one `CHUNKS_UNDER_WAY` before it.
    """

    def __init__(self, blocks: Bytes) -> None:
        self._blocks = blocks
        self._buffers: list[Bytes] = [np.empty((0, blocks.shape[1]), np.uint8)] * CHUNKS_UNDER_WAY

    def places(self, ids: BlockIds, ends: list[int], turn: int) -> list[Bytes]:
        """One for each piece, uint8 [num_blocks, block_bytes], contiguous."""
        pieces = [ids[start:end] for start, end in zip([0, *ends], ends, strict=False)]
        if all((np.diff(piece) == 1).all() for piece in pieces):
            return [self._blocks[piece[0] : piece[0] + len(piece)] for piece in pieces]
        slot = turn % CHUNKS_UNDER_WAY
        if len(self._buffers[slot]) < len(ids):
            self._buffers[slot] = np.empty((len(ids), self._blocks.shape[1]), np.uint8)
        return [self._buffers[slot][start:end] for start, end in zip([0, *ends], ends, strict=False)]

    def gather(self, ids: BlockIds, turn: int) -> None:
        """Copy blocks to the staged places they got for this turn."""
        place = self._buffers[turn % CHUNKS_UNDER_WAY]
        for start, end in runs(ids):
            place[start:end] = self._blocks[ids[start] : ids[start] + end - start]

    def scatter(self, ids: BlockIds, turn: int) -> None:
        """Copy what was received at the staged places of this turn to its blocks, the first of them."""
        place = self._buffers[turn % CHUNKS_UNDER_WAY]
        for start, end in runs(ids):
            self._blocks[ids[start] : ids[start] + end - start] = place[start:end]

    def is_staged(self, places: list[Bytes]) -> bool:
        """Whether these are not in the arena itself."""
        return not np.may_share_memory(places[0], self._blocks)
