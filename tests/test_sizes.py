"""Amounts of memory, read and written."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memserve.sizes import format_bytes, parse_memory


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2GiB", 2 << 30),
        ("1.5 gib", 3 << 29),
        ("512 MB", 512_000_000),
        ("10kib", 10 << 10),
        ("1TB", 10**12),
        ("4096B", 4096),
        ("0.5", 0.5),
        (".25", 0.25),
        ("1", 1.0),
    ],
)
def test_parse(text: str, expected: float) -> None:
    parsed = parse_memory(text)
    assert parsed == expected
    assert type(parsed) is type(expected)


@pytest.mark.parametrize(
    "text", ["", "0", "0B", "2", "1.01", "-1GiB", "2G", "GiB", "nan", "inf", "1e3", "2GiBB"]
)
def test_refused(text: str) -> None:
    with pytest.raises(ValueError, match="neither a size"):
        parse_memory(text)


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (3 << 29, "1.50 GiB"),
        (12345 << 20, "12.1 GiB"),
        (1 << 50, "1024 TiB"),
    ],
)
def test_format(num_bytes: int, text: str) -> None:
    assert format_bytes(num_bytes) == text


@given(st.integers(1 << 10, 1 << 45))
def test_what_is_written_is_never_too_small(num_bytes: int) -> None:
    read = parse_memory(format_bytes(num_bytes))
    assert num_bytes - 1 <= read <= num_bytes * 1.02
