"""The rows of a decision's table: what a request would cost on each worker.

For prefill: queue + exec(x, y), the prefix being there, or in the host tier, or pulled where that is faster
than computing it (MemServe §Global scheduling: move when transfer <= exec(x, y) - exec(x, y')). For decode:
the KV to move, and the steps with one more request in them.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import itemgetter
from typing import NamedTuple

from memserve.router.scheduling.holder_tree import Found
from memserve.router.scheduling.policies.decision import NOBODY, Ask, Candidate, DecodeRow, PrefillRow, Source
from memserve.router.scheduling.predictor import IDLE, Batch, Phase, Predictor
from memserve.router.scheduling.prompt_tree import PromptTree

# Tokens that a request is expected to draw, where it says more.
_MAX_EXPECTED_TOKENS = 128
# Holders asked for their addresses, the longest first: the first mostly has them.
_MAX_TRIED = 4
_new_row = tuple.__new__
# To look a member up on its class takes 0.2 us, and a table has a row for each worker.
_PREFILL, _DECODE, _TRANSFER = Phase.PREFILL, Phase.DECODE, Phase.TRANSFER
# From this share of blocks taken on, preemption comes near.
_FULL_SHARE = 0.8


def source_of(tree: PromptTree, found: Found) -> Source | None:
    """The life that holds most of a matched prefix at known addresses, in either tier: the one to pull from.
    (A sequence goes to the host tier from its end.)
    """
    best = None
    holdings = [*found.live.values(), *found.lost]
    for holding in sorted(holdings, key=itemgetter(1), reverse=True)[:_MAX_TRIED]:
        if best is not None and best.num_tokens >= holding.num_tokens:
            continue
        num_tokens = min(holding.num_tokens, tree.num_known_tokens(found, holding.life))
        if num_tokens > (0 if best is None else best.num_tokens):
            life = holding.life
            num_in_device = holding.num_tokens - holding.num_host_tokens
            num_host = max(0, num_tokens - num_in_device)
            best = Source(life.instance, life.incarnation, num_tokens, life.is_lost, num_host)
    return best


class _Ways(NamedTuple):
    """What a prompt costs where so much of it is cached, whoever else waits there: as it is, or with the rest
    of the source's prefix pulled. Raw predictions.
    """

    num_device: int
    num_host: int
    swap_in_ms: float
    exec_ms: float
    num_pulled: int
    pull_ms: float
    pulled_exec_ms: float


def price_prefills(
    candidates: Sequence[Candidate], ask: Ask, found: Found | None, *, pulls: bool
) -> list[PrefillRow]:
    """One row for each worker, in their order. `pulls`: whether KV may come from other instances."""
    live = found.live if found is not None else NOBODY
    source = ask.source if pulls else None
    source_name = source.instance if source is not None else ""
    block_size = candidates[0].view.block_size
    # Whole blocks, and never the last token; of a prompt that is there whole, all but that.
    most = (ask.num_tokens - 1) // block_size * block_size
    known: dict[tuple[Predictor, int, int], _Ways] = {}  # most prefill workers are alike, without decodes
    rows = []
    for candidate in candidates:
        view, predictor, correction = candidate.view, candidate.predictor, candidate.correction
        name, queue_ms = view.instance, view.queue_ms
        own = in_host = 0
        holding = live.get(name)
        if holding is not None:
            _, own, in_host = holding
            if own > most and not in_host:
                own = ask.num_tokens - 1
            elif own > most:
                own, in_host = most, in_host - (own - most)  # ends are swapped out first: it is in the host's
        if view.num_decoding:
            batch = Batch(view.num_decoding, view.num_context)
            ways = _ways(predictor, ask.num_tokens, most, own, in_host, source, batch)
            factor = correction.factor(_PREFILL, True)
        else:
            key = (predictor, own, in_host)
            maybe = known.get(key)
            if maybe is None:
                maybe = _ways(predictor, ask.num_tokens, most, own, in_host, source, IDLE)
                known[key] = maybe
            ways, factor = maybe, correction.factor(_PREFILL, False)
        num_device, num_host, swap_in_ms, exec_ms, num_pulled, pull_ms, pulled_exec_ms = ways
        exec_ms *= factor
        total_ms = queue_ms + swap_in_ms + exec_ms
        if num_pulled:
            pull_ms *= correction.factor(_TRANSFER, False)
            pulled_exec_ms *= factor
            with_ms = (queue_ms if queue_ms > pull_ms else pull_ms) + swap_in_ms + pulled_exec_ms
            if with_ms < total_ms and source_name != name:
                total_ms, exec_ms = with_ms, pulled_exec_ms
            else:
                num_pulled, pull_ms = 0, 0.0
        # `PrefillRow(...)` costs twice as much, and a table has a row for each worker
        row = (
            name,
            total_ms,
            queue_ms,
            exec_ms,
            pull_ms,
            swap_in_ms,
            num_device,
            num_host,
            num_pulled,
            source if num_pulled else None,
        )
        rows.append(_new_row(PrefillRow, row))
    return rows


def _ways(
    predictor: Predictor,
    num_tokens: int,
    most: int,
    own: int,
    in_host: int,
    source: Source | None,
    batch: Batch,
) -> _Ways:
    exec_ms, swap_in_ms = predictor.prefill_ms(num_tokens, own, batch), 0.0
    if in_host:
        swap_in_ms = predictor.model.swap_in_ms(in_host)
        without_ms = predictor.prefill_ms(num_tokens, own - in_host, batch)
        if without_ms <= swap_in_ms + exec_ms:
            own, in_host, swap_in_ms, exec_ms = own - in_host, 0, 0.0, without_ms
    upto = min(source.num_tokens, most) if source is not None else 0
    if source is None or upto <= own:
        return _Ways(own - in_host, in_host, swap_in_ms, exec_ms, 0, 0.0, 0.0)
    in_device = source.num_tokens - source.num_host_tokens
    num_from_host = max(0, upto - max(own, in_device))
    pull_ms = predictor.pull_ms(upto - own - num_from_host) + predictor.pull_host_ms(num_from_host)
    pulled_exec_ms = predictor.prefill_ms(num_tokens, upto, batch)
    if num_from_host and in_device > own:  # or what is in the device tier alone
        less_ms = predictor.pull_ms(in_device - own)
        more_exec_ms = predictor.prefill_ms(num_tokens, in_device, batch)
        if less_ms + more_exec_ms <= pull_ms + pulled_exec_ms:
            upto, pull_ms, pulled_exec_ms = in_device, less_ms, more_exec_ms
    return _Ways(own - in_host, in_host, swap_in_ms, exec_ms, upto - own, pull_ms, pulled_exec_ms)


def price_decodes(candidates: Sequence[Candidate], ask: Ask, found: Found | None) -> list[DecodeRow]:
    """One row for each worker, in their order."""
    live = found.live if found is not None else NOBODY
    num_tokens = ask.num_tokens
    num_drawn = max(1, min(ask.num_new_tokens, _MAX_EXPECTED_TOKENS))
    rows = []
    for candidate in candidates:
        view, predictor = candidate.view, candidate.predictor
        holding = live.get(view.instance)
        num_moved = num_tokens if holding is None else max(0, num_tokens - holding.num_tokens)
        move_ms = predictor.pull_ms(num_moved)
        factor = candidate.correction.factor(_DECODE, False)
        num_decoding, num_context = view.num_decoding, view.num_context
        step_ms = predictor.decode_ms(num_decoding + 1, num_context + num_tokens) * factor
        # what the others wait longer for each token, because of this one
        slower_ms = (step_ms - predictor.decode_ms(num_decoding, num_context) * factor) * num_decoding
        num_free = view.num_blocks - view.reserved_blocks
        share = 1.0 - (num_free - num_tokens / view.block_size) / view.num_blocks
        pressure = 1.0 + (share - _FULL_SHARE) / (1.0 - _FULL_SHARE) if share > _FULL_SHARE else 1.0
        total_ms = move_ms + num_drawn * (step_ms * pressure + slower_ms)
        row = (view.instance, total_ms, move_ms, step_ms, num_moved, num_decoding, num_free)
        rows.append(_new_row(DecodeRow, row))
    return rows
