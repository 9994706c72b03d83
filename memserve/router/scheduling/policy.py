"""What is known of one live worker, and how loaded it is: the ground on which policies (policies/) choose.

Nothing is reserved here: the dispatcher does, with what was chosen. Role is policy, not code: when no worker
of a role is alive, the others do its work.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from memserve.config import Role
from memserve.messages import Load
from memserve.model_config import blocks_for


@dataclass(slots=True)
class WorkerView:
    """What the dispatcher knows of one live worker. Counts of blocks are the pool's, of its device tier
    where nothing else is said; `reserved_*` are promises made.

    `outstanding_tokens`: prompt tokens dispatched there and not yet computed, as far as the router knows.
    Predictions, kept by whoever dispatches (load.py): `queue_ms`, until what waits there is computed;
    `recent_ms`, what it was given lately, in a unit of which only ratios count; `num_decoding` and
    `num_context`, its decodes and the tokens they attend to.
    """

    instance: str
    role: Role
    incarnation: int
    num_blocks: int
    block_size: int
    max_running: int
    kv_token_bytes: int = 1
    caches: bool = False
    max_host_blocks: int = 0
    reserved_blocks: int = 0
    num_placed: int = 0
    outstanding_tokens: int = 0
    queue_ms: float = 0.0
    recent_ms: float = 0.0
    num_decoding: int = 0
    num_context: int = 0
    load: Load = field(default_factory=Load)

    def has_room(self, num_tokens: int, num_new_tokens: int) -> bool:
        """Whether a request of `num_tokens`, expected to draw `num_new_tokens`, may be placed here now.

        An idle worker takes whatever its pool can hold with one token more; growth is then its problem.
        """
        least = blocks_for(num_tokens + min(num_new_tokens, 1), self.block_size)
        return self.has_blocks(least, blocks_for(num_tokens + num_new_tokens, self.block_size))

    def has_blocks(self, least: int, wanted: int) -> bool:
        """`has_room` in blocks: at `least` so many for an idle worker, and `wanted` beside others."""
        if self.num_placed == 0:
            return least <= self.num_blocks
        if least > self.num_blocks:
            return False
        return self.num_placed < self.max_running and self.reserved_blocks + wanted <= self.num_blocks


class Placement(NamedTuple):
    """The instances chosen. `prefill` None: `decode` does both (colocated); `decode` None: the first token
    ends it.
    """

    prefill: str | None
    decode: str | None


def choose_decode(views: Sequence[WorkerView], owner: str) -> str:
    """A worker to decode a request that `owner` has prefilled: the least loaded, room or not (it waits
    there).

    With no decode worker alive it is the owner, who has the KV already: two prefill workers that pulled from
    each other could wait for one another's blocks for ever.
    """
    candidates = [view for view in views if view.role is not Role.PREFILL]
    return min(candidates, key=load_key).instance if candidates else owner


def load_key(view: WorkerView) -> tuple[int, float, int, str]:
    """How loaded a worker is, lowest first."""
    return (
        view.outstanding_tokens,
        view.reserved_blocks / view.num_blocks,
        view.num_placed,
        view.instance,
    )
