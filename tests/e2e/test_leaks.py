"""A thousand requests from prefill to decode leave everything as it was: blocks, descriptors, memory; and
the decode worker never computed a prompt again that it could have pulled.

A tenth leaves midway, wherever it may be by then. Memory is looked at after each of several rounds: a leak
grows in every one, while what grows once (a thread's heap, say) does so in one of them. Steps are small,
because the libraries keep something for every shape they have computed: of those there are few here, and a
first round has met them all.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, get_args

import aiohttp
import psutil
import pytest

from memserve.config import Transfer
from tests.e2e.server_process import Server

NUM_WARM_UP = 400
NUM_ROUNDS = 5
REQUESTS_A_ROUND = 200
IN_FLIGHT = 16
BLOCK_SIZE = 4
STEP_TOKENS = 16
# At the boundaries of blocks and of chunks
LENGTHS = (1, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65)
# In a round, by the median; a leak of 10 KB a request would be twice as much
MAX_GROWTH_BYTES = 1_000_000


class Holdings(NamedTuple):
    """What a process holds."""

    num_fds: int
    rss_bytes: int


@dataclass
class Tally:
    """What a round of requests came to. `num_prompt_tokens` is that of the answered ones."""

    num_answered: int = 0
    num_left: int = 0
    num_prompt_tokens: int = 0


async def ask(session: aiohttp.ClientSession, url: str, length: int, rng: random.Random) -> int:
    """One streamed completion; the number of its tokens."""
    num_tokens = rng.choice([2, 3, 5, 18])  # the last crosses a block boundary
    body = {
        "prompt": [rng.randrange(3, 4096) for _ in range(length)],
        "max_tokens": num_tokens,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
    }
    async with session.post(f"{url}/v1/completions", json=body) as answer:
        text = await answer.text()
    assert answer.status == 200 and "[DONE]" in text, text
    return num_tokens


async def run_round(url: str, num_requests: int, seed: int) -> Tally:
    """So many requests, `IN_FLIGHT` at a time."""
    tally, rng = Tally(), random.Random(seed)
    numbers = iter(range(num_requests))

    async def client(session: aiohttp.ClientSession) -> None:
        for number in numbers:
            length = rng.choice(LENGTHS)
            patience_s = rng.uniform(0, 0.1) if number % 10 == 0 else 60
            try:
                async with asyncio.timeout(patience_s):
                    await ask(session, url, length, rng)
            except TimeoutError:
                assert patience_s < 60, "a request hangs"
                tally.num_left += 1  # its connection is closed
            else:
                tally.num_answered += 1
                tally.num_prompt_tokens += length

    async with aiohttp.ClientSession() as session:
        await asyncio.gather(*[client(session) for _ in range(IN_FLIGHT)])
    return tally


def holdings(server: Server) -> dict[str, Holdings]:
    """By process, as soon as the router has closed the connections of its clients."""
    router = psutil.Process(server.process.pid)
    deadline = time.monotonic() + 10
    while any(connection.status == "ESTABLISHED" for connection in router.net_connections("tcp")):
        assert time.monotonic() < deadline, "a connection stays open"
        time.sleep(0.05)
    return {
        f"{process.pid} {process.cmdline()[0].strip()}": Holdings(
            process.num_fds(), process.memory_info().rss
        )
        for process in server.family()
    }


def num_idle_blocks(gauges: dict[str, float], instance: str) -> float:
    """Blocks that no request holds: free, or kept for reuse."""
    return sum(
        gauges[f'memserve_blocks{{instance="{instance}",state="{state}"}}']
        for state in ("free", "historical")
    )


@pytest.mark.parametrize("transfer", get_args(Transfer))
def test_a_thousand_requests_leave_nothing(
    transfer: str, start: Callable[..., Server], random_model: Path
) -> None:
    server = start(
        "--model",
        str(random_model),
        "--dtype=float32",
        "--prefill=1",
        "--decode=1",
        f"--block-size={BLOCK_SIZE}",
        f"--transfer={transfer}",
        f"--prefill-max-batch-tokens={STEP_TOKENS}",  # a long prompt is several chunks
        "--device-memory=32MiB",
    )

    def run(num_requests: int, seed: int) -> tuple[Tally, dict[str, Holdings]]:
        tally = asyncio.run(run_round(server.url, num_requests, seed))
        server.wait_idle()
        server.post("/v1/cache/flush", {})  # what is cached, the router remembers too
        server.wait_idle()
        return tally, holdings(server)

    # 1. warm
    _, held = run(NUM_WARM_UP, seed=0)
    before = server.gauges()
    # 2. a thousand
    rounds = [run(REQUESTS_A_ROUND, seed) for seed in range(1, 1 + NUM_ROUNDS)]
    after = server.gauges()
    num_answered = sum(tally.num_answered for tally, _ in rounds)
    assert num_answered >= 0.85 * NUM_ROUNDS * REQUESTS_A_ROUND
    assert sum(tally.num_left for tally, _ in rounds) > 0

    # 3. every prompt was pulled, and hardly any of it computed a second time
    def grown(name: str) -> float:
        return after[name] - before[name]

    computed_again = grown('memserve_computed_tokens_total{instance="decode-0",phase="prefill"}')
    assert grown('memserve_computed_tokens_total{instance="prefill-0",phase="prefill"}') > 0
    assert grown("memserve_pulls_total") >= num_answered
    assert grown("memserve_pulled_tokens_total") + computed_again >= sum(
        tally.num_prompt_tokens for tally, _ in rounds
    )
    assert computed_again <= BLOCK_SIZE * grown("memserve_pulls_total")
    assert grown("memserve_pull_failures_total") == 0
    assert grown("memserve_replays_total") == 0
    # 4. the same processes hold what they held
    still_held = rounds[-1][1]
    assert still_held.keys() == held.keys() and len(held) >= 3
    for title in held:
        assert still_held[title].num_fds == held[title].num_fds, title
        sizes = [held[title].rss_bytes, *[now[title].rss_bytes for _, now in rounds]]
        growths = [b - a for a, b in zip(sizes, sizes[1:], strict=False)]
        print(f"{transfer}: {title}: {[round(growth / 1e6, 2) for growth in growths]} MB")
        assert statistics.median(growths) < MAX_GROWTH_BYTES, (title, growths)
    for instance in ("prefill-0", "decode-0"):
        assert num_idle_blocks(before, instance) == num_idle_blocks(after, instance) > 0
