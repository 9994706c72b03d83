"""Start, stop, death: what a user sees, and that nothing is left behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.e2e.server_process import Server, launch, wait_ready


def wait_gone(processes: list[psutil.Process], timeout_s: float = 10) -> None:
    _, alive = psutil.wait_procs(processes, timeout=timeout_s)
    assert not alive, alive


def leftovers() -> set[str]:
    """Named things a run could leave: shared memory and sockets."""
    return set(os.listdir("/dev/shm"))


def test_the_bundled_model_chats(start: Callable[..., Server]) -> None:
    server = start()
    body = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 24, "seed": 1}
    status, answer = server.post("/v1/chat/completions", body)
    assert status == 200
    choice = answer["choices"][0]  # type: ignore[index]
    assert choice["message"]["content"].strip()
    titles = [" ".join(process.cmdline()) for process in server.family()]
    assert any("router" in title for title in titles), titles
    assert any("prefill-0" in title for title in titles), titles
    assert any("decode-0" in title for title in titles), titles


def test_ctrl_c_drains_and_leaves_nothing(tmp_path: Path) -> None:
    before = leftovers()
    server = launch(tmp_path / "log")
    wait_ready(server)
    family = server.family()
    answers: list[object] = []
    body = {"prompt": "def", "max_tokens": 300, "ignore_eos": True}
    client = threading.Thread(target=lambda: answers.append(server.post("/v1/completions", body)))
    client.start()
    time.sleep(0.5)
    server.process.send_signal(signal.SIGINT)
    client.join(60)
    assert answers and answers[0][0] == 200  # type: ignore[index]
    assert answers[0][1]["usage"]["completion_tokens"] == 300  # type: ignore[index]
    assert server.process.wait(30) == 0
    wait_gone(family)
    assert leftovers() == before


def test_a_second_ctrl_c_forces(tmp_path: Path) -> None:
    server = launch(tmp_path / "log")
    wait_ready(server)
    family = server.family()
    body = {"prompt": "def", "max_tokens": 5000, "ignore_eos": True}
    client = threading.Thread(target=lambda: _ignore_errors(server, body))
    client.start()
    time.sleep(0.5)
    server.process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert server.process.poll() is None
    server.process.send_signal(signal.SIGINT)
    assert server.process.wait(15) == 130  # work was cut off
    wait_gone(family)
    client.join(30)


def _ignore_errors(server: Server, body: object) -> None:
    try:
        server.post("/v1/completions", body)
    except (OSError, ValueError):
        return  # the server was told to go away under this request


def test_kill_9_of_the_router_leaves_nothing(tmp_path: Path) -> None:
    before = leftovers()
    server = launch(tmp_path / "log")
    wait_ready(server)
    family = server.family()
    assert len(family) >= 3
    server.process.kill()
    server.process.wait()
    wait_gone(family[1:], timeout_s=5)
    assert leftovers() == before


def test_ctrl_c_during_start_up(tmp_path: Path) -> None:
    server = launch(tmp_path / "log")
    time.sleep(1.0)
    family = server.family()
    server.process.send_signal(signal.SIGINT)
    assert server.process.wait(15) != 0
    wait_gone(family)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--model", "/no/such/folder"), "/no/such/folder"),
        (("--max-model-len", "0"), "max-model-len"),
        (("--prefill", "1", "--colocated", "1"), "colocated"),
        (("--dtype", "int4"), "int4"),
        (("--device-memory", "1KiB"), "missing"),
        (("--model", "~no-such-user/model"), "home directory"),
    ],
)
def test_mistakes_are_one_line(options: tuple[str, ...], expected: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "memserve", "serve", *options], capture_output=True, text=True, timeout=60
    )
    assert done.returncode in (1, 2)
    assert expected in done.stderr
    assert "Traceback" not in done.stderr


def test_of_two_servers_on_a_port_the_second_is_told_at_once(tmp_path: Path) -> None:
    first = launch(tmp_path / "log")
    family: list[psutil.Process] = []
    try:
        # 1. From its first second it answers: not yet, but in a moment.
        while True:
            try:
                status, answer = first.post("/v1/completions", {"prompt": "x"})
                break
            except OSError:
                assert first.process.poll() is None
                time.sleep(0.02)
        assert (status, answer["error"]["code"]) == (503, "unavailable")  # type: ignore[index]
        # 2. So the second sees that the port is taken, before it has loaded anything.
        port = first.url.rpartition(":")[2]
        second = subprocess.run(
            [sys.executable, "-m", "memserve", "serve", "--port", port],
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert second.returncode == 1
        assert second.stderr.count("memserve: cannot listen") == 1 and "in use" in second.stderr
        assert "Traceback" not in second.stderr
        # 3. The first comes up undisturbed.
        wait_ready(first)
        family = first.family()
        assert first.post("/v1/completions", {"prompt": "x", "max_tokens": 1})[0] == 200
    finally:
        assert first.stop() == 0
    wait_gone(family)


def test_the_server_ends_when_its_last_worker_is_lost(tmp_path: Path) -> None:
    server = launch(tmp_path / "log", "--colocated", "1")
    wait_ready(server)
    # 1. A request is under way when the worker dies, and again each replacement.
    answers: list[tuple[int, dict[str, object]]] = []
    body = {"prompt": "def", "max_tokens": 5000, "ignore_eos": True}
    client = threading.Thread(target=lambda: answers.append(server.post("/v1/completions", body)))
    client.start()
    known: set[int] = set()
    while server.process.poll() is None:
        for process in server.family()[1:]:
            process.kill()
            known.add(process.pid)
        time.sleep(0.05)
    # 2. No replacement got ready: the server says so, refuses the request, and ends with a failure.
    client.join(30)
    assert len(known) >= 3
    assert answers[0][0] == 503, answers
    assert server.process.returncode == 1
    assert "no worker is left" in server.log.read_text()


def test_port_in_use_is_one_line() -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        port = sock.getsockname()[1]
        done = subprocess.run(
            [sys.executable, "-m", "memserve", "serve", "--port", str(port)],
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert done.returncode == 1
    assert str(port) in done.stderr and "in use" in done.stderr
    assert "Traceback" not in done.stderr
