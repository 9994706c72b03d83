"""`memserve top --once` against a real server that is at work, and what it is told by."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.server_process import REPOSITORY, Server


@pytest.fixture(scope="module")
def server(start: Callable[..., Server], random_model: Path) -> Server:
    return start(
        "--model",
        str(random_model),
        "--prefill=1",
        "--decode=1",
        "--dtype=float32",
        "--threads=1",
        "--device-memory=64MiB",
        "--host-memory=16MiB",
        "--max-model-len=800",
    )


def once(url: str, columns: int = 80) -> tuple[int, str]:
    """Exit status and output."""
    done = subprocess.run(
        [sys.executable, "-m", "memserve", "top", "--once", "--interval=0.3", "--url", url],
        cwd=REPOSITORY,
        env={**os.environ, "COLUMNS": str(columns), "LINES": "30"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stderr == ""
    return done.returncode, done.stdout


def listed(server: Server, query: str = "") -> list[dict]:
    with urllib.request.urlopen(f"{server.url}/v1/requests{query}", timeout=10) as answer:
        return json.load(answer)["data"]


def test_a_server_at_work(server: Server) -> None:
    # 1. the same prompt twice: the second finds the first
    prompt = [5 + 7 * i % 4000 for i in range(160)]
    for _ in range(2):
        server.complete(prompt, 3, ignore_eos=True)
    # 2. a long answer goes on while it is looked at
    asker = threading.Thread(target=server.complete, args=(prompt, 600), kwargs={"ignore_eos": True})
    asker.start()
    deadline = time.monotonic() + 60
    while len(listed(server)) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    status, text = once(server.url)
    asker.join()
    lines = text.splitlines()
    assert status == 0 and len(lines) <= 30 and all(len(line) <= 80 for line in lines), text
    assert lines[0].startswith(f"memserve top {server.url}  up "), text
    named = {line[:11].strip(): line[11:] for line in lines}
    assert "ready" in named["prefill-0 P"] and "ready" in named["decode-0  D"], text
    assert "cached of 64.0 MiB" in named["P device"] and "MiB" in named["D host"], text
    assert re.search("0 waiting  [01] running  0 refused", named["queue"]), text
    hit, of = named["hits all"].split("%")[0], named["hits all"].split(" of ")[1]
    assert 40 < float(hit) < 50 and of.split()[0] in ("320", "480"), text
    assert "2 pulls, 0 failed" in named["P→D"] or "3 pulls, 0 failed" in named["P→D"], text
    rows = [line for line in lines if "least-load" in line]
    assert len(rows) == 3 and all("prefill-0 → decode-0" in row for row in rows), text
    # 3. when all is done, the list tells it, the newest first
    newest, second, first = listed(server)
    assert [row["state"] for row in (newest, second, first)] == ["finished"] * 3
    assert first["cached_tokens"]["device"] == 0 < second["cached_tokens"]["device"]
    for row in (newest, second, first):
        assert row["predicted_ttft_ms"] > 0 and row["ttft_ms"] > 0 and row["duration_ms"] > row["ttft_ms"]
    # 4. and the sums are those of the rows
    gauges = server.gauges()
    captured = sum(row["cached_tokens"]["device"] for row in (newest, second, first))
    assert gauges['memserve_cache_tokens_total{stage="captured"}'] == captured
    assert gauges['memserve_cached_prompt_tokens_total{source="device"}'] == captured
    assert gauges["memserve_prefilled_prompt_tokens_total"] == 3 * 160
    assert gauges["memserve_ttft_prediction_error_ratio_count"] == 3
    measured = sum(row["ttft_ms"] for row in (newest, second, first)) / 1e3
    assert gauges["memserve_measured_ttft_seconds_total"] == pytest.approx(measured, rel=1e-3)


def test_no_server(server: Server) -> None:
    status, text = once("http://127.0.0.1:1")
    assert status == 1 and "/v1/workers: Connection refused" in text
