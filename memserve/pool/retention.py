"""What a pool keeps of finished sequences and how much that is: its options, and its state in numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from memserve.pool.allocator import BlockIds
from memserve.pool.arena import Arena
from memserve.pool.eviction import Rank, least_recently_used
from memserve.pool.pinned import Pins


class HostArena(NamedTuple):
    """Memory for a host tier, at its greatest size, of which `num_blocks` are used at first. `on_free` is
    told which of its blocks have become free. `pins`: how a GPU pins its memory.
    """

    arena: Arena
    num_blocks: int
    on_free: Callable[[BlockIds], None] | None = None
    pins: Pins | None = None


@dataclass(frozen=True, slots=True)
class Retention:
    """What a pool keeps of finished sequences, and how.

    `fingerprint`: of model and layout; what is cached under another one never matches. `rank`: order of
    eviction, lowest first. `host`: a second tier for what is evicted. `tells_removals`: note what is no
    longer cached for `take_removed`.
    """

    fingerprint: str = ""
    rank: Rank = least_recently_used
    host: HostArena | None = None
    tells_removals: bool = False


@dataclass(frozen=True, slots=True)
class PoolStats:
    """Blocks by state; those of the device add up to the arena. `historical`: cached, and in nobody's use
    now. The host tier has `num_host` blocks, of which `host_historical` are cached.
    """

    free: int
    active: int
    historical: int
    num_host: int = 0
    host_historical: int = 0
