"""Memory for a host tier that grows: backed by a thread of its own, piece by piece, so that neither the loop
waits for it nor a first touch, and so that two tiers that grow at once see what the other has taken.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from memserve import memfd
from memserve.errors import MemoryError_

logger = logging.getLogger(__name__)

_PIECE_BYTES = 32 << 20


class Growth:
    """Backs blocks [start, stop) of an arena, uint8 [num_blocks, block_bytes]; `num_backed` says how far it
    has got. It ends early where memory runs out. `wake` is called at the end, from the thread, and
    `on_backed` before the first so many blocks count as backed.
    """

    def __init__(
        self,
        blocks: NDArray[np.uint8],
        start: int,
        stop: int,
        wake: Callable[[], None],
        on_backed: Callable[[int], None] = lambda num_blocks: None,
    ) -> None:
        self._on_backed = on_backed
        self.num_backed = start
        self.is_done = False
        self._blocks, self._stop, self._wake = blocks, stop, wake
        self._cancelled = threading.Event()
        self._thread = threading.Thread(target=self._run, name="memserve-grow", daemon=True)
        self._thread.start()

    def cancel(self) -> None:
        """Stop at the end of the piece, and wait for it: some milliseconds."""
        self._cancelled.set()
        self._thread.join()

    def _run(self) -> None:
        step = max(1, _PIECE_BYTES // self._blocks.shape[1])
        try:
            while self.num_backed < self._stop and not self._cancelled.is_set():
                stop = min(self.num_backed + step, self._stop)
                piece = self._blocks[self.num_backed : stop].reshape(-1)
                memfd.check_available(piece.nbytes)
                memfd.populate(piece)
                self._on_backed(stop)
                self.num_backed = stop
        except MemoryError_ as error:
            logger.warning("the host tier stays at %d blocks: %s", self.num_backed, str(error))
        self.is_done = True
        self._wake()
