"""Real workers killed and stopped at random under load: no request fails, no token is lost or doubled.

24 clients stream greedy and seeded completions without a pause; meanwhile workers get SIGKILL or SIGSTOP.
Every answer must equal the one of an undisturbed run (float32). Four events here; `make chaos` runs thirty.
How long clients waited around them is printed (`gap_report.py`), and written to CHAOS_JSON if that is set.
CHAOS_TRANSPORT is the server's `--transport`.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import aiohttp
import psutil

from tests.e2e.gap_report import Event, Stream, gaps_by_kind, read_replays
from tests.e2e.server_process import Server

NUM_CLIENTS = 24
NUM_EVENTS = int(os.environ.get("CHAOS_EVENTS", "4"))
PING_DEADLINE_S = 3.0
EVENT_INTERVAL_S = 2.0
ROLES = ("memserve: prefill-", "memserve: decode-")

Body = dict[str, object]


@dataclass
class Tally:
    """What the clients saw."""

    num_answers: int = 0
    problems: list[str] = field(default_factory=list)
    streams: list[Stream] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)


def make_bodies() -> list[Body]:
    """One a client: mixed lengths and ways to draw."""
    rng = random.Random(11)
    bodies: list[Body] = []
    for i in range(NUM_CLIENTS):
        body: Body = {
            "prompt": [rng.randrange(3, 4096) for _ in range(rng.choice([5, 16, 17, 60, 200, 500]))],
            "max_tokens": rng.choice([20, 60, 120]),
            "ignore_eos": True,
            "return_token_ids": True,
            "stream": True,
            "temperature": 0,
        }
        if i % 2:
            body.update(temperature=0.9, top_p=0.95, seed=i, frequency_penalty=0.3)
        bodies.append(body)
    return bodies


async def stream(
    session: aiohttp.ClientSession, url: str, body: Body, tally: Tally, client: int
) -> list[int] | None:
    """The ids of one answer; None, and a problem noted, if it is not a whole one."""
    ids: list[int] = []
    finish: str | None = None
    request_id = f"c{client}-{len(tally.streams)}"
    times = [time.time()]
    tally.streams.append(Stream(request_id, client, times))
    headers = {"x-request-id": request_id}
    async with session.post(f"{url}/v1/completions", json=body, headers=headers) as answer:
        if answer.status != 200:
            tally.problems.append(f"{answer.status}: {await answer.text()}")
            return None
        async for line in answer.content:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            if "error" in event:
                tally.problems.append(str(event))
                return None
            choice = event["choices"][0]
            if choice.get("token_ids"):
                times.append(time.time())
                ids.extend(choice["token_ids"])
            finish = choice["finish_reason"] or finish
    if finish != "length" or len(ids) != body["max_tokens"]:
        tally.problems.append(f"{len(ids)} of {body['max_tokens']} tokens, finish_reason {finish}")
        return None
    return ids


async def client(
    url: str, number: int, body: Body, expected: list[int], tally: Tally, stop: asyncio.Event
) -> None:
    """Ask for the same again and again until told to stop."""
    timeout = aiohttp.ClientTimeout(total=90)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        while not stop.is_set():
            ids = await stream(session, url, body, tally, number)
            tally.num_answers += 1
            if ids is not None and ids != expected:
                tally.problems.append(f"other tokens than undisturbed: {ids} instead of {expected}")


def workers_of(server: Server) -> list[psutil.Process]:
    """Those that have a title: a process has none in its first moments."""
    children = psutil.Process(server.process.pid).children()
    return [child for child in children if any(role in title_of(child) for role in ROLES)]


def title_of(process: psutil.Process) -> str:
    """What `ps` shows; nothing of one that has just died."""
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""


async def disturb(server: Server, rng: random.Random, tally: Tally) -> None:
    """Kill or stop one worker."""
    while not (workers := workers_of(server)):
        await asyncio.sleep(0.1)
    victim = rng.choice(workers)
    number = rng.choice([signal.SIGKILL, signal.SIGSTOP])
    print(f"{number.name} to {victim.pid}")
    tally.events.append(Event(number.name, time.time()))
    victim.send_signal(number)
    await asyncio.sleep(EVENT_INTERVAL_S if number is signal.SIGKILL else PING_DEADLINE_S + EVENT_INTERVAL_S)


def report_gaps(server: Server, bodies: list[Body], calm: Tally, tally: Tally) -> None:
    """Print, and write if asked to, how long clients waited. The first token alone, undisturbed, tells the
    speed of a prefill.
    """
    speeds = [
        (stream.times[1] - stream.times[0]) / len(body["prompt"])  # type: ignore[arg-type]
        for body, stream in zip(bodies, calm.streams, strict=True)
        if len(body["prompt"]) >= 200  # type: ignore[arg-type]
    ]
    replays = read_replays(server.log.read_text(errors="replace"))
    kinds = gaps_by_kind(tally.events, tally.streams, replays, statistics.median(speeds))
    for gaps in kinds:
        print("\n".join(gaps.lines()))
    if path := os.environ.get("CHAOS_JSON"):
        Path(path).write_text(json.dumps([asdict(gaps) for gaps in kinds], indent=1))


def test_no_request_fails(start: Callable[..., Server], random_model: Path) -> None:
    server = start(
        "--model",
        str(random_model),
        "--prefill=2",
        "--decode=2",
        "--dtype=float32",
        "--transfer=layer",
        "--policy",
        os.environ.get("CHAOS_POLICY", "prompt-tree"),
        f"--transport={os.environ.get('CHAOS_TRANSPORT', 'auto')}",
        "--max-batch-tokens=64",  # short chunks: pulls ahead are under way at most moments
        "--max-running=24",
        f"--ping-deadline-s={PING_DEADLINE_S}",
    )
    bodies = make_bodies()

    async def run() -> tuple[Tally, Tally]:
        # 1. undisturbed
        calm = Tally()
        async with aiohttp.ClientSession() as session:
            expected = [await stream(session, server.url, body, calm, i) for i, body in enumerate(bodies)]
        assert not calm.problems
        # 2. disturbed
        tally, stop, rng = Tally(), asyncio.Event(), random.Random(5)
        clients = [
            asyncio.create_task(client(server.url, i, body, ids or [], tally, stop))
            for i, (body, ids) in enumerate(zip(bodies, expected, strict=True))
        ]
        for _ in range(NUM_EVENTS):
            await asyncio.sleep(rng.uniform(0.5, 1.5))
            await disturb(server, rng, tally)
        stop.set()
        await asyncio.gather(*clients)
        return calm, tally

    calm, tally = asyncio.run(run())
    gauges = server.gauges()
    print(f"{tally.num_answers} answers, {gauges['memserve_restarts_total']:.0f} restarts, ", end="")
    print(f"{gauges['memserve_replays_total']:.0f} replays")
    report_gaps(server, bodies, calm, tally)
    assert tally.problems == []
    assert tally.num_answers >= NUM_CLIENTS
    # a replacement that is hit before it is ready is not counted as one
    assert gauges["memserve_restarts_total"] >= NUM_EVENTS // 2
    assert gauges["memserve_replays_total"] > 0
    server.wait_idle(timeout_s=30)
