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

from memserve.config import Role, ServeConfig, WorkerConfig
from memserve.display import Display, TokenMeter, base_url, curl_example, describe_plan
from memserve.messages import Load
from memserve.model_config import ModelConfig, RopeConfig
from memserve.router.engine_api import EngineStatus, InstanceState, InstanceStatus

MODEL = ModelConfig(
    architecture="LlamaForCausalLM",
    vocab_size=64,
    hidden_size=16,
    intermediate_size=32,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    rms_norm_eps=1e-5,
    rope=RopeConfig(),
    tie_word_embeddings=True,
    qkv_bias=False,
    o_bias=False,
    mlp_bias=False,
    qk_norm=False,
    sliding_window=(None, None),
    max_position_embeddings=128,
    dtype="float32",
    eos_token_ids=(1,),
    bos_token_id=None,
)
WORKER = WorkerConfig(
    instance="prefill-0",
    role=Role.PREFILL,
    model_path="/nowhere",
    model=MODEL,
    device="cpu",
    dtype="float32",
    load_format="auto",
    seed=0,
    block_size=16,
    num_blocks=64,
    device_memory_fraction=None,
    max_model_len=128,
    max_batch_tokens=64,
    max_running=4,
    max_step_ms=200.0,
    threads=3,
    cpus=(0, 4, 1, 7),
)
DECODE = msgspec.structs.replace(WORKER, instance="decode-0", role=Role.DECODE, threads=1, cpus=())


def make_display(*, terminal: bool, **options: Any) -> tuple[Display, io.StringIO]:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=terminal, width=200, color_system=None)
    return Display(ServeConfig(), (WORKER, DECODE), "tiny", console=console, **options), stream


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
    display.ready(8000)
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
        "ready: tiny on http://127.0.0.1:8000",
        "prefill-0: weights 0 %",
    ]


def test_terminal_shows_progress_and_an_example() -> None:
    display, stream = make_display(terminal=True)
    with display.starting():
        display.on_progress("decode-0", "weights", 0.5)
    assert "decode-0 weights" in stream.getvalue()
    display.ready(8000)
    display.close()
    assert "memserve is ready on http://127.0.0.1:8000" in stream.getvalue()
    assert curl_example("http://127.0.0.1:8000", "tiny") in stream.getvalue()


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


def test_rates_over_lives_of_a_worker() -> None:
    meter = TokenMeter()
    assert meter.rates(make_status(100, 10), 0.0) == (0.0, 0.0)
    assert meter.rates(make_status(300, 30), 10.0) == (20.0, 2.0)
    # The counters of its next life begin at 0: never a negative rate.
    assert meter.rates(make_status(50, 5, incarnation=1), 20.0) == (5.0, 0.5)
