"""The endpoints beside generation, of a real server: cancelling by id, the list of workers."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Callable, Iterator

import pytest

from tests.e2e.server_process import Server


@pytest.fixture(scope="module")
def server(start: Callable[..., Server]) -> Server:
    return start("--prefill", "1", "--decode", "1")


def events(response: Iterator[bytes]) -> Iterator[dict[str, list[dict[str, object]]]]:
    for line in response:
        if line.startswith(b"data: {"):
            yield json.loads(line.removeprefix(b"data: "))


@pytest.mark.parametrize("num_seen", [0, 20])
def test_a_cancel_ends_the_stream_and_gives_every_block_back(server: Server, num_seen: int) -> None:
    body = {"prompt": "Once upon a time", "max_tokens": 400, "ignore_eos": True, "stream": True}
    request = urllib.request.Request(
        f"{server.url}/v1/completions",
        json.dumps(body).encode(),
        {"content-type": "application/json", "x-request-id": f"mine-{num_seen}"},
    )
    # 1. a stream is under way: at its handoff, or decoding
    with urllib.request.urlopen(request, timeout=60) as response:
        stream = events(response)
        for _ in range(num_seen):
            next(stream)
        # 2. another client cancels it
        status, answer = server.post(f"/v1/requests/cmpl-mine-{num_seen}/cancel", {})
        assert (status, answer["status"]) == (200, "cancelled")
        # 3. the stream ends properly
        choices = [choice for event in stream for choice in event["choices"]]
        assert choices[-1]["finish_reason"] == "abort"
        assert len(choices) < 400
    # 4. nothing is left of it
    server.wait_idle()
    assert server.post(f"/v1/requests/mine-{num_seen}/cancel", {})[0] == 404


def test_the_list_of_workers(server: Server) -> None:
    with urllib.request.urlopen(f"{server.url}/v1/workers", timeout=60) as response:
        rows = json.load(response)["data"]
    assert [(row["id"], row["role"], row["state"]) for row in rows] == [
        ("prefill-0", "prefill", "ready"),
        ("decode-0", "decode", "ready"),
    ]
    for row in rows:
        (way,) = row["pulls_from"].values()
        assert way == "shm"
        load = row["load"]
        held = load["free_blocks"] + load["active_blocks"] + load["historical_blocks"]
        assert load["num_blocks"] == held > 0
        assert row["restarts"] == row["incarnation"] == 0
