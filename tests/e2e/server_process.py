"""A `memserve serve` process on a loopback port, watched from outside like a user would."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
SHARED_DATA = REPOSITORY.parent / "shared" / "data"
# The samples of /metrics that are 0 when nothing is being done.
BUSY = re.compile(r"memserve_(requests|instance_requests|offers|blocks)\{(?!.*state=\"(free|historical)\")")


@dataclass
class Server:
    """One running `memserve serve`."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path

    def post(self, path: str, body: object, timeout_s: float = 90) -> tuple[int, dict[str, object]]:
        """Status and JSON of a POST."""
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"content-type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=timeout_s) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.load(error)

    def complete(self, prompt: str | list[int], max_tokens: int, **options: object) -> dict[str, object]:
        """The first choice of a greedy completion, unless the options say otherwise."""
        body = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, **options}
        status, answer = self.post("/v1/completions", body)
        assert status == 200, answer
        return answer["choices"][0]  # type: ignore[index,return-value]

    def gauges(self) -> dict[str, float]:
        """Every sample of /metrics, by name and labels as written there."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=10) as answer:
            text = answer.read().decode()
        samples = re.findall(r"^(memserve_[^ ]+) ([0-9.e+-]+)$", text, re.M)
        return {name: float(value) for name, value in samples}

    def wait_idle(self, timeout_s: float = 15) -> None:
        """Nothing runs, waits or is offered, and every block is back; workers report soon after they rest."""
        deadline = time.monotonic() + timeout_s
        while True:
            samples = {name: value for name, value in self.gauges().items() if BUSY.match(name)}
            # The router's two, and five of each of its instances that has been up
            assert len(samples) >= 2 + 5, samples
            busy = {name: value for name, value in samples.items() if value}
            if not busy:
                return
            assert time.monotonic() < deadline, f"not idle: {busy}"
            time.sleep(0.05)

    def family(self) -> list[psutil.Process]:
        """The router and its workers."""
        router = psutil.Process(self.process.pid)
        return [router, *router.children(recursive=True)]

    def stop(self) -> int:
        """Ctrl-C; the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        try:
            return self.process.wait(30)
        except subprocess.TimeoutExpired:
            for member in self.family():
                member.kill()
            raise


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def launch(log: Path, *options: str) -> Server:
    """Start a server without waiting for it."""
    port = free_port()
    if not any(option.startswith("--calibration") for option in options):
        options = ("--calibration", "off", *options)  # seconds of every start, and a file in the home
    command = [sys.executable, "-m", "memserve", "serve", "--port", str(port), *options]
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, cwd=REPOSITORY, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
    return Server(f"http://127.0.0.1:{port}", process, log)


def wait_ready(server: Server, timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline and server.process.poll() is None:
        try:
            with urllib.request.urlopen(f"{server.url}/health", timeout=2):
                return
        except OSError:
            time.sleep(0.1)
    os.killpg(server.process.pid, signal.SIGKILL)
    server.process.wait()
    pytest.fail(f"the server did not start:\n{server.log.read_text(errors='replace')}")
