"""The global scheduler with real processes: prompts go to who has them, and say so."""

from __future__ import annotations

import json
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.server_process import Server


@pytest.fixture(scope="module")
def server(start: Callable[..., Server], random_model: Path) -> Server:
    return start(
        "--model",
        str(random_model),
        "--prefill=2",
        "--decode=2",
        "--dtype=float32",
        "--threads=1",
        "--policy",
        "prompt-tree",
        "--max-model-len=800",
    )


def ask(server: Server, prompt: list[int], max_tokens: int = 1, **headers: str) -> tuple[dict, dict]:
    """Headers and first choice of a greedy completion."""
    body = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
    given = {"content-type": "application/json", **{k.replace("_", "-"): v for k, v in headers.items()}}
    request = urllib.request.Request(f"{server.url}/v1/completions", json.dumps(body).encode(), given)
    with urllib.request.urlopen(request, timeout=90) as answer:
        return dict(answer.headers), json.load(answer)["choices"][0]


def prompt_of(seed: int, num_tokens: int) -> list[int]:
    return [5 + (seed * 7919 + 31 * i * (seed + 1)) % 4000 for i in range(num_tokens)]


def cached(headers: dict) -> dict[str, int]:
    pairs = headers["x-memserve-cached"].split(";")[0].split(", ")
    return {source: int(count) for source, count in (pair.split("=") for pair in pairs)}


def test_prompts_go_to_who_has_them(server: Server) -> None:
    homes = {}
    for seed in range(6):
        headers, _ = ask(server, prompt_of(seed, 400))
        assert headers["x-memserve-policy"] == "prompt-tree" and cached(headers)["device"] == 0
        homes[seed] = headers["x-memserve-prefill"]
    assert set(homes.values()) == {"prefill-0", "prefill-1"}, "cold prompts are spread"
    for seed in range(6):
        headers, _ = ask(server, prompt_of(seed, 400) + prompt_of(99 + seed, 20))
        assert headers["x-memserve-prefill"] == homes[seed]
        assert cached(headers) == {"device": 400, "host": 0, "pulled": 0}


@pytest.mark.parametrize("policy", ["random", "round-robin", "least-load", "session", "prompt-tree"])
def test_any_policy_by_header_with_the_same_answer(server: Server, policy: str) -> None:
    prompt = prompt_of(50, 200)
    _, expected = ask(server, prompt, 12)
    for n in range(2):
        headers, choice = ask(
            server, prompt, 12, x_memserve_policy=policy, x_session_id="me", x_request_id=f"{policy}-{n}"
        )
        assert choice["text"] == expected["text"] and headers["x-memserve-policy"] == policy
        with urllib.request.urlopen(f"{server.url}/v1/requests/{policy}-{n}", timeout=10) as answer:
            (story,) = json.load(answer)["choices"]
        (decision,) = story["decisions"]
        chosen = [row["instance"] for row in decision["prefill_candidates"] if row["chosen"]]
        assert chosen == [headers["x-memserve-prefill"]]
        happened = [event["event"] for event in story["timeline"] if event["event"] != "handed_off"]
        assert happened == ["submitted", "placed", "computing", "first_token", "finished"]
        times = [event["at_ms"] for event in story["timeline"]]
        assert times == sorted(times)


def workers(server: Server) -> dict[str, int]:
    """Incarnations of those that are ready."""
    with urllib.request.urlopen(f"{server.url}/v1/workers", timeout=10) as answer:
        rows = json.load(answer)["data"]
    return {row["id"]: row["incarnation"] for row in rows if row["state"] == "ready"}


def test_nothing_is_believed_of_a_worker_that_died(server: Server) -> None:
    prompt = prompt_of(77, 400)
    first, expected = ask(server, prompt, 8)
    home, before = first["x-memserve-prefill"], workers(server)
    # 1. it is killed while it is asked again: the answer is the same
    (victim,) = [member for member in server.family() if home in " ".join(member.cmdline())]
    victim.kill()
    _, choice = ask(server, prompt, 8)
    assert choice["text"] == expected["text"]
    # 2. its replacement has nothing, and the table of the next decision knows it
    deadline = time.monotonic() + 60
    while workers(server).get(home, 0) <= before[home]:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    other = prompt_of(78, 400)
    ask(server, other, 8)
    _, choice = ask(server, prompt, 8, x_request_id="after")
    assert choice["text"] == expected["text"]
    with urllib.request.urlopen(f"{server.url}/v1/requests/after", timeout=10) as answer:
        rows = json.load(answer)["choices"][0]["decisions"][0]["prefill_candidates"]
    (row,) = [row for row in rows if row["instance"] == home]
    assert row["device_tokens"] == 0
