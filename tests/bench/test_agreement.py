"""The figures agree with those of an independent client: a few lines on the `openai` package.

Both put the same load on a server whose tokens come at set times, one after the other. Latencies are of a
second and more, so that 5 % of them is far above what a busy machine adds.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from dataclasses import dataclass

import pytest

from benchmarks.fake_server import FakeServer, serving
from memserve.bench.load import LoadOptions, State
from memserve.bench.run import RunOptions, Target, run
from memserve.bench.workload import Session, Turn, Workload

NUM_STREAMS = 6
NUM_TOKENS = 25
TTFT_S, ITL_S = 1.0, 0.045
AGREES = 0.05


@dataclass
class Measured:
    """One request of the other client."""

    ttft_s: float
    jct_s: float
    num_tokens: int

    @property
    def tpot_s(self) -> float:
        return (self.jct_s - self.ttft_s) / (self.num_tokens - 1)


async def by_openai(url: str) -> list[Measured]:
    openai = pytest.importorskip("openai")

    async def ask(prompt: str) -> Measured:
        started, times, num_tokens = time.perf_counter(), [], 0
        stream = await client.completions.create(
            model="fake",
            prompt=prompt,
            max_tokens=NUM_TOKENS,
            stream=True,
            stream_options={"include_usage": True},
        )
        async for chunk in stream:
            if chunk.choices and chunk.choices[0].text:
                times.append(time.perf_counter() - started)
            if chunk.usage:
                num_tokens = chunk.usage.completion_tokens
        return Measured(times[0], times[-1], num_tokens)

    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client:
        return list(await asyncio.gather(*(ask(f"prompt {index}") for index in range(NUM_STREAMS))))


async def test_figures_agree_with_the_openai_package() -> None:
    sessions = (Session(f"{i}", (Turn(f"prompt {i}", None, NUM_TOKENS),)) for i in range(NUM_STREAMS))
    workload = Workload("test", tuple(sessions), is_text=True)
    options = RunOptions(LoadOptions(concurrency=NUM_STREAMS))
    async with serving(FakeServer(TTFT_S, ITL_S)) as server:
        theirs = await by_openai(server.url)
        report = await run(Target(url=server.url), workload, options, State())
    ours = report.summary
    assert ours.num_completed == NUM_STREAMS and ours.ttft and ours.tpot and ours.jct
    assert ours.output_tokens == sum(one.num_tokens for one in theirs) == NUM_STREAMS * NUM_TOKENS
    for found, expected in (
        (ours.ttft, [one.ttft_s for one in theirs]),
        (ours.tpot, [one.tpot_s for one in theirs]),
        (ours.jct, [one.jct_s for one in theirs]),
    ):
        assert found.mean == pytest.approx(1e3 * statistics.fmean(expected), rel=AGREES)
        assert found.p50 == pytest.approx(1e3 * statistics.median(expected), rel=AGREES)
