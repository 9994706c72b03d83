"""Typed reading of a JSON object that somebody else wrote: every fault is a ModelError that names the key.

A null counts as absent, as mostly in Hugging Face's files (`is_null` tells them apart). A bool is no number.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

from memserve.errors import ModelError

# No dimension or count of a model comes near this; beyond it arithmetic on sizes loses its meaning.
_MAX_INT = 1 << 31


class JsonFields:
    """The fields of `values`; `name` says in errors where they are from."""

    def __init__(self, values: dict[str, object], name: str) -> None:
        self._values = values
        self._name = name

    @classmethod
    def read(cls, path: Path) -> JsonFields:
        """The object in a file. Raises ModelError if it cannot be read or is no JSON object."""
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise ModelError(f"{path} is missing") from error
        except (OSError, ValueError, RecursionError) as error:
            raise ModelError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
        if not isinstance(values, dict):
            raise ModelError(f"{path} is not a JSON object")
        return cls(values, path.name)

    def get(self, key: str) -> object:
        """The raw value, None if absent."""
        return self._values.get(key)

    def has(self, key: str) -> bool:
        """Whether the key is there and not null."""
        return self._values.get(key) is not None

    def is_null(self, key: str) -> bool:
        """Whether the key is there with the value null."""
        return key in self._values and self._values[key] is None

    def keys(self) -> tuple[str, ...]:
        """The keys whose value is not null."""
        return tuple(key for key, value in self._values.items() if value is not None)

    def fail(self, key: str, why: str) -> ModelError:
        """The error that says what is wrong with `key`, for the caller to raise."""
        return ModelError(f"{self._name}: {key} = {_shown(self.get(key))} {why}")

    def integer(self, key: str, default: int | None = None, *, minimum: int = 1) -> int:
        """An int of at least `minimum`; required where `default` is None."""
        value: object = self._present(key, default)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool):
            raise self.fail(key, "is not a whole number")
        if not minimum <= value < _MAX_INT:
            raise self.fail(key, f"is out of range (from {minimum} to {_MAX_INT - 1})")
        return value

    def number(
        self, key: str, default: float | None = None, *, low: float = 0.0, open_low: bool = True
    ) -> float:
        """A finite float above `low` (or equal, unless `open_low`); required where `default` is None."""
        value = self._present(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise self.fail(key, "is not a number")
        try:
            value = float(value)
        except OverflowError:
            value = math.inf
        if not math.isfinite(value) or value < low or (open_low and value == low):
            raise self.fail(key, f"is out of range (must be {'above' if open_low else 'at least'} {low:g})")
        return value

    def flag(self, key: str, default: bool) -> bool:
        """A bool."""
        value = self._present(key, default)
        if not isinstance(value, bool):
            raise self.fail(key, "is not true or false")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        """A string; required where `default` is None."""
        value = self._present(key, default)
        if not isinstance(value, str):
            raise self.fail(key, "is not a string")
        return value

    def strings(self, key: str) -> tuple[str, ...]:
        """A list of strings; empty if absent."""
        value = self.get(key)
        if value is None:
            return ()
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.fail(key, "is not a list of strings")
        return tuple(value)

    def integers(self, key: str) -> tuple[int, ...]:
        """A list of ints, or one int; empty if absent."""
        value = self.get(key)
        items = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(item, int) and not isinstance(item, bool) for item in items):
            raise self.fail(key, "is not a whole number or a list of them")
        return tuple(items)

    def nested(self, key: str) -> JsonFields | None:
        """A nested object; None if absent."""
        value = self.get(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.fail(key, "is not an object")
        return JsonFields(value, f"{self._name}: {key}")

    def _present(self, key: str, default: object) -> object:
        value = self._values.get(key)
        value = default if value is None else value
        if value is None:
            raise ModelError(f"{self._name} lacks {key}")
        return value


def _shown(value: object) -> str:
    shown = json.dumps(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."
