"""Servers that a benchmark starts and stops by their command lines; ours among them.

    start    on a free loopback port, in a session (process group) of its own, output into a file without a
             name, so that none is left behind however this process ends
    ready    /health answers 200; servers without one: /v1/models does
    stop     SIGTERM; after a while SIGKILL to the whole group. Also when the body raised or was cancelled.
             If this process is killed, the kernel sends the SIGTERM

`{port}` in a command line stands for the port; without it `--port N` is added, unless the command says a port
itself. The command `memserve` is the one that runs.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shlex
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import IO

import aiohttp

from memserve.errors import BenchError

_STOP_S = 30.0
_POLL_S = 0.1
_LOG_TAIL = 2000
# Has the kernel send a SIGTERM (15) when the parent dies (PR_SET_PDEATHSIG, 1), and becomes the server.
_LAUNCH = "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 15); os.execvp(sys.argv[1], sys.argv[1:])"
_PORT = re.compile(r"--port[ =](\d+)")


def is_url(text: str) -> bool:
    """Whether a server is given by its URL, and not by a command line."""
    return "://" in text or (" " not in text and ":" in text)


def place(command: str, port: int) -> tuple[list[str], int]:
    """The words of a command line and the port that it will listen on, which is `port` unless it says its
    own. Raises BenchError.
    """
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise BenchError(f"{command!r} is no command line: {error}") from None
    if not words:
        raise BenchError("an empty command line is no server")
    if words[0] == "memserve":  # this one, also where no such command is installed
        words[:1] = [sys.executable, "-m", "memserve"]
    if any("{port}" in word for word in words):
        return [word.replace("{port}", str(port)) for word in words], port
    if own := _PORT.search(command):
        return words, int(own[1])
    return [*words, "--port", str(port)], port


@contextlib.asynccontextmanager
async def started(
    command: str, *, cpus: Sequence[int] | None = None, timeout_s: float = 300.0
) -> AsyncIterator[str]:
    """The URL of a server that runs while the body does, on these cores (None: on all of this process).

    Raises BenchError, with the end of its log, if it does not start.
    """
    words, port = place(command, free_port())
    with tempfile.TemporaryFile() as log:
        process = await _spawn(words, log, cpus)
        try:
            url = f"http://127.0.0.1:{port}"
            await _wait_ready(url, process, words[0], log, timeout_s)
            yield url
        finally:
            await _stop(process)


async def _spawn(
    words: Sequence[str], log: IO[bytes], cpus: Sequence[int] | None
) -> asyncio.subprocess.Process:
    if shutil.which(words[0]) is None:
        raise BenchError(f"{words[0]} cannot be started: there is no such program")
    own = os.sched_getaffinity(0)
    if cpus is not None:
        os.sched_setaffinity(0, cpus)  # inherited by the child
    try:
        return await asyncio.create_subprocess_exec(
            *(sys.executable, "-I", "-S", "-c", _LAUNCH, *words),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=log,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,
        )
    finally:
        os.sched_setaffinity(0, own)


async def _wait_ready(
    url: str, process: asyncio.subprocess.Process, name: str, log: IO[bytes], timeout_s: float
) -> None:
    deadline = time.monotonic() + timeout_s
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=5)) as http:
        while process.returncode is None and time.monotonic() < deadline:
            with contextlib.suppress(aiohttp.ClientError, OSError, TimeoutError):
                if await _is_ready(http, url):
                    return
            await asyncio.sleep(_POLL_S)
    if process.returncode is None:
        what = f"is not ready after {timeout_s:g} s"
    else:
        what = f"ended with status {process.returncode} before it was ready"
    raise BenchError(f"{name} {what}; the end of its log:\n{_tail(log)}")


def _tail(log: IO[bytes]) -> str:
    """Its end. The servers write where the file is at, so that place must not be moved."""
    num_bytes = os.fstat(log.fileno()).st_size
    data = os.pread(log.fileno(), _LOG_TAIL, max(0, num_bytes - _LOG_TAIL))
    return data.decode(errors="replace")


async def _is_ready(http: aiohttp.ClientSession, url: str) -> bool:
    async with http.get(f"{url}/health") as answer:
        status = answer.status
    if status in (404, 405):
        async with http.get(f"{url}/v1/models") as answer:
            status = answer.status
    return status == 200


async def _stop(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(process.wait(), _STOP_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # its group outlives it if it left processes behind
    await process.wait()


def free_port() -> int:
    """A loopback port that nobody listens on."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


# --- cores -------------------------------------------------------------------------------------------------


def server_cores(count: int | None) -> list[int]:
    """The cores of servers that are started: the first so many, or all. Raises BenchError."""
    cores = sorted(os.sched_getaffinity(0))
    if count is not None and count > len(cores):
        raise BenchError(f"--cores {count}: there are {len(cores)}")
    return cores[:count]


@contextlib.contextmanager
def cores_shared(count: int | None) -> Iterator[None]:
    """Leave the servers' cores to them while the body runs, if there are others."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores - set(server_cores(count)) or cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)
