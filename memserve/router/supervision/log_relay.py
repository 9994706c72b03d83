"""The workers' stderr on the router's console, while that draws on a terminal.

Lines that a worker writes straight to the terminal would tear what is drawn there. So workers are given the
write end of a pipe, and what comes out of it is printed above the drawing, line by line. Where nothing is
drawn, workers keep the router's own stderr and no relay is made.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable

# Longer lines are broken, so that nothing is kept without bound.
MAX_LINE_BYTES = 1 << 16


class LogRelay:
    """Prints what is written to `write_fd` by `print_line`. Made inside the loop; `close` prints the rest."""

    def __init__(self, print_line: Callable[[str], None]) -> None:
        self._print_line = print_line
        self._read_fd, self.write_fd = os.pipe()
        self._pending = b""
        os.set_blocking(self._read_fd, False)
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._read_fd, self._read)

    def close(self) -> None:
        """After the last writer's end; the descriptors are closed."""
        self._loop.remove_reader(self._read_fd)
        os.close(self.write_fd)
        while self._read():
            pass
        if self._pending:
            self._print(self._pending)
        os.close(self._read_fd)

    def _read(self) -> bool:
        """Print the whole lines that have come; whether there may be more."""
        data = b""
        with contextlib.suppress(BlockingIOError):
            data = os.read(self._read_fd, MAX_LINE_BYTES)
        *lines, self._pending = (self._pending + data).split(b"\n")
        if len(self._pending) >= MAX_LINE_BYTES:
            lines.append(self._pending)
            self._pending = b""
        for line in lines:
            self._print(line)
        return bool(data)

    def _print(self, line: bytes) -> None:
        self._print_line(line.decode(errors="replace"))
