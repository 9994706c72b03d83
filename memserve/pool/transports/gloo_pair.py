"""A private gloo group of two processes: tensors over a loopback connection, and a deadline on every wait.

    receiver (rank 0)   listen ─► port ─ ─ (told by a control message) ─ ─► join (rank 1)   source
                        wait for "source" in the store ◄───── set ──────────┘
                        ProcessGroupGloo ◄────── one connection ──────► ProcessGroupGloo

Made of torch.distributed's parts (TCPStore, ProcessGroupGloo), never of its global group, so that instances
join and leave. What gloo does with a wait that times out is both the limit and the tool here: it closes the
connection for good. So a pair that failed once is thrown away and formed anew, and `interrupt` is a wait that
times out at once. A closed connection wakes, at both ends, whoever waits for a message that has not begun to
move; who waits for one of which a part has moved is left to his deadline (seen with torch 2.13).

Nothing is authenticated: whoever may connect to loopback ports of this machine could take part. Left to
others: what the tensors mean, who forms a pair when, threads.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from datetime import timedelta

import torch
from torch.distributed import ProcessGroupGloo, TCPStore, Work  # type: ignore[attr-defined]

LOOPBACK = "127.0.0.1"
_RECEIVER, _SOURCE = 0, 1
_SOURCE_IS_HERE = "source"
_LOOK_S = 0.002  # between two looks for the source: a timed-out wait of a store would be logged each time
_INTERRUPT_TAG = 0  # nobody ever sends with this tag; others start at 1


class PairError(Exception):
    """The pair is of no use any more; `str(error)` is one plain line. `timed_out`: by our own deadline."""

    def __init__(self, message: str, *, timed_out: bool = False) -> None:
        super().__init__(message)
        self.timed_out = timed_out


Device = ProcessGroupGloo.Device


def make_device() -> Device:
    """A loopback listener and a thread that moves the bytes of all pairs made with it; gone with the last."""
    return ProcessGroupGloo.create_device(hostname=LOOPBACK, lazy_init=False)


class GlooPair:
    """One end of a formed pair. `send` and `recv` only post; tags order nothing among each other."""

    def __init__(self, store: TCPStore, rank: int, device: Device, timeout_s: float) -> None:
        options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._devices = [device]
        options._timeout = timedelta(seconds=timeout_s)
        options._threads = 1
        try:
            self._group: ProcessGroupGloo | None = ProcessGroupGloo(store, rank, 2, options)
        except RuntimeError as error:
            raise PairError(f"no connection: {_first_line(error)}") from None
        self._other = 1 - rank

    def send(self, data: torch.Tensor, tag: int) -> Work:
        """Post a contiguous tensor; it must not change, or go, before `wait` is through."""
        return self._post("send", data, tag)

    def recv(self, data: torch.Tensor, tag: int) -> Work:
        """Post a contiguous tensor to be overwritten, of exactly the size that is sent with this tag."""
        return self._post("recv", data, tag)

    def wait(self, work: Work, timeout_s: float) -> None:
        """Until `work` is through. Raises PairError if the other side has gone or is too slow."""
        began_s = time.monotonic()
        try:
            work.wait(timedelta(seconds=timeout_s))
        except RuntimeError as error:
            timed_out = time.monotonic() - began_s >= timeout_s
            message = f"nothing came for {timeout_s:g} s" if timed_out else _first_line(error)
            raise PairError(message, timed_out=timed_out) from None

    def interrupt(self) -> None:
        """Break the pair at both ends, now and for later. Any thread; takes a millisecond.

        Wakes whoever waits, except for a message of which a part has moved.
        """
        group = self._group
        if group is None:
            return
        try:
            work: Work = group.recv([torch.empty(1)], self._other, _INTERRUPT_TAG)  # type: ignore[attr-defined]
            work.wait(timedelta(milliseconds=1))
        except RuntimeError:
            return  # as meant, or it was broken already

    def close(self) -> None:
        """Close the connection: from now on no tensor posted here is touched any more.

        The group alone would not do, as it lives on in the works; and the other end learns of it at once.
        """
        self.interrupt()
        self._group = None

    def _post(self, what: str, data: torch.Tensor, tag: int) -> Work:
        assert self._group is not None and tag != _INTERRUPT_TAG
        try:
            return getattr(self._group, what)([data], self._other, tag)  # type: ignore[no-any-return]
        except RuntimeError as error:
            raise PairError(_first_line(error)) from None


class Listener:
    """The receiver's end before there is a pair: a store that listens on a loopback port of its own."""

    def __init__(self, timeout_s: float) -> None:
        # Given only a port, a TCPStore would listen on all interfaces.
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listening:
            listening.bind((LOOPBACK, 0))
            listening.listen()
            self.port: int = listening.getsockname()[1]
            self._deadline_s = time.monotonic() + timeout_s
            self._timeout_s = timeout_s
            self._store = _open_store(LOOPBACK, self.port, timeout_s, listening.detach())

    def accept(self, device: Device, is_over: Callable[[], bool]) -> GlooPair:
        """Wait until the source joins. Raises PairError if it does not in time, or once `is_over()`."""
        while not self._has_joined():
            if is_over():
                raise PairError("given up")
            if time.monotonic() >= self._deadline_s:
                raise PairError(f"no connection within {self._timeout_s:g} s", timed_out=True)
            time.sleep(_LOOK_S)
        return GlooPair(self._store, _RECEIVER, device, self._timeout_s)

    def _has_joined(self) -> bool:
        try:
            return self._store.check([_SOURCE_IS_HERE])
        except RuntimeError as error:
            raise PairError(_first_line(error)) from None


def join(host: str, port: int, device: Device, timeout_s: float) -> GlooPair:
    """The source's end: join who listens there. Raises PairError, at once if nobody listens any more."""
    try:  # which a store would try again and again, to the deadline
        socket.create_connection((host, port), timeout_s).close()
    except OSError as error:
        raise PairError(f"no connection to {host}:{port}: {error.strerror or error}") from None
    store = _open_store(host, port, timeout_s, None)
    try:
        store.set(_SOURCE_IS_HERE, "")
    except RuntimeError as error:
        raise PairError(_first_line(error)) from None
    return GlooPair(store, _SOURCE, device, timeout_s)


def _open_store(host: str, port: int, timeout_s: float, listen_fd: int | None) -> TCPStore:
    try:
        return TCPStore(
            host,
            port,
            world_size=None,
            is_master=listen_fd is not None,
            timeout=timedelta(seconds=timeout_s),
            wait_for_workers=False,
            master_listen_fd=listen_fd,
            use_libuv=True,
        )
    except RuntimeError as error:
        raise PairError(f"no connection to {host}:{port}: {_first_line(error)}") from None


def _first_line(error: RuntimeError) -> str:
    """Of gloo's message, without where in its sources it was raised, and without advice."""
    line = str(error).partition("\n")[0]
    return (line.partition("] ")[2] or line).partition(". This is typically")[0]
