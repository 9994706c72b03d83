"""The worker's sockets: framing, incarnations, descriptors, the bell, the heartbeat."""

from __future__ import annotations

import fcntl
import os
import resource
import socket
import threading
import time

import msgspec
import pytest

from memserve.errors import EngineError
from memserve.messages import (
    FRAME_HEADER,
    MAX_FRAME_BYTES,
    Cancel,
    Heartbeat,
    Init,
    Load,
    Loading,
    Release,
    RevokeGrant,
    Shutdown,
    WeightsGrant,
    decode_to_router,
    encode_frame,
    encode_grant,
)
from memserve.workers import heartbeat
from memserve.workers.channel import ChannelClosed, Doorbell, GrantSocket, MessageTooLong, SocketChannel


@pytest.fixture
def ends():
    """A channel of incarnation 7 and the router's end of it."""
    router, worker = socket.socketpair()
    channel = SocketChannel(worker)
    channel.incarnation = 7
    yield channel, router
    channel.close()
    router.close()


@pytest.fixture
def grant_ends():
    router, worker = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    grants = GrantSocket(worker)
    yield grants, router
    grants.close()
    router.close()


def test_frames_may_come_in_any_pieces(ends):
    channel, router = ends
    messages = [Cancel("a", 1), Release("b" * 3000, 2), Shutdown()]
    data = b"".join(encode_frame(message, 7) for message in messages)
    for size in (1, 7, 8, 9, 100, len(data)):
        received = []
        for start in range(0, len(data), size):
            router.sendall(data[start : start + size])
            received += channel.receive()
        assert received == messages
    assert channel.receive() == []


def test_more_than_one_read_holds(ends):
    channel, router = ends
    messages = [Cancel("a" * 5000, i) for i in range(200)]
    sender = threading.Thread(
        target=router.sendall, args=(b"".join(encode_frame(message, 7) for message in messages),)
    )
    sender.start()
    received = []
    while len(received) < len(messages):
        received += channel.receive()
    sender.join()
    assert received == messages


def test_frames_of_another_incarnation_are_dropped(ends):
    channel, router = ends
    router.sendall(encode_frame(Cancel("old", 0), 6) + encode_frame(Cancel("new", 0), 7))
    assert channel.receive() == [Cancel("new", 0)]


def test_what_is_sent_before_the_end_is_received(ends):
    channel, router = ends
    router.sendall(encode_frame(Shutdown(), 7) + encode_frame(Cancel("a", 0), 7)[:-1])
    router.close()
    assert channel.receive() == [Shutdown()]
    with pytest.raises(ChannelClosed):
        channel.receive()
    with pytest.raises(ChannelClosed):
        channel.send(Loading("weights", 0.5))


def test_an_oversized_frame_is_refused_before_it_comes(ends):
    channel, router = ends
    router.sendall(FRAME_HEADER.pack(MAX_FRAME_BYTES + 1, 7))
    with pytest.raises(EngineError):
        channel.receive()


def test_a_malformed_frame_is_an_error(ends):
    channel, router = ends
    router.sendall(FRAME_HEADER.pack(4, 7) + b"\xff\xff\xff\xff")
    with pytest.raises(msgspec.DecodeError):
        channel.receive()


def test_init_sets_the_incarnation(tools):
    router, worker = socket.socketpair()
    channel = SocketChannel(worker)
    init = Init(tools.make_config(), 3, b"manifest")
    router.sendall(encode_frame(init, 3))
    assert channel.receive_init() == init
    channel.send(Loading("weights", 0.5))
    data = router.recv(1000)
    num_bytes, incarnation = FRAME_HEADER.unpack_from(data)
    assert incarnation == 3 and decode_to_router(data[8 : 8 + num_bytes]) == Loading("weights", 0.5)
    channel.close()
    router.close()


def test_anything_else_before_init_is_an_error(ends):
    channel, router = ends
    router.sendall(encode_frame(Shutdown(), 7))
    with pytest.raises(EngineError):
        channel.receive_init()


def test_grants_carry_descriptors(grant_ends):
    grants, router = grant_ends
    read_end, write_end = os.pipe()
    socket.send_fds(router, [encode_grant(WeightsGrant(10))], [read_end, write_end])
    router.send(encode_grant(RevokeGrant("p")))
    first, second = grants.wait()
    assert first.grant == WeightsGrant(10) and second.grant == RevokeGrant("p") and second.fds == ()
    assert not os.get_inheritable(first.fds[0])
    os.write(first.fds[1], b"x")
    assert os.read(read_end, 1) == b"x"
    for fd in (read_end, write_end, *first.fds):
        os.close(fd)
    assert grants.receive() == []
    router.send(encode_grant(RevokeGrant("q")))
    router.close()
    assert grants.receive() == [(RevokeGrant("q"), ())]
    for receive in (grants.receive, grants.wait):
        with pytest.raises(ChannelClosed):
            receive()


def test_the_bell_wakes_from_any_thread_and_for_any_message(ends):
    channel, router = ends
    doorbell = Doorbell()
    doorbell.watch(channel.fileno())
    thread = threading.Thread(target=doorbell.ring)
    thread.start()
    doorbell.wait()
    thread.join()
    router.sendall(encode_frame(Shutdown(), 7))
    doorbell.wait()
    assert channel.receive() == [Shutdown()]
    doorbell.ring()
    doorbell.ring()
    doorbell.wait()
    router.close()
    doorbell.wait()
    with pytest.raises(ChannelClosed):
        channel.receive()
    doorbell.close()


def test_heartbeat_reports_and_ends_an_orphan(ends, monkeypatch):
    channel, router = ends
    monkeypatch.setattr(heartbeat, "INTERVAL_S", 0.01)
    monkeypatch.setattr(heartbeat, "GRACE_S", 0.01)
    exits: list[int] = []
    thread = heartbeat.HeartbeatThread(channel, exit=exits.append)
    thread.report = lambda: Heartbeat(5, 0.25, Load(num_running=3))
    router.settimeout(10)
    received = b""
    while encode_frame(Heartbeat(5, 0.25, Load(num_running=3)), 7) not in received:
        received += router.recv(1000)
    assert exits == []
    router.close()
    deadline = time.monotonic() + 10
    while not exits and time.monotonic() < deadline:
        time.sleep(0.001)
    assert exits == [heartbeat.ORPHAN_STATUS]
    thread.stop()


def test_descriptors_beyond_those_select_knows():
    """A worker's sockets keep the numbers they had in a router of many connections."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard <= 1100:
        pytest.skip("this process may not open so many files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 1100), hard))
    try:
        router, worker = socket.socketpair()
        high = socket.socket(fileno=fcntl.fcntl(worker.fileno(), fcntl.F_DUPFD_CLOEXEC, 1050))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    worker.close()
    channel = SocketChannel(high)
    sender = threading.Timer(0.05, router.sendall, [encode_frame(Shutdown(), 3)])
    sender.start()
    with pytest.raises(EngineError, match="before it had sent Init"):
        channel.receive_init()
    sender.join()
    channel.close()
    router.close()


def test_a_message_that_no_frame_holds_is_not_sent(ends):
    channel, router = ends
    with pytest.raises(MessageTooLong, match="exceeds the frame limit"):
        channel.send(Loading("x" * MAX_FRAME_BYTES, 0.5))
    channel.send(Loading("weights", 0.5))
    assert decode_to_router(router.recv(1000)[FRAME_HEADER.size :]) == Loading("weights", 0.5)
