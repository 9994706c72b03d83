"""The small JSON files beside a tokenizer.json, read into checked structs. Whatever is wrong in one is a
ModelError.
"""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import msgspec

from memserve.errors import ModelError

SPECIAL_TOKEN_NAMES = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)

T = TypeVar("T")


class AddedToken(msgspec.Struct, frozen=True):
    """A token beside the vocabulary proper."""

    content: str
    special: bool = False


def read_json(file: Path, kind: type[T]) -> T | None:
    """`file` as `kind`, None if there is no such file. Raises ModelError if it is something else."""
    try:
        return msgspec.json.decode(file.read_bytes(), type=kind)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ModelError(f"{file} cannot be read: {error.strerror}") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ModelError(f"{file} is broken: {one_line(error)}") from None


def special_tokens(folder: Path) -> dict[str, str]:
    """The special tokens with a name: {"bos_token": "<s>", …}; tokenizer_config.json over
    special_tokens_map.json.
    """
    return _named_tokens(folder / "special_tokens_map.json") | _named_tokens(folder / "tokenizer_config.json")


def one_line(error: Exception) -> str:
    """The error's text, whatever line breaks it has, for messages of one line."""
    return " ".join(str(error).split())


def _named_tokens(file: Path) -> dict[str, str]:
    """Each named token is a string or an object with `content`; null is none."""
    values = read_json(file, dict[str, msgspec.Raw]) or {}
    named = {}
    for name in SPECIAL_TOKEN_NAMES:
        if name not in values:
            continue
        try:
            token = msgspec.json.decode(values[name], type=str | AddedToken | None)
        except msgspec.ValidationError as error:
            raise ModelError(f"{file}: {name}: {one_line(error)}") from None
        if token is not None:
            named[name] = token if isinstance(token, str) else token.content
    return named
