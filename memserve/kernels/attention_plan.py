"""Where a step's attention finds its keys: worked out once per step in NumPy, used by every layer.

The arena `[num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim]` is read as rows of
`block_size * head_dim` elements: K or V of one head in one block. The row of (block b, layer l, K/V c, head
h) is `((b * num_layers + l) * 2 + c) * num_kv_heads + h`, so a plan holds the rows of layer 0 and a layer
shifts the arena's view instead of the ids (`kv_cache.block_rows`). One `index_select` then yields
`[2, batch, num_kv_heads, blocks * block_size, head_dim]`, ready for attention.

Sequences with one new token are batched into `DecodeGroup`s of similar length, so that one long context
does not make every short one pay for its padding; each longer sequence is a `ChunkPlan` of its own. All ids
are int64. No mask has more than MAX_MASK_ELEMENTS, whatever chunk and context are.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from memserve.step_memory import MAX_MASK_ELEMENTS

# Groups of decodes differ by a factor of two in context, except the short ones: below this many tokens the
# padding is cheaper than another call per layer (~50 us against ~0.2 us a token of gathered context).
SHORT_CONTEXT = 256

# From this many queries on, torch's flash kernel works on tiles of 256 of them, not 64.
LONG_TILE_QUERIES = 768
# Fewer queries than this are not worth more than one call.
MIN_SPLIT_QUERIES = 192
OWN_PART_QUERIES = 128


@dataclass(frozen=True, slots=True)
class SequenceSlice:
    """One sequence's share of a step.

    Attributes:
        start: its first row among the step's tokens.
        num_new: its number of rows (1 = decode).
        context_len: tokens whose KV was stored before this step (0 at the first chunk).
        block_ids: int64 [>= ceil((context_len + num_new) / block_size)], in sequence order; a surplus is
            ignored.
    """

    start: int
    num_new: int
    context_len: int
    block_ids: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """Sequences with one query each: batch B, padded to `num_blocks` blocks.

    Attributes:
        rows: the query rows, as a slice where they are consecutive, else int64 [B].
        block_rows: int64 [2 * B * num_kv_heads * num_blocks], the arena's rows at layer 0.
        mask: float32 [B, 1, num_blocks * block_size], 0 or -inf, to be added to scores; None = every key
            counts.
    """

    rows: slice | Tensor
    batch: int
    num_blocks: int
    block_rows: Tensor
    mask: Tensor | None


@dataclass(frozen=True, slots=True)
class MaskedPart:
    """Consecutive queries of a chunk, and the keys that any of them sees.

    Attributes:
        queries: rows among the chunk's queries; the first of them is at `first_position` of the sequence.
        keys: columns among the chunk's gathered keys; the first of them is at `first_key`.
        window: the last tokens a query sees, itself included; None = all.
        mask: [queries, keys] of the model's dtype, 0 or -inf; None = to be made when needed (`visible`).
    """

    queries: slice
    keys: slice
    first_position: int
    first_key: int
    window: int | None
    mask: Tensor | None

    def visible(self, device: torch.device) -> Tensor:
        """Which query sees which key: bool [queries, keys], made on `device` without anything larger."""
        num_queries, num_keys = self.queries.stop - self.queries.start, self.keys.stop - self.keys.start
        positions = torch.arange(self.first_position, self.first_position + num_queries, device=device)
        keys = torch.arange(self.first_key, self.first_key + num_keys, device=device)
        visible = keys <= positions[:, None]
        if self.window is not None:
            visible &= keys > (positions - self.window)[:, None]
        return visible


@dataclass(frozen=True, slots=True)
class OwnPart:
    """A run of a chunk's queries against the chunk's own keys up to the last of them.

    `mask` [group * queries, keys] of the model's dtype, 0 or -inf: the causal order, with the query heads
    that share a key head folded into the queries.
    """

    queries: slice
    mask: Tensor


@dataclass(frozen=True, slots=True)
class ChunkPlan:
    """One sequence with several queries.

    Without parts its keys are the `num_keys` stored ones, all visible, then its own new ones, causally; where
    attention cannot join the two (`Paging.joins`), `num_keys` is 0. With parts they are the `num_keys` stored
    ones alone (the step's own are stored by then), some hidden.

        gathered blocks:  |skip|<------ num_keys ------>|unused slots of the last block|

    Attributes:
        queries: rows among the queries given to attention.
        new: rows among the step's new keys and values.
        block_rows: int64 [2 * num_kv_heads * num_blocks]; None where num_keys is 0.
        parts: as above.
        joins: `Paging.joins`.
        own_parts: the own part in runs of queries; empty = by the kernel's own causal order.
    """

    queries: slice
    new: slice
    num_blocks: int
    skip: int
    num_keys: int
    block_rows: Tensor | None
    parts: tuple[MaskedPart, ...]
    joins: bool
    own_parts: tuple[OwnPart, ...]


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """What every layer with the same window does. Each query row is in exactly one group or chunk."""

    decodes: tuple[DecodeGroup, ...]
    chunks: tuple[ChunkPlan, ...]


@dataclass(frozen=True, slots=True)
class Paging:
    """The fixed facts a plan depends on.

    `joins`: attention joins two parts of one softmax (`attention.joins`); where it cannot, a mask does all.
    `group`: query heads that share a key head.
    """

    num_layers: int
    num_kv_heads: int
    block_size: int
    device: torch.device
    dtype: torch.dtype
    joins: bool
    group: int = 1


def plan_attention(
    queries: Sequence[tuple[int, SequenceSlice]], window: int | None, paging: Paging
) -> AttentionPlan:
    """Plan the attention of one step.

    Args:
        queries: for each sequence the first of its rows among the queries (`num_new` of them) and its
            slice, whose `start` counts rows of the step's new keys.
        window: the last tokens a query sees, itself included; None = all.
        paging: shape and place of the arena.
    """
    groups: dict[int, list[tuple[int, SequenceSlice]]] = defaultdict(list)
    chunks = []
    for row, piece in queries:
        if piece.num_new > 1:
            chunks.append(_plan_chunk(row, piece, window, paging))
        else:
            visible = piece.context_len + 1 if window is None else min(piece.context_len + 1, window)
            groups[(max(visible, SHORT_CONTEXT) - 1).bit_length()].append((row, piece))
    decodes = tuple(_plan_group(group, window, paging) for group in groups.values())
    return AttentionPlan(decodes=decodes, chunks=tuple(chunks))


def _plan_group(group: list[tuple[int, SequenceSlice]], window: int | None, paging: Paging) -> DecodeGroup:
    block_size = paging.block_size
    lengths = np.array([piece.context_len + 1 for _, piece in group], dtype=np.int64)
    first_keys = np.zeros_like(lengths) if window is None else np.maximum(lengths - window, 0)
    first_blocks = first_keys // block_size
    counts = -(-lengths // block_size) - first_blocks
    num_blocks = int(counts.max())
    # Padding repeats a sequence's first gathered block: masked, but its bytes take part in sums as 0 * x,
    # so they must be finite. Every block that holds a token is (see kv_cache).
    table = np.empty((len(group), num_blocks), dtype=np.int64)
    bounds = zip(first_blocks.tolist(), counts.tolist(), strict=True)
    for line, (_, piece), (first, count) in zip(table, group, bounds, strict=True):
        line[:count] = piece.block_ids[first : first + count]
        line[count:] = line[0]
    keys = np.arange(num_blocks * block_size, dtype=np.int64) + (first_blocks * block_size)[:, None]
    visible = (keys >= first_keys[:, None]) & (keys < lengths[:, None])
    mask = None if visible.all() else _additive(visible, paging.device)[:, None, :]
    return DecodeGroup(
        rows=_rows([row for row, _ in group], paging.device),
        batch=len(group),
        num_blocks=num_blocks,
        block_rows=_arena_rows(table, paging),
        mask=mask,
    )


def _plan_chunk(row: int, piece: SequenceSlice, window: int | None, paging: Paging) -> ChunkPlan:
    context, total = piece.context_len, piece.context_len + piece.num_new
    is_windowed = window is not None and window < total
    first_key = max(context + 1 - window, 0) if window is not None else 0
    masked = is_windowed or (context > 0 and not paging.joins)
    last_key = total if masked else context
    first_block, end_block = first_key // paging.block_size, -(-last_key // paging.block_size)
    num_blocks = end_block - first_block
    return ChunkPlan(
        queries=slice(row, row + piece.num_new),
        new=slice(piece.start, piece.start + piece.num_new),
        num_blocks=num_blocks,
        skip=first_key - first_block * paging.block_size,
        num_keys=last_key - first_key,
        block_rows=_arena_rows(piece.block_ids[None, first_block:end_block], paging) if num_blocks else None,
        parts=tuple(_parts(piece, first_key, window if is_windowed else None, paging)) if masked else (),
        joins=paging.joins,
        own_parts=tuple(_own_parts(piece.num_new, paging)) if paging.joins and not masked else (),
    )


def _parts(piece: SequenceSlice, first_key: int, window: int | None, paging: Paging) -> Iterator[MaskedPart]:
    """The chunk's queries in runs whose masks are small enough. Gathered keys begin at `first_key`."""
    context, num_new = piece.context_len, piece.num_new
    num_rows = max(1, MAX_MASK_ELEMENTS // (paging.group * (context + num_new - first_key)))
    for start in range(0, num_new, num_rows):
        stop = min(start + num_rows, num_new)
        first = first_key if window is None else max(context + start + 1 - window, first_key)
        part = MaskedPart(
            queries=slice(start, stop),
            keys=slice(first - first_key, context + stop - first_key),
            first_position=context + start,
            first_key=first,
            window=window,
            mask=None,
        )
        # On a CPU a mask costs some of the attention's own time, and is made once for all layers; a window
        # bounds it. Elsewhere it is memory that is dear.
        yield replace(part, mask=_additive_of(part, paging.dtype)) if paging.joins else part


def _additive_of(part: MaskedPart, dtype: torch.dtype) -> Tensor:
    hidden = part.visible(torch.device("cpu")).logical_not_()
    return torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, -torch.inf)


def _own_parts(num_new: int, paging: Paging) -> Iterator[OwnPart]:
    """Runs of about 128 queries, each against the keys up to its last query.

    The kernel's causal order skips only whole tiles of 512 keys, so that below 768 queries it computes nearly
    every pair. Runs leave three eighths of them out (2 threads, 448 queries, group 2: 2.2 ms against 3.1).
    """
    if not MIN_SPLIT_QUERIES <= num_new < LONG_TILE_QUERIES:
        return
    num_parts = round(num_new / OWN_PART_QUERIES)
    cuts = [num_new * part // num_parts for part in range(num_parts + 1)]
    for start, stop in itertools.pairwise(cuts):
        visible = np.tri(stop - start, stop, start, dtype=np.bool_)
        mask = _additive(np.tile(visible, (paging.group, 1)), paging.device).to(paging.dtype)
        yield OwnPart(slice(start, stop), mask)


def _arena_rows(table: NDArray[np.int64], paging: Paging) -> Tensor:
    """Rows at layer 0 of `table` [B, n] of block ids, in the order [2, B, num_kv_heads, n], flat."""
    heads = paging.num_kv_heads
    blocks = table.astype(np.int64, copy=False) * (paging.num_layers * 2 * heads)
    parts = (np.arange(2, dtype=np.int64) * heads)[:, None, None, None]
    rows = blocks[None, :, None, :] + (parts + np.arange(heads, dtype=np.int64)[None, None, :, None])
    return torch.from_numpy(rows.reshape(-1)).to(paging.device, non_blocking=True)


def _additive(visible: NDArray[np.bool_], device: torch.device) -> Tensor:
    mask = np.where(visible, np.float32(0), np.float32(-np.inf))
    return torch.from_numpy(mask).to(device, non_blocking=True)


def _rows(rows: list[int], device: torch.device) -> slice | Tensor:
    if rows == list(range(rows[0], rows[0] + len(rows))):
        return slice(rows[0], rows[0] + len(rows))
    return torch.tensor(rows, dtype=torch.int64).to(device, non_blocking=True)
