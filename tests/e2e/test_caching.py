"""Context caching through HTTP and real processes: what each of the paper's milestones caches, computes and
moves in a conversation, turn by turn, and that nothing of it shows in the output.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.e2e.server_process import Server

OPTIONS = ("--dtype", "float32", "--max-model-len", "1024")
BLOCK_SIZE = 16
# 3 layers, K and V, 2 heads of 24 numbers of 4 bytes
BLOCK_BYTES = 3 * 2 * 2 * BLOCK_SIZE * 24 * 4
SETTINGS = {
    "off": ("--caching", "off"),
    "prefill": ("--caching", "prefill"),
    "both": ("--caching", "both"),
    "full": ("--caching", "full", "--transfer", "layer", "--max-batch-tokens", "80"),
    "colocated": ("--colocated", "1"),
    "full, over gloo": ("--transport", "torch_distributed", "--max-batch-tokens", "80"),
    "full, in chunks": ("--caching", "full", "--transfer", "chunk", "--max-batch-tokens", "80"),
}


class Turn(NamedTuple):
    """One turn of a conversation, as seen from outside."""

    prompt: list[int]
    token_ids: list[int]
    num_cached: int


def user_says(turn: int, length: int) -> list[int]:
    rng = random.Random(turn)
    return [rng.randrange(3, 4096) for _ in range(length)]


def ask(server: Server, prompt: list[int], max_tokens: int, **options: object) -> Turn:
    body = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
    status, answer = server.post("/v1/completions", {**body, "return_token_ids": True, **options})
    assert status == 200, answer
    usage = answer["usage"]
    num_cached = usage["prompt_tokens_details"]["cached_tokens"]  # type: ignore[index,call-overload]
    return Turn(prompt, answer["choices"][0]["token_ids"], num_cached)  # type: ignore[index]


def counter(server: Server, name: str) -> float:
    return sum(value for key, value in server.gauges().items() if key.startswith(name))


def settled(server: Server) -> dict[str, float]:
    """The counters once everything is idle, what goes back to the prefill side included."""
    server.wait_idle()
    deadline = time.monotonic() + 10
    while counter(server, "memserve_pull_backs_total") > counter(server, "memserve_pull_backs_done_total"):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return server.gauges()


def whole(num_tokens: int) -> int:
    """Tokens of whole blocks."""
    return max(0, num_tokens) // BLOCK_SIZE * BLOCK_SIZE


@pytest.fixture(scope="module")
def without_caching(start: Callable[..., Server], random_model: Path) -> Server:
    return start("--model", str(random_model), *OPTIONS, "--colocated", "1", "--caching", "off")


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_conversation_under_each_milestone(
    setting: str, start: Callable[..., Server], random_model: Path, without_caching: Server
) -> None:
    options = SETTINGS[setting]
    server = start("--model", str(random_model), *OPTIONS, *options)
    name = setting.split(",")[0]
    num_turns, num_answered = 10, 21
    history: list[int] = []
    last_prompt = 0
    before = settled(server)
    for number in range(num_turns):
        prompt = history + user_says(number, 30 + number)
        turn = ask(server, prompt, num_answered)
        assert turn.token_ids == ask(without_caching, prompt, num_answered).token_ids
        after = settled(server)

        def grown(sample: str, before: dict[str, float] = before, after: dict[str, float] = after) -> float:
            return after.get(sample, 0) - before.get(sample, 0)

        # 1. cached: nothing, the last turn's prompt, or its answer too (whose last token has no KV)
        known = {"off": 0, "prefill": last_prompt, "both": last_prompt}.get(name, len(history) - 1)
        assert turn.num_cached == whole(known)
        # 2. computed: the rest of the prompt on the prefill side, the answer on the decode side
        prefill, decode = ("colocated-0",) * 2 if name == "colocated" else ("prefill-0", "decode-0")
        computed = 'memserve_computed_tokens_total{{instance="{}",phase="{}"}}'
        assert grown(computed.format(prefill, "prefill")) == len(prompt) - turn.num_cached
        assert grown(computed.format(decode, "decode")) == num_answered - 1
        # 3. moved: the whole prompt, or what the decode side lacks; with `full` the answer goes back
        if name != "colocated":
            at_decode = whole(len(history) - 1) if name in ("both", "full") else 0
            num_blocks = -(-len(prompt) // BLOCK_SIZE) - at_decode // BLOCK_SIZE
            assert grown("memserve_pulled_bytes_total") == num_blocks * BLOCK_BYTES
            assert grown(computed.format(decode, "prefill")) == 0
            num_back = whole(len(prompt) + num_answered - 1) - whole(len(prompt)) if name == "full" else 0
            assert grown("memserve_pulled_back_tokens_total") == num_back
        history, last_prompt, before = prompt + turn.token_ids, len(prompt), after
    assert counter(server, "memserve_pull_failures_total") == 0


@pytest.mark.parametrize("setting", ["full", "colocated"])
def test_cached_lengths_salts_and_logprobs(
    setting: str, start: Callable[..., Server], random_model: Path, without_caching: Server
) -> None:
    server = start("--model", str(random_model), *OPTIONS, *SETTINGS[setting])
    base = user_says(99, 70)
    cold = ask(server, base, 5)
    assert cold.num_cached == 0
    settled(server)
    # 1. every shared length around the borders of blocks, and the whole prompt less a token at most
    for length in (1, 15, 16, 17, 31, 32, 33, 63, 64, 65):
        prompt = base[:length] + user_says(length, 9)
        turn = ask(server, prompt, 5)
        assert turn.num_cached == whole(length)
        assert turn.token_ids == ask(without_caching, prompt, 5).token_ids
    assert ask(server, base[:64], 5).num_cached == 63
    # 2. another salt shares nothing, the same salt does
    assert ask(server, base, 5, cache_salt="mine").num_cached == 0
    settled(server)
    salted = ask(server, base, 5, cache_salt="mine")
    assert salted.num_cached == 64 and salted.token_ids == cold.token_ids
    assert ask(server, base, 5, cache_salt="yours").num_cached == 0
    # 3. log-probabilities of the prompt need all of it computed
    assert ask(server, base, 5, logprobs=1, echo=True).num_cached == 0


@pytest.mark.parametrize("host", [(), ("--host-memory", "4MiB")], ids=["evicts", "swaps"])
def test_a_pool_twenty_times_too_small(
    host: tuple[str, ...], start: Callable[..., Server], random_model: Path, without_caching: Server
) -> None:
    """It evicts or swaps, preempts and finishes everything, with the output it has alone."""
    options = ("--prefill-device-memory", "600KiB", "--decode-device-memory", "600KiB", *host)
    server = start("--model", str(random_model), "--dtype", "float32", "--max-model-len", "400", *options)
    for number in range(30):
        prompt = user_says(number % 12, 100 + 5 * (number % 12))
        turn = ask(server, prompt, 10)
        assert turn.token_ids == ask(without_caching, prompt, 10).token_ids
        assert turn.num_cached <= len(prompt) - 1
    server.wait_idle()
    assert (counter(server, "memserve_swapped_in_blocks_total") > 0) == bool(host)


@pytest.mark.parametrize("setting", ["full", "full, over gloo", "colocated"])
def test_a_burst_on_a_cold_prefix_computes_it_once(
    setting: str, start: Callable[..., Server], random_model: Path, without_caching: Server
) -> None:
    server = start("--model", str(random_model), *OPTIONS, *SETTINGS[setting])
    shared = user_says(7, 500)
    prompts = [shared + user_says(100 + number, 5 + number) for number in range(12)]
    before = settled(server)
    with ThreadPoolExecutor(len(prompts)) as threads:
        turns = list(threads.map(lambda prompt: ask(server, prompt, 6), prompts))
    after = settled(server)
    # 1. a few of the first may find each other's last blocks not yet there
    name = 'memserve_computed_tokens_total{{instance="{}",phase="prefill"}}'.format(
        "colocated-0" if setting == "colocated" else "prefill-0"
    )
    computed = after[name] - before[name]
    assert computed == sum(len(turn.prompt) - turn.num_cached for turn in turns)
    assert computed <= 500 + sum(len(prompt) - whole(500) for prompt in prompts) + 200
    # 2. and nobody's output shows it
    for turn in turns:
        assert turn.token_ids == ask(without_caching, turn.prompt, 6).token_ids
