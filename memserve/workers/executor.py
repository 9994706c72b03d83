"""Begins steps and ends them, so that a request which breaks a step fails alone.

    begin ──► advance ──► finish        the next step may begin between `advance` and `finish`

A step that raises, at either end, is computed again chunk by chunk. That is safe, as a chunk writes the same
KV to the same slots however often it is computed, except for those who pull it layer by layer meanwhile: to
them its blocks are renewed, and so a miss. A step that was begun on the draws of one that raises has computed
nothing of worth, and is made to fail too. Steps that keep failing mean that the device or the process is
broken, not the requests.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from memserve.errors import EngineError
from memserve.pool.mempool import MemPool
from memserve.workers.budget import StepTally
from memserve.workers.request import RequestState
from memserve.workers.steps import Chunk, Drawn, Runner, Step

logger = logging.getLogger(__name__)

MAX_FAILED_STEPS = 3


@dataclass(slots=True)
class Flight:
    """A step from its beginning until its results are told. `step` is None once it has failed.

    Requests may finish meanwhile: then what is drawn for them is surplus.
    """

    chunks: Sequence[Chunk]
    tally: StepTally
    step: Step | None

    @property
    def looks_back(self) -> bool:
        """Whether the step after it needs to know what it draws."""
        return any(request.is_drawing and request.looks_back for request, _ in self.chunks)

    @property
    def is_wanted(self) -> bool:
        """Whether any of its requests still runs."""
        return any(request.state is RequestState.RUNNING for request, _ in self.chunks)

    def advance(self, max_model_len: int) -> None:
        """Its tokens count as computed from now on, and what it draws is pending."""
        for request, num_new in self.chunks:
            if request.state is RequestState.RUNNING:
                request.num_computed_tokens += num_new
                if request.num_computed_tokens == request.num_tokens:
                    request.expect(max_model_len)

    def rewind(self) -> None:
        """Undo `advance`."""
        for request, num_new in self.chunks:
            if request.state is RequestState.RUNNING:
                request.num_computed_tokens -= num_new
                request.unexpect()


class Executor:
    """See the module. At most two steps are under way at a time, and one unless the runner overlaps them."""

    def __init__(self, runner: Runner, pool: MemPool, max_model_len: int) -> None:
        self._runner = runner
        self._pool = pool
        self._max_model_len = max_model_len
        self._num_failed = 0

    def begin(self, chunks: Sequence[Chunk], tally: StepTally) -> Flight:
        """Start a step. One that cannot even begin is to be finished before the next."""
        try:
            step: Step | None = self._runner.begin(chunks)
        except Exception:
            logger.exception("a step of %d requests failed; each is now tried by itself", len(chunks))
            step = None
        return Flight(chunks, tally, step)

    def advance(self, flight: Flight) -> None:
        """See `Flight.advance`; when the step before is finished."""
        flight.advance(self._max_model_len)

    def finish(self, flight: Flight, following: Flight | None = None) -> list[Drawn]:
        """Wait for the end of a step that has advanced: one `Drawn` a chunk, with an error where it cannot be
        computed. `following` was begun after it, and has not advanced.

        Raises EngineError when several steps in a row had nothing but errors.
        """
        drawn = self._result(flight)
        if drawn is None:
            if following is not None:
                self.abandon(following)
            flight.rewind()
            for request, _ in flight.chunks:
                if request.tell_layers:  # layers of another step would be taken for this one's
                    self._pool.renew(request.table)
            drawn = [self._execute_alone(chunk) for chunk in flight.chunks]
            flight.advance(self._max_model_len)
            if not flight.is_wanted:
                return drawn
            if all(result.error is not None for result in drawn):
                self._num_failed += 1
                if self._num_failed == MAX_FAILED_STEPS:
                    raise EngineError(f"{MAX_FAILED_STEPS} steps in a row failed") from None
                return drawn
        self._num_failed = 0
        return drawn

    def abandon(self, flight: Flight) -> None:
        """Wait for the end of a step whose results nobody wants: it has failed."""
        if flight.step is not None:
            self._result(flight)
            flight.step = None

    def _result(self, flight: Flight) -> list[Drawn] | None:
        if flight.step is None:
            return None
        try:
            return flight.step.result()
        except Exception:
            logger.exception("a step of %d requests failed; each is now tried by itself", len(flight.chunks))
            return None

    def _execute_alone(self, chunk: Chunk) -> Drawn:
        request = chunk.request
        if request.state is not RequestState.RUNNING:
            return Drawn(error="it has ended")
        try:
            (drawn,) = self._runner.execute((chunk,))
        except Exception:
            logger.exception("%s: cannot be computed", request.request_id)
            return Drawn(error="an internal error")
        return drawn
