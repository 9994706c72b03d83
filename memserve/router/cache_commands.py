"""Commands on the workers' caches and the answers to them: forget everything, look something up, resize.

They are about instances, not requests, so they go past the dispatcher. Each instance answers between two of
its steps. One that dies or stays silent for too long has no answer.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from memserve.messages import CacheCommand, CacheReport

# A step takes 200 ms at most on a CPU; a worker that is busy with several things may need a few.
ANSWER_WITHIN_S = 10.0


@dataclass(frozen=True, slots=True)
class _Asked:
    instance: str
    answer: asyncio.Future[CacheReport | None]


class CacheCommands:
    """Those that wait for their answers.

    Args:
        send: to an instance.
    """

    def __init__(self, send: Callable[[str, CacheCommand], object]) -> None:
        self._send = send
        self._ids = itertools.count(1)
        self._asked: dict[int, _Asked] = {}

    async def ask(
        self, commands: Mapping[str, CacheCommand], timeout_s: float = ANSWER_WITHIN_S
    ) -> dict[str, CacheReport | None]:
        """Send each instance its command, with an id of its own; the reports, None where none came."""
        asked: dict[int, _Asked] = {}
        for instance, command in commands.items():
            command_id = next(self._ids)
            asked[command_id] = _Asked(instance, asyncio.get_running_loop().create_future())
            self._asked[command_id] = asked[command_id]
            self._send(
                instance,
                CacheCommand(
                    command_id,
                    command.verb,
                    command.token_ids,
                    command.cache_salt,
                    command.num_host_blocks,
                ),
            )
        try:
            if asked:
                await asyncio.wait([each.answer for each in asked.values()], timeout=timeout_s)
        finally:
            for command_id in asked:
                del self._asked[command_id]
        return {
            each.instance: each.answer.result() if each.answer.done() else None for each in asked.values()
        }

    def on_report(self, instance: str, report: CacheReport) -> None:
        """An instance answered; what nobody waits for any more is dropped."""
        asked = self._asked.get(report.command_id)
        if asked is not None and asked.instance == instance and not asked.answer.done():
            asked.answer.set_result(report)

    def on_down(self, instance: str) -> None:
        """An instance will not answer."""
        for asked in self._asked.values():
            if asked.instance == instance and not asked.answer.done():
                asked.answer.set_result(None)
