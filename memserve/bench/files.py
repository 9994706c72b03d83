"""Reads a workload's file line by line, plain or gzip, and turns whatever is wrong with it into a
WorkloadError that names file and line. Knows no format.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import msgspec

from memserve.errors import WorkloadError

Row = TypeVar("Row")

GZIP_MAGIC = b"\x1f\x8b"


def at_line(path: Path, line: int, what: object) -> WorkloadError:
    """The error for line `line`, counted from 1."""
    return WorkloadError(f"{path}:{line}: {what}")


def read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines that are not blank, with their numbers, counted from 1. Raises WorkloadError."""
    number = 0
    try:
        with path.open("rb") as raw:
            zipped = raw.read(2) == GZIP_MAGIC or path.suffix == ".gz"
            raw.seek(0)
            with gzip.GzipFile(fileobj=raw) if zipped else raw as lines:
                for number, line in enumerate(lines, 1):
                    stripped = line.strip()
                    if stripped:
                        yield number, stripped
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise at_line(path, number + 1, f"the gzip data is broken: {error}") from None
    except OSError as error:
        raise WorkloadError(f"{path}: cannot be read: {error.strerror or error}") from None


def read_json_rows(path: Path, row_type: type[Row]) -> Iterator[tuple[int, Row]]:
    """One msgspec struct a line, with the line's number. Raises WorkloadError, also for a file of no rows."""
    decoder = msgspec.json.Decoder(row_type)
    number = 0
    for number, line in read_lines(path):
        try:
            yield number, decoder.decode(line)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise at_line(path, number, error) from None
    if not number:
        raise WorkloadError(f"{path}: there is nothing in it")
