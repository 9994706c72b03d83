"""A private gloo group of two processes: tensors over a loopback connection, and a deadline on every wait.

    receiver (rank 0)                                                source (rank 1)
    Letterbox ── address, token ─ ─ (control messages) ─ ─ ► Letterbox
              ◄─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─  address ──
    ProcessGroupGloo ◄────────────── one connection ──────────────► ProcessGroupGloo
    proof ────────────────────────────────────────────────────────► checked
    checked ◄──────────────────────────────────────────────────────── proof

Made of torch.distributed's parts, never of its global group, so that instances join and leave. In place of a
TCPStore, which listens for whoever comes and believes him, each end has a `Letterbox`: the two addresses
travel by the router's private sockets. gloo itself listens on loopback and asks nobody who he is, so that the
first thing said on a connection is a proof, from both sides, of the token that came with the address; before
it nothing received is believed and nothing of ours is sent. As a connection goes only to the address that was
told, nobody can stand in the middle and hand proofs on. The bytes are not encrypted. What proofs do not help
against: gloo takes whoever comes first and names a pair's number, and ends the process on bytes that make no
sense, so that a local user can cost a pull, or a worker.

What gloo does with a wait that times out is both the limit and the tool here: it closes the connection for
good. So a pair that failed once is thrown away and formed anew, and `interrupt` is a wait that times out at
once. A closed connection wakes, at both ends, whoever waits for a message that has not begun to move; who
waits for one of which a part has moved is left to his deadline (seen with torch 2.13).

Left to others: what the tensors mean, who forms a pair when, threads.
"""

from __future__ import annotations

import hmac
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta

import numpy as np
import torch
from torch.distributed import ProcessGroupGloo, Store, Work  # type: ignore[attr-defined]

LOOPBACK = "127.0.0.1"
RECEIVER, SOURCE = 0, 1  # ranks
_INTERRUPT_TAG = 0  # nobody ever sends with this tag
_TOKEN_TAG = 1
FIRST_TAG = 2  # of whoever uses the pair
_PROOF_BYTES = 32


class PairError(Exception):
    """The pair is of no use any more; `str(error)` is one plain line. `timed_out`: by our own deadline."""

    def __init__(self, message: str, *, timed_out: bool = False) -> None:
        super().__init__(message)
        self.timed_out = timed_out


Device = ProcessGroupGloo.Device


def make_device() -> Device:
    """A loopback listener and a thread that moves the bytes of all pairs made with it; gone with the last."""
    return ProcessGroupGloo.create_device(hostname=LOOPBACK, lazy_init=False)


class Letterbox(Store):
    """One end's view of where the two ends of a pair are; all that gloo wants of a store.

    `post` is called with our address once it is known, from the thread that forms the pair, and must not
    block; `deliver` and `give_up` come from any thread.
    """

    def __init__(self, post: Callable[[bytes], None], timeout_s: float) -> None:
        super().__init__()
        self._post = post
        self._timeout_s = timeout_s
        self._own: dict[str, bytes] = {}
        self._theirs: bytes | None = None
        self._failure: str | None = None
        self._news = threading.Event()

    def deliver(self, address: bytes) -> None:
        """The other end's address has come."""
        self._theirs = address
        self._news.set()

    def give_up(self, reason: str) -> None:
        """Nothing will come any more: whoever waits fails."""
        self._failure = reason
        self._news.set()

    def await_theirs(self) -> bytes:
        """The other end's address. Raises PairError if it does not come in time, or not at all."""
        arrived = self._news.wait(self._timeout_s)
        if self._failure is not None:
            raise PairError(self._failure)
        if not arrived or self._theirs is None:
            raise PairError(f"no connection within {self._timeout_s:g} s", timed_out=True)
        return self._theirs

    # --- what gloo calls: it sets a key of its own, and gets it and the other's -----------------------------

    def set(self, key: str, value: bytes) -> None:  # type: ignore[override]
        """Our address, once."""
        assert not self._own, f"gloo told {key} beside its address"
        self._own[key] = value
        self._post(value)

    def get(self, key: str) -> bytes:
        """An address."""
        return self._own[key] if key in self._own else self.await_theirs()

    def wait(self, keys: Sequence[str], timeout: timedelta | None = None) -> None:
        """Until the addresses are here."""
        for key in keys:
            self.get(key)


class GlooPair:
    """One end of a formed pair. `send` and `recv` only post; tags order nothing among each other."""

    def __init__(self, box: Letterbox, rank: int, device: Device, token: bytes, timeout_s: float) -> None:
        """Form it, as `rank`. Raises PairError if nobody comes, or not who knows the token."""
        options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._devices = [device]
        options._timeout = timedelta(seconds=timeout_s)
        options._threads = 1
        self._box = box  # which the group refers to
        try:
            self._group: ProcessGroupGloo | None = ProcessGroupGloo(box, rank, 2, options)
        except RuntimeError as error:
            raise PairError(f"no connection: {_first_line(error)}") from None
        self._other = 1 - rank
        try:
            self._check_token(rank, token, timeout_s)
        except PairError:
            self.close()
            raise

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

    def _check_token(self, rank: int, token: bytes, timeout_s: float) -> None:
        """Prove that we know the pair's token, and have the other end prove it."""
        theirs = torch.zeros(_PROOF_BYTES, dtype=torch.uint8)
        ours = torch.from_numpy(np.frombuffer(proof(token, rank), dtype=np.uint8).copy())
        received = self.recv(theirs, _TOKEN_TAG)
        sent = self.send(ours, _TOKEN_TAG)
        self.wait(received, timeout_s)
        if not hmac.compare_digest(theirs.numpy().tobytes(), proof(token, self._other)):
            raise PairError("the other end does not know the token of this pair")
        self.wait(sent, timeout_s)

    def _post(self, what: str, data: torch.Tensor, tag: int) -> Work:
        assert self._group is not None and tag != _INTERRUPT_TAG
        try:
            return getattr(self._group, what)([data], self._other, tag)  # type: ignore[no-any-return]
        except RuntimeError as error:
            raise PairError(_first_line(error)) from None


def proof(token: bytes, rank: int) -> bytes:
    """What only who knows the token can say as `rank`. A token is for one pair alone, so it is no replay."""
    return hmac.digest(token, bytes([rank]), "sha256")


def _first_line(error: RuntimeError) -> str:
    """Of gloo's message, without where in its sources it was raised, and without advice."""
    line = str(error).partition("\n")[0]
    return (line.partition("] ")[2] or line).partition(". This is typically")[0]
