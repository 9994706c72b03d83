"""Values of options that have a syntax of their own: numbers in bounds, ramps, think times, limits, JSON;
and files to be written.

A value that is none is a usage error with one line. Nothing heavy is imported before one is parsed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from memserve.bench.arrivals import Ramp, ThinkTime


class Parsed(click.ParamType):  # type: ignore[type-arg,unused-ignore]
    """A value with a syntax of its own; `parse` raises ValueError with a line for the user."""

    def __init__(self, name: str, parse: Callable[[str], object]) -> None:
        self.name = name
        self._parse = parse

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """See `click.ParamType`."""
        if not isinstance(value, str):
            return value
        try:
            return self._parse(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


def _positive(text: str) -> float:
    value = _number(text)
    if not value > 0:
        raise ValueError(f"{text!r} is not greater than 0")
    return value


def _finite(text: str) -> float:
    value = _positive(text)
    if math.isinf(value):
        raise ValueError(f"{text!r} is not finite")
    return value


def _not_negative(text: str) -> float:
    value = _number(text)
    if not 0 <= value < math.inf:
        raise ValueError(f"{text!r} is negative or not finite")
    return value


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise ValueError(f"{text!r} is not a number") from None
    if math.isnan(value):
        raise ValueError(f"{text!r} is not a number")
    return value


def _ramp(text: str) -> Ramp:
    from memserve.bench.arrivals import Ramp

    start, has_both, end = text.partition(":")
    if not has_both:
        raise ValueError("two rates are wanted, as 1:5")
    first, last = _number(start), _finite(end)
    if not 0 <= first < math.inf:
        raise ValueError(f"{start!r} is no rate")
    return Ramp(first, last)


def _think(text: str) -> ThinkTime:
    from memserve.bench.arrivals import ThinkTime

    mean_s = _number(text.removeprefix("exp:"))
    if not 0 <= mean_s < math.inf:
        raise ValueError(f"{text!r} is no time")
    return ThinkTime(mean_s, text.startswith("exp:"))


def _goodput(text: str) -> dict[str, float]:
    from memserve.bench.metrics import parse_goodput

    return parse_goodput(text)


def _fields(text: str) -> dict[str, object]:
    try:
        fields = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{text!r} is not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise ValueError(f"{text!r} is no JSON object")
    return fields


def _output(text: str) -> Path:
    path = Path(text)
    if not path.parent.is_dir():  # found out before the work, not after it
        raise ValueError(f"there is no folder {path.parent}")
    if path.is_dir():
        raise ValueError(f"{path} is a folder")
    return path


def _picture(text: str) -> Path:
    path = _output(text)
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise ValueError(f"{path} is no .png, .svg or .pdf")
    return path


POSITIVE = Parsed("number", _positive)
NOT_NEGATIVE = Parsed("number", _not_negative)
SECONDS = Parsed("seconds", _finite)
COUNT = click.IntRange(min=1)
RAMP = Parsed("A:B", _ramp)
THINK_TIME = Parsed("seconds", _think)
LIMITS = Parsed("limits", _goodput)
JSON_OBJECT = Parsed("JSON", _fields)
OUTPUT = Parsed("file", _output)
PICTURE = Parsed("picture", _picture)
