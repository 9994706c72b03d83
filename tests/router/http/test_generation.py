"""Merging the sequences of a job: order, joining, failure, closing."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pytest

from memserve.errors import EngineError, MemserveError
from memserve.messages import FinishReason, SamplingParams
from memserve.router.engine_api import Delta, EngineStatus, GenerateRequest, Listener
from memserve.router.http.choices import Choice
from memserve.router.http.generation import Generation
from memserve.router.http.prompts import Prompt
from memserve.router.http.validation import ChoicePlan
from memserve.router.metrics import Metrics
from memserve.router.text.tokenizer import Tokenizer

News = Delta | MemserveError
LAST = Delta((301,), finish_reason=FinishReason.LENGTH)


class ScriptedEngine:
    """Each sequence plays what `scripts` holds under its id, a step each time the loop comes round."""

    def __init__(self, scripts: Mapping[str, Sequence[News]]) -> None:
        self._scripts = scripts
        self.running: dict[str, asyncio.Task[None]] = {}
        self.cancelled: list[str] = []

    def submit(self, request: GenerateRequest, listener: Listener) -> None:
        self.running[request.request_id] = asyncio.create_task(self._play(request.request_id, listener))

    def cancel(self, request_id: str) -> None:
        task = self.running.pop(request_id, None)
        if task is not None:
            self.cancelled.append(request_id)
            task.cancel()

    async def _play(self, request_id: str, listener: Listener) -> None:
        for news in self._scripts[request_id]:
            await asyncio.sleep(0)
            if isinstance(news, MemserveError) or news.finish_reason is not None:
                del self.running[request_id]
            listener(news)

    def check_room(self, num_sequences: int) -> None:
        pass

    def ready(self) -> bool:
        return True

    def status(self) -> EngineStatus:
        return EngineStatus()


def make_choices(tokenizer: Tokenizer, n: int, stops: tuple[str, ...] = ()) -> list[Choice]:
    prompt = Prompt(np.asarray([300], dtype=np.int32))
    choices = []
    for i in range(n):
        request = GenerateRequest(str(i), prompt.token_ids, SamplingParams(max_tokens=99, seed=0))
        choices.append(Choice(ChoicePlan(i, 0, prompt, request, stops, False, True, None, False), tokenizer))
    return choices


@contextlib.contextmanager
def run(engine: ScriptedEngine, choices: list[Choice]) -> Iterator[Generation]:
    with contextlib.closing(Generation(engine, choices, Metrics(engine).start_request())) as generation:
        generation.start()
        yield generation


async def settle() -> None:
    """Lets the engine play all it has."""
    for _ in range(300):
        await asyncio.sleep(0)


@pytest.mark.parametrize("n", [1, 2, 5])
async def test_every_choice_ends_once_and_in_order(tiny_tokenizer: Tokenizer, n: int) -> None:
    engine = ScriptedEngine({str(i): [Delta((300 + i,))] * i + [LAST] for i in range(n)})
    choices = make_choices(tiny_tokenizer, n)
    texts, ends = [""] * n, [0] * n
    with run(engine, choices) as generation:
        while updates := await generation.next():
            for update in updates:
                assert not ends[update.index]
                texts[update.index] += update.text
                ends[update.index] += update.finish_reason is not None
        assert await generation.next() == []
    assert ends == [1] * n
    assert texts == [tiny_tokenizer.decode([300 + i] * i + [301]) for i in range(n)]
    assert not engine.running and not engine.cancelled


@pytest.mark.parametrize("n", [1, 2])
async def test_what_a_slow_reader_missed_comes_joined(tiny_tokenizer: Tokenizer, n: int) -> None:
    engine = ScriptedEngine({str(i): [Delta((300,))] * 50 + [LAST] for i in range(n)})
    with run(engine, make_choices(tiny_tokenizer, n)) as generation:
        # 1. the reader takes what came first, then waits
        assert await generation.next()
        await settle()
        # 2. all the rest is one update a choice
        rest = await generation.next()
        assert await generation.next() == []
    assert len(rest) == n
    assert all(update.finish_reason is FinishReason.LENGTH for update in rest)


@pytest.mark.parametrize("slow", [False, True])
@pytest.mark.parametrize("n", [1, 3])
async def test_one_failure_ends_all_after_what_came_before_it(
    tiny_tokenizer: Tokenizer, n: int, slow: bool
) -> None:
    scripts: dict[str, Sequence[News]] = {str(i): [Delta((300,))] * 1000 for i in range(n)}
    scripts["0"] = [Delta((300,)), EngineError("broken")]
    engine = ScriptedEngine(scripts)
    seen: set[int] = set()
    with (
        pytest.raises(EngineError, match="broken"),
        run(engine, make_choices(tiny_tokenizer, n)) as generation,
    ):
        if slow:
            await settle()
        while updates := await generation.next():
            seen.update(update.index for update in updates)
    assert 0 in seen
    assert not engine.running


@pytest.mark.parametrize("n", [1, 3])
async def test_a_reader_that_leaves_ends_all(tiny_tokenizer: Tokenizer, n: int) -> None:
    engine = ScriptedEngine({str(i): [Delta((300,))] * 1000 for i in range(n)})
    with run(engine, make_choices(tiny_tokenizer, n)) as generation:
        await generation.next()
        assert len(engine.running) == n
    assert not engine.running


async def test_a_stop_string_ends_the_sequence_and_nothing_follows(tiny_tokenizer: Tokenizer) -> None:
    token_ids = tiny_tokenizer.encode("one two three four").tolist()
    engine = ScriptedEngine({str(i): [Delta((token,)) for token in token_ids] * 10 for i in range(2)})
    choices = make_choices(tiny_tokenizer, 2, stops=("two",))
    updates = []
    with run(engine, choices) as generation:
        await settle()  # what comes after it is there already
        while batch := await generation.next():
            updates += batch
        assert sorted(engine.cancelled) == ["0", "1"]
    for index in range(2):
        own = [update for update in updates if update.index == index]
        assert "".join(update.text for update in own) == "one "
        assert [update.finish_reason for update in own if update.finish_reason] == [FinishReason.STOP]


async def test_an_error_behind_a_stop_string_is_not_told(tiny_tokenizer: Tokenizer) -> None:
    token_ids = tiny_tokenizer.encode("one two three four").tolist()
    scripts: dict[str, Sequence[News]] = {
        "0": [*(Delta((token,)) for token in token_ids), EngineError("late")],
        "1": [Delta((300,))] * 100 + [LAST],
    }
    ends = []
    with run(ScriptedEngine(scripts), make_choices(tiny_tokenizer, 2, stops=("two",))) as generation:
        await settle()
        while updates := await generation.next():
            ends += [update.finish_reason for update in updates if update.finish_reason]
    assert ends == [FinishReason.STOP, FinishReason.LENGTH]


@pytest.mark.parametrize("n", [1, 3])
async def test_abort_tells_what_there_is(tiny_tokenizer: Tokenizer, n: int) -> None:
    engine = ScriptedEngine({str(i): [Delta((300,))] * (5 + 1000 * i) + [LAST] for i in range(n)})
    choices = make_choices(tiny_tokenizer, n)
    with run(engine, choices) as generation:
        # 1. some tokens have come; the first choice has ended by itself
        while len(engine.running) == n:
            await asyncio.sleep(0)
        generation.abort()
        generation.abort()
        assert not engine.running  # at once, whatever the reader is doing
        # 2. the others end with what came, and are cancelled below
        updates = await generation.next()
        assert await generation.next() == []
    assert not engine.running
    ends = [update.finish_reason for update in sorted(updates, key=lambda update: update.index)]
    assert ends == [FinishReason.LENGTH] + [FinishReason.ABORT] * (n - 1)
    assert all(choice.num_completion_tokens >= 5 for choice in choices)
    # 3. one that was never started just ends
    engine = ScriptedEngine({})
    generation = Generation(engine, make_choices(tiny_tokenizer, n), Metrics(engine).start_request())
    generation.abort()
    assert [update.finish_reason for update in await generation.next()] == [FinishReason.ABORT] * n
