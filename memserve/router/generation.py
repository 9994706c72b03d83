"""Runs a job's sequences and merges what they give into one stream of updates.

A job of one choice is iterated directly: the engine already joins what a slow reader has not taken. Several
run as one task each, which push into their `Choice`; whoever reads the merged stream takes all that has
gathered. If one fails the others are cancelled; if the reader leaves (closes the generator, is cancelled),
all are.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from memserve.errors import EngineError
from memserve.router.choices import Choice, ChoiceUpdate
from memserve.router.engine_api import Engine
from memserve.router.metrics import RequestTimer
from memserve.router.tokenizer import Tokenizer
from memserve.router.validation import Job

# Tokens of a prompt that are decoded on the event loop in about the time that a thread takes to start.
_INLINE_TOKENS = 1024

Updates = list[ChoiceUpdate]


async def make_choices(job: Job, tokenizer: Tokenizer) -> list[Choice]:
    """The job's choices, before their first token. Prompts that are echoed are decoded here."""

    def make() -> list[Choice]:
        return [Choice(plan, tokenizer) for plan in job.choices]

    num_echoed = sum(len(plan.prompt.token_ids) for plan in job.choices if plan.echo)
    return make() if num_echoed <= _INLINE_TOKENS else await asyncio.to_thread(make)


async def run_choices(
    engine: Engine, choices: Sequence[Choice], timer: RequestTimer
) -> AsyncGenerator[Updates, None]:
    """Non-empty lists of updates, each choice's in order, until every choice has told its finish_reason.

    Raises what the engine raises; `Overloaded` before any choice was begun if there is no room for all of
    them. The caller closes it (`contextlib.aclosing`).
    """
    stream = _run_one(engine, choices[0], timer) if len(choices) == 1 else _run_many(engine, choices, timer)
    async with aclosing(stream):
        async for updates in stream:
            yield updates


async def _drive(engine: Engine, choice: Choice, timer: RequestTimer) -> AsyncGenerator[None, None]:
    """Pushes a sequence's deltas into `choice`, yielding after each, until the choice is complete."""
    async with aclosing(engine.generate(choice.plan.request)) as deltas:
        async for delta in deltas:
            timer.on_tokens(choice.plan.index, len(delta.token_ids))
            if delta.prompt_logprobs is None or len(delta.prompt_logprobs) <= _INLINE_TOKENS:
                choice.push(delta)
            else:  # they come with the first delta, and before that nobody else looks at the choice
                await asyncio.to_thread(choice.push, delta)
            yield
            if choice.finish_reason is not None:
                return
    raise EngineError(f"sequence {choice.plan.request.request_id} ended without a reason")


async def _run_one(engine: Engine, choice: Choice, timer: RequestTimer) -> AsyncGenerator[Updates, None]:
    async with aclosing(_drive(engine, choice, timer)) as pushes:
        async for _ in pushes:
            update = choice.take()
            if update is not None:
                yield [update]


async def _run_many(
    engine: Engine, choices: Sequence[Choice], timer: RequestTimer
) -> AsyncGenerator[Updates, None]:
    engine.check_room(len(choices))  # the tasks below submit theirs before anything else can happen
    changed = asyncio.Event()
    dirty: dict[int, Choice] = {}  # by index: pushed to since the last round

    async def pump(choice: Choice) -> None:
        async with aclosing(_drive(engine, choice, timer)) as pushes:
            async for _ in pushes:
                dirty[choice.plan.index] = choice
                changed.set()

    tasks = [asyncio.create_task(pump(choice)) for choice in choices]
    for task in tasks:
        task.add_done_callback(lambda _: changed.set())
    try:
        while True:
            await changed.wait()
            changed.clear()
            done = [task for task in tasks if task.done()]
            for task in done:
                task.result()  # raises what ended it
            updates = [update for choice in dirty.values() if (update := choice.take()) is not None]
            dirty.clear()
            if updates:
                yield updates
            if len(done) == len(tasks):
                return
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
