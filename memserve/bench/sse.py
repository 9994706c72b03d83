"""Server-sent events out of the pieces in which a body arrives. Pure; one parser a stream.

Only `data` fields matter here; comments and other fields are skipped. Lines may end in LF or CR LF, and may
be cut anywhere between two pieces.
"""

from __future__ import annotations

# No event of a token stream is near this; a line without an end must not fill the memory.
MAX_EVENT_BYTES = 16 << 20


class EventTooLong(ValueError):
    """More than MAX_EVENT_BYTES without the end of an event."""


class EventParser:
    """`feed` until the body ends, then `rest`."""

    def __init__(self) -> None:
        self._line = b""
        self._data: list[bytes] = []
        self._num_bytes = 0

    def feed(self, piece: bytes) -> list[bytes]:
        """The data of every event that this piece completes. Raises EventTooLong."""
        lines = (self._line + piece).split(b"\n") if self._line else piece.split(b"\n")
        self._line = lines.pop()
        events = []
        for line in lines:
            if line.endswith(b"\r"):
                line = line[:-1]
            if line.startswith(b"data:"):
                self._data.append(line[6:] if line.startswith(b"data: ") else line[5:])
                self._num_bytes += len(line)
            elif not line and self._data:
                events.append(self._data[0] if len(self._data) == 1 else b"\n".join(self._data))
                self._data, self._num_bytes = [], 0
        if self._num_bytes + len(self._line) > MAX_EVENT_BYTES:
            raise EventTooLong
        return events

    def rest(self) -> bytes | None:
        """The data of an event that the end of the body left without its blank line."""
        events = self.feed(b"\n\n")
        return events[0] if events else None
