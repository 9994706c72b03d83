"""The live workers as the dispatcher sees them, and what each was promised.

A `Seat` is a request's place on one incarnation of a worker: blocks reserved in its pool and prompt tokens
still to be computed there. `Fleet` hands seats out and takes them back; when a worker dies its view goes,
and seats on it become void: taking them back is a no-op. Nothing here chooses a worker (policy.py) or knows
of phases.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from memserve.messages import Load
from memserve.model_config import blocks_for
from memserve.router.events import FromWorker, WorkerDown, WorkerUp
from memserve.router.scheduling.policy import WorkerView


@dataclass(slots=True)
class Seat:
    """A place on one incarnation of a worker, and what was promised with it."""

    instance: str
    incarnation: int
    num_blocks: int
    outstanding_tokens: int

    def is_at(self, place: FromWorker | WorkerView) -> bool:
        """Whether this seat is on that worker, in that life of it."""
        return self.instance == place.instance and self.incarnation == place.incarnation


@dataclass(slots=True)
class Fleet:
    """Views of the live workers by instance. Sums of promises are exact: they return to 0 when all seats
    are left.
    """

    views: dict[str, WorkerView] = field(default_factory=dict)

    def __iter__(self) -> Iterator[WorkerView]:
        return iter(self.views.values())

    def __len__(self) -> int:
        return len(self.views)

    def add(self, event: WorkerUp) -> None:
        """A worker came up; its predecessor must have been removed."""
        assert event.instance not in self.views
        self.views[event.instance] = WorkerView(
            instance=event.instance,
            role=event.role,
            incarnation=event.incarnation,
            num_blocks=event.num_blocks,
            block_size=event.block_size,
            max_running=event.max_running,
            kv_token_bytes=event.kv_token_bytes,
            caches=event.caches,
            max_host_blocks=event.max_host_blocks,
            load=Load(num_free_blocks=event.num_blocks),  # until it reports
        )

    def remove(self, event: WorkerDown) -> WorkerView | None:
        """A worker is gone; None if that incarnation was not here."""
        return None if self.view_of(event) is None else self.views.pop(event.instance)

    def view_of(self, place: Seat | FromWorker | WorkerDown) -> WorkerView | None:
        """The worker of a seat, or that a message comes from; None if that incarnation is not alive."""
        view = self.views.get(place.instance)
        return view if view is not None and view.incarnation == place.incarnation else None

    def take_seat(self, instance: str, *, num_tokens: int, outstanding_tokens: int) -> Seat:
        """Reserve blocks for `num_tokens` on a live worker, of which `outstanding_tokens` must be computed
        there.
        """
        view = self.views[instance]
        num_blocks = min(blocks_for(num_tokens, view.block_size), view.num_blocks)
        view.reserved_blocks += num_blocks
        view.num_placed += 1
        view.outstanding_tokens += outstanding_tokens
        return Seat(instance, view.incarnation, num_blocks, outstanding_tokens)

    def settle_prompt(self, seat: Seat) -> None:
        """The prompt was computed there: it is no longer outstanding work. Idempotent."""
        view = self.view_of(seat)
        if view is not None:
            view.outstanding_tokens -= seat.outstanding_tokens
        seat.outstanding_tokens = 0

    def leave(self, seat: Seat | None) -> None:
        """Give a seat back; once."""
        if seat is None:
            return
        self.settle_prompt(seat)
        view = self.view_of(seat)
        if view is not None:
            view.reserved_blocks -= seat.num_blocks
            view.num_placed -= 1
