"""memserve through HTTP beside `transformers`, on the same random weights, in the same run.

    python benchmarks/engine.py                      # the `small` shapes, 2 threads, bf16
    python benchmarks/engine.py --shapes half-b --repeats 5 --json out.json

Measured, each the median of `--repeats` alternating rounds:

* decode: one stream, tokens/s, against `generate` (its prefill subtracted)
* ttft: 1,000 and 4,000 new tokens, against a bare prefill (last token's logits only)
* batch: 8 streams, 256 in / 64 out, output tokens/s, against `generate` on a static batch of 8
* router: TTFT of a 16-token prompt through HTTP against the same worker driven over its socket
* hand-off: a 4,000-token prompt from a prefill to a decode worker; the gap between the first and the second
  token less a usual gap, against a memcpy of the same bytes between two populated shared mappings
* start: from the command line to the first token of the bundled model, against 8 s

The weights are random but saved, so that both sides have the same ones; `--load-format dummy` is as quick.
Ratios within one run mean something; the digits belong to the machine. Run nothing else meanwhile.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import mmap
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import numpy as np
import torch
from direct import direct_worker
from rig import BUNDLED_MODEL, SHAPES, Shapes, server, stream_completion
from transformers import AutoModelForCausalLM, LlamaConfig

THREADS = 2


@dataclass(slots=True)
class Row:
    """One line of the table: ours against the reference, both in `unit`, and the floor on the ratio."""

    name: str
    unit: str
    ours: list[float]
    reference: list[float]
    floor: str
    passes: Callable[[float, float], bool]

    def print(self) -> None:
        ours, reference = statistics.median(self.ours), statistics.median(self.reference)
        ratio = ours / reference if reference else float("nan")
        verdict = "ok" if self.passes(ours, reference) else "MISSED"
        print(
            f"{self.name:<22}{ours:>10.2f}{reference:>12.2f} {self.unit:<8}{ratio:>8.2f}x   "
            f"{self.floor:<22} {verdict}"
        )


class Reference:
    """transformers on the same folder, in this process."""

    def __init__(self, folder: Path) -> None:
        torch.set_num_threads(THREADS)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
        self.model.generation_config.eos_token_id = None
        self.model.generation_config.pad_token_id = 0

    def generate(self, batch: int, num_in: int, num_out: int) -> float:
        """Seconds for a static batch, greedy."""
        ids = torch.from_numpy(random_ids(batch * num_in).reshape(batch, num_in))
        started = time.perf_counter()
        with torch.inference_mode():
            out = self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=num_out,
                min_new_tokens=num_out,
                do_sample=False,
            )
        assert out.shape == (batch, num_in + num_out)
        return time.perf_counter() - started

    def decode_rate(self, num_in: int, num_out: int) -> float:
        """Tokens/s of one stream without its prefill."""
        return (num_out - 1) / (self.generate(1, num_in, num_out) - self.generate(1, num_in, 1))

    def prefill(self, num_tokens: int) -> float:
        """Seconds of a bare prefill with the last token's logits only."""
        ids = torch.from_numpy(random_ids(num_tokens)[None])
        started = time.perf_counter()
        with torch.inference_mode():
            self.model(ids, use_cache=True, logits_to_keep=1)
        return time.perf_counter() - started


def random_ids(count: int) -> np.ndarray:
    """Token ids that repeat in no other request, so that no cache can help."""
    return np.random.default_rng(time.perf_counter_ns()).integers(3, 31999, count)


def memcpy_s(num_bytes: int) -> float:
    """Seconds to copy between two shared, populated mappings in one go: what a hand-off cannot beat."""
    views = []
    for name in ("source", "target"):
        fd = os.memfd_create(name)
        os.ftruncate(fd, num_bytes)
        view = np.frombuffer(mmap.mmap(fd, num_bytes), dtype=np.uint8)
        view[:] = 1
        views.append(view)
        os.close(fd)
    started = time.perf_counter()
    np.copyto(views[1], views[0])
    return time.perf_counter() - started


async def measure_colocated(url: str, reference: Reference, repeats: int) -> list[Row]:
    """Decode, TTFT and batch rows, ours and theirs in alternation; the idle side burns nothing."""
    decode = Row("decode, 1 stream", "tok/s", [], [], ">= 1.4x", lambda a, b: a >= 1.4 * b)
    ttft_1k = Row("ttft, 1,000 tokens", "ms", [], [], "<= 1.0x", lambda a, b: a <= b)
    ttft_4k = Row("ttft, 4,000 tokens", "ms", [], [], "<= 0.9x", lambda a, b: a <= 0.9 * b)
    batch = Row("8 streams, 256/64", "tok/s", [], [], ">= 1.7x", lambda a, b: a >= 1.7 * b)
    async with aiohttp.ClientSession() as session:
        for i in range(repeats + 1):
            line = await stream_completion(session, url, random_ids(128).tolist(), 128)
            ours = [127 / (line.token_times_s[-1] - line.ttft_s)]
            theirs = [reference.decode_rate(128, 128)]
            for size in (1000, 4000):
                line = await stream_completion(session, url, random_ids(size).tolist(), 2)
                ours.append(line.ttft_s * 1e3)
                theirs.append(reference.prefill(size) * 1e3)
            started = time.perf_counter()
            prompts = [random_ids(256).tolist() for _ in range(8)]
            await asyncio.gather(*[stream_completion(session, url, prompt, 64) for prompt in prompts])
            ours.append(8 * 64 / (time.perf_counter() - started))
            theirs.append(8 * 64 / reference.generate(8, 256, 64))
            if i == 0:  # the first round warms both sides up
                continue
            for row, a, b in zip((decode, ttft_1k, ttft_4k, batch), ours, theirs, strict=True):
                row.ours.append(a)
                row.reference.append(b)
    return [decode, ttft_1k, ttft_4k, batch]


async def measure_handoff(url: str, shapes: Shapes, repeats: int) -> Row:
    """First-to-second-token gap of a 4,000-token prompt, less the usual gap, against memcpy."""
    row = Row("hand-off, 4,000 tokens", "ms", [], [], "<= memcpy + 15 ms", lambda a, b: a <= b + 15)
    async with aiohttp.ClientSession() as session:
        for i in range(repeats + 1):
            line = await stream_completion(session, url, random_ids(4000).tolist(), 12)
            gaps = line.itls_s
            ours = (gaps[0] - statistics.median(gaps[2:])) * 1e3
            theirs = memcpy_s(4000 * shapes.kv_bytes_per_token) * 1e3
            if i:
                row.ours.append(ours)
                row.reference.append(theirs)
    return row


async def measure_router(url: str, folder: Path, repeats: int) -> Row:
    """TTFT through HTTP against a worker driven over its socket; one sleeps while the other works."""
    row = Row("router, 16 tokens", "ms", [], [], "<= direct + 2 ms", lambda a, b: a <= b + 2)
    async with aiohttp.ClientSession() as session, direct_worker(folder, THREADS) as first_token_s:
        for i in range(20 * repeats):
            line = await stream_completion(session, url, random_ids(16).tolist(), 2)
            direct_s = await first_token_s(random_ids(16))
            if i >= 5:
                row.ours.append(line.ttft_s * 1e3)
                row.reference.append(direct_s * 1e3)
    return row


def measure_start(log: Path, repeats: int) -> Row:
    """Seconds from the command to the first token, with the defaults and the bundled model."""
    row = Row("start to first token", "s", [], [], "<= 8 s", lambda a, b: a <= b)
    for _ in range(repeats):
        started = time.perf_counter()
        with server(BUNDLED_MODEL, "--served-model-name", "bench", log=log) as url:
            asyncio.run(_first_token(url))
            row.ours.append(time.perf_counter() - started)
        row.reference.append(8.0)
    return row


async def _first_token(url: str) -> None:
    async with aiohttp.ClientSession() as session:
        await stream_completion(session, url, [5, 6, 7], 1)


def main() -> None:
    """Run everything and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", choices=sorted(SHAPES), default="small")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    shapes = SHAPES[args.shapes]
    with tempfile.TemporaryDirectory() as name:
        folder, log = Path(name) / "model", Path(name) / "log"
        torch.manual_seed(0)
        config = LlamaConfig(**shapes.config())
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
        reference = Reference(folder)
        gc.collect()
        gc.freeze()  # or this process's collections of torch's objects count as the server's slowness
        common = ("--dtype", "bfloat16", "--served-model-name", "bench")
        with server(folder, "--colocated", "1", "--threads", str(THREADS), *common, log=log) as url:
            rows = asyncio.run(measure_colocated(url, reference, args.repeats))
            rows.append(asyncio.run(measure_router(url, folder, args.repeats)))
        with server(folder, "--prefill", "1", "--decode", "1", *common, log=log) as url:
            rows.append(asyncio.run(measure_handoff(url, shapes, args.repeats)))
        rows.append(measure_start(log, args.repeats))
    print(f"{args.shapes}, bf16, {THREADS} threads, medians of {args.repeats}; torch {torch.__version__}")
    print(f"{'':<22}{'memserve':>10}{'reference':>12} {'unit':<8}{'ratio':>9}   {'floor':<22}")
    for row in rows:
        row.print()
    if args.json:
        data = {row.name: {"unit": row.unit, "ours": row.ours, "reference": row.reference} for row in rows}
        args.json.write_text(json.dumps(data, indent=1))


if __name__ == "__main__":
    main()
