"""Amounts of memory as people write and read them. A leaf."""

from __future__ import annotations

import math
import re

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY_UNITS = {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]i?)?b", re.IGNORECASE)
_FRACTION = re.compile(r"\d*\.?\d+")


def parse_memory(text: str) -> int | float:
    """Bytes as an int ("2GiB", "512 MB", "1000B"), or a fraction of what is free as a float ("0.5", "1").

    GiB is 2**30 bytes, GB is 10**9. Raises ValueError, in words for the user, on anything else.
    """
    text = text.strip()
    if (size := _SIZE.fullmatch(text)) is not None:
        num_bytes = int(float(size[1]) * (_UNITS | _BINARY_UNITS)[(size[2] or "").lower()])
        if num_bytes > 0:
            return num_bytes
    elif _FRACTION.fullmatch(text) is not None and 0.0 < (fraction := float(text)) <= 1.0:
        return fraction
    raise ValueError(f"{text!r} is neither a size, such as 2GiB, nor a fraction of what is free, such as 0.5")


def format_bytes(num_bytes: int) -> str:
    """Three digits and a unit, never too small: what is missing, rounded up, is enough ("1.23 GiB")."""
    for unit, size in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if num_bytes >= size:
            return f"{_round_up(num_bytes / size)} {unit}"
    return f"{num_bytes} B"


def _round_up(number: float) -> str:
    decimals = max(0, 2 - math.floor(math.log10(number)))
    return f"{math.ceil(number * 10**decimals) / 10**decimals:.{decimals}f}"
