"""The command and its loops: a server that comes, goes and hangs; a terminal that is given back."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import io
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from aiohttp import web
from click.testing import CliRunner
from rich.console import Console

from memserve.cli import cli
from memserve.top.client import TopClient
from memserve.top.screen import watch
from tests.e2e.server_process import free_port
from tests.top.test_client import recorded, serving

REPOSITORY = Path(__file__).resolve().parents[2]
ENTERED, LEFT = b"\x1b[?1049h", b"\x1b[?1049l"


async def until(true: Callable[[], bool], timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)


async def test_a_server_that_comes_goes_and_hangs() -> None:
    out = io.StringIO()
    console = Console(file=out, width=100, height=30, force_terminal=True)
    port = free_port()
    hangs = False

    async def handler(request: web.Request) -> web.StreamResponse:
        if hangs:
            await asyncio.sleep(60)
        return await recorded(request)

    def shows(pattern: str) -> bool:
        plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", out.getvalue())
        if re.search(pattern, plain) is None:
            return False
        out.seek(0)
        out.truncate()
        return True

    async with TopClient(f"127.0.0.1:{port}", time.monotonic, timeout_s=0.5) as client:
        task = asyncio.create_task(watch(client, 0.05, console, time.monotonic))
        await until(lambda: shows("waiting for the server"))
        await until(lambda: shows("Connection refused"))
        for _ in range(2):
            async with serving(handler, port):
                await until(lambda: shows("prefill-0 +P "))
                hangs = True
                await until(lambda: shows("no answer in time"))
                hangs = False
                await until(lambda: shows(r"every 0.05 s *\nworker "))
            await until(lambda: shows("Connection refused"))
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
    assert out.getvalue().endswith("\x1b[?25h\x1b[?1049l")  # the cursor is back, and what was there before


async def test_a_bug_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken(self: TopClient) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(TopClient, "ask", broken)
    console = Console(file=io.StringIO(), force_terminal=True)
    async with TopClient("x", time.monotonic) as client:
        with pytest.raises(ZeroDivisionError):
            await asyncio.wait_for(watch(client, 1.0, console, time.monotonic), 10)


# --- the command -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "status", "told"),
    [
        (["--once", "--url", "ftp://x"], 2, "no URL"),
        (["--interval", "0"], 2, "--interval"),
        (["--interval", "nan"], 2, "--interval"),
        ([], 2, "use --once"),
        (["--once", "--url", "http://[::1"], 2, "no URL"),
        (["--once", "--url", "host:99999999"], 2, "no URL"),
        (["--once", "--url", "http://127.0.0.1:1"], 1, "/v1/workers: Connection refused"),
    ],
)
def test_what_cannot_be_done_is_said(args: list[str], status: int, told: str) -> None:
    result = CliRunner().invoke(cli, ["top", *args])
    assert (result.exit_code, told in result.output) == (status, True), result.output
    assert "waiting" not in result.output


class Terminal:
    """`memserve top` on a terminal of its own."""

    def __init__(self, columns: int, rows: int, *args: str) -> None:
        self.output = b""
        self._fd, end = pty.openpty()
        fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        self.before = termios.tcgetattr(end)
        environment = {**os.environ, "TERM": "xterm"}
        for name in ("COLUMNS", "LINES", "NO_COLOR"):
            environment.pop(name, None)
        command = [sys.executable, "-m", "memserve", "top", *args]

        def own_terminal() -> None:
            os.setsid()
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)

        self.process = subprocess.Popen(
            command,
            stdin=end,
            stdout=end,
            stderr=end,
            cwd=REPOSITORY,
            env=environment,
            preexec_fn=own_terminal,
        )
        self._end = end

    def wait_for(self, text: bytes, timeout_s: float = 20.0) -> None:
        deadline = time.monotonic() + timeout_s
        while text not in self.output:
            assert time.monotonic() < deadline, self.output
            self._read()

    def _read(self) -> None:
        if select.select([self._fd], [], [], 0.1)[0]:
            self.output += os.read(self._fd, 65_536)

    def type(self, keys: bytes) -> None:
        os.write(self._fd, keys)

    def wait(self, timeout_s: float = 20.0) -> int:
        """The exit status; the terminal is as it was."""
        deadline = time.monotonic() + timeout_s
        while self.process.poll() is None:
            assert time.monotonic() < deadline, self.output
            self._read()
        while select.select([self._fd], [], [], 0)[0]:
            self._read()
        assert termios.tcgetattr(self._end) == self.before
        assert self.output.count(ENTERED) == self.output.count(LEFT) == 1
        assert b"Traceback" not in self.output
        return self.process.returncode

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self._fd)
        os.close(self._end)


@pytest.fixture
def terminal() -> Iterator[Callable[..., Terminal]]:
    made: list[Terminal] = []

    def make(*args: object) -> Terminal:
        made.append(Terminal(*args))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.mark.parametrize(
    ("size", "end", "status"),
    [
        ((0, 0), b"\x03", 0),  # Ctrl-C; a terminal that does not know its size
        ((80, 24), b"q", 0),
        ((1, 1), signal.SIGTERM, 143),
    ],
)
def test_the_terminal_is_given_back(
    terminal: Callable[..., Terminal], size: tuple[int, int], end: bytes | int, status: int
) -> None:
    top = terminal(*size, "--url", "127.0.0.1:1")
    top.wait_for(ENTERED)
    top.wait_for(b"Connection refused" if size != (1, 1) else b"\x1b[?25l")
    if isinstance(end, bytes):
        top.type(b"typed\r" + end)
    else:
        top.process.send_signal(end)
    assert top.wait() == status
    assert b"typed" not in top.output
