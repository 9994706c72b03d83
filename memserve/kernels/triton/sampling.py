"""One token a row out of edited logits, without the host: the draw of `kernels.sampling` in Triton.

The same race with the same hashes (see there): blocks of 64 columns by their sums, then the columns of the
fastest block. Only rounding differs. Three kernels, of which the last runs where some row is truncated:

    _scan      (row, chunk of the vocabulary)  maximum and its first id, sum of weights, the chunk's fastest
                                               block; each block's maximum
    _pick      (row)                           joins the chunks: the best id, or the fastest of all and its
                                               fastest column; whether the row has a distribution at all
    _truncate  (row)                           min_p, top_k and top_p, then the race among what is left

`_truncate` finds its borders by bisection over the bits of floats, which are ordered as the floats are, among
candidates that it first packs together: what is above a bound that the k-th largest block maximum, min_p or
(1 - top_p) / V gives. Parameters are tensors, and so are the results: nothing waits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from memserve.kernels.sampling import GREEDY_BELOW

# Columns of a block of the race; as in `kernels.sampling`.
_BLOCK = 64
# Blocks of a chunk.
_CHUNK_BLOCKS = 64


class DrawParams(NamedTuple):
    """Per row, each a tensor [R] beside the logits.

    Attributes:
        temperatures: float32; below GREEDY_BELOW the best id is taken.
        top_ps: float64; 1 = off.
        min_ps: float32; 0 = off.
        top_ks: int32; 0 = off.
        seeds: int64, of which all 64 bits count.
        positions: int64, of the token that is drawn.
    """

    temperatures: Tensor
    top_ps: Tensor
    min_ps: Tensor
    top_ks: Tensor
    seeds: Tensor
    positions: Tensor


@triton.jit
def _mix(bits):
    """The finaliser of splitmix64."""
    bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9
    bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EB
    return bits ^ (bits >> 31)


@triton.jit
def _row_state(seed, position):
    """uint64: what (seed, position) contributes to each hash of a row."""
    state = _mix(seed.to(tl.uint64, bitcast=True) + 0x9E3779B97F4A7C15)
    return _mix(state + (position + 1).to(tl.uint64) * 0x9E3779B97F4A7C15)


@triton.jit
def _exponential(state, counters):
    """float64: waiting times of mean 1 at `counters` >= 0."""
    bits = _mix(state + (counters + 1).to(tl.uint64) * 0x9E3779B97F4A7C15)
    uniform = ((bits >> 12).to(tl.int64).to(tl.float64) + 0.5) * 2.220446049250313e-16
    return -tl.log(uniform)


@triton.jit
def _scan_kernel(
    logits_ptr,  # float32 [R, V], rows stride apart
    temperatures_ptr,  # float32 [R]
    seeds_ptr,  # int64 [R]
    positions_ptr,  # int64 [R]
    maxima_ptr,  # float32 [R, chunks]; NaN if the chunk holds one
    best_ids_ptr,  # int32 [R, chunks], first id with the maximum
    sums_ptr,  # float32 [R, chunks], of exp((logit - chunk's maximum) / temperature)
    keys_ptr,  # float64 [R, chunks], logarithm of the fastest block's time, in units common to the row
    fastest_ptr,  # int32 [R, chunks], that block
    block_maxima_ptr,  # float32 [R, blocks], maximum of each block
    stride,
    vocab_size,
    num_blocks,
    GREEDY: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK_BLOCKS: tl.constexpr,
):
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    place = row * tl.num_programs(1) + chunk
    blocks = chunk * CHUNK_BLOCKS + tl.arange(0, CHUNK_BLOCKS)
    columns = blocks[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    logits = tl.load(logits_ptr + row * stride + columns, mask=columns < vocab_size, other=float("-inf"))
    is_nan = logits != logits
    logits = tl.where(is_nan, float("-inf"), logits)
    of_blocks = tl.max(logits, axis=1)
    maximum = tl.max(of_blocks, axis=0)
    num_nan = tl.sum(tl.sum(is_nan.to(tl.int32), axis=1), axis=0)
    tl.store(maxima_ptr + place, tl.where(num_nan > 0, float("nan"), maximum))
    first = tl.min(tl.where(logits == maximum, columns, vocab_size), axis=1)
    tl.store(best_ids_ptr + place, tl.min(first, axis=0))

    temperature = tl.load(temperatures_ptr + row)
    if temperature >= GREEDY:
        tl.store(block_maxima_ptr + row * num_blocks + blocks, of_blocks, mask=blocks < num_blocks)
        # Of a chunk of nothing but -inf, all weights are 0; of +inf the row is bad anyway.
        shift = tl.where(tl.abs(maximum) < float("inf"), maximum / temperature, 0.0)
        sums = tl.sum(tl.exp(logits / temperature - shift), axis=1)
        tl.store(sums_ptr + place, tl.sum(sums, axis=0))
        state = _row_state(tl.load(seeds_ptr + row), tl.load(positions_ptr + row))
        # Counters: the columns first, then the blocks, so that no hash is used twice.
        races = (sums > 0) & (sums < float("inf"))
        times = _exponential(state, (vocab_size + blocks).to(tl.int64)) / tl.where(races, sums, 1.0)
        keys = tl.where(races, tl.log(times) - shift, float("inf"))
        key = tl.min(keys, axis=0)
        tl.store(keys_ptr + place, key)
        tl.store(fastest_ptr + place, tl.min(tl.where(keys == key, blocks, num_blocks), axis=0))


@triton.jit
def _pick_kernel(
    logits_ptr,  # as in _scan_kernel
    temperatures_ptr,
    seeds_ptr,
    positions_ptr,
    maxima_ptr,
    best_ids_ptr,
    keys_ptr,
    fastest_ptr,
    ids_ptr,  # int64 [R]
    is_bad_ptr,  # bool [R]
    stride,
    vocab_size,
    num_chunks,
    GREEDY: tl.constexpr,
    BLOCK: tl.constexpr,
    MAX_CHUNKS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    chunks = tl.arange(0, MAX_CHUNKS)
    places, exists = row * num_chunks + chunks, chunks < num_chunks
    maxima = tl.load(maxima_ptr + places, mask=exists, other=float("-inf"))
    num_nan = tl.sum((maxima != maxima).to(tl.int32), axis=0)
    maximum = tl.max(tl.where(maxima != maxima, float("-inf"), maxima), axis=0)
    is_bad = (num_nan > 0) | (tl.abs(maximum) == float("inf"))
    tl.store(is_bad_ptr + row, is_bad)
    best_ids = tl.load(best_ids_ptr + places, mask=exists, other=vocab_size)
    found = tl.min(tl.where(maxima == maximum, best_ids, vocab_size), axis=0)

    temperature = tl.load(temperatures_ptr + row)
    if (temperature >= GREEDY) & (is_bad == 0):
        keys = tl.load(keys_ptr + places, mask=exists, other=float("inf"))
        fastest = tl.load(fastest_ptr + places, mask=exists, other=vocab_size)
        block = tl.min(tl.where(keys == tl.min(keys, axis=0), fastest, vocab_size), axis=0)
        columns = block * BLOCK + tl.arange(0, BLOCK)
        logits = tl.load(logits_ptr + row * stride + columns, mask=columns < vocab_size, other=float("-inf"))
        weights = tl.exp(logits / temperature - maximum / temperature)
        state = _row_state(tl.load(seeds_ptr + row), tl.load(positions_ptr + row))
        found = _fastest_column(state, columns, weights, vocab_size)
    tl.store(ids_ptr + row, tl.where(is_bad, -1, found).to(tl.int64))


@triton.jit
def _fastest_column(state, columns, weights, vocab_size):
    times = _exponential(state, columns.to(tl.int64)) / tl.where(weights > 0, weights, 1.0)
    times = tl.where(weights > 0, times, float("inf"))
    return tl.min(tl.where(times == tl.min(times, axis=0), columns, vocab_size - 1), axis=0)


@triton.jit
def _count_from(values_ptr, count, edge, TILE: tl.constexpr):
    """How many of `count` values are at least `edge`."""
    total = tl.full((), 0, tl.int32)
    for first in range(0, count, TILE):
        at = first + tl.arange(0, TILE)
        values = tl.load(values_ptr + at, mask=at < count, other=-1.0)
        total += tl.sum((values >= edge).to(tl.int32), axis=0)
    return total


@triton.jit
def _sum_from(values_ptr, count, edge, TILE: tl.constexpr):
    """float64: the sum of those of `count` values that are at least `edge` > 0, or 0."""
    total = tl.full((), 0.0, tl.float64)
    for first in range(0, count, TILE):
        at = first + tl.arange(0, TILE)
        values = tl.load(values_ptr + at, mask=at < count, other=0.0)
        total += tl.sum(tl.where(values >= edge, values, 0.0).to(tl.float64), axis=0)
    return total


@triton.jit
def _edge(values_ptr, count, wanted, low, high, BY_SUM: tl.constexpr, TILE: tl.constexpr):
    """The largest value between `low` and `high`, both >= 0, such that those of `count` values from it on are
    `wanted` many (the k-th largest) or, BY_SUM, add up to `wanted` (the nucleus); `low` if all are too few.
    """
    low_bits, high_bits = low.to(tl.int32, bitcast=True), high.to(tl.int32, bitcast=True)
    while low_bits < high_bits:
        middle = low_bits + (high_bits - low_bits + 1) // 2
        if BY_SUM:
            reached = _sum_from(values_ptr, count, middle.to(tl.float32, bitcast=True), TILE) >= wanted
        else:
            reached = _count_from(values_ptr, count, middle.to(tl.float32, bitcast=True), TILE) >= wanted
        if reached:
            low_bits = middle
        else:
            high_bits = middle - 1
    return low_bits.to(tl.float32, bitcast=True)


@triton.jit
def _truncate_kernel(
    logits_ptr,  # as in _scan_kernel
    temperatures_ptr,
    top_ps_ptr,  # float64 [R]
    min_ps_ptr,  # float32 [R]
    top_ks_ptr,  # int32 [R]
    seeds_ptr,
    positions_ptr,
    maxima_ptr,
    sums_ptr,
    block_maxima_ptr,
    probs_ptr,  # float32 [R, V], scratch: probabilities, 0 where cut
    packed_ptr,  # float32 [R, V], scratch: the candidates' alone
    is_bad_ptr,  # bool [R]
    ids_ptr,  # int64 [R], written for truncated rows
    stride,
    vocab_size,
    num_blocks,
    num_chunks,
    GREEDY: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK_BLOCKS: tl.constexpr,
    MAX_CHUNKS: tl.constexpr,
):
    TILE: tl.constexpr = BLOCK * CHUNK_BLOCKS
    row = tl.program_id(0).to(tl.int64)
    temperature, top_p = tl.load(temperatures_ptr + row), tl.load(top_ps_ptr + row)
    min_p, top_k = tl.load(min_ps_ptr + row), tl.load(top_ks_ptr + row)
    is_cut = (top_k > 0) | (min_p > 0)
    is_truncated = (top_p < 1) | ((top_k > 0) & (top_k < vocab_size)) | (min_p > 0)
    if (temperature < GREEDY) | (is_truncated == 0) | (tl.load(is_bad_ptr + row) != 0):
        return
    logits_ptr += row * stride
    probs_ptr += row * vocab_size
    packed_ptr += row * vocab_size

    # 1. what makes probabilities of logits
    chunks = tl.arange(0, MAX_CHUNKS)
    places, exists = row * num_chunks + chunks, chunks < num_chunks
    maxima = tl.load(maxima_ptr + places, mask=exists, other=float("-inf")) / temperature
    shift = tl.max(maxima, axis=0)
    sums = tl.load(sums_ptr + places, mask=exists, other=0.0)
    total = tl.sum(tl.where(maxima > float("-inf"), sums * tl.exp(maxima - shift), 0.0), axis=0)
    highest = 1.0 / total

    # 2. a floor below which nothing is kept, whatever the borders will be
    floor = highest * min_p
    if (top_k > 0) & (top_k <= num_blocks):
        # The k largest block maxima are k values, so the k-th largest of all is not below the least of them.
        for first in range(0, num_blocks, TILE):
            at = first + tl.arange(0, TILE)
            found = tl.load(block_maxima_ptr + row * num_blocks + at, mask=at < num_blocks, other=0.0)
            tl.store(packed_ptr + at, tl.exp(found / temperature - shift) / total, mask=at < num_blocks)
        tl.debug_barrier()
        floor = tl.maximum(floor, _edge(packed_ptr, num_blocks, top_k, floor * 0.0, highest, False, TILE))
        tl.debug_barrier()
    if is_cut == 0:
        # Tokens below it add up to less than 1 - top_p; 0.99: rounding may not cost the nucleus a member.
        floor = ((1.0 - top_p) * (0.99 / vocab_size)).to(tl.float32)

    # 3. the candidates
    count = tl.full((), 0, tl.int32)
    for first in range(0, vocab_size, TILE):
        at = first + tl.arange(0, TILE)
        logits = tl.load(logits_ptr + at, mask=at < vocab_size, other=float("-inf"))
        probs = tl.exp(logits / temperature - shift) / total
        is_candidate = (probs >= floor) & (probs > 0)
        tl.store(probs_ptr + at, tl.where(is_candidate, probs, 0.0), mask=at < vocab_size)
        ones = is_candidate.to(tl.int32)
        tl.store(packed_ptr + count + tl.cumsum(ones, axis=0) - 1, probs, mask=is_candidate)
        count += tl.sum(ones, axis=0)
    tl.debug_barrier()

    # 4. the borders: everything above `edge` is kept, and the first `num_at_edge` of those that equal it
    edge, num_at_edge = floor, vocab_size.to(tl.float64)
    if (top_k > 0) & (top_k < count):
        edge = tl.maximum(edge, _edge(packed_ptr, count, top_k, floor, highest, False, TILE))
    if top_p < 1:
        mass = top_p
        if is_cut:
            mass = top_p * _sum_from(packed_ptr, count, edge, TILE)
        edge = _edge(packed_ptr, count, mass, edge, highest, True, TILE)
        above = _sum_from(
            packed_ptr, count, (edge.to(tl.int32, bitcast=True) + 1).to(tl.float32, bitcast=True), TILE
        )
        num_at_edge = tl.maximum(tl.ceil((mass - above) / tl.maximum(edge.to(tl.float64), 1e-300)), 1.0)

    # 5. the race among what is kept
    state = _row_state(tl.load(seeds_ptr + row), tl.load(positions_ptr + row))
    best_time = tl.full((), float("inf"), tl.float64)
    best_block = tl.full((), 0, tl.int32)
    num_ties = tl.full((), 0, tl.int32)
    for first in range(0, vocab_size, TILE):
        at = first + tl.arange(0, TILE)
        probs = tl.load(probs_ptr + at, mask=at < vocab_size, other=0.0)
        ties = (probs == edge).to(tl.int32)
        is_early = (num_ties + tl.cumsum(ties, axis=0)).to(tl.float64) <= num_at_edge
        num_ties += tl.sum(ties, axis=0)
        kept = tl.where((probs > edge) | ((probs == edge) & is_early), probs, 0.0)
        tl.store(probs_ptr + at, kept, mask=at < vocab_size)
        block_sums = tl.sum(tl.reshape(kept, [CHUNK_BLOCKS, BLOCK]), axis=1)
        blocks = first // BLOCK + tl.arange(0, CHUNK_BLOCKS)
        times = _exponential(state, (vocab_size + blocks).to(tl.int64)) / tl.where(
            block_sums > 0, block_sums, 1.0
        )
        times = tl.where(block_sums > 0, times, float("inf"))
        time = tl.min(times, axis=0)
        block = tl.min(tl.where(times == time, blocks, num_blocks), axis=0)
        best_block = tl.where(time < best_time, block, best_block)
        best_time = tl.minimum(time, best_time)
    tl.debug_barrier()
    columns = best_block * BLOCK + tl.arange(0, BLOCK)
    weights = tl.load(probs_ptr + columns, mask=columns < vocab_size, other=0.0)
    tl.store(ids_ptr + row, _fastest_column(state, columns, weights, vocab_size).to(tl.int64))


def draw(logits: Tensor, params: DrawParams, any_truncated: bool = True) -> tuple[Tensor, Tensor]:
    """Draw one token a row.

    Args:
        logits: float32 [R, V], edited already; left as they are.
        params: of the rows.
        any_truncated: whether some row has a top_p below 1, a top_k or a min_p. Saying yes is never wrong.

    Returns:
        token_ids: int64 [R]; -1 in bad rows.
        is_bad: bool [R], rows without a distribution to draw from (a NaN or +inf, or nothing finite).
    """
    num_rows, vocab_size = logits.shape
    device = logits.device
    assert logits.dtype == torch.float32 and logits.stride(1) == 1
    assert all(param.shape == (num_rows,) for param in params)
    ids = torch.empty(num_rows, dtype=torch.int64, device=device)
    is_bad = torch.empty(num_rows, dtype=torch.bool, device=device)
    if num_rows == 0:
        return ids, is_bad
    num_blocks = triton.cdiv(vocab_size, _BLOCK)
    num_chunks = triton.cdiv(num_blocks, _CHUNK_BLOCKS)
    # One allocation a type: float32 | maxima, sums, block maxima |, int32 | best ids, fastest blocks |.
    floats = torch.empty((num_rows, 2 * num_chunks + num_blocks), dtype=torch.float32, device=device).view(-1)
    maxima, sums = floats[: 2 * num_rows * num_chunks].view(2, num_rows, num_chunks)
    block_maxima = floats[2 * num_rows * num_chunks :].view(num_rows, num_blocks)
    best_ids, fastest = torch.empty((2, num_rows, num_chunks), dtype=torch.int32, device=device)
    keys = torch.empty((num_rows, num_chunks), dtype=torch.float64, device=device)
    temperatures, top_ps, min_ps, top_ks, seeds, positions = params
    shapes = {"GREEDY": GREEDY_BELOW, "BLOCK": _BLOCK}
    max_chunks = triton.next_power_of_2(num_chunks)
    _scan_kernel[(num_rows, num_chunks)](
        logits, temperatures, seeds, positions, maxima, best_ids, sums, keys, fastest, block_maxima,
        logits.stride(0), vocab_size, num_blocks, CHUNK_BLOCKS=_CHUNK_BLOCKS, num_warps=8, **shapes,
    )  # fmt: skip
    _pick_kernel[(num_rows,)](
        logits, temperatures, seeds, positions, maxima, best_ids, keys, fastest, ids, is_bad,
        logits.stride(0), vocab_size, num_chunks, MAX_CHUNKS=max_chunks, num_warps=1, **shapes,
    )  # fmt: skip
    if any_truncated:
        probs, packed = torch.empty((2, num_rows, vocab_size), dtype=torch.float32, device=device)
        _truncate_kernel[(num_rows,)](
            logits, temperatures, top_ps, min_ps, top_ks, seeds, positions, maxima, sums, block_maxima,
            probs, packed, is_bad, ids, logits.stride(0), vocab_size, num_blocks, num_chunks,
            CHUNK_BLOCKS=_CHUNK_BLOCKS, MAX_CHUNKS=max_chunks, num_warps=8, **shapes,
        )  # fmt: skip
    return ids, is_bad
