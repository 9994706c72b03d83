"""Through HTTP and real processes, float32: the same tokens wherever and beside whatever a request runs."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable
from pathlib import Path

import aiohttp
import pytest
import torch
from transformers import LlamaForCausalLM

from tests.e2e.server_process import Server

OPTIONS = ("--dtype", "float32", "--max-model-len", "1024")
LENGTHS = (1, 2, 15, 16, 17, 31, 33, 64, 100, 255, 600)


@pytest.fixture(scope="module")
def disaggregated(start: Callable[..., Server], random_model: Path) -> Server:
    return start("--model", str(random_model), "--transfer", "request", *OPTIONS)


@pytest.fixture(scope="module")
def in_chunks(start: Callable[..., Server], random_model: Path) -> Server:
    """Prompts in chunks of at most 64 tokens, pulled one by one while the next is computed."""
    options = ("--transfer", "chunk", "--max-batch-tokens", "64", "--max-running", "16")
    return start("--model", str(random_model), *options, *OPTIONS)


@pytest.fixture(scope="module")
def over_gloo(start: Callable[..., Server], random_model: Path) -> Server:
    """The same, by workers that do not map each other's memory."""
    options = ("--transport", "torch_distributed", "--max-batch-tokens", "64", "--max-running", "16")
    return start("--model", str(random_model), *options, *OPTIONS)


@pytest.fixture(scope="module")
def colocated(start: Callable[..., Server], random_model: Path) -> Server:
    return start("--model", str(random_model), "--colocated", "1", *OPTIONS)


def prompt_of(length: int) -> list[int]:
    return [random.Random(length * 31 + i).randrange(3, 4096) for i in range(length)]


def tokens_of(server: Server, prompt: list[int], max_tokens: int, **options: object) -> list[int]:
    """The ids of a completion."""
    choice = server.complete(prompt, max_tokens, ignore_eos=True, return_token_ids=True, **options)
    return choice["token_ids"]  # type: ignore[return-value]


def test_greedy_equals_transformers(
    disaggregated: Server, in_chunks: Server, over_gloo: Server, colocated: Server, random_model: Path
) -> None:
    model = LlamaForCausalLM.from_pretrained(random_model, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    for length in LENGTHS:
        prompt = prompt_of(length)
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=64,
                do_sample=False,
                pad_token_id=0,
            )
        expected = out[0, length:].tolist()
        assert tokens_of(disaggregated, prompt, 64) == expected, length
        assert tokens_of(in_chunks, prompt, 64) == expected, length
        if length in (1, 16, 17, 100, 600):
            assert tokens_of(over_gloo, prompt, 64) == expected, length
        assert tokens_of(colocated, prompt, 64) == expected, length


def test_seeded_sampling_is_the_same_in_all(
    disaggregated: Server, over_gloo: Server, colocated: Server
) -> None:
    for seed in range(4):
        options = {"temperature": 0.9, "top_p": 0.9, "top_k": 50, "seed": seed, "presence_penalty": 0.5}
        prompt = prompt_of(40 + seed)
        ours = tokens_of(disaggregated, prompt, 48, **options)
        assert ours == tokens_of(colocated, prompt, 48, **options)
        assert ours == tokens_of(over_gloo, prompt, 48, **options)
        assert ours == tokens_of(disaggregated, prompt, 48, **options)


def test_pulls_do_happen_and_do_not_fail(disaggregated: Server, over_gloo: Server, colocated: Server) -> None:
    for server in (disaggregated, over_gloo):
        before = server.gauges()
        tokens_of(server, prompt_of(41), 4)
        after = server.gauges()
        assert after["memserve_pulls_total"] == before["memserve_pulls_total"] + 1
        assert after["memserve_pulled_tokens_total"] > before["memserve_pulled_tokens_total"]
        assert after["memserve_pull_failures_total"] == 0
    tokens_of(colocated, prompt_of(40), 4)
    assert colocated.gauges()["memserve_pulls_total"] == 0


def test_the_log_says_once_how_kv_moves(disaggregated: Server, over_gloo: Server) -> None:
    lines = ("KV moves over torch_distributed", "as with --transfer chunk")
    for server, count in ((disaggregated, 0), (over_gloo, 1)):
        log = server.log.read_text(errors="replace")
        assert [log.count(line) for line in lines] == [count, count]


async def _stream_ids(
    session: aiohttp.ClientSession, url: str, body: dict[str, object], leave_after: int | None
) -> list[int]:
    ids: list[int] = []
    async with session.post(f"{url}/v1/completions", json={**body, "stream": True}) as answer:
        assert answer.status == 200, await answer.text()
        async for line in answer.content:
            if line.startswith(b"data: {"):
                for choice in json.loads(line[6:])["choices"]:
                    ids.extend(choice.get("token_ids") or [])
            if leave_after is not None and len(ids) >= leave_after:
                return ids  # closes the connection in the middle of the stream
    return ids


@pytest.mark.parametrize("kind", ["disaggregated", "in_chunks", "over_gloo", "colocated"])
def test_64_at_once_with_disconnects(kind: str, request: pytest.FixtureRequest) -> None:
    server: Server = request.getfixturevalue(kind)
    rng = random.Random(3)
    bodies: list[dict[str, object]] = []
    for i in range(64):
        sampled = {"temperature": 0.8, "seed": i} if i % 3 == 0 else {"temperature": 0}
        bodies.append(
            {
                "prompt": prompt_of(rng.choice([3, 16, 40, 120, 300])),
                "max_tokens": rng.choice([4, 20, 60]),
                "ignore_eos": True,
                "return_token_ids": True,
                **sampled,
            }
        )
    leavers = {i: rng.randrange(0, 6) for i in rng.sample(range(64), 20)}

    async def run_all() -> list[list[int]]:
        timeout = aiohttp.ClientTimeout(total=100)
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
            return await asyncio.gather(
                *[_stream_ids(session, server.url, body, leavers.get(i)) for i, body in enumerate(bodies)]
            )

    together = asyncio.run(run_all())
    server.wait_idle()
    for i, body in enumerate(bodies):
        status, answer = server.post("/v1/completions", body)
        assert status == 200
        alone = answer["choices"][0]["token_ids"]  # type: ignore[index]
        if i in leavers:
            assert together[i] == alone[: len(together[i])]
        else:
            assert together[i] == alone
    server.wait_idle()
