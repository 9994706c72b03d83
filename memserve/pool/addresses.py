"""Addresses of one pool's blocks: (instance, incarnation, tier, block, generation), DESIGN "The block"."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray

from memserve.messages import BlockRefs, Tier


@dataclass(frozen=True, slots=True)
class Addresses:
    """Of the pool of `instance` in its life `incarnation`; `generations` are the tables of its tiers."""

    instance: str
    incarnation: int
    generations: dict[Tier, NDArray[np.uint64]] = field(default_factory=dict)

    def of(self, ids: ArrayLike, tier: Tier) -> BlockRefs:
        """Where blocks can be pulled from; good until they are freed."""
        blocks = np.asarray(ids, dtype=np.int64)
        return BlockRefs(
            instance=self.instance,
            incarnation=self.incarnation,
            tier=tier,
            blocks=tuple(blocks.tolist()),
            generations=tuple(self.generations[tier][blocks].tolist()),
        )
