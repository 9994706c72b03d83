"""Sizes that come again: how many rows, or keys, a kernel is given for so many that are wanted.

On a CPU oneDNN compiles a kernel for every shape it has not seen, half a millisecond to two for each matrix
product, and keeps a thousand of them. A step after a prompt of a length not met before would pay 5 to 20 ms
for that, and a server would meet new lengths for as long as it runs. So sizes are rounded up to a few that
come again and again, an eighth of a power of two apart: some 5 % more work, an eighth at most where that
matters. What is added is filler that nobody looks at. A leaf without torch: the cost model counts the
same rows.
"""

from __future__ import annotations

from collections.abc import Iterator

# A step's rows lie at most so far apart: where compiling is small beside computing.
_MAX_ROW_STEP = 32
_MIN_KEY_STEP = 64


def row_sizes(most: int) -> Iterator[int]:
    """All sizes that `padded_rows` yields of up to `most` rows, ascending."""
    num_rows = 1
    while num_rows <= most:
        yield num_rows
        num_rows = padded_rows(num_rows + 1)


def padded_rows(num_rows: int) -> int:
    """Rows to compute for `num_rows` tokens of a step, or queries of a part; exact up to 16."""
    step = _row_step(num_rows)
    return -(-num_rows // step) * step


def whole_rows(num_rows: int) -> int:
    """The largest number of rows, at most `num_rows`, that needs no filler."""
    step = _row_step(num_rows)
    return num_rows // step * step


def padded_keys(num_keys: int) -> int:
    """Keys to read for `num_keys` that a query may see."""
    step = max(_MIN_KEY_STEP, _floor_power(num_keys) // 8)
    return -(-num_keys // step) * step


def _row_step(num_rows: int) -> int:
    return min(_MAX_ROW_STEP, max(1, _floor_power(num_rows) // 8))


def _floor_power(number: int) -> int:
    """The largest power of two that is at most `number`; 0 of 0."""
    return 1 << number.bit_length() >> 1
