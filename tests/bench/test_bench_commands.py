"""The command line of `memserve bench`, against a server in a thread of its own."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import get_args

import pytest
from click.testing import CliRunner, Result

from benchmarks.fake_server import FakeServer, Mode, serving
from memserve.bench import options
from memserve.bench.commands import without_secrets
from memserve.bench.request_format import Endpoint
from memserve.bench.workload_spec import Source
from memserve.cli import cli

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def server() -> Iterator[FakeServer]:
    """A fake server whose loop is not the test's."""
    ready: Future[FakeServer] = Future()
    loop = asyncio.new_event_loop()
    done = asyncio.Event()

    async def serve() -> None:
        async with serving(FakeServer(ttft_s=0.005, itl_s=0.001)) as server:
            ready.set_result(server)
            await done.wait()

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()))
    thread.start()
    yield ready.result(20)
    loop.call_soon_threadsafe(done.set)
    thread.join(20)
    loop.close()


@pytest.fixture
def sessions(tmp_path: Path) -> Path:
    """Three conversations, of 2, 1 and 1 turns."""
    file = tmp_path / "talk.jsonl"
    rows = [
        {"id": "a", "turns": [{"in": "one ", "out": "two "}, {"in": "three ", "out": "four "}]},
        {"id": "b", "turns": [{"in": "five ", "out": "six "}]},
        {"id": "c", "turns": [{"in": "seven ", "out": "eight "}]},
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def invoke(*args: object) -> Result:
    return CliRunner().invoke(cli, ["bench", *map(str, args)], prog_name="memserve")


def test_serve(server: FakeServer, sessions: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    args = ("serve", "sessions", sessions, "--url", server.url, "--json", out, "--api-key", "secret")
    result = invoke(*args, "--goodput", "ttft:60000", "--max-output-tokens", 5, "--concurrency", 2)
    assert result.exit_code == 0, result.output
    assert "4 of 4" in result.output and "TTFT" in result.output
    file = json.loads(out.read_text())
    assert file["report"]["summary"]["num_completed"] == 4
    assert len(file["report"]["requests"]) == 4
    assert "secret" not in out.read_text() and "secret" not in result.output
    assert file["command"][:5] == ["memserve", "bench", "serve", "sessions", str(sessions)]
    assert sorted(str(seen.prompt) for seen in server.seen[1:]) == [
        "five ",
        "one ",
        "one two three ",
        "seven ",
    ]


def test_failed_requests_are_status_1(server: FakeServer, sessions: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    server.mode = lambda number: Mode.STATUS_500 if number == 2 else Mode.WELL
    result = invoke("serve", "sessions", sessions, "--url", server.url, "--json", out)
    assert result.exit_code == 1
    assert "3 of 4" in result.output and "http: 1 (500: out of order)" in result.output
    assert json.loads(out.read_text())["report"]["summary"]["errors"] == {"http": 1}


def test_nothing_to_measure_is_one_line(sessions: Path, tmp_path: Path) -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        result = invoke("serve", "sessions", sessions, "--url", f"127.0.0.1:{sock.getsockname()[1]}")
    assert result.exit_code == 1
    assert result.stderr.startswith("memserve bench: no answer from http://127.0.0.1:")
    for args, message in (
        (("sessions", tmp_path / "none.jsonl"), "none.jsonl"),
        (("sessions",), "needs a file"),
        (("random", sessions), "reads no file"),
        (("random", "--rate", 1, "--ramp", "1:2"), "exclude each other"),
        (("random", "--url", "ftp://x"), "is no URL"),
    ):
        result = invoke("serve", *args)
        assert result.exit_code == 1, args
        assert message in result.stderr and result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "line",
    [
        "nothing",
        "random --rate 0",
        "random --rate nan",
        "random --rate x",
        "random --ramp 1",
        "random --ramp 1:0",
        "random --ramp=-1:2",
        "random --burstiness 0",
        "random --concurrency 0",
        "random --think-time exp:x",
        "random --think-time=-1",
        "random --think-time inf",
        "random --duration inf",
        "random --goodput speed:1",
        "random --answers dead",
        "random --extra-body 7",
        "random --extra-body {",
        "random --endpoint other",
        "random --temperature nan",
        "random --temperature inf",
        "random --temperature=-1",
        "random --json /nowhere/at/all.json",
        "random --plot /nowhere/at/all.png",
        "random --json /",
    ],
)
def test_bad_values_are_usage_errors(line: str) -> None:
    result = invoke("serve", *line.split())
    assert result.exit_code == 2, result.output
    assert "Usage: memserve bench serve" in result.stderr


@pytest.mark.parametrize("option", ["--json", "--plot"])
def test_files_of_the_pool_that_cannot_be_written_are_told_before_it_runs(option: str) -> None:
    result = invoke("pool", "--quick", "--only", "calls", option, "/nowhere/at/all")
    assert result.exit_code == 2, result.output
    assert "there is no folder /nowhere/at" in result.stderr and not result.stdout


def test_names_are_those_of_the_code() -> None:
    assert tuple(source.value for source in Source) == options.SOURCES
    assert get_args(Endpoint) == options.ENDPOINTS


def test_keys_are_left_out() -> None:
    words = ["--api-key", "k", "--api-key=k", "x"]
    assert without_secrets(words) == ["--api-key", "…", "--api-key=…", "x"]


def test_ctrl_c_keeps_what_there_is(server: FakeServer, sessions: Path, tmp_path: Path) -> None:
    # the check and the first request go well, all others stall
    server.mode = lambda number: Mode.WELL if number < 2 else Mode.STALL
    out = tmp_path / "out.json"
    command = [sys.executable, "-m", "memserve", "bench", "serve", "sessions", str(sessions)]
    command += ["--url", server.url, "--json", str(out), "--concurrency", "1"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            deadline = time.monotonic() + 60
            while len(server.seen) < 3:
                assert time.monotonic() < deadline and process.poll() is None
                time.sleep(0.02)
            process.send_signal(signal.SIGINT)
            text, _ = process.communicate(timeout=30)
        finally:
            process.kill()
    assert process.returncode == 130
    assert "partial results" in text
    summary = json.loads(out.read_text())["report"]["summary"]
    assert (summary["num_requests"], summary["num_completed"]) == (2, 1)
    assert summary["errors"] == {"interrupted": 1}


def test_bench_imports_no_torch() -> None:
    code = """
import importlib, pkgutil, sys
import memserve.bench
for module in pkgutil.iter_modules(memserve.bench.__path__):
    importlib.import_module(f"memserve.bench.{module.name}")
assert "torch" not in sys.modules and "matplotlib" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, cwd=REPOSITORY)
