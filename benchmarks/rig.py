"""What the benchmarks share: model folders of given shapes, a server started by its command line, a
streaming client.

Nothing here measures; `engine.py` says what is measured and against what.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp

BUNDLED_MODEL = Path(__file__).resolve().parents[1] / "memserve" / "tiny_model"


@dataclass(frozen=True)
class Shapes:
    """A Llama-shaped model with random weights."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocab: int = 32000
    tied: bool = False

    def config(self) -> dict[str, object]:
        """Its config.json."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "intermediate_size": self.intermediate,
            "vocab_size": self.vocab,
            "tie_word_embeddings": self.tied,
            "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "hidden_act": "silu",
            "bos_token_id": 1,
            "eos_token_id": 2,
            "torch_dtype": "bfloat16",
        }

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of bf16 K and V of one token over all layers."""
        return self.layers * 2 * self.kv_heads * (self.hidden // self.heads) * 2


SHAPES = {
    "small": Shapes(hidden=512, layers=8, heads=8, kv_heads=4, intermediate=1536),
    "half-b": Shapes(hidden=896, layers=24, heads=14, kv_heads=2, intermediate=4864, tied=True),
}


def free_port() -> int:
    """A loopback port that nobody listens on."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@contextmanager
def server(model: Path, *options: str, log: Path) -> Iterator[str]:
    """`memserve serve` on a model folder; yields its URL once it is ready, and stops it afterwards."""
    port = free_port()
    command = [sys.executable, "-m", "memserve", "serve", "--model", str(model), "--port", str(port)]
    command += ["--tokenizer", str(BUNDLED_MODEL), *options]
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
    url = f"http://127.0.0.1:{port}"
    try:
        wait_ready(url, process, log)
        yield url
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def wait_ready(url: str, process: subprocess.Popen[bytes], log: Path, timeout_s: float = 120) -> None:
    """Return once /health answers 200. Raises RuntimeError with the log's end if the server does not come
    up.
    """
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=2) as answer:
                if answer.status == 200:
                    return
        except OSError:
            time.sleep(0.1)
    raise RuntimeError(f"the server did not start:\n{log.read_text(errors='replace')[-3000:]}")


@dataclass(slots=True)
class Timeline:
    """When the chunks of one streamed request arrived, in seconds since it was sent.

    memserve sends a chunk for every token that was drawn; several tokens share one only if the client or the
    router lagged behind.
    """

    token_times_s: list[float] = field(default_factory=list)

    @property
    def ttft_s(self) -> float:
        """Time to first token."""
        return self.token_times_s[0]

    @property
    def itls_s(self) -> list[float]:
        """Gaps between tokens."""
        times = self.token_times_s
        return [b - a for a, b in zip(times, times[1:], strict=False)]


async def stream_completion(
    session: aiohttp.ClientSession, url: str, prompt: Sequence[int], max_tokens: int
) -> Timeline:
    """One greedy completion of exactly `max_tokens` tokens from token ids; raises on any HTTP error."""
    body = {
        "model": "bench",
        "prompt": list(prompt),
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    timeline, last = Timeline(), b""
    started = time.perf_counter()
    async with session.post(f"{url}/v1/completions", json=body) as answer:
        if answer.status != 200:
            raise RuntimeError(await answer.text())
        async for line in answer.content:
            if line.startswith(b"data: {"):
                timeline.token_times_s.append(time.perf_counter() - started)
                last = line
    # the last two chunks carry the finish reason and the usage. Nothing is parsed before the end: it would
    # take the cores from the server
    del timeline.token_times_s[-2:]
    num_tokens = json.loads(last[6:])["usage"]["completion_tokens"]
    if num_tokens != max_tokens:
        raise RuntimeError(f"asked for {max_tokens} tokens, got {num_tokens}")
    return timeline
