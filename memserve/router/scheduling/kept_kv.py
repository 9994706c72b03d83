"""What workers still hold of a request when it leaves them, and what that is good for.

A worker tells each block as it fills (`Stored`), so the router knows addresses. They are hints: whoever pulls
verifies the generations, and what is gone is a miss.
"""

from __future__ import annotations

from typing import NamedTuple

from memserve.messages import Offer, PullBack
from memserve.router.fleet import Fleet
from memserve.router.request_state import RequestState
from memserve.router.scheduling.policy import WorkerView


class SentPullBack(NamedTuple):
    """A command on its way to a worker."""

    instance: str
    incarnation: int
    message: PullBack


def pull_back(request: RequestState, fleet: Fleet) -> SentPullBack | None:
    """The command to the worker that prefilled a request to pull what was generated from it (MemServe
    §Context caching, PD-Caching-3); None if there is nothing new, or nobody to take it.
    """
    origin, stored = request.origin, request.stored
    if origin is None or stored is None or stored.instance == origin.instance:
        return None
    view = fleet.views.get(origin.instance)
    num_blocks = len(stored.blocks)
    if view is None or view.incarnation != origin.incarnation or num_blocks <= origin.num_blocks:
        return None
    message = PullBack(
        request_id=request.request_id,
        token_ids=request.token_bytes(0, num_blocks * view.block_size),
        cache_salt=request.cache_salt,
        first_block=origin.num_blocks,
        refs=stored.refs(origin.num_blocks),
    )
    return SentPullBack(origin.instance, origin.incarnation, message)


def what_is_left(request: RequestState, dead: WorkerView) -> Offer | None:
    """The memory of a dead worker outlives it: what it held of a request, while its generations verify."""
    stored = request.stored
    if stored is None or stored.instance != dead.instance or not stored.blocks:
        return None
    if request.sampling.prompt_logprobs is not None:
        return None  # they come only from computing
    num_tokens = len(stored.blocks) * dead.block_size
    return Offer(stored.refs(), num_tokens) if num_tokens < len(request.tokens) else None
