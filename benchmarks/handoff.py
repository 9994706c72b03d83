"""What the hand-off from a prefill to a decode worker adds, by mode, length and state of the machine.

    python benchmarks/handoff.py                              # every mode the command line offers
    python benchmarks/handoff.py --transfer request,chunk --lengths 1024,4096 --repeats 3 --json out.json

The `small` shapes with dummy weights, bf16, one thread a worker. The router runs in this process without
HTTP (its dispatcher and supervisor are the real ones), so that what the workers say can be timed as
it arrives: Prefilled (a prompt's last token was drawn, its KV is on offer), Pulled (the KV is there and
verified), StepOutputs (a decode step's tokens). A row is the median of `--repeats` prompts:

* adds: Prefilled to the first StepOutputs, less the usual gap between two of them; floor: the memcpy of the
  same bytes + 10 ms
* waits: the part of it until the step ends that the decode worker was in at Prefilled, for its other streams:
  no step is broken off, so a new stream waits for half of one on average, whatever is to be handed off
* pulled: Prefilled to Pulled, the messages' hops and the wait for the decode worker's loop included
* copy: the part of the copying that lies after Prefilled; of a copy that began before it `pulled` less
  what mode `request` takes for the hops
* hidden: how much less that is than the whole copy of mode `request` in the same state; floor: 80 %
* http: the gap between a client's first and second token less its usual gap, where it was taken

in three states:

    populated   both mappings of the decode worker backed, as when a server is ready; nothing else runs
    load        two streams decode and prompts of 512 tokens are prefilled, and handed off, without a pause
    cold        their pages punched out before each prompt: the copy faults on both sides, as does its memcpy
"""

from __future__ import annotations

import argparse
import asyncio
import fcntl
import itertools
import json
import mmap
import os
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import get_args

import aiohttp
import numpy as np
from rig import SHAPES, server, stream_completion

from memserve.config import ServeConfig, Transfer, WorkerConfig, WorkerOptions
from memserve.memfd import punch_hole
from memserve.messages import Prefilled, Pulled, Ready, SamplingParams, StepOutputs, ToRouter
from memserve.model_config import load_model_config
from memserve.router.dispatcher import Dispatcher, DispatcherLimits
from memserve.router.events import Abandon, Emit, Event, FromWorker, Refuse, Send, Submit, WorkerUp
from memserve.router.supervision.machine import read_machine
from memserve.router.supervision.memory import plan_workers
from memserve.router.supervision.supervisor import Supervisor

SHAPE = SHAPES["small"]
MAX_MODEL_LEN = 8192 + 1024
STATES = ("populated", "load", "cold")  # the last leaves holes behind, which those before it are not to meet
ADDED_MS = 10.0
HIDDEN = 0.8
OPTIONS = WorkerOptions(threads=1, device_memory="512MiB")
SERVER = (  # the same by the command line
    "--prefill=1 --decode=1 --load-format=dummy --dtype=bfloat16 --served-model-name=bench "
    f"--max-model-len={MAX_MODEL_LEN} --threads={OPTIONS.threads} --device-memory={OPTIONS.device_memory}"
).split()
Ids = np.ndarray


@dataclass(slots=True)
class Heard:
    """What was heard of one request; times of perf_counter."""

    prefilled_at: float = 0.0
    pulled_at: float = 0.0
    pull_ms: float = 0.0
    step_ended_at: float | None = None
    outputs_at: list[float] = field(default_factory=list)


class Router:
    """The dispatcher between a supervisor and `run`, noting when the workers' messages come."""

    def __init__(self, transfer: Transfer) -> None:
        self._dispatcher = Dispatcher(limits=DispatcherLimits(transfer=transfer))
        self._heard: dict[str, Heard] = {}
        self._ends: dict[str, asyncio.Future[None]] = {}
        self._numbers = itertools.count()
        self.supervisor: Supervisor | None = None

    async def run(self, prompt: Ids, max_tokens: int) -> Heard:
        """One greedy request to its end, which is `max_tokens`."""
        request_id = str(next(self._numbers))
        heard = self._heard[request_id] = Heard()
        end = self._ends[request_id] = asyncio.get_running_loop().create_future()
        sampling = SamplingParams(max_tokens=max_tokens, seed=0, temperature=0.0)
        self._feed(Submit(request_id, prompt, sampling))
        try:
            await end
        except asyncio.CancelledError:
            self._feed(Abandon(request_id))
            raise
        finally:
            del self._heard[request_id], self._ends[request_id]
        return heard

    def on_worker_message(self, instance: str, incarnation: int, message: ToRouter) -> None:
        now = time.perf_counter()
        match message:
            case Prefilled() if (heard := self._heard.get(message.request_id)) is not None:
                heard.prefilled_at = now
            case Pulled() if (heard := self._heard.get(message.request_id)) is not None:
                heard.pulled_at, heard.pull_ms = now, message.pull_ms
                assert message.failure is None, message.failure
            case StepOutputs():
                for heard in self._heard.values():
                    if heard.prefilled_at and heard.step_ended_at is None:
                        heard.step_ended_at = now
                for output in message.outputs:
                    if (heard := self._heard.get(output.request_id)) is not None:
                        heard.outputs_at.append(now)
        self._feed(FromWorker(instance, incarnation, message))

    def on_worker_up(self, config: WorkerConfig, incarnation: int, ready: Ready) -> None:
        sizes = {"num_blocks": ready.num_blocks, "block_size": ready.block_size}
        self._feed(
            WorkerUp(config.instance, config.role, incarnation, max_running=config.max_running, **sizes)
        )

    def on_worker_down(self, instance: str, incarnation: int, reason: str) -> None:
        raise RuntimeError(f"{instance} {reason}")

    def on_progress(self, instance: str, stage: str, fraction: float) -> None: ...

    def on_instance_lost(self, instance: str) -> None: ...

    def _feed(self, event: Event) -> None:
        assert self.supervisor is not None
        for action in self._dispatcher.on_event(event, time.monotonic()):
            match action:
                case Send():
                    self.supervisor.send(action.instance, action.message)
                case Emit() if action.output.finish_reason is not None and action.request_id in self._ends:
                    self._ends[action.request_id].set_result(None)
                case Refuse():
                    self._ends[action.request_id].set_exception(action.error)


@dataclass(slots=True)
class Row:
    """One line of the table; every list has one entry a repeat, in ms."""

    transfer: str
    state: str
    num_tokens: int
    memcpy: list[float] = field(default_factory=list)
    adds: list[float] = field(default_factory=list)
    pulled: list[float] = field(default_factory=list)
    copy: list[float] = field(default_factory=list)
    step: list[float] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)
    http: list[float] = field(default_factory=list)

    def add(self, heard: Heard, memcpy_ms: float) -> None:
        step_ms = 1e3 * median(np.diff(heard.outputs_at[1:]))
        pulled_ms = 1e3 * (heard.pulled_at - heard.prefilled_at)
        self.memcpy.append(memcpy_ms)
        self.step.append(step_ms)
        self.adds.append(1e3 * (heard.outputs_at[0] - heard.prefilled_at) - step_ms)
        ended_at = heard.step_ended_at
        is_own = ended_at is None or ended_at >= heard.outputs_at[0]
        self.waits.append(0.0 if is_own or ended_at is None else 1e3 * (ended_at - heard.prefilled_at))
        self.pulled.append(pulled_ms)
        self.copy.append(min(heard.pull_ms, pulled_ms))

    def print(self, whole: Row | None) -> None:
        """`whole`: the row of mode `request` to compare with."""
        memcpy, adds, copy = median(self.memcpy), median(self.adds), median(self.copy)
        if whole is not None and copy >= median(self.pulled):  # it began before Prefilled
            copy = max(0.0, median(self.pulled) - (median(whole.pulled) - median(whole.copy)))
        waits = median(self.waits)
        missed = [f"adds > memcpy + {ADDED_MS:g} ms"] if adds > memcpy + ADDED_MS else []
        hidden = ""
        if self.transfer != "request" and whole is not None:
            share = 1 - copy / median(whole.copy)
            hidden = f"{share:.0%}"
            missed += [f"hides < {HIDDEN:.0%}"] if share < HIDDEN else []
        megabytes = self.num_tokens * SHAPE.kv_bytes_per_token / 1e6
        print(
            f"{self.transfer:<8}{self.state:<10}{self.num_tokens:>7}{megabytes:>7.1f}{memcpy:>8.2f}{adds:>8.2f}{waits:>8.2f}"
            f"{median(self.pulled):>8.2f}{copy:>8.2f}{hidden:>8}{median(self.step):>7.1f}   "
            + ("MISSED: " + ", ".join(missed) if missed else "ok"),
            flush=True,
        )


def random_ids(count: int) -> Ids:
    """Token ids that repeat in no other request."""
    return np.random.default_rng(time.perf_counter_ns()).integers(3, SHAPE.vocab - 1, count).astype(np.int32)


def memcpy_ms(num_bytes: int, *, cold: bool) -> float:
    """A copy between two shared mappings in one go, both populated, or both not."""
    fds = [os.memfd_create(name) for name in ("source", "target")]
    views = []
    for fd in fds:
        os.ftruncate(fd, num_bytes)
        views.append(np.frombuffer(mmap.mmap(fd, num_bytes), dtype=np.uint8))
    if cold:  # the source has content, but not in this mapping; the target is a hole
        for start in range(0, num_bytes, 1 << 20):
            os.pwrite(fds[0], b"\1" * min(1 << 20, num_bytes - start), start)
    else:
        for view in views:
            view[:] = 1
    for fd in fds:
        os.close(fd)
    started = time.perf_counter()
    np.copyto(views[1], views[0])
    return 1e3 * (time.perf_counter() - started)


def punch_arenas() -> None:
    """Take the pages of both pools, in which nothing may be held, out of memory and so of every mapping."""
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # the descriptor of the listing itself
            fd = int(name)
            is_writable = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_RDWR
            if is_writable and os.readlink(f"/proc/self/fd/{fd}").endswith("-arena (deleted)"):
                punch_hole(fd, 0, os.fstat(fd).st_size)


@asynccontextmanager
async def two_workers(folder: Path, transfer: Transfer) -> AsyncIterator[Router]:
    """A prefill and a decode worker behind a router in this process."""
    serve = ServeConfig(
        model=str(folder),
        load_format="dummy",
        dtype="bfloat16",
        prefill=1,
        decode=1,
        max_model_len=MAX_MODEL_LEN,
        transfer=transfer,
        worker=OPTIONS,
    )
    plan = plan_workers(serve, load_model_config(folder), folder, read_machine())
    router = Router(transfer)
    supervisor = router.supervisor = Supervisor(plan, serve, router)
    await supervisor.start()
    try:
        yield router
    finally:
        await supervisor.shutdown()


@asynccontextmanager
async def load(router: Router) -> AsyncIterator[None]:
    """Two streams that decode and one prompt after the other that is prefilled, until the context ends."""

    async def again_and_again(num_tokens: int, max_tokens: int) -> None:
        while True:
            await router.run(random_ids(num_tokens), max_tokens)

    tasks = [asyncio.create_task(again_and_again(*sizes)) for sizes in ((128, 800), (128, 800), (512, 2))]
    await asyncio.sleep(1)
    yield
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await asyncio.sleep(1)  # their cancels reach the workers


async def measure(
    folder: Path,
    transfer: Transfer,
    lengths: Sequence[int],
    repeats: int,
    states: Sequence[str],
    show: Callable[[Row], None],
) -> list[Row]:
    """The rows of one mode, in alternation, so that a slow minute hits all lengths of a state alike; each is
    shown as soon as it is whole.
    """
    rows = [Row(transfer, state, length) for state in states for length in lengths]
    async with two_workers(folder, transfer) as router:
        for length in lengths:  # warms up, and teaches the workers what a step costs
            await router.run(random_ids(length), 4)
        for state in states:
            async with AsyncExitStack() as stack:
                if state == "load":
                    await stack.enter_async_context(load(router))
                for _, row in itertools.product(range(repeats), [row for row in rows if row.state == state]):
                    reference = memcpy_ms(row.num_tokens * SHAPE.kv_bytes_per_token, cold=state == "cold")
                    await asyncio.sleep(0.2)  # the release of the request before has arrived
                    if state == "cold":
                        punch_arenas()
                    row.add(await router.run(random_ids(row.num_tokens), 12), reference)
            for row in rows:
                if row.state == state:
                    show(row)
    return rows


async def measure_http(url: str, rows: Sequence[Row], repeats: int) -> None:
    """What a client of an idle server sees."""
    async with aiohttp.ClientSession() as session:
        await stream_completion(session, url, random_ids(1024).tolist(), 4)
        for _, row in itertools.product(range(repeats), rows):
            gaps = (await stream_completion(session, url, random_ids(row.num_tokens).tolist(), 12)).itls_s
            row.http.append(1e3 * (gaps[0] - median(gaps[2:])))


def main() -> None:
    """Run everything and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--transfer", default=",".join(get_args(Transfer)), help="modes [%(default)s]")
    parser.add_argument(
        "--lengths", default="256,512,1024,2048,4096,8192", help="prompts' tokens [%(default)s]"
    )
    parser.add_argument("--states", default=",".join(STATES), help="[%(default)s]")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no-http", action="store_true", help="leave out what a client sees")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    lengths = [int(length) for length in args.lengths.split(",")]
    rows: list[Row] = []
    whole: dict[tuple[str, int], Row] = {}

    def show(row: Row) -> None:
        if row.transfer == "request":
            whole[row.state, row.num_tokens] = row
        row.print(whole.get((row.state, row.num_tokens)))

    print(f"small, bf16, dummy weights, 1 thread a worker, medians of {args.repeats}, ms")
    print(
        f"{'mode':<8}{'state':<10}{'tokens':>7}{'MB':>7}{'memcpy':>8}{'adds':>8}{'waits':>8}{'pulled':>8}",
        end="",
    )
    print(f"{'copy':>8}{'hidden':>8}{'step':>7}", flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = SHAPE.config() | {"max_position_embeddings": MAX_MODEL_LEN}
        (folder / "config.json").write_text(json.dumps(config))
        for transfer in args.transfer.split(","):
            states = [state for state in STATES if state in args.states.split(",")]
            new = asyncio.run(measure(folder, transfer, lengths, args.repeats, states, show))
            populated = [row for row in new if row.state == "populated"]
            if populated and not args.no_http:
                with server(folder, *SERVER, f"--transfer={transfer}", log=folder / "log") as url:
                    asyncio.run(measure_http(url, populated, args.repeats))
                for row in populated:
                    print(
                        f"{transfer:<8}by HTTP   {row.num_tokens:>7}: {median(row.http):.2f} ms", flush=True
                    )
            rows += new
    if args.json:
        args.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))


if __name__ == "__main__":
    main()
