"""Ctrl-C while something is measured: the first ends it with what there is, the second ends the program."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Iterator

from memserve.bench.load import State

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupt:
    """Whether to go on. Who measures makes each run's State here and asks `pressed` between runs.

    While requests are sent a signal ends the run, which then has a report; at other times, while a server
    starts for example, it cancels the task.
    """

    def __init__(self) -> None:
        self.pressed = False
        self._state: State | None = None
        self._task: asyncio.Task[object] | None = None

    def new_state(self) -> State:
        """The state of the run that is next, which a signal will stop."""
        self._state = State(interrupted=self.pressed)
        return self._state

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Take signals while the body runs, in this task."""
        loop = asyncio.get_running_loop()
        self._task = asyncio.current_task()
        for number in _SIGNALS:
            loop.add_signal_handler(number, self._press)
        try:
            yield
        finally:
            self._ignore_no_more()

    def _press(self) -> None:
        self.pressed = True
        self._ignore_no_more()
        if self._state is not None and self._state.is_running:
            self._state.stop()
        elif self._task is not None:
            self._task.cancel()

    def _ignore_no_more(self) -> None:
        for number in _SIGNALS:
            asyncio.get_running_loop().remove_signal_handler(number)
