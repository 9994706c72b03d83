"""As `python -O` runs it: nothing that the server needs is done inside an assert."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest

from tests.e2e.server_process import Server


def test_requests_and_a_death_without_asserts(
    start: Callable[..., Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    # 1. -O for every process from here on: the workers inherit it from the router.
    monkeypatch.setenv("PYTHONOPTIMIZE", "1")
    subprocess.run([sys.executable, "-c", "assert False"], check=True)
    server = start("--dtype", "float32")
    # 2. A request goes by way of both workers.
    calm = server.complete("import os", 40, ignore_eos=True)["text"]
    gauges = server.gauges()
    assert gauges["memserve_pulls_total"] == 1 and not gauges["memserve_pull_failures_total"]
    # 3. A worker dies, and the next request is served all the same.
    next(p for p in server.family() if "decode-0" in " ".join(p.cmdline())).kill()
    assert server.complete("import os", 40, ignore_eos=True)["text"] == calm
    server.wait_idle()
