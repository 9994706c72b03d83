"""More than the workers hold: requests wait in a bounded queue, the rest is told at once to come again.

Prefill worker, decode worker or both have room for a request or two. Whoever is taken in gets the tokens it
gets alone; whoever is not (429, Retry-After) has cost the workers nothing. A client that does not read keeps
nobody else waiting, and nothing on any worker.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import random
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import aiohttp
import pytest

from tests.e2e.server_process import Server

MAX_WAITING = 8
BURST = 24
SMALL_DECODE = ("--decode-max-running=2", "--decode-device-memory=512KiB")
SMALL_PREFILL = ("--prefill-max-running=1", "--prefill-device-memory=512KiB")
WAITING = 'memserve_requests{state="waiting"}'

Body = dict[str, object]


class Reply(NamedTuple):
    """A whole answer."""

    status: int
    retry_after: str | None
    content: dict[str, object]


def make_body(number: int) -> Body:
    """Prompts about block boundaries, greedy and drawn."""
    rng = random.Random(number)
    length = rng.choice([97, 111, 112, 113, 128, 129])
    drawn = {"temperature": 0.9, "seed": number} if number % 2 else {"temperature": 0}
    return {
        "prompt": [rng.randrange(3, 4096) for _ in range(length)],
        "max_tokens": rng.choice([24, 32, 40]),
        "ignore_eos": True,
        "return_token_ids": True,
        **drawn,
    }


def num_computed(gauges: dict[str, float], instance: str) -> float:
    """Tokens that an instance has computed, of prompts and of answers."""
    name = "memserve_computed_tokens_total"
    return sum(gauges[f'{name}{{instance="{instance}",phase="{phase}"}}'] for phase in ("prefill", "decode"))


def num_replies(gauges: dict[str, float], status: int) -> float:
    """Completions answered so, to the last byte."""
    name = "memserve_http_requests_total"
    return gauges.get(f'{name}{{endpoint="/v1/completions",status="{status}"}}', 0.0)


def token_ids(content: dict[str, object]) -> object:
    return content["choices"][0]["token_ids"]  # type: ignore[index]


async def send_at_once(url: str, bodies: list[Body]) -> list[Reply]:
    """The answer to each."""

    async def send(session: aiohttp.ClientSession, body: Body) -> Reply:
        async with session.post(f"{url}/v1/completions", json=body) as answer:
            return Reply(answer.status, answer.headers.get("Retry-After"), await answer.json())

    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(60)) as session:
        return await asyncio.gather(*[send(session, body) for body in bodies])


async def watch_peaks(server: Server, work: asyncio.Future[list[Reply]]) -> dict[str, float]:
    """The highest value of every sample of /metrics that was seen before `work` was done."""
    peaks: dict[str, float] = {}
    while not work.done():
        for name, value in (await asyncio.to_thread(server.gauges)).items():
            peaks[name] = max(value, peaks.get(name, 0.0))
        await asyncio.wait([work], timeout=0.03)
    return peaks


@pytest.mark.parametrize(
    "options",
    [
        (*SMALL_DECODE, "--transfer=request"),
        (*SMALL_PREFILL, "--transfer=chunk"),
        (*SMALL_DECODE, *SMALL_PREFILL, "--transfer=chunk"),
    ],
    ids=["decode full", "prefill full", "both full"],
)
def test_a_burst_is_queued_or_refused(
    options: tuple[str, ...], start: Callable[..., Server], random_model: Path
) -> None:
    server = start(
        "--model",
        str(random_model),
        "--dtype=float32",
        "--prefill=1",
        "--decode=1",
        "--max-model-len=192",
        "--max-batch-tokens=64",
        f"--max-waiting={MAX_WAITING}",
        *options,
    )
    bodies = [make_body(number) for number in range(BURST)]

    async def burst() -> tuple[list[Reply], dict[str, float]]:
        work = asyncio.ensure_future(send_at_once(server.url, bodies))
        peaks = await watch_peaks(server, work)
        return await work, peaks

    # 1. more at once than there is room for
    before = server.gauges()
    replies, peaks = asyncio.run(burst())
    server.wait_idle()
    after = server.gauges()
    taken = [i for i, reply in enumerate(replies) if reply.status == 200]
    refused = [reply for reply in replies if reply.status != 200]
    # 2. the queue was used to its bound, and not beyond
    assert len(taken) > MAX_WAITING and refused
    assert 0 < peaks[WAITING] <= MAX_WAITING
    for option in options:
        if "max-running" in option:
            role, most = option.removeprefix("--").split("-")[0], float(option.split("=")[1])
            assert peaks[f'memserve_instance_requests{{instance="{role}-0",state="running"}}'] <= most
    # 3. who was refused knows when to come again
    for reply in refused:
        assert reply.status == 429 and reply.retry_after is not None and 1 <= int(reply.retry_after) <= 60
        assert reply.content["error"]["type"] == "rate_limit_error"  # type: ignore[index]
    assert num_replies(after, 429) - num_replies(before, 429) == len(refused)
    # 4. and has cost no work: what was computed is each prompt once, and each token but the first
    num_prompt_tokens = sum(len(bodies[i]["prompt"]) for i in taken)  # type: ignore[arg-type,misc]
    num_drawn = sum(bodies[i]["max_tokens"] - 1 for i in taken)  # type: ignore[operator,misc]
    assert num_computed(after, "prefill-0") - num_computed(before, "prefill-0") == num_prompt_tokens
    assert num_computed(after, "decode-0") - num_computed(before, "decode-0") == num_drawn
    # 5. the others have what they have alone; those refused are as welcome as before
    for i in taken:
        assert token_ids(replies[i].content) == token_ids(server.post("/v1/completions", bodies[i])[1]), i
    assert server.post("/v1/completions", bodies[replies.index(refused[0])])[0] == 200
    server.wait_idle()


class Reader:
    """A client that asks for a stream and reads nothing of it until it is told to."""

    def __init__(self, server: Server, body: Body) -> None:
        address = urlsplit(server.url)
        assert address.hostname is not None and address.port is not None
        self._sock = socket.socket()
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)  # the least there is, about 2 KB
        self._sock.settimeout(60)
        self._sock.connect((address.hostname, address.port))
        data = json.dumps({**body, "stream": True}).encode()
        head = (
            f"POST /v1/completions HTTP/1.1\r\nhost: {address.netloc}\r\ncontent-type: application/json\r\n"
        )
        self._sock.sendall(f"{head}connection: close\r\ncontent-length: {len(data)}\r\n\r\n".encode() + data)

    def read(self) -> dict[int, list[int]]:
        """All of the stream: the token ids of every choice."""
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        ids: dict[int, list[int]] = {}
        with self._sock, http.client.HTTPResponse(self._sock, method="POST") as answer:
            answer.begin()
            lines = answer.read().split(b"\n\n")
        assert answer.status == 200 and b"data: [DONE]" in lines, lines[-1]
        for line in lines:
            if line.startswith(b"data: {"):
                for choice in json.loads(line[6:])["choices"]:
                    ids.setdefault(choice["index"], []).extend(choice.get("token_ids") or [])
        return ids


def test_slow_readers_keep_nobody_waiting(start: Callable[..., Server], random_model: Path) -> None:
    server = start(
        "--model",
        str(random_model),
        "--dtype=float32",
        "--prefill=1",
        "--decode=1",
        "--max-model-len=1024",
        "--decode-max-running=4",
    )
    # The echo's log-probabilities are megabytes: more than sockets hold for a reader that does not read
    slow_body: Body = {
        **make_body(1),
        "prompt": [random.Random(9).randrange(3, 4096) for _ in range(900)],
        "n": 4,
        "echo": True,
        "logprobs": 20,
    }
    # 1. alone
    quick_bodies = [make_body(number) for number in range(8)]
    expected = [token_ids(server.post("/v1/completions", body)[1]) for body in quick_bodies]
    expected_slow = Reader(server, slow_body).read()
    server.wait_idle()
    before = server.gauges()
    # 2. two who do not read have all seats of the decode worker, and then none
    slow = [Reader(server, slow_body) for _ in range(2)]
    deadline = time.monotonic() + 30
    while server.gauges()["memserve_pulls_total"] < before["memserve_pulls_total"] + 2 * 4:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    server.wait_idle()
    # 3. beside them others come and go
    quick = [Reader(server, body) for body in quick_bodies]
    assert [reader.read()[0] for reader in quick] == expected
    num_new = num_replies(server.gauges(), 200) - num_replies(before, 200)
    assert num_new == len(quick_bodies), "the slow readers were not slow"
    # 4. nothing of theirs is lost
    for reader in slow:
        assert reader.read() == expected_slow
    assert [len(ids) for ids in expected_slow.values()] == [slow_body["max_tokens"]] * 4
    server.wait_idle()
