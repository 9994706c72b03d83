"""A thread that tells the router this worker is alive, and ends the process when the router is gone.

It does both while the loop is in a long step, in a load, or stuck. `in_step_s` lets the router tell busy
from stuck. When the router's end of the socket closes, the loop gets a moment to leave by itself; then
the process ends whatever it is doing, so that no worker outlives its router.
"""

from __future__ import annotations

import os
import select
import threading
import time
from collections.abc import Callable

from memserve.messages import Heartbeat, Load
from memserve.workers.channel import ChannelClosed, SocketChannel

INTERVAL_S = 1.0
GRACE_S = 0.5
ORPHAN_STATUS = 3


class HeartbeatThread:
    """Runs from construction to the end of the process. `report` may be replaced at any time."""

    def __init__(self, channel: SocketChannel, *, exit: Callable[[int], object] = os._exit) -> None:
        self._channel = channel
        self._exit = exit
        self._stopped = threading.Event()
        self.report: Callable[[], Heartbeat] = lambda: Heartbeat(num_steps=0, in_step_s=0.0, load=Load())
        self._thread = threading.Thread(target=self._run, name="memserve-heartbeat", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread before its process ends (tests)."""
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        poll = select.poll()
        poll.register(self._channel.fileno(), select.POLLRDHUP | select.POLLHUP)
        next_beat = time.monotonic() + INTERVAL_S
        while not self._stopped.is_set():
            left_s = next_beat - time.monotonic()
            if poll.poll(max(0.0, min(left_s, INTERVAL_S)) * 1e3):
                break
            if left_s > 0:
                continue
            next_beat = time.monotonic() + INTERVAL_S
            if self._channel.incarnation is None:
                continue  # Init has not come yet
            try:
                self._channel.send(self.report())
            except ChannelClosed:
                break
        if not self._stopped.wait(GRACE_S):
            self._exit(ORPHAN_STATUS)
