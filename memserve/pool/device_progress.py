"""How far a GPU has got with a step, for those who pull it layer by layer: `Progress` where computing is only
put on a stream.

The loop counts layers as they are put there, and puts a mark after each; a thread tells of a layer, in the
word in shared memory, when its mark is done. Nobody waits for it, and the GPU takes no part. Steps that
nobody follows get no marks: what they counted is told with the next mark that there is.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from queue import SimpleQueue

import numpy as np
from numpy.typing import NDArray

from memserve.pool.arena import Progress
from memserve.pool.lanes import Mark

logger = logging.getLogger(__name__)

_LOOK_S = 1e-4  # a layer of a long chunk takes milliseconds


class DeviceProgress(Progress):
    """See the module, and `Progress`. `mark` marks the stream that computes."""

    def __init__(self, word: NDArray[np.uint64], incarnation: int, mark: Callable[[], Mark]) -> None:
        super().__init__(word, incarnation)
        self._mark = mark
        self._is_followed = False
        self._marks: SimpleQueue[tuple[int, Mark] | None] = SimpleQueue()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="memserve-layers", daemon=True)
        self._thread.start()

    def follow(self, is_followed: bool) -> None:
        """See `Progress.follow`."""
        self._is_followed = is_followed

    def advance(self) -> None:
        """One layer more is on the stream."""
        self._count += 1
        if self._is_followed:
            self._marks.put((self._count, self._mark()))

    def close(self) -> None:
        """See `Progress.close`."""
        self._closing.set()
        self._marks.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (taken := self._marks.get()) is not None:
            count, mark = taken
            try:
                while not mark.is_done():
                    if self._closing.is_set():
                        return
                    time.sleep(_LOOK_S)
            except Exception:  # a broken GPU: whoever follows gives up after a while
                logger.exception("the GPU does not tell how far it has got")
                return
            self._tell(count)
