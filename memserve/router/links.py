"""Control messages of links between workers, relayed: workers open no control sockets to each other. Pure.

Every message names both ends with their incarnations. It goes on only if it comes from the end that it says
and the other is alive in the life that it means; a `Connect` to one that is not is refused at once, so that
whoever waits need not wait for his deadline.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

from memserve.messages import Connect, Link, Refuse
from memserve.router.events import FromWorker, Send

logger = logging.getLogger(__name__)


def relay(event: FromWorker, message: Link, alive: Mapping[str, int]) -> Send | None:
    """Where a worker's message goes, or what it is answered; None if it is stale. `alive`: incarnations."""
    receiver = message.receiver, message.receiver_incarnation
    source = message.source, message.source_incarnation
    sender, (target, incarnation) = (receiver, source) if isinstance(message, Connect) else (source, receiver)
    if alive.get(event.instance) != event.incarnation:
        return None
    if sender != (event.instance, event.incarnation):
        logger.warning("%s sent a %s in another's name", event.instance, type(message).__name__)
        return None
    now = alive.get(target)
    if now == incarnation:
        return Send(target, incarnation, message)
    if not isinstance(message, Connect):
        return None
    reason = f"{target} is down" if now is None else f"{target} is of incarnation {now}, not {incarnation}"
    refusal = Refuse(*receiver, *source, message.attempt, reason)
    return Send(event.instance, event.incarnation, refusal)
