"""The blocks of one sequence: shared ones first, then its own."""

from __future__ import annotations

import numpy as np

from memserve.pool.block_table import BlockTable


def test_a_table_grows_and_shares_from_the_front() -> None:
    # 1. own blocks pile up
    table = BlockTable()
    for block in range(100):
        table.append(np.array([block, block + 1000]))
    assert table.num_blocks == 200 and table.ids(3).tolist() == [0, 1000, 1]
    # 2. the first become shared, some under other ids
    table.share(np.array([0, 7]))
    assert table.num_shared == 2 and table.ids(3).tolist() == [0, 7, 1]
    table.share(np.array([1]))
    assert table.num_shared == 3 and table.num_blocks == 200


def test_a_table_over_cached_blocks() -> None:
    table = BlockTable(np.array([5, 3]))
    assert (table.num_shared, table.num_blocks) == (2, 2)
    table.append(np.array([9]))
    assert (table.num_shared, table.num_blocks) == (2, 3) and table.ids(3).tolist() == [5, 3, 9]
