"""What a policy is asked, what it sees, and what it answers: a placement, and the whole table that it chose
from, so that a user can see why.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from memserve.router.scheduling.holder_tree import Found
from memserve.router.scheduling.holders import Holding
from memserve.router.scheduling.policy import Placement, WorkerView
from memserve.router.scheduling.predictor import Correction, Predictor


@dataclass(slots=True)
class Candidate:
    """A live worker and what is known of its speed."""

    view: WorkerView
    predictor: Predictor
    correction: Correction = field(default_factory=Correction)


class Source(NamedTuple):
    """A life of an instance that holds the first `num_tokens` of the request at known addresses
    (`PromptTree.addresses` has them), the last `num_host_tokens` of them in its host tier.
    """

    instance: str
    incarnation: int
    num_tokens: int
    is_lost: bool = False
    num_host_tokens: int = 0


NOBODY: dict[str, Holding] = {}


@dataclass(slots=True)
class Ask:
    """One request to place.

    `num_tokens` are to prefill, `num_new_tokens` expected to be drawn. `turn` counts the requests placed
    before. `prefill_found`, `decode_found`: the matches in the trees of those roles (for colocated workers
    both in theirs); `source` is the best to pull from, of any role (`source_of`).
    """

    num_tokens: int
    num_new_tokens: int
    rng: random.Random
    turn: int = 0
    session: str | None = None
    prefill_found: Found | None = None
    decode_found: Found | None = None
    source: Source | None = None


class PrefillRow(NamedTuple):
    """One worker to prefill on. `total_ms`: predicted time to the first token; the pull overlaps the queue.

    The prompt's tokens come from the worker's device tier, its host tier, another instance (`source`), and
    the rest is computed.
    """

    instance: str
    total_ms: float
    queue_ms: float
    exec_ms: float
    pull_ms: float
    swap_in_ms: float
    num_device_tokens: int
    num_host_tokens: int
    num_pulled_tokens: int
    source: Source | None

    @property
    def num_cached_tokens(self) -> int:
        """Tokens that are not computed."""
        return self.num_device_tokens + self.num_host_tokens + self.num_pulled_tokens


class DecodeRow(NamedTuple):
    """One worker to decode on. `num_moved_tokens` of KV are to go there, `step_ms` is what a step takes with
    this request in it, `total_ms` weighs all.
    """

    instance: str
    total_ms: float
    move_ms: float
    step_ms: float
    num_moved_tokens: int
    num_decoding: int
    num_free_blocks: int


@dataclass(frozen=True, slots=True)
class Decision:
    """Where a request goes, and why. `prefill` and `decode` are the rows that were chosen; where one worker
    does both, `prefill` is its prefill row. `prefills`, `decodes`: every worker with room.
    """

    policy: str
    placement: Placement
    prefill: PrefillRow
    decode: DecodeRow | None
    prefills: Sequence[PrefillRow]
    decodes: Sequence[DecodeRow]

    @property
    def predicted_ttft_ms(self) -> float:
        """Predicted time to the first token."""
        return self.prefill.total_ms


Policy = Callable[[Sequence[Candidate], Ask], Decision | None]
"""A decision, or None when nothing has room and the request must wait."""
