"""From logits to tokens: penalties, temperature, truncation, one draw a row, and log-probabilities.

The order is that of vLLM: raw log-probabilities are what the model said; then logit_bias, min_tokens,
repetition, presence and frequency penalty; then temperature, min_p, top_k, top_p; then the draw.

The draw of a row depends on its logits, its parameters and (seed, position) alone. It is a race: each token
gets an exponential waiting time from a counter-based hash of (seed, position, id), divided by its
probability, and the first to arrive is drawn (the Gumbel-max trick by another name). So the same request
draws the same tokens alone, in any batch, on any worker and in a replay (DESIGN "Failure"), and rounding of
the logits, as from a prompt cut into other chunks, changes a draw only where the two fastest arrive within
that rounding of each other. (The inverse of a cumulative distribution would move every border a little, and
crosses one far more often.) There is no generator state to keep or move. Plain torch, on any device; nothing
loops over the vocabulary in Python.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from memserve.kernels.logit_edits import SamplingRow, collect_edits, edit_logits
from memserve.messages import SamplingParams, TokenLogprobs

__all__ = ["GREEDY_BELOW", "Sampled", "SamplingRow", "exponentials", "sample", "token_logprobs"]

# Below this, dividing by the temperature would only lose digits: greedy, as in vLLM.
GREEDY_BELOW = 1e-5

# Reductions over the vocabulary go by blocks of this many: a sum or maximum of blocks is vectorised on a
# CPU, a cumulative sum or argmax is not, and is then needed only over the blocks and within one of them (5x
# at V = 128k).
_BLOCK = 64

# Elements of logits whose log-softmax is held at once (64 MB).
_LOGPROBS_ELEMENTS = 1 << 24


@dataclass(frozen=True, slots=True)
class Sampled:
    """One token a row, and its log-probabilities where asked for.

    `bad_rows`: rows without a distribution to draw from (a NaN or +inf among the logits, or nothing
    finite); their token is -1, and the others are not affected.
    """

    token_ids: list[int]
    logprobs: list[TokenLogprobs | None]
    bad_rows: list[int] = field(default_factory=list)


def sample(logits: Tensor, rows: Sequence[SamplingRow]) -> Sampled:
    """Draw one token for each row of `logits`, float32 [R, V] on any device; `logits` is left as it is."""
    num_rows, vocab_size = logits.shape
    assert len(rows) == num_rows and logits.dtype == torch.float32
    if num_rows == 0:
        return Sampled([], [])
    edits = collect_edits(rows, vocab_size)
    edited = logits if edits.is_empty else edit_logits(logits, edits.on(logits.device))
    best, greedy_ids = _argmax(edited)
    token_ids = greedy_ids
    random = [i for i, row in enumerate(rows) if row.params.temperature >= GREEDY_BELOW]
    if random:
        drawn = _draw(edited if len(random) == num_rows else edited[random], [rows[i] for i in random])
        token_ids = greedy_ids.index_copy(0, torch.tensor(random, device=logits.device), drawn)
    ids, finite = torch.stack((token_ids, torch.isfinite(best).long())).tolist()
    bad_rows = [i for i in range(num_rows) if not finite[i]]
    for i in bad_rows:
        ids[i] = -1

    logprobs: list[TokenLogprobs | None] = [None] * num_rows
    asked = [i for i, row in enumerate(rows) if row.params.logprobs is not None and finite[i]]
    if asked:
        raw = logits if len(asked) == num_rows else logits[asked]
        sizes = [rows[i].params.logprobs or 0 for i in asked]
        for i, found in zip(asked, _logprobs(raw, [ids[i] for i in asked], sizes), strict=True):
            logprobs[i] = found
    return Sampled(ids, logprobs, bad_rows)


def token_logprobs(logits: Tensor, targets: Tensor, k: int) -> list[TokenLogprobs]:
    """Log-probability and rank of `targets` [T] and the `k` best tokens, under each row of `logits` [T, V].

    For prompt_logprobs: row t are the logits at the position before target t. Nothing is adjusted.
    """
    assert logits.shape[0] == len(targets)
    return _logprobs(logits, targets.tolist(), [k] * len(targets))


def exponentials(seeds: Iterable[int], positions: Iterable[int], counters: Tensor) -> Tensor:
    """The waiting times, float64 [R, N] of mean 1, of rows of (seed, position) at `counters`, int64 [R, N].

    Hashes of (seed, position, counter) by three rounds of splitmix64, of which the top 52 bits are a number
    strictly between 0 and 1; its negative logarithm is exponentially distributed.
    """
    state = np.array([seed & 0xFFFFFFFFFFFFFFFF for seed in seeds], dtype=np.uint64).view(np.int64)
    position = torch.from_numpy(np.fromiter(positions, dtype=np.int64, count=len(state)))
    row = _mix(_mix(torch.from_numpy(state) + _GOLDEN) + (position + 1) * _GOLDEN).to(counters.device)
    bits = _mix(row.unsqueeze(1) + (counters + 1) * _GOLDEN)
    uniform = (_shift(bits, 12).double() + 0.5) * 2.0**-52
    return uniform.log_().neg_()


def _signed(bits: int) -> int:
    return bits - (1 << 64) if bits >> 63 else bits


# int64 stands for uint64, which torch has few operations for: addition and multiplication are the same.
_GOLDEN = _signed(0x9E3779B97F4A7C15)


def _mix(bits: Tensor) -> Tensor:
    """The finaliser of splitmix64 (Steele, Lea and Flood 2014); arithmetic modulo 2^64."""
    bits = (bits ^ _shift(bits, 30)) * _signed(0xBF58476D1CE4E5B9)
    bits = (bits ^ _shift(bits, 27)) * _signed(0x94D049BB133111EB)
    return bits ^ _shift(bits, 31)


def _shift(bits: Tensor, count: int) -> Tensor:
    """Logical shift to the right."""
    return (bits >> count) & ((1 << (64 - count)) - 1)


# --- the draw ----------------------------------------------------------------------------------------------


def _draw(logits: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """int64 [R]: a token for each row, all of them random."""
    device, params = logits.device, [row.params for row in rows]
    temperatures = [p.temperature for p in params]
    if any(temperature != 1.0 for temperature in temperatures):
        logits = logits / torch.tensor(temperatures, device=device).unsqueeze(1)
    probs = torch.softmax(logits, dim=-1)
    vocab_size = logits.shape[1]
    truncated = [i for i, p in enumerate(params) if p.top_p < 1 or 0 < p.top_k < vocab_size or p.min_p > 0]
    if len(truncated) == len(rows):
        probs = _truncate(probs, params)
    elif truncated:
        chosen = torch.tensor(truncated, device=device)
        probs = probs.index_copy(0, chosen, _truncate(probs[chosen], [params[i] for i in truncated]))
    return _race(probs, [p.seed for p in params], [row.position for row in rows])


def _truncate(probs: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """`probs` [R, V] with 0 where min_p, top_k or top_p cut.

    Each row gets a floor that cuts exactly what min_p and top_k do (all that equal the k-th largest stay).
    Without them it is (1 - top_p) / V: tokens below it add up to less than 1 - top_p, so none is in the
    nucleus. Only what is left, the candidates, is ever sorted.
    """
    device, vocab_size = probs.device, probs.shape[1]
    top_k = [min(p.top_k, vocab_size) for p in params]
    floor = probs.amax(dim=1) * torch.tensor([p.min_p for p in params], device=device)
    if max(top_k) > 0:
        floor = torch.maximum(floor, _kth_largest(probs, torch.tensor(top_k, device=device)))
    is_cut = torch.tensor([k > 0 or p.min_p > 0 for k, p in zip(top_k, params, strict=True)], device=device)
    if all(p.top_p >= 1 for p in params):
        return torch.where(probs >= floor.unsqueeze(1), probs, 0.0)
    top_p = torch.tensor([p.top_p for p in params], dtype=torch.float64, device=device)
    harmless = (1 - top_p) * (0.99 / vocab_size)  # 0.99: rounding may not cost the nucleus a member
    weights, ids = _candidates(probs, torch.where(is_cut, floor, harmless.float()))
    # What fills a row of candidates up weighs nothing and adds nothing to token 0.
    return torch.zeros_like(probs).scatter_add_(1, ids, _keep_nucleus(weights, top_p, is_cut))


def _kth_largest(probs: Tensor, k: Tensor) -> Tensor:
    """The k-th largest [R] of each row of `probs` [R, V], 0 where k is not positive."""
    largest_k = int(k.max())
    blocks = _blocks(probs, 0.0)
    if largest_k < blocks.shape[1]:  # the k largest are in the k blocks of largest maximum
        best = blocks.amax(dim=2).topk(largest_k, dim=1, sorted=False).indices
        probs = blocks.gather(1, best.unsqueeze(2).expand(-1, -1, _BLOCK)).flatten(1)
    largest = probs.topk(largest_k, dim=1).values
    kth = largest.gather(1, (k - 1).clamp(min=0).unsqueeze(1)).squeeze(1)
    return torch.where(k > 0, kth, 0.0)


def _candidates(probs: Tensor, floor: Tensor) -> tuple[Tensor, Tensor]:
    """What is positive and at least `floor` [R] in `probs` [R, V]: weights and ids, both [R, C].

    Each row's are to the left, in vocabulary order; C is the most that any has, and the rest weighs 0.
    """
    device, num_rows = probs.device, len(probs)
    blocks = _blocks(probs, 0.0)
    row_of_block, block_of = (blocks.amax(dim=2) >= floor.unsqueeze(1)).nonzero(as_tuple=True)
    inside = blocks[row_of_block, block_of]
    found, offset = ((inside >= floor[row_of_block].unsqueeze(1)) & (inside > 0)).nonzero(as_tuple=True)
    row = row_of_block[found]
    counts = torch.bincount(row, minlength=num_rows)
    column = torch.arange(len(row), device=device) - (counts.cumsum(0) - counts)[row]
    width = max(1, int(counts.max()))
    weights = probs.new_zeros(num_rows, width)
    ids = torch.zeros(num_rows, width, dtype=torch.int64, device=device)
    weights[row, column] = inside[found, offset]
    ids[row, column] = block_of[found] * _BLOCK + offset
    return weights, ids


def _keep_nucleus(weights: Tensor, top_p: Tensor, is_cut: Tensor) -> Tensor:
    """`weights` [R, C] with 0 outside each row's smallest set, never empty, that adds up to `top_p` [R].

    Of the whole, that is: of what is left of rows that were cut, else of 1. Of equal weights at the edge,
    those of the lowest ids stay.
    """
    # numpy's sort of values alone is vectorised; torch's, which makes indices too, takes many times as long.
    if weights.device.type == "cpu":
        descending = torch.from_numpy(-np.sort(-weights.numpy(), axis=1))
    else:
        descending = weights.sort(dim=1, descending=True).values
    sums = descending.cumsum(dim=1, dtype=torch.float64)
    mass = torch.where(top_p < 1, top_p * torch.where(is_cut, sums[:, -1], 1.0), torch.inf)
    is_kept = (sums - descending < mass.unsqueeze(1)) & (descending > 0)
    num_kept = is_kept.sum(dim=1, keepdim=True).clamp(min=1)
    edge = descending.gather(1, num_kept - 1)
    at_edge = weights == edge
    num_at_edge = num_kept - (weights > edge).sum(dim=1, keepdim=True)
    return weights * ((weights > edge) | (at_edge & (at_edge.cumsum(dim=1) <= num_at_edge)))


def _race(weights: Tensor, seeds: Sequence[int], positions: Sequence[int]) -> Tensor:
    """int64 [R]: the column of `weights` [R, V] that arrives first; its weight is positive.

    The blocks race by their sums, and then the columns of the fastest: V / 64 + 64 hashes a row instead of
    V. A row of NaN or of nothing gives some column.
    """
    vocab_size = weights.shape[1]
    blocks = _blocks(weights, 0.0)
    # Counters: the columns first, then the blocks, so that no hash is used twice.
    counters = torch.arange(vocab_size, vocab_size + blocks.shape[1], device=weights.device).unsqueeze(0)
    block = (exponentials(seeds, positions, counters) / blocks.sum(dim=2)).argmin(dim=1, keepdim=True)
    inside = blocks.gather(1, block.unsqueeze(2).expand(-1, -1, _BLOCK)).squeeze(1)
    columns = block * _BLOCK + torch.arange(_BLOCK, device=weights.device)
    fastest = (exponentials(seeds, positions, columns) / inside).argmin(dim=1, keepdim=True)
    return columns.gather(1, fastest).squeeze(1).clamp(max=vocab_size - 1)


def _argmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Maximum [R] of each row and the lowest id [R] that has it; NaN where there is one."""
    blocks = _blocks(logits, -torch.inf)
    maxima = blocks.amax(dim=2)
    block = maxima.argmax(dim=1, keepdim=True)
    inner = blocks.gather(1, block.unsqueeze(2).expand(-1, -1, _BLOCK)).squeeze(1)
    column = inner.argmax(dim=1, keepdim=True)
    return inner.gather(1, column).squeeze(1), (block * _BLOCK + column).squeeze(1)


def _blocks(values: Tensor, fill: float) -> Tensor:
    """[R, V] as [R, ceil(V / _BLOCK), _BLOCK], the last block filled up."""
    missing = -values.shape[1] % _BLOCK
    if missing:
        values = functional.pad(values, (0, missing), value=fill)
    return values.reshape(len(values), -1, _BLOCK)


# --- log-probabilities -------------------------------------------------------------------------------------


def _logprobs(logits: Tensor, targets: Sequence[int], sizes: Sequence[int]) -> list[TokenLogprobs]:
    """For each row its target's log-probability and rank (1 = best), and its `size` best tokens."""
    found: list[TokenLogprobs] = []
    step = max(1, _LOGPROBS_ELEMENTS // logits.shape[1])
    for start in range(0, len(targets), step):
        part = torch.log_softmax(logits[start : start + step].float(), dim=-1)
        ids = torch.tensor(targets[start : start + step], device=logits.device).unsqueeze(1)
        own = part.gather(1, ids)
        ranks = (part > own).sum(dim=1) + 1
        part_sizes = sizes[start : start + step]
        best, best_ids = part.topk(min(max(part_sizes), part.shape[1]), dim=1)
        columns = (own.squeeze(1).tolist(), ranks.tolist(), best.tolist(), best_ids.tolist(), part_sizes)
        for logprob, rank, values, tokens, size in zip(*columns, strict=True):
            top = sorted(zip(tokens[:size], values[:size], strict=True), key=lambda pair: (-pair[1], pair[0]))
            found.append(TokenLogprobs(logprob=logprob, rank=rank, top=tuple(top)))
    return found
