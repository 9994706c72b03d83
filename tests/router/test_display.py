"""What the terminal and the log show."""

from __future__ import annotations

import io
import json
import logging
import shlex
from typing import Any

import msgspec
import pytest
from rich.console import Console

from memserve.config import Role, ServeConfig
from memserve.messages import Load
from memserve.router.display import (
    ConsoleHandler,
    Display,
    TokenMeter,
    base_url,
    curl_example,
    describe_plan,
)
from memserve.router.engine_api import EngineStatus, InstanceState, InstanceStatus
from tests.router.worker_configs import make_worker

WORKER = msgspec.structs.replace(make_worker("prefill-0", (0, 4, 1, 7)), num_blocks=64, threads=3)
DECODE = msgspec.structs.replace(WORKER, instance="decode-0", role=Role.DECODE, threads=1, cpus=())
READY = EngineStatus(
    instances=(
        InstanceStatus("prefill-0", Role.PREFILL, 0, InstanceState.READY, Load(), num_blocks=64),
        InstanceStatus("decode-0", Role.DECODE, 0, InstanceState.READY, Load(), num_blocks=100),
    )
)


def make_display(*, terminal: bool, **options: Any) -> tuple[Display, io.StringIO]:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=terminal, width=200, color_system=None)
    return Display(ServeConfig(), (WORKER, DECODE), "tiny", console, **options), stream


def make_status(prompt: int, drawn: int, incarnation: int = 0, running: int = 1) -> EngineStatus:
    load = Load(num_prefill_tokens=prompt, num_decode_tokens=drawn, num_free_blocks=60, num_active_blocks=4)
    instance = InstanceStatus("decode-0", Role.DECODE, incarnation, InstanceState.READY, load)
    return EngineStatus(instances=(instance,), num_running=running, num_waiting=2 * running)


def test_plan_in_words() -> None:
    on_gpu = msgspec.structs.replace(DECODE, device="cuda:1", num_blocks=None, device_memory_fraction=0.9)
    assert describe_plan((WORKER, DECODE, on_gpu), "tiny") == [
        "tiny: float32, up to 128 tokens a request",
        "prefill-0: cpu, 3 threads on cores 0-1,4,7, KV of 1024 tokens (128 KiB)",
        "decode-0: cpu, 1 thread, KV of 1024 tokens (128 KiB)",
        "decode-0: cuda:1, 1 thread, KV pool of 90% of the memory that its weights leave",
    ]


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:80"),
        ("0.0.0.0", "http://127.0.0.1:80"),
        ("::", "http://[::1]:80"),
        ("fe80::1", "http://[fe80::1]:80"),
        ("name", "http://name:80"),
    ],
)
def test_url_that_can_be_used(host: str, url: str) -> None:
    assert base_url(host, 80) == url


def test_example_survives_a_shell() -> None:
    command = curl_example("http://x:1", "it's $HOME").replace("\\\n", "")
    words = shlex.split(command)
    assert words[:3] == ["curl", "-N", "http://x:1/v1/completions"]
    assert json.loads(words[-1])["model"] == "it's $HOME"


def test_log_of_a_run_without_a_terminal(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    display, stream = make_display(terminal=False)
    with display.starting():
        for percent in range(101):
            display.on_progress("prefill-0", "weights", percent / 100)
    display.ready(8000, READY)
    # A replacement starts from the beginning again.
    display.on_progress("prefill-0", "weights", 0.0)
    display.close()
    assert stream.getvalue() == ""
    assert caplog.messages[3:] == [
        "prefill-0: weights 0 %",
        "prefill-0: weights 25 %",
        "prefill-0: weights 50 %",
        "prefill-0: weights 75 %",
        "prefill-0: weights 100 %",
        "prefill-0: prefill on cpu, 3 threads on cores 0-1,4,7, 1024 tokens of KV",
        "decode-0: decode on cpu, 1 thread, 1600 tokens of KV",
        "ready: tiny on http://127.0.0.1:8000",
        f"try: {curl_example('http://127.0.0.1:8000', 'tiny')}".replace("\\\n  ", ""),
        "prefill-0: weights 0 %",
    ]


def test_terminal_shows_progress_and_an_example() -> None:
    display, stream = make_display(terminal=True)
    with display.starting():
        display.on_progress("decode-0", "weights", 0.5)
    assert "decode-0 weights" in stream.getvalue()
    display.ready(8000, READY)
    display.close()
    shown = stream.getvalue()
    assert "tiny on http://127.0.0.1:8000" in shown
    assert curl_example("http://127.0.0.1:8000", "tiny") in shown
    (row,) = [line.split("│") for line in shown.splitlines() if line.startswith("│ decode-0")]
    assert [cell.strip() for cell in row[1:-1]] == ["decode-0", "decode", "cpu", "1 thread", "1600"]


def test_log_lines_go_above_the_bars_as_they_are() -> None:
    display, stream = make_display(terminal=True)
    handler = ConsoleHandler(display._console)
    record = logging.makeLogRecord({"msg": "[bold]not markup[/bold] %s", "args": ("x" * 300,)})
    with display.starting():
        handler.emit(record)
    assert f"[bold]not markup[/bold] {'x' * 300}\n" in stream.getvalue()


def test_status_under_load_only(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    times = iter([0.0, 5.0, 10.0])
    display, _ = make_display(terminal=False, clock=lambda: next(times))
    display.status(make_status(0, 0, running=0))
    display.status(make_status(5000, 100))
    display.status(make_status(5000, 100, running=0))
    assert caplog.messages == [
        "1 running, 2 waiting; 1000 prompt tokens/s, 20 drawn tokens/s; 60 of 64 blocks free"
    ]


def test_the_first_report_counts_from_when_the_server_was_ready(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    times = iter([0.0, 5.0])
    display, _ = make_display(terminal=False, clock=lambda: next(times))
    display.ready(8000, make_status(0, 0, running=0))
    display.status(make_status(5000, 100))
    assert "1000 prompt tokens/s, 20 drawn tokens/s" in caplog.messages[-1]


def test_rates_over_lives_of_a_worker() -> None:
    meter = TokenMeter()
    assert meter.rates(make_status(100, 10), 0.0) == (0.0, 0.0)
    assert meter.rates(make_status(300, 30), 10.0) == (20.0, 2.0)
    # The counters of its next life begin at 0: never a negative rate.
    assert meter.rates(make_status(50, 5, incarnation=1), 20.0) == (5.0, 0.5)
