"""Numbers and others' texts in the few columns that there are."""

from __future__ import annotations

from memserve.sizes import format_bytes

NONE = "–"
_MAX_TEXT = 200


def clean(text: str) -> str:
    """What a server or its clients chose, without anything that a terminal might obey."""
    return "".join(char if char.isprintable() else "?" for char in text[:_MAX_TEXT])


def amount(number: float | None) -> str:
    """At most six columns: 7, 1,234, 12.3k, 4.5M."""
    if number is None:
        return NONE
    if number >= 9.995e14:
        return ">999T"
    if 0 < number < 10 and number != int(number):
        return f"{number:.1f}"
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= (9_999.5 if unit == "k" else size * 0.9995):
            return f"{number / size:.0f}{unit}" if number >= 99.95 * size else f"{number / size:.1f}{unit}"
    return f"{number:,.0f}"


def percent(part: float | None, whole: float | None) -> str:
    """A share; none of nothing."""
    return NONE if part is None or not whole else f"{100 * part / whole:.1f} %"


def duration(ms: float | None) -> str:
    """At most six columns, with the unit: 1.2ms, 123ms, 4.56s, 12m, 3h, 4d."""
    if ms is None:
        return NONE
    if ms < 999.5:
        return f"{ms:.1f}ms" if ms < 99.95 else f"{ms:.0f}ms"
    seconds = ms / 1e3
    if seconds < 99.5:
        return f"{seconds:.2f}s" if seconds < 9.995 else f"{seconds:.1f}s"
    return age(seconds)


def age(seconds: float) -> str:
    """At most five columns."""
    for unit, size, last in (("s", 1, 100), ("m", 60, 100), ("h", 3600, 48)):
        if seconds < last * size:
            return f"{seconds / size:.0f}{unit}"
    return f"{seconds / 86400:.0f}d"


def size(num_bytes: float | None) -> str:
    """Bytes, with a unit."""
    return NONE if num_bytes is None else format_bytes(round(num_bytes))
