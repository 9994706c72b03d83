"""One instance as those see it who measure it: what it times itself, and real prompts timed from here.

Times come with what the threads of both sides waited for a core meanwhile (core_waits.py).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from memserve.config import WorkerConfig
from memserve.core_waits import longest_wait, read_waits
from memserve.messages import CacheCommand, CacheVerb, Measure, Measured, MeasureVerb, Repeat, StepSpec
from memserve.router.engine import ServingEngine

Tokens = NDArray[np.int32]

# Nothing that is measured is cached for anybody else.
SALT = "calibration"
_IDLE_WITHIN_S = 5.0


class NotMeasured(Exception):
    """A worker did not do as it was asked; the text says why."""


class Worker:
    """One instance that is measured. Raises NotMeasured where it does not answer, dies, or refuses."""

    def __init__(self, engine: ServingEngine, config: WorkerConfig) -> None:
        self.engine = engine
        self.config = config
        self.instance = config.instance
        (status,) = [row for row in engine.status().instances if row.instance == self.instance]
        self.num_blocks, self.block_bytes = status.num_blocks, status.block_bytes
        self.num_host = config.host_blocks or 0

    async def ask(self, command: Measure) -> Measured:
        """Have something measured; while requests that came before are running, try again."""
        deadline = time.monotonic() + _IDLE_WITHIN_S
        while True:
            answer = await self.engine.measurements.measure(self.instance, command)
            if answer is None:
                raise NotMeasured(f"{self.instance} is down or did not answer")
            if answer.error is None:
                return answer
            if answer.error != "requests are running" or time.monotonic() > deadline:
                raise NotMeasured(answer.error)
            await asyncio.sleep(0.05)

    async def step(self, spec: StepSpec, num_repeats: int) -> Sequence[Repeat]:
        """Time a step."""
        return (await self.ask(Measure(0, MeasureVerb.STEP, num_repeats, spec))).repeats

    async def prefill(self, token_ids: Tokens) -> tuple[Repeat, int]:
        """Time a request from here, to its first token; and how many of its tokens were cached."""
        ours, theirs = read_waits(), await self._waits()
        timed = await self.engine.measurements.prefill(self.instance, token_ids, SALT)
        if timed is None:
            raise NotMeasured(f"a prompt of {len(token_ids)} tokens failed on {self.instance}")
        waited_ms = longest_wait(ours, read_waits()) + longest_wait(theirs, await self._waits())
        return Repeat(timed.ms, min(timed.ms, waited_ms)), timed.num_cached

    async def _waits(self) -> dict[str, float]:
        answer = await self.ask(Measure(0, MeasureVerb.WAITS))
        return {str(number): repeat.waited_ms for number, repeat in enumerate(answer.repeats)}

    def prompt(self, num_tokens: int, seed: int) -> Tokens:
        """Arbitrary tokens."""
        generator = np.random.default_rng(seed)
        return generator.integers(0, self.config.model.vocab_size, num_tokens, dtype=np.int32)

    async def flush(self) -> None:
        """Forget what prompts have left in the cache."""
        await self.engine.command_caches({self.instance: CacheCommand(0, CacheVerb.FLUSH)})
