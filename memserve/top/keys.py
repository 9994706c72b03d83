"""The keyboard while a screen is shown: keys leave no trace on it, and q ends it like Ctrl-C."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import termios
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def listening(quit_: Callable[[], None]) -> Iterator[None]:
    """Call `quit_` on q while the body runs. Without a keyboard nothing happens."""
    try:
        fd = sys.stdin.fileno()
        before = termios.tcgetattr(fd)
    except (AttributeError, ValueError, OSError, termios.error):  # closed, or no terminal
        yield
        return
    loop = asyncio.get_running_loop()

    def read() -> None:
        keys = os.read(fd, 1024)
        if not keys:  # the terminal is gone
            loop.remove_reader(fd)
        if not keys or b"q" in keys.lower():
            quit_()

    quiet = termios.tcgetattr(fd)
    quiet[3] &= ~(termios.ECHO | termios.ICANON)  # signals stay: Ctrl-C, Ctrl-Z
    termios.tcsetattr(fd, termios.TCSADRAIN, quiet)
    loop.add_reader(fd, read)
    try:
        yield
    finally:
        loop.remove_reader(fd)
        with contextlib.suppress(termios.error):
            termios.tcsetattr(fd, termios.TCSAFLUSH, before)
