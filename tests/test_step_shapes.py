"""Sizes that come again: enough, not much more, and few."""

from __future__ import annotations

from memserve.step_shapes import padded_keys, padded_rows, row_sizes, whole_rows


def test_a_size_is_enough_and_little_more() -> None:
    for size in range(1, 5000):
        rows, keys = padded_rows(size), padded_keys(size)
        assert size <= rows < size * 9 / 8 and (size > 16 or rows == size)
        assert size <= keys < max(size * 9 / 8, size + 64)
        assert padded_rows(rows) == rows and padded_keys(keys) == keys
        assert whole_rows(size) <= size and padded_rows(whole_rows(size)) == whole_rows(size)
        assert whole_rows(rows) == rows


def test_there_are_few_sizes() -> None:
    sizes = list(row_sizes(2048))
    assert sizes == sorted({padded_rows(size) for size in range(1, 2049)})
    assert len(sizes) < 110
    assert len({padded_keys(size) for size in range(1, 131_073)}) < 80


def test_nothing_is_nothing() -> None:
    assert (padded_rows(0), whole_rows(0), padded_keys(0), list(row_sizes(0))) == (0, 0, 0, [])
