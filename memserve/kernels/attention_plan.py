"""Where a step's attention finds its keys: worked out once per step in NumPy, used by every layer.

The arena `[num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim]` is read as rows of
`block_size * head_dim` elements: K or V of one head in one block. The row of (block b, layer l, K/V c, head
h) is `((b * num_layers + l) * 2 + c) * num_kv_heads + h`, so a plan holds the rows of layer 0 and a layer
shifts the arena's view instead of the ids (`kv_cache.block_rows`). One `index_select` then yields
`[2, batch, num_kv_heads, blocks * block_size, head_dim]`, ready for attention.

Sequences with one new token are batched into `DecodeGroup`s of similar length, so that one long context
does not make every short one pay for its padding; each longer sequence is a `ChunkPlan` of its own. All ids
are int64. No call makes more than MAX_SCORE_ELEMENTS scores, whatever chunk and context are.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from memserve.model_config import blocks_for
from memserve.step_memory import MAX_SCORE_ELEMENTS
from memserve.step_shapes import padded_keys, padded_rows, whole_rows

# Groups of decodes differ by a factor of two in context, except the short ones: below this many tokens the
# padding is cheaper than another call per layer (~50 us against ~0.2 us a token of gathered context).
SHORT_CONTEXT = 256

# Queries of a part: the fewer, the less is computed above the diagonal; the more, the fewer calls. On a
# CPU scores should also stay in its cache, and below the size from which each allocation means fresh pages.
PART_QUERIES = 1024
PART_QUERIES_CPU = 128
SCORE_ELEMENTS_CPU = 1 << 22
MIN_PART_QUERIES = 16

# From this many queries on, torch's flash kernel works on tiles of 256 of them, not 64.
LONG_TILE_QUERIES = 768
# Keys that are not all the gathered ones are copied before they are multiplied, which costs as much as an
# eighth of them would for the queries of a part: a part that needs nearly all is given all.
SPARED_KEYS = 8

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
        queries: rows among the chunk's queries.
        num_rows: rows to compute, filler behind the queries included (`step_shapes`).
        keys: columns among the chunk's gathered keys.
        first_masked: the first of those columns that some query does not see.
        mask: [num_rows, columns from `first_masked` on] of the model's dtype, 0 or -inf.
    """

    queries: slice
    num_rows: int
    keys: slice
    first_masked: int
    mask: Tensor


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
    there is no context `num_keys` is 0. With parts they are the `num_keys` stored ones alone (the step's own
    are stored by then), some hidden; without a window all that is gathered counts, filler included, so that
    it need not be copied.

        gathered blocks:  |skip|<------ num_keys ------>|unused slots of the last block|

    Attributes:
        queries: rows among the queries given to attention.
        new: rows among the step's new keys and values.
        block_rows: int64 [2 * num_kv_heads * num_blocks]; None where num_keys is 0.
        parts: as above; empty where the two softmaxes are joined instead (`Paging.joins`).
        own_parts: the own part in runs of queries; empty = by the kernel's own causal order.
    """

    queries: slice
    new: slice
    num_blocks: int
    skip: int
    num_keys: int
    block_rows: Tensor | None
    parts: tuple[MaskedPart, ...]
    own_parts: tuple[OwnPart, ...]


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """What every layer with the same window does. Each of `num_rows` query rows is in exactly one group or
    chunk.
    """

    num_rows: int
    decodes: tuple[DecodeGroup, ...]
    chunks: tuple[ChunkPlan, ...]


@dataclass(frozen=True, slots=True)
class Paging:
    """The fixed facts a plan depends on.

    `joins`: attention joins two parts of one softmax (`attention.joins`); elsewhere a mask does all.
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
    num_rows = sum(piece.num_new for _, piece in queries)
    return AttentionPlan(num_rows=num_rows, decodes=decodes, chunks=tuple(chunks))


def _plan_group(group: list[tuple[int, SequenceSlice]], window: int | None, paging: Paging) -> DecodeGroup:
    block_size = paging.block_size
    lengths = np.array([piece.context_len + 1 for _, piece in group], dtype=np.int64)
    first_keys = np.zeros_like(lengths) if window is None else np.maximum(lengths - window, 0)
    first_blocks = first_keys // block_size
    counts = -(-lengths // block_size) - first_blocks
    num_blocks = blocks_for(padded_keys(int(counts.max()) * block_size), block_size)
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
    masked = is_windowed or not paging.joins
    last_key = total if masked else context
    first_block, end_block = first_key // paging.block_size, blocks_for(last_key, paging.block_size)
    block_ids = piece.block_ids[first_block:end_block]
    skip, num_keys = first_key - first_block * paging.block_size, last_key - first_key
    if masked and not is_windowed:
        # As in a decode group, filler is the sequence's own first block.
        num_blocks = blocks_for(padded_keys(num_keys), paging.block_size)
        block_ids = np.append(block_ids, np.repeat(block_ids[:1], num_blocks - len(block_ids)))
        num_keys = num_blocks * paging.block_size
    return ChunkPlan(
        queries=slice(row, row + piece.num_new),
        new=slice(piece.start, piece.start + piece.num_new),
        num_blocks=len(block_ids),
        skip=skip,
        num_keys=num_keys,
        block_rows=_arena_rows(block_ids[None], paging) if len(block_ids) else None,
        parts=tuple(_parts(piece, first_key, num_keys, window if is_windowed else None, paging))
        if masked
        else (),
        own_parts=tuple(_own_parts(piece.num_new, paging)) if paging.joins and not masked else (),
    )


def _parts(
    piece: SequenceSlice, first_key: int, num_gathered: int, window: int | None, paging: Paging
) -> Iterator[MaskedPart]:
    """The chunk's queries in runs whose scores are few enough. `num_gathered` keys begin at `first_key`."""
    context, num_new = piece.context_len, piece.num_new
    num_rows = _part_queries(num_gathered, window, paging)
    masks: dict[tuple[int, int, int], Tensor] = {}  # most parts have the same one
    for start in range(0, num_new, num_rows):
        stop = min(start + num_rows, num_new)
        if window is None:
            # Only what lies above the diagonal is hidden.
            first, masked, end = 0, context + start, padded_keys(context + stop)
            if (num_gathered - end) * SPARED_KEYS <= num_gathered:
                end = num_gathered
        else:  # a window hides on its left too
            first = masked = max(context + start + 1 - window, first_key)
            end = context + stop
        shape = (padded_rows(stop - start), context + start - masked, end - masked)
        if shape not in masks:
            masks[shape] = _mask(*shape, window, paging)
        yield MaskedPart(
            queries=slice(start, stop),
            num_rows=shape[0],
            keys=slice(first - first_key, end - first_key),
            first_masked=masked - first,
            mask=masks[shape],
        )


def _part_queries(total_keys: int, window: int | None, paging: Paging) -> int:
    on_cpu = paging.device.type == "cpu"
    most = PART_QUERIES_CPU if on_cpu else PART_QUERIES
    num_keys = total_keys if window is None else min(total_keys, window - 1 + most)
    num_heads = paging.num_kv_heads * paging.group
    fitting = MAX_SCORE_ELEMENTS // (num_heads * num_keys)
    if on_cpu:
        fitting = min(fitting, max(MIN_PART_QUERIES, SCORE_ELEMENTS_CPU // (num_heads * num_keys)))
    return whole_rows(max(1, min(most, fitting)))


def _mask(num_queries: int, num_before: int, num_keys: int, window: int | None, paging: Paging) -> Tensor:
    """Who of `num_queries` tokens sees whom of `num_keys`, of which `num_before` lie in front of the first
    query: 0 or -inf.
    """
    positions = torch.arange(num_before, num_before + num_queries, device=paging.device)[:, None]
    keys = torch.arange(num_keys, device=paging.device)
    hidden = keys > positions
    if window is not None:
        hidden |= keys <= positions - window
    return torch.zeros(hidden.shape, dtype=paging.dtype, device=paging.device).masked_fill_(
        hidden, -torch.inf
    )


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
