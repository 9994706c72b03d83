"""The policies, by name: each a pure choice among priced rows.

`prompt-tree` is the system's own; the others are what the paper compares it with, and what an experiment
wants as a baseline. All reuse what a worker happens to have cached; only `prompt-tree` looks for it, and
pulls from other instances.

Role is policy, not code: when no worker of a role is alive, the others do its work.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Sequence
from functools import partial

from memserve.config import Role
from memserve.model_config import blocks_for
from memserve.router.scheduling.policies.decision import (
    Ask,
    Candidate,
    Decision,
    DecodeRow,
    Policy,
    PrefillRow,
)
from memserve.router.scheduling.policies.pricing import price_decodes, price_prefills
from memserve.router.scheduling.policy import Placement, load_key

# Rows this near to the best (a share, and ms) are as good: the one that was given least lately is taken. That
# spreads cold requests.
_NEAR_SHARE, _NEAR_MS = 0.01, 0.5
# A worker that was given more than this, in units of the average, is left for one that is slower by as much
# as it was given more, and at most twice as slow. With pulls that spreads a hot prefix.
_GUARD_RATIO, _GUARD_SHARE = 1.2, 1.0
# A decode worker does no prefill that takes longer than so many of its steps, idle or not: decodes that
# arrive meanwhile would wait for it.
_MAX_ALONE_STEPS = 4

Pick = Callable[[Sequence[Candidate], Ask], Candidate]


def _random(candidates: Sequence[Candidate], ask: Ask) -> Candidate:
    return candidates[ask.rng.randrange(len(candidates))]


def _round_robin(candidates: Sequence[Candidate], ask: Ask) -> Candidate:
    return candidates[ask.turn % len(candidates)]


def _least_load(candidates: Sequence[Candidate], ask: Ask) -> Candidate:
    return min(candidates, key=lambda candidate: load_key(candidate.view))


def _session(candidates: Sequence[Candidate], ask: Ask) -> Candidate:
    """The same for all requests of a session, as long as it lives: the highest hash of both names wins, so a
    worker that comes or goes moves no other sessions. Requests without a session go by load.
    """
    if ask.session is None:
        return _least_load(candidates, ask)
    name = ask.session.encode()
    return max(candidates, key=lambda candidate: zlib.crc32(name + b"\0" + candidate.view.instance.encode()))


def _by_pick(name: str, pick: Pick, candidates: Sequence[Candidate], ask: Ask) -> Decision | None:
    """A policy that looks at no cache: one pick for each role."""
    prefills, decodes = _split(candidates)
    if not (prefills and decodes):
        fitting = _with_room(candidates, ask.num_tokens, ask.num_new_tokens)
        if not fitting:
            return None
        rows = price_prefills(fitting, ask, ask.prefill_found, pulls=False)
        chosen = rows[fitting.index(pick(fitting, ask))]
        return Decision(name, Placement(None, chosen.instance), chosen, None, rows, ())
    prefills = _with_room(prefills, ask.num_tokens, 0)
    if not prefills:
        return None
    rows = price_prefills(prefills, ask, ask.prefill_found, pulls=False)
    prefill = rows[prefills.index(pick(prefills, ask))]
    if ask.num_new_tokens <= 1:
        return Decision(name, Placement(prefill.instance, None), prefill, None, rows, ())
    decodes = _with_room(decodes, ask.num_tokens, ask.num_new_tokens)
    if not decodes:
        return None
    decode_rows = price_decodes(decodes, ask, ask.decode_found)
    decode = decode_rows[decodes.index(pick(decodes, ask))]
    return Decision(name, Placement(prefill.instance, decode.instance), prefill, decode, rows, decode_rows)


def prompt_tree(candidates: Sequence[Candidate], ask: Ask) -> Decision | None:
    """The least predicted completion: queue + exec, with what is cached or worth pulling (MemServe §Global
    scheduling). A decode worker does the prefill too where that costs it and its batch less.
    """
    name = "prompt-tree"
    prefills, decodes = _split(candidates)
    if not (prefills and decodes):
        fitting = _with_room(candidates, ask.num_tokens, ask.num_new_tokens)
        if not fitting:
            return None
        rows = price_prefills(fitting, ask, ask.prefill_found, pulls=True)
        steps = price_decodes(fitting, ask, ask.prefill_found)
        # no KV moves where it was computed
        costs = [row.total_ms + step.total_ms - step.move_ms for row, step in zip(rows, steps, strict=True)]
        chosen = rows[_cheapest(costs, fitting, ask.rng)]
        return Decision(name, Placement(None, chosen.instance), chosen, None, rows, steps)
    prefills = _with_room(prefills, ask.num_tokens, 0)
    if not prefills:
        return None
    rows = price_prefills(prefills, ask, ask.prefill_found, pulls=True)
    prefill = rows[_cheapest([row.total_ms for row in rows], prefills, ask.rng)]
    if ask.num_new_tokens <= 1:
        return Decision(name, Placement(prefill.instance, None), prefill, None, rows, ())
    decodes = _with_room(decodes, ask.num_tokens, ask.num_new_tokens)
    if not decodes:
        return None
    decode_rows = price_decodes(decodes, ask, ask.decode_found)
    at = _least([row.total_ms for row in decode_rows], ask.rng)
    decode, alone = decode_rows[at], _alone(decodes[at], decode_rows[at], prefill, ask)
    if alone is not None:
        return Decision(name, Placement(None, decode.instance), alone, decode, [*rows, alone], decode_rows)
    return Decision(name, Placement(prefill.instance, decode.instance), prefill, decode, rows, decode_rows)


def _alone(candidate: Candidate, decode: DecodeRow, prefill: PrefillRow, ask: Ask) -> PrefillRow | None:
    """The row of a decode worker that had better do the prefill as well: its batch's delay counts as its own
    time.
    """
    (row,) = price_prefills([candidate], ask, ask.decode_found, pulls=False)
    if row.exec_ms > _MAX_ALONE_STEPS * decode.step_ms:
        return None
    batch_ms = decode.num_decoding * max(0.0, row.exec_ms - decode.step_ms)
    return row if row.total_ms + batch_ms < prefill.total_ms + decode.move_ms else None


def _cheapest(costs: Sequence[float], candidates: Sequence[Candidate], rng: random.Random) -> int:
    """The index of the least cost; of those about as cheap, of the one that was given least lately."""
    best_ms = min(costs)
    recent = [candidate.view.recent_ms for candidate in candidates]
    mean, share = sum(recent) / len(recent), _NEAR_SHARE
    if recent[costs.index(best_ms)] > _GUARD_RATIO * mean:
        share = min(_GUARD_SHARE, recent[costs.index(best_ms)] / mean - 1.0)
    limit_ms = best_ms * (1.0 + share) + _NEAR_MS
    keys = [
        (given, cost, index)
        for index, (given, cost) in enumerate(zip(recent, costs, strict=True))
        if cost <= limit_ms
    ]
    given, cost, _ = min(keys)
    return rng.choice([index for other_given, other, index in keys if (other_given, other) == (given, cost)])


def _least(costs: Sequence[float], rng: random.Random) -> int:
    """The index of the least cost. For decodes: what a worker has of them is in the price itself, and what it
    was given lately are prompts.
    """
    best_ms = min(costs)
    return rng.choice([index for index, cost in enumerate(costs) if cost == best_ms])


def _split(candidates: Sequence[Candidate]) -> tuple[list[Candidate], list[Candidate]]:
    prefill, decode = Role.PREFILL, Role.DECODE  # once: the look-up takes longer than the comparison
    prefills = [candidate for candidate in candidates if candidate.view.role is prefill]
    return prefills, [candidate for candidate in candidates if candidate.view.role is decode]


def _with_room(candidates: Sequence[Candidate], num_tokens: int, num_new_tokens: int) -> list[Candidate]:
    block_size = candidates[0].view.block_size  # of all: their trees share it
    least = blocks_for(num_tokens + min(num_new_tokens, 1), block_size)
    wanted = blocks_for(num_tokens + num_new_tokens, block_size)
    return [candidate for candidate in candidates if candidate.view.has_blocks(least, wanted)]


POLICIES: dict[str, Policy] = {
    "random": partial(_by_pick, "random", _random),
    "round-robin": partial(_by_pick, "round-robin", _round_robin),
    "least-load": partial(_by_pick, "least-load", _least_load),
    "session": partial(_by_pick, "session", _session),
    "prompt-tree": prompt_tree,
}
