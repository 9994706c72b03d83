"""Runs a step so that a request which breaks it fails alone.

A step that raises is computed again chunk by chunk. That is safe, as a chunk writes the same KV to the same
slots however often it is computed, except for those who pull it layer by layer meanwhile: to them its blocks
are renewed, and so a miss. Steps that keep failing mean that the device or the process is broken,
not the requests.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from memserve.errors import EngineError
from memserve.pool.mempool import MemPool
from memserve.workers.steps import Chunk, Drawn, Runner

logger = logging.getLogger(__name__)

MAX_FAILED_STEPS = 3


class Executor:
    """See the module."""

    def __init__(self, runner: Runner, pool: MemPool) -> None:
        self._runner = runner
        self._pool = pool
        self._num_failed = 0

    def execute(self, chunks: Sequence[Chunk]) -> list[Drawn]:
        """One `Drawn` a chunk, with an error where it cannot be computed.

        Raises EngineError when several steps in a row had nothing but errors.
        """
        try:
            drawn = self._runner.execute(chunks)
        except Exception:
            logger.exception("a step of %d requests failed; each is now tried by itself", len(chunks))
            for request, _ in chunks:
                if request.tell_layers:  # layers of another step would be taken for this one's
                    self._pool.renew(request.table)
            drawn = [self._execute_alone(chunk) for chunk in chunks]
            if all(result.error is not None for result in drawn):
                self._num_failed += 1
                if self._num_failed == MAX_FAILED_STEPS:
                    raise EngineError(f"{MAX_FAILED_STEPS} steps in a row failed") from None
                return drawn
        self._num_failed = 0
        return drawn

    def _execute_alone(self, chunk: Chunk) -> Drawn:
        try:
            (drawn,) = self._runner.execute((chunk,))
        except Exception:
            logger.exception("%s: cannot be computed", chunk.request.request_id)
            return Drawn(error="an internal error")
        return drawn
