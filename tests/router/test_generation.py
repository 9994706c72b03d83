"""Merging the sequences of a job: order, joining, failure, closing."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from memserve.errors import EngineError
from memserve.messages import FinishReason, SamplingParams
from memserve.router.choices import Choice
from memserve.router.engine_api import Delta, EngineStatus, GenerateRequest
from memserve.router.generation import run_choices
from memserve.router.metrics import Metrics
from memserve.router.prompts import Prompt
from memserve.router.tokenizer import Tokenizer
from memserve.router.validation import ChoicePlan

LAST = Delta((301,), finish_reason=FinishReason.LENGTH)


class ScriptedEngine:
    """Each sequence plays what `scripts` holds under its id; an exception in a script is raised."""

    def __init__(self, scripts: Mapping[str, Sequence[Delta | Exception]]) -> None:
        self._scripts = scripts
        self.running: set[str] = set()

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Delta, None]:
        self.running.add(request.request_id)
        try:
            for step in self._scripts[request.request_id]:
                await asyncio.sleep(0)
                if isinstance(step, Exception):
                    raise step
                yield step
        finally:
            self.running.discard(request.request_id)

    def check_room(self, num_sequences: int) -> None:
        pass

    def ready(self) -> bool:
        return True

    def status(self) -> EngineStatus:
        return EngineStatus()


def make_choices(tokenizer: Tokenizer, n: int) -> list[Choice]:
    prompt = Prompt(np.asarray([300], dtype=np.int32))
    choices = []
    for i in range(n):
        request = GenerateRequest(str(i), prompt.token_ids, SamplingParams(max_tokens=99, seed=0))
        choices.append(Choice(ChoicePlan(i, 0, prompt, request, (), False, True, None, False), tokenizer))
    return choices


def run(engine: ScriptedEngine, choices: list[Choice]) -> Any:
    return contextlib.aclosing(run_choices(engine, choices, Metrics(engine).start_request()))


@pytest.mark.parametrize("n", [1, 2, 5])
async def test_every_choice_ends_once_and_in_order(tiny_tokenizer: Tokenizer, n: int) -> None:
    engine = ScriptedEngine({str(i): [Delta((300 + i,))] * i + [LAST] for i in range(n)})
    choices = make_choices(tiny_tokenizer, n)
    texts, ends = [""] * n, [0] * n
    async with run(engine, choices) as batches:
        async for batch in batches:
            assert batch
            for update in batch:
                assert not ends[update.index]
                texts[update.index] += update.text
                ends[update.index] += update.finish_reason is not None
    assert ends == [1] * n
    assert texts == [tiny_tokenizer.decode([300 + i] * i + [301]) for i in range(n)]
    assert not engine.running


async def test_what_a_slow_reader_missed_comes_joined(tiny_tokenizer: Tokenizer) -> None:
    engine = ScriptedEngine({str(i): [Delta((300,))] * 50 + [LAST] for i in range(2)})
    async with run(engine, make_choices(tiny_tokenizer, 2)) as batches:
        # 1. the reader takes what came first, then waits
        await anext(batches)
        for _ in range(300):
            await asyncio.sleep(0)
        # 2. all the rest is one update a choice
        rest = [batch async for batch in batches]
    assert [len(batch) for batch in rest] == [2]
    assert all(update.finish_reason is FinishReason.LENGTH for update in rest[0])


@pytest.mark.parametrize("n", [1, 3])
async def test_one_failure_ends_all(tiny_tokenizer: Tokenizer, n: int) -> None:
    scripts: dict[str, Sequence[Delta | Exception]] = {str(i): [Delta((300,))] * 1000 for i in range(n)}
    scripts["0"] = [Delta((300,)), EngineError("broken")]
    engine = ScriptedEngine(scripts)
    with pytest.raises(EngineError, match="broken"):
        async with run(engine, make_choices(tiny_tokenizer, n)) as batches:
            async for _ in batches:
                pass
    assert not engine.running


@pytest.mark.parametrize("n", [1, 3])
async def test_a_reader_that_leaves_ends_all(tiny_tokenizer: Tokenizer, n: int) -> None:
    engine = ScriptedEngine({str(i): [Delta((300,))] * 1000 for i in range(n)})
    async with run(engine, make_choices(tiny_tokenizer, n)) as batches:
        await anext(batches)
        assert len(engine.running) == n
    assert not engine.running


@pytest.mark.parametrize("n", [1, 2])
async def test_an_end_without_a_reason_is_an_error(tiny_tokenizer: Tokenizer, n: int) -> None:
    engine = ScriptedEngine({str(i): [Delta((300,))] for i in range(n)})
    with pytest.raises(EngineError, match="without a reason"):
        async with run(engine, make_choices(tiny_tokenizer, n)) as batches:
            async for _ in batches:
                pass
