"""The router alone: what it adds to a request, how many it takes, how many tokens it streams.

    python benchmarks/router.py [--layout colocated] [--json FILE] [--tokenizer FOLDER]

The complete router process (HTTP, tokenizer, dispatcher, prompt trees, supervisor) has the first core to
itself; workers that compute nothing (`instant_worker.py`) and the load generator (`raw_client.py`) share the
last one. Prompts are 1.7 KB of words, no two alike.

* latency: one request at a time, from its sending to its answer (one token) or to the first event of a
  stream; and what of it the router adds: all but the median that the same takes through a bare server, which
  tokenises the prompt, passes it to the same worker and answers (`bare_server.py`).
* requests/s: 16 connections, one token each.
* tokens/s: 64-token streams, of a worker that draws `--tokens-per-s` in steps of one token a stream. As long
  as the router keeps up, a token is an event; where it lags, tokens that have gathered share one, so the
  figure counts only beside the number of tokens an event.

`nothing` is a server that answers at once: what the client can do. Beside each figure: processor time of the
server's process, all threads, which other processes do not disturb as much, and what share of a core it and
the client had. Needs two cores, and nothing else on them.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import uvloop
from bare_server import BareConnection, BareWorker, NothingConnection
from raw_client import Answer, request_bytes, run_requests
from rich.console import Console
from rig import BUNDLED_MODEL, SHAPES, free_port, wait_ready

from memserve.config import ServeConfig, WorkerOptions
from memserve.router.app import bind, resolve, serve
from memserve.router.supervision.supervisor import Supervisor
from memserve.router.text.tokenizer import Tokenizer

PROMPT_CHARS = 1700
STREAM_TOKENS = 64
WORDS = """
the of and to in is that it was for on are with as they be at one have this from or had by hot but
some what there we can out other were all your when up use word how said an each she which do their
time if will way about many then them would write like so these her long make thing see him two has
look more day could go come did my sound no most number who over know water than call first people
may down side been now find any new work part take get place made live where after back little only
round man year came show every good me give our under name very through just form much great think
say help low line before turn cause same mean differ move right boy old too does tell sentence set
three want air well also play
""".split()  # noqa: SIM905


def prompts(count: int, seed: int) -> list[str]:
    """Texts of PROMPT_CHARS characters, no two alike."""
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=500))[:PROMPT_CHARS] for _ in range(count)]


def bodies(texts: Sequence[str], max_tokens: int, *, stream: bool) -> list[bytes]:
    """Requests for their completion."""
    return [
        request_bytes("/v1/completions", {"prompt": text, "max_tokens": max_tokens, "stream": stream})
        for text in texts
    ]


class Cpu:
    """Processor time of a process from now on, all threads, by the kernel's clock of it."""

    def __init__(self, pid: int) -> None:
        self._clock = (~pid << 3) | 2  # clock_getcpuclockid(3)
        self._started_s = time.clock_gettime(self._clock)

    def used_s(self) -> float:
        """Until now."""
        return time.clock_gettime(self._clock) - self._started_s


class Cost(NamedTuple):
    """What a run took: processor of both sides, and time."""

    server_s: float
    client_s: float
    wall_s: float

    def each(self, count: int) -> tuple[float, float, float]:
        """The server's microseconds for each of so many; the shares of a core that both had."""
        return self.server_s / count * 1e6, self.server_s / self.wall_s, self.client_s / self.wall_s


# --- the router process ---


@dataclass(frozen=True)
class Server:
    """What a process of this file is to be, on the first core: a router, or what it is held against."""

    kind: str
    folder: Path
    port: int
    tokenizer: Path
    tokens_per_s: float
    cpus: Sequence[int]

    def run(self) -> int:
        """Serve until SIGINT; the exit status."""
        os.sched_setaffinity(0, {self.cpus[0]})
        if self.kind in ("nothing", "bare"):
            uvloop.run(self._serve_bare())
            return 0
        found = resolve(self._config())
        with bind("127.0.0.1", self.port) as sock:
            work = serve(found, sock, Console(stderr=True), worker_command=self._worker_command())
            return uvloop.run(work)

    async def _serve_bare(self) -> None:
        loop, stopped = asyncio.get_running_loop(), asyncio.Event()
        loop.add_signal_handler(signal.SIGINT, stopped.set)
        if self.kind == "nothing":
            async with await loop.create_server(NothingConnection, "127.0.0.1", self.port):
                await stopped.wait()
            return
        found, worker = resolve(self._config()), BareWorker()
        supervisor = Supervisor(found.plan, found.config, worker, command=self._worker_command())
        worker.send = supervisor.send
        await supervisor.start()
        try:
            factory = partial(BareConnection, worker, found.model.tokenizer)
            async with await loop.create_server(factory, "127.0.0.1", self.port):
                await stopped.wait()
        finally:
            await supervisor.shutdown()

    def _config(self) -> ServeConfig:
        is_split = self.kind == "disaggregated"
        return ServeConfig(
            model=str(self.folder),
            load_format="dummy",
            tokenizer=str(self.tokenizer),
            device="cpu",
            calibration="off",
            prefill=1 if is_split else None,
            decode=1 if is_split else None,
            colocated=None if is_split else 1,
            max_model_len=4096,
            worker=WorkerOptions(device_memory="1GiB", threads=1, max_running=256),
            port=self.port,
            log_level="warning",
        )

    def _worker_command(self) -> tuple[str, ...]:
        program = str(Path(__file__).with_name("instant_worker.py"))
        options = ("--cpu", str(self.cpus[-1]), "--tokens-per-s", str(self.tokens_per_s))
        return (sys.executable, program, *options)


@contextmanager
def started(folder: Path, *options: str) -> Iterator[tuple[int, int]]:
    """A server of this file as a process of its own; its port and its pid."""
    port, log = free_port(), folder / "server.log"
    command = [sys.executable, __file__, "--serve-on", str(port), "--folder", str(folder), *options]
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
    try:
        wait_ready(f"http://127.0.0.1:{port}", process, log)
        yield port, process.pid
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if text := log.read_text(errors="replace").strip():
            print(text[-2000:], file=sys.stderr)


# --- measurements ---


@dataclass(frozen=True)
class Row:
    """One figure beside its floor. `cpu_us`: of the router, for each of what the figure counts."""

    name: str
    value: float
    unit: str
    floor: str
    is_met: bool | None
    cpu_us: float
    router_cpu: float
    client_cpu: float

    def print(self) -> None:
        """A line of the table."""
        verdict = {True: "ok", False: "MISSED", None: ""}[self.is_met]
        shares = f"{self.cpu_us:>10.1f}{self.router_cpu:>9.0%}{self.client_cpu:>8.0%}"
        print(
            f"{self.name:<44}{self.value:>10.3f} {self.unit:<4}{self.floor:>9} {verdict:<8}{shares}",
            flush=True,
        )


def percentile(values: Sequence[float], share: float) -> float:
    """Of sorted values."""
    return values[min(len(values) - 1, int(len(values) * share))]


class Bench:
    """Measurements on one server."""

    def __init__(self, server: tuple[int, int], repeats: int = 1) -> None:
        self._port, self._pid = server
        self._repeats = repeats
        self._seed = 0
        self.rows: list[Row] = []

    async def latency(self, name: str, count: int, bare_ms: float | None, *, stream: bool = False) -> float:
        """One request at a time; the median. `bare_ms`: that of the bare server."""
        await self._run(bodies(self._texts(100), 1, stream=stream), 1)
        answers, cost = await self._run(bodies(self._texts(count), 1, stream=stream), 1)
        times = sorted(1e3 * ((a.first_at if stream else a.ended_at) - a.sent_at) for a in answers)
        for share, floor_ms in ((0.5, 0.5), (0.99, 1.5)):
            took_ms = percentile(times, share)
            self._add(Row(f"{name}, p{100 * share:.0f}", took_ms, "ms", "", None, *cost.each(count)))
            if bare_ms is not None:
                added_ms = took_ms - bare_ms
                verdict = (f"<= {floor_ms}", added_ms <= floor_ms)
                self._add(Row("    adds to the bare server's", added_ms, "ms", *verdict, *cost.each(count)))
        return percentile(times, 0.5)

    async def requests(self, count: int, concurrency: int, *, has_floor: bool = True) -> None:
        """As many as it takes; the best of the repeats, as others on the machine only take away."""
        rows = []
        for _ in range(self._repeats):
            _, cost = await self._run(bodies(self._texts(count), 1, stream=False), concurrency)
            rate = count / cost.wall_s
            floor = (">= 1000", rate >= 1000) if has_floor else ("", None)
            rows.append(Row(f"requests, {concurrency} at a time", rate, "/s", *floor, *cost.each(count)))
        self._add(max(rows, key=lambda row: row.value))

    async def tokens(self, num_streams: int, concurrency: int) -> None:
        """64-token streams; the best of the repeats."""
        rows = []
        for _ in range(self._repeats):
            short = [" ".join(text.split()[:8]) for text in self._texts(num_streams)]
            answers, cost = await self._run(bodies(short, STREAM_TOKENS, stream=True), concurrency)
            count = num_streams * STREAM_TOKENS
            num_events = sum(answer.num_events - 2 for answer in answers)  # the end, and [DONE]
            rate = count / cost.wall_s
            name = f"tokens, {concurrency} streams, {count / num_events:.2f} an event"
            rows.append(Row(name, rate, "/s", ">= 20000", rate >= 20_000, *cost.each(count)))
        self._add(max(rows, key=lambda row: row.value))

    async def _run(self, requests: Sequence[bytes], concurrency: int) -> tuple[list[Answer], Cost]:
        client, server = Cpu(os.getpid()), Cpu(self._pid)
        started_s = time.perf_counter()
        answers = await run_requests(self._port, requests, concurrency)
        wall_s = time.perf_counter() - started_s
        return answers, Cost(server.used_s(), client.used_s(), wall_s)

    def _texts(self, count: int) -> list[str]:
        """Prompts that were not sent before."""
        self._seed += 1
        return prompts(count, self._seed)

    def _add(self, row: Row) -> None:
        row.print()
        self.rows.append(row)


def measure_tokenising(tokenizer: Tokenizer, core: int, texts: Sequence[str]) -> float:
    """p50 in ms, on the router's core."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    times = []
    for text in texts:
        started = time.perf_counter()
        tokenizer.encode(text)
        times.append(time.perf_counter() - started)
    os.sched_setaffinity(0, before)
    return statistics.median(times) * 1e3


async def measure(kind: str, server: tuple[int, int], bare_ms: float, quick: bool) -> tuple[list[Row], float]:
    """All that is measured of one kind of server; the median of its latency."""
    bench = Bench(server, repeats=1 if quick else 3)
    count = 300 if quick else 2000
    if kind in ("nothing", "bare"):
        p50_ms = await bench.latency("answer", count, None)
        await bench.requests(4 * count, 16, has_floor=False)
        return bench.rows, p50_ms
    p50_ms = await bench.latency("whole answer", count, bare_ms)
    await bench.latency("first event of a stream", count, bare_ms, stream=True)
    await bench.requests(2 * count, 16)
    for concurrency in (16, 64, 256):
        await bench.tokens(concurrency * (4 if quick else 12), concurrency)
    return bench.rows, p50_ms


def main() -> None:
    """Measure, or be a server."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--layout", choices=["colocated", "disaggregated", "both"], default="both")
    parser.add_argument("--tokenizer", type=Path, default=BUNDLED_MODEL)
    parser.add_argument("--tokens-per-s", type=float, default=22_000.0, help="of the worker; 0 = no bound")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--serve-on", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--kind", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    cpus = sorted(os.sched_getaffinity(0))
    if args.serve_on is not None:
        server = Server(args.kind, args.folder, args.serve_on, args.tokenizer, args.tokens_per_s, cpus)
        sys.exit(server.run())
    if len(cpus) < 2:
        parser.error("two cores are needed")
    tokenise_ms, bare_ms = measure_tokenising(Tokenizer.load(args.tokenizer), cpus[0], prompts(500, 0)), 0.0
    results: dict[str, object] = {"tokenise_ms": tokenise_ms}
    print(f"tokenising {PROMPT_CHARS} characters: {tokenise_ms:.3f} ms, p50")
    layouts = ["colocated", "disaggregated"] if args.layout == "both" else [args.layout]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "config.json").write_text(json.dumps(SHAPES["small"].config()))
        for kind in ("nothing", "bare", *layouts):
            print(f"{kind:<44}{'':>14}{'floor':>10}{'':<8}{'cpu us':>10}{'server':>9}{'client':>8}")
            options = ("--kind", kind, "--tokenizer", str(args.tokenizer))
            with started(folder, *options, "--tokens-per-s", str(args.tokens_per_s)) as process:
                os.sched_setaffinity(0, {cpus[-1]})
                rows, p50_ms = uvloop.run(measure(kind, process, bare_ms, args.quick))
                os.sched_setaffinity(0, cpus)
            bare_ms = p50_ms if kind == "bare" else bare_ms
            results[kind] = [asdict(row) for row in rows]
    if args.json is not None:
        args.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
