"""What a pull over gloo is measured against: torch.distributed's own send and recv of one tensor, nothing
around it, between the same two processes.

The two ends meet over a file, listen on loopback, and otherwise take torch's defaults.
"""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

RECEIVER, SOURCE = 0, 1
TIMEOUT_S = 60.0


class BareGloo:
    """One end. Made at both ends at once: the constructor waits for the other; then the file may go."""

    def __init__(self, path: Path, rank: int) -> None:
        from torch.distributed import FileStore, ProcessGroupGloo  # type: ignore[attr-defined]

        from memserve.pool.transports.gloo_pair import make_device

        options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._devices = [make_device()]
        options._timeout = timedelta(seconds=TIMEOUT_S)
        self._group = ProcessGroupGloo(FileStore(str(path), 2), rank, 2, options)
        self._other = 1 - rank
        # The other end has read the file too by then.
        (self.send if rank == SOURCE else self.recv)(np.zeros(1, np.uint8))

    def send(self, data: NDArray[np.uint8]) -> None:
        """Send contiguous bytes, and wait."""
        import torch

        self._group.send([torch.from_numpy(data)], self._other, 0).wait()  # type: ignore[attr-defined]

    def recv(self, data: NDArray[np.uint8]) -> None:
        """Receive as many contiguous bytes, and wait."""
        import torch

        self._group.recv([torch.from_numpy(data)], self._other, 0).wait()  # type: ignore[attr-defined]
