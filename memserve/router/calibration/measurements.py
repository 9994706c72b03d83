"""Measurements on workers, past the dispatcher: what a worker times itself (`Measure`), and real prefills,
timed here from the message to its answer.

For workers that have nothing else to do: one that has requests refuses to measure, and a prefill would be
timed with all that runs beside it. A prefill is an ordinary one, cached under the salt it is given.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from memserve.messages import (
    Failed,
    Measure,
    Measured,
    Prefill,
    Prefilled,
    Release,
    SamplingParams,
    ToRouter,
    ToWorker,
    pack_tokens,
)
from memserve.router.commands import Commands

ANSWER_WITHIN_S = 60.0


class TimedPrefill(NamedTuple):
    """What a prefill took, from here to here, and how many of its tokens were cached."""

    ms: float
    num_cached: int


class Measurements:
    """Those under way.

    Args:
        send: to an instance.
        clock: seconds.
    """

    def __init__(
        self, send: Callable[[str, ToWorker], object], clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._send = send
        self._clock = clock
        self._commands: Commands[Measure, Measured] = Commands(send)
        self._ids = itertools.count(1)
        self._prefills: dict[str, tuple[str, float, asyncio.Future[TimedPrefill | None]]] = {}

    async def measure(self, instance: str, command: Measure) -> Measured | None:
        """Have a worker time something; None if it does not answer."""
        answers = await self._commands.ask({instance: command}, ANSWER_WITHIN_S)
        return answers[instance]

    async def prefill(self, instance: str, token_ids: NDArray[np.int32], salt: str) -> TimedPrefill | None:
        """Run a prompt to its first token; None if that fails."""
        request_id = f"measured-{next(self._ids)}"
        sampling = SamplingParams(max_tokens=1, seed=0)
        message = Prefill(request_id, 0, pack_tokens(token_ids), len(token_ids), sampling, salt)
        answer: asyncio.Future[TimedPrefill | None] = asyncio.get_running_loop().create_future()
        self._prefills[request_id] = (instance, self._clock(), answer)
        self._send(instance, message)
        try:
            return await asyncio.wait_for(answer, ANSWER_WITHIN_S)
        except TimeoutError:
            return None
        finally:
            del self._prefills[request_id]

    def take(self, instance: str, message: ToRouter) -> bool:
        """Whether a message was an answer to something here; then it is nobody else's."""
        if isinstance(message, Measured):
            self._commands.on_report(instance, message)
            return True
        if not isinstance(message, Prefilled | Failed) or message.request_id not in self._prefills:
            return False
        asked, began_at, answer = self._prefills[message.request_id]
        if asked != instance or answer.done():
            return True
        if isinstance(message, Failed):
            answer.set_result(None)
            return True
        if message.offer is not None:
            self._send(instance, Release(message.request_id, 0))
        answer.set_result(TimedPrefill((self._clock() - began_at) * 1e3, message.cached.total))
        return True

    def on_down(self, instance: str) -> None:
        """An instance will not answer."""
        self._commands.on_down(instance)
        for asked, _, answer in self._prefills.values():
            if asked == instance and not answer.done():
                answer.set_result(None)
