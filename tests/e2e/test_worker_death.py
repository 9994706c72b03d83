"""A worker is killed in the middle of its work: clients see a pause, and the tokens are the same."""

from __future__ import annotations

import json
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from tests.e2e.server_process import Server

# Small steps, so that a prefill takes many of them
OPTIONS = ("--dtype", "float32", "--max-model-len", "1024", "--prefill-max-batch-tokens", "32")
LONG_PROMPTS = [[3 + (i * j + i) % 4000 for j in range(900)] for i in range(1, 13)]


@pytest.fixture(scope="module", params=["shm", "torch_distributed"])
def server(start: Callable[..., Server], random_model: Path, request: pytest.FixtureRequest) -> Server:
    return start("--model", str(random_model), "--transport", request.param, *OPTIONS)


def worker(server: Server, name: str) -> psutil.Process:
    """The process of an instance, as soon as there is one."""
    deadline = time.monotonic() + 30
    while True:
        for process in server.family()[1:]:
            try:
                if name in " ".join(process.cmdline()):
                    return process
            except psutil.NoSuchProcess:
                continue
        assert time.monotonic() < deadline, f"no {name}"
        time.sleep(0.05)


def wait_restarted(server: Server, num_restarts: float) -> None:
    """Until so many instances have been started again, and are ready."""
    deadline = time.monotonic() + 30
    while server.gauges()["memserve_restarts_total"] < num_restarts:
        assert time.monotonic() < deadline
        time.sleep(0.1)


def streamed(server: Server, body: dict[str, object]) -> Iterator[dict[str, list[int]]]:
    """Token ids by choice, as they come."""
    request = urllib.request.Request(
        f"{server.url}/v1/completions",
        json.dumps({**body, "stream": True, "return_token_ids": True, "ignore_eos": True}).encode(),
        {"content-type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=90) as answer:
        for line in answer:
            if line.startswith(b"data: {"):
                yield {str(c["index"]): c.get("token_ids", []) for c in json.loads(line[6:])["choices"]}


def joined(server: Server, body: dict[str, object], after_first: Callable[[], None]) -> dict[str, list[int]]:
    """All token ids of all choices; `after_first` is called as soon as the first token is there."""
    ids: dict[str, list[int]] = {}
    for event in streamed(server, body):
        if not ids:
            after_first()
        for index, new in event.items():
            ids.setdefault(index, []).extend(new)
    return ids


@pytest.mark.parametrize(
    ("victim", "body"),
    [
        # FCFS: when the first of the prompts has its token, the prefill worker is at the second
        ("prefill-0", {"prompt": LONG_PROMPTS, "max_tokens": 4, "temperature": 0}),
        ("decode-0", {"prompt": LONG_PROMPTS[0][:40], "max_tokens": 400, "temperature": 0}),
        ("decode-0", {"prompt": LONG_PROMPTS[1][:40], "max_tokens": 400, "temperature": 0.8, "seed": 5}),
    ],
    ids=["prefill", "decode", "decode-seeded"],
)
def test_no_token_is_lost_or_doubled(server: Server, victim: str, body: dict[str, object]) -> None:
    calm = joined(server, body, lambda: None)
    before = server.gauges()
    process = worker(server, victim)
    cold = {**body, "cache_salt": f"{victim} {body['temperature']}"}  # with the rest of its work still to do
    assert joined(server, cold, process.kill) == calm
    # 1. it did hit them
    after = server.gauges()
    assert after["memserve_replays_total"] > before["memserve_replays_total"]
    # 2. the worker comes back, as another process, and works
    wait_restarted(server, before["memserve_restarts_total"] + 1)
    assert worker(server, victim).pid != process.pid
    assert joined(server, body, lambda: None) == calm
    # 3. nothing of it stays
    server.wait_idle()


@pytest.mark.parametrize("victim", ["prefill-0", "decode-0"])
def test_no_request_is_lost_under_load(server: Server, victim: str) -> None:
    bodies: list[dict[str, object]] = [
        {"prompt": LONG_PROMPTS[i][: 100 + 40 * i], "max_tokens": 40, "temperature": 0.7 * (i % 2), "seed": i}
        for i in range(10)
    ]
    calm = [joined(server, body, lambda: None) for body in bodies]
    before = server.gauges()
    process = worker(server, victim)
    # the first prompt to be done kills the prefill worker at the next, the last one the decode worker
    salted = [{**body, "cache_salt": victim} for body in bodies]
    hooks = [lambda: None] * len(bodies)
    hooks[0 if victim == "prefill-0" else -1] = process.kill
    with ThreadPoolExecutor(len(bodies)) as threads:
        together = list(threads.map(joined, [server] * len(bodies), salted, hooks))
    assert together == calm
    assert server.gauges()["memserve_replays_total"] > before["memserve_replays_total"]
    wait_restarted(server, before["memserve_restarts_total"] + 1)
    # and what comes after is pulled again
    before = server.gauges()
    assert joined(server, {**bodies[3], "cache_salt": "afterwards"}, lambda: None) == calm[3]
    after = server.gauges()
    assert after["memserve_pulled_tokens_total"] > before["memserve_pulled_tokens_total"]
    assert after["memserve_pull_failures_total"] == before["memserve_pull_failures_total"]
    server.wait_idle()
