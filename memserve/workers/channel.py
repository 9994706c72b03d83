"""The worker's end of its two sockets: framed messages, grants with descriptors; and the idle loop's bell.

Reading never blocks: `receive` takes what has arrived. Writing may block while the router is slow to
read, which is the bound on what is unsent. A frame of another incarnation is dropped (DESIGN "Failure");
`Init`, the first frame, sets the incarnation. End of file becomes `ChannelClosed` once everything before
it was handed out.
"""

from __future__ import annotations

import os
import select
import socket
import struct
import threading
from typing import NamedTuple, Protocol

from memserve.errors import EngineError
from memserve.messages import (
    FRAME_HEADER,
    MAX_FRAME_BYTES,
    Export,
    Grant,
    Init,
    ToRouter,
    ToWorker,
    decode_grant,
    decode_to_worker,
    encode_export,
    encode_frame,
)

_READ_BYTES = 1 << 16
_MAX_GRANT_BYTES = 1 << 16
_MAX_GRANT_FDS = 2
_FD = struct.Struct("@i")


class ChannelClosed(EngineError):
    """The router is gone."""


class MessageTooLong(EngineError):
    """The message exceeds MAX_FRAME_BYTES; nothing of it was sent."""


class Channel(Protocol):
    """What the loop needs of its connection to the router."""

    def receive(self) -> list[ToWorker]: ...
    def send(self, message: ToRouter) -> None:
        """Raises MessageTooLong or ChannelClosed."""
        ...


class SocketChannel:
    """Frames over a connected stream socket, which it owns. `send` may be called from any thread."""

    def __init__(self, sock: socket.socket) -> None:
        self.incarnation: int | None = None
        self._socket = sock
        self._buffer = bytearray()
        self._at_end = False
        self._send_lock = threading.Lock()

    def fileno(self) -> int:
        """For `poll`."""
        return self._socket.fileno()

    def receive(self) -> list[ToWorker]:
        """Every complete message that has arrived; an empty list if none has.

        Raises ChannelClosed at the end of the stream, EngineError on a frame over the limit,
        msgspec.DecodeError on a malformed one.
        """
        while not self._at_end:
            try:
                data = self._socket.recv(_READ_BYTES, socket.MSG_DONTWAIT)
            except BlockingIOError:
                break
            except OSError:  # the peer was killed with unread data
                data = b""
            self._at_end = not data
            self._buffer += data
            if len(data) < _READ_BYTES:
                break
        messages = self._parse() if self._buffer else []
        if self._at_end and not messages:
            raise ChannelClosed("the router closed the connection")
        return messages

    def receive_init(self) -> Init:
        """Wait for the first message, which must be `Init`, and take its incarnation. Raises as `receive`."""
        while not (messages := self.receive()):
            _wait_readable(self._socket)
        if len(messages) > 1 or not isinstance(messages[0], Init):
            raise EngineError("the router spoke before it had sent Init and heard Ready")
        return messages[0]

    def send(self, message: ToRouter) -> None:
        """Send one message. Blocks while the socket is full.

        Raises ChannelClosed if the router is gone, MessageTooLong if no frame could hold the message.
        """
        assert self.incarnation is not None, "nothing is sent before Init"
        try:
            frame = encode_frame(message, self.incarnation)
        except ValueError as error:
            raise MessageTooLong(str(error)) from error
        with self._send_lock:
            try:
                self._socket.sendall(frame)
            except OSError as error:
                raise ChannelClosed(f"the router closed the connection: {error}") from error

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    def _parse(self) -> list[ToWorker]:
        messages: list[ToWorker] = []
        offset = 0
        with memoryview(self._buffer) as view:
            while len(view) - offset >= FRAME_HEADER.size:
                num_bytes, incarnation = FRAME_HEADER.unpack_from(view, offset)
                if num_bytes > MAX_FRAME_BYTES:
                    raise EngineError(f"the router sent a frame of {num_bytes} bytes")
                start = offset + FRAME_HEADER.size
                if len(view) - start < num_bytes:
                    break
                offset = start + num_bytes
                if self.incarnation is None:
                    self.incarnation = incarnation
                if incarnation == self.incarnation:
                    messages.append(decode_to_worker(view[start:offset]))
        del self._buffer[:offset]
        return messages


class ReceivedGrant(NamedTuple):
    """A grant and the descriptors that came with it, which the receiver owns."""

    grant: Grant
    fds: tuple[int, ...]


class GrantSource(Protocol):
    """What the loop needs of the second socket."""

    def receive(self) -> list[ReceivedGrant]: ...


class GrantSocket:
    """Grants over a connected SOCK_SEQPACKET socket, which it owns; exports the other way."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock

    def fileno(self) -> int:
        """For `poll`."""
        return self._socket.fileno()

    def receive(self) -> list[ReceivedGrant]:
        """Every grant that has arrived; never blocks. Raises ChannelClosed at the end of the stream."""
        received: list[ReceivedGrant] = []
        while True:
            try:  # socket.recv_fds would drop the flags, and wait
                body, ancillary, _, _ = self._socket.recvmsg(
                    _MAX_GRANT_BYTES,
                    socket.CMSG_SPACE(_MAX_GRANT_FDS * _FD.size),
                    socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC,
                )
            except BlockingIOError:
                return received
            if not body:
                if received:
                    return received
                raise ChannelClosed("the router closed the grants socket")
            fds = [fd for _, kind, data in ancillary if kind == socket.SCM_RIGHTS for fd in _fds_of(data)]
            received.append(ReceivedGrant(decode_grant(body), tuple(fds)))

    def wait(self) -> list[ReceivedGrant]:
        """As `receive`, but waits for one."""
        while not (received := self.receive()):
            _wait_readable(self._socket)
        return received

    def send(self, export: Export, fd: int | None) -> None:
        """Hand memory of ours over, with its descriptor, which stays the caller's. Raises ChannelClosed."""
        try:
            if fd is None:
                self._socket.send(encode_export(export))
            else:
                socket.send_fds(self._socket, [encode_export(export)], [fd])
        except OSError as error:
            raise ChannelClosed(f"the router closed the grants socket: {error}") from error

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()


def _wait_readable(sock: socket.socket) -> None:
    # Not select(), which fails from descriptor 1024 on: a worker's keep the numbers they had in the router.
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    poll.poll()


def _fds_of(data: bytes) -> list[int]:
    return [fd for (fd,) in _FD.iter_unpack(data[: len(data) // _FD.size * _FD.size])]


class Doorbell:
    """What an idle loop sleeps on: the sockets, and an eventfd that other threads ring."""

    def __init__(self) -> None:
        self._event_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._poll = select.poll()
        self._poll.register(self._event_fd, select.POLLIN)

    def watch(self, fd: int) -> None:
        """Wake also when `fd` has something to read, or its peer is gone."""
        self._poll.register(fd, select.POLLIN)

    def ring(self) -> None:
        """Wake the loop; from any thread."""
        os.eventfd_write(self._event_fd, 1)

    def wait(self, timeout_s: float | None = None) -> bool:
        """Sleep until something is to be read or the bell rings: True; or until time is up: False."""
        woken_by = self._poll.poll(None if timeout_s is None else timeout_s * 1e3)
        for fd, _ in woken_by:
            if fd == self._event_fd:
                os.eventfd_read(self._event_fd)
        return bool(woken_by)

    def close(self) -> None:
        """Give the descriptor back."""
        os.close(self._event_fd)
