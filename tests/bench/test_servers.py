"""Servers by their command lines: started, ready, stopped, whatever happens in between."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import aiohttp
import psutil
import pytest

from memserve.bench.servers import free_port, is_url, place, started
from memserve.errors import BenchError

REPOSITORY = Path(__file__).resolve().parents[2]
FAKE = f"{sys.executable} {REPOSITORY / 'benchmarks' / 'fake_server.py'}"


def children() -> set[int]:
    return {child.pid for child in psutil.Process().children(recursive=True)}


async def test_a_server_lives_as_long_as_the_body() -> None:
    before = children()
    cpu = min(os.sched_getaffinity(0))
    async with started(FAKE, cpus=[cpu]) as url, aiohttp.ClientSession() as http:
        async with http.get(f"{url}/v1/models") as answer:
            assert answer.status == 200
        (server,) = children() - before
        assert os.sched_getaffinity(server) == {cpu}
        assert os.getsid(server) == server  # a Ctrl-C for the benchmark is none for the server
    assert children() == before
    assert cpu in os.sched_getaffinity(0)


async def test_nothing_with_a_name_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    async with started(FAKE):
        assert list(tmp_path.iterdir()) == []  # or a kill would leave it


async def test_a_body_that_fails_or_is_cancelled_leaves_none() -> None:
    before = children()
    with pytest.raises(KeyError):
        async with started(FAKE):
            raise KeyError
    assert children() == before

    async def wait() -> None:
        async with started(FAKE):
            up.set()
            await asyncio.sleep(60)

    up = asyncio.Event()
    task = asyncio.create_task(wait())
    await up.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert children() == before


async def test_a_server_that_ignores_the_signal_and_its_child_are_killed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("memserve.bench.servers._STOP_S", 0.2)
    before = children()
    with pytest.raises(KeyError):
        async with started(f"/bin/sh -c 'trap \"\" TERM; {FAKE} --port {{port}} & wait; wait; sleep 60'"):
            assert len(children() - before) == 2
            raise KeyError
    deadline = time.monotonic() + 10
    while children() != before:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.05)


async def test_servers_that_do_not_start() -> None:
    before = children()
    for command, message in (
        ("/no/such/program", "/no/such/program cannot be started"),
        ("/bin/sh -c 'echo alas; exit 3'", r"status 3 before it was ready; the end of its log:\nalas"),
        ("/bin/sh -c 'sleep 60'", r"not ready after 0.3 s"),
    ):
        with pytest.raises(BenchError, match=message):
            async with started(command, timeout_s=0.3):
                raise AssertionError
    assert children() == before


def test_a_benchmark_that_is_killed_leaves_no_server() -> None:
    code = f"""
import asyncio
from memserve.bench.servers import started
async def main():
    async with started({FAKE!r}):
        print("up", flush=True)
        await asyncio.sleep(60)
asyncio.run(main())
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=REPOSITORY) as bench:
        assert bench.stdout is not None and bench.stdout.readline() == b"up\n"
        (server,) = psutil.Process(bench.pid).children()
        bench.kill()
    server.wait(20)


def test_ports() -> None:
    assert place("x --a 'b c'", 7) == (["x", "--a", "b c", "--port", "7"], 7)
    assert place("x --listen=:{port}", 7) == (["x", "--listen=:7"], 7)
    assert place("x --port 9 y", 7) == (["x", "--port", "9", "y"], 9)
    assert place("memserve serve", 7)[0] == [sys.executable, "-m", "memserve", "serve", "--port", "7"]
    for bad in ("", "x 'y"):
        with pytest.raises(BenchError, match="command line"):
            place(bad, 7)
    assert free_port() > 1024


def test_urls_and_commands() -> None:
    assert all(map(is_url, ("http://x", "https://x:1/v1", "127.0.0.1:8000")))
    assert not any(map(is_url, ("memserve serve", "vllm serve --host a:b", "server")))
