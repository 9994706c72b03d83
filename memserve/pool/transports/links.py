"""What all gloo links of a worker share: one device, the way of their control messages, cores, options.

The device, which listens on loopback, is made by the first link that forms a pair. Links' threads may run on
every core that the transport's maker might: a worker's loop, which starts them, keeps to a core of its own.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

from memserve.messages import LinkMessage
from memserve.pool.transports.gloo_pair import Device, GlooPair, make_device
from memserve.pool.transports.gloo_wire import Options


class LinkMeans:
    """See the module, and `TorchTransfer` for `send_control`."""

    def __init__(self, options: Options, send_control: Callable[[str, LinkMessage], None]) -> None:
        self.options = options
        self.send_control = send_control
        self.cpus = os.sched_getaffinity(0)
        self._device: Device | None = None
        self._lock = threading.Lock()
        self._interrupts: list[threading.Thread] = []

    def device(self) -> Device:
        """The device, from a link's thread."""
        with self._lock:
            if self._device is None:
                self._device = make_device()
            return self._device

    def interrupt(self, pair: GlooPair) -> None:
        """Interrupt a pair from the loop, which may not wait the millisecond that it takes."""
        thread = threading.Thread(target=pair.interrupt, name="memserve-interrupt")
        self._interrupts = [other for other in self._interrupts if other.is_alive()]
        self._interrupts.append(thread)
        thread.start()

    def close(self) -> None:
        """When all links have ended: the device ends with the last pair."""
        for thread in self._interrupts:
            thread.join()
        self._interrupts.clear()
        self._device = None
