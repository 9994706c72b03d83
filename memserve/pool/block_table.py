"""The blocks of one sequence, in order: first those shared through the index, then its own.

    [ shared: historical, kept by `lock` | own: active, nobody else knows them ]
    0                           num_shared                            num_blocks

Plain state. `MemPool.acquire` makes a table from what is cached, `publish` moves blocks from own to shared,
`release` gives everything back; whoever holds the table appends own blocks.
"""

from __future__ import annotations

import numpy as np

from memserve.pool.allocator import BlockIds
from memserve.pool.index import Lock


class BlockTable:
    """See the module. `lock` is None where nothing is shared, nor will be: the pool keeps no history.

    `num_swapped_in`: how many of the blocks first shared were in the host tier before.
    """

    __slots__ = ("_ids", "lock", "num_blocks", "num_shared", "num_swapped_in")

    def __init__(self, shared: BlockIds | None = None, lock: Lock | None = None) -> None:
        self._ids = np.empty(0, np.int64) if shared is None else shared
        self.num_blocks = self.num_shared = len(self._ids)
        self.num_swapped_in = 0
        self.lock = lock

    def ids(self, num_blocks: int) -> BlockIds:
        """The first `num_blocks` block ids: a view, good until the table changes."""
        assert num_blocks <= self.num_blocks
        return self._ids[:num_blocks]

    def append(self, block_ids: BlockIds) -> None:
        """Blocks that now belong to this sequence."""
        count = self.num_blocks + len(block_ids)
        if count > len(self._ids):
            grown = np.empty(max(8, count + count // 2), np.int64)
            grown[: self.num_blocks] = self._ids[: self.num_blocks]
            self._ids = grown
        self._ids[self.num_blocks : count] = block_ids
        self.num_blocks = count

    def share(self, block_ids: BlockIds) -> None:
        """The next own blocks are now the index's, under these ids, which may be others of equal content."""
        stop = self.num_shared + len(block_ids)
        assert stop <= self.num_blocks
        self._ids[self.num_shared : stop] = block_ids
        self.num_shared = stop
