"""Control messages of links between workers, relayed: workers open no control sockets to each other. Pure.

Every message names both ends with their incarnations. It goes on only if it comes from the end that it says
and the other is alive in the life that it means. A `Connect` to one that is not, or that dies before it has
answered, is refused at once, so that whoever waits need not wait for his deadline.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

from memserve.messages import Connect, LinkMessage, Refuse
from memserve.router.events import FromWorker, Send

logger = logging.getLogger(__name__)


class LinkRelay:
    """What was asked for and not answered, the last of each pair; nothing else is kept."""

    def __init__(self) -> None:
        self._asked: dict[tuple[str, str], Connect] = {}

    def relay(self, event: FromWorker, message: LinkMessage, alive: Mapping[str, int]) -> Send | None:
        """Where a worker's message goes, or its answer; None if it is stale. `alive`: incarnations."""
        receiver = message.receiver, message.receiver_incarnation
        source = message.source, message.source_incarnation
        is_question = isinstance(message, Connect)
        sender, (target, incarnation) = (receiver, source) if is_question else (source, receiver)
        if alive.get(event.instance) != event.incarnation:
            return None
        if sender != (event.instance, event.incarnation):
            logger.warning("%s sent a %s in another's name", event.instance, type(message).__name__)
            return None
        pair = message.receiver, message.source
        if isinstance(message, Connect):
            self._asked[pair] = message
        elif (asked := self._asked.get(pair)) is not None and asked.attempt == message.attempt:
            del self._asked[pair]
        now = alive.get(target)
        if now == incarnation:
            return Send(target, incarnation, message)
        if not isinstance(message, Connect):
            return None
        return self._refuse(pair, "is down" if now is None else f"is of incarnation {now}, not {incarnation}")

    def on_worker_down(self, instance: str) -> list[Send]:
        """An instance is dead: who waits for its answer gets one, and what it asked is forgotten."""
        for pair in [pair for pair in self._asked if pair[0] == instance]:
            del self._asked[pair]
        return [self._refuse(pair, "has died") for pair in list(self._asked) if pair[1] == instance]

    def _refuse(self, pair: tuple[str, str], why: str) -> Send:
        asked = self._asked.pop(pair)
        refusal = Refuse(
            receiver=asked.receiver,
            receiver_incarnation=asked.receiver_incarnation,
            source=asked.source,
            source_incarnation=asked.source_incarnation,
            attempt=asked.attempt,
            reason=f"{asked.source} {why}",
        )
        return Send(asked.receiver, asked.receiver_incarnation, refusal)
