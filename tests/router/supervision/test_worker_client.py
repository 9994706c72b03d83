"""Frames over a socketpair: cut anywhere, of the right life, never waiting."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator

import pytest

from memserve.messages import (
    FRAME_HEADER,
    MAX_FRAME_BYTES,
    Cancel,
    Failed,
    Heartbeat,
    Load,
    Prefill,
    SamplingParams,
    ToRouter,
    decode_to_worker,
    encode_frame,
)
from memserve.router.supervision.worker_client import WorkerClient

INCARNATION = 7


class Wire:
    """A client, what it was handed, and the worker's end of its socket."""

    def __init__(self, max_unsent_bytes: int = 1 << 20) -> None:
        self.heard: list[ToRouter] = []
        self.client = WorkerClient(INCARNATION, self.on_message, max_unsent_bytes=max_unsent_bytes)
        self.ours, self.worker = socket.socketpair()

    def on_message(self, message: ToRouter) -> None:
        if isinstance(message, Failed) and message.request_id == "bug":
            raise KeyError("bug")
        self.heard.append(message)

    async def hear(self, count: int) -> list[ToRouter]:
        while len(self.heard) < count:
            await asyncio.sleep(0)
        return self.heard


@pytest.fixture
async def wire() -> AsyncIterator[Wire]:
    wire = Wire()
    await wire.client.open(wire.ours)
    yield wire
    wire.worker.close()
    await wire.client.closed.wait()


def failed(text: str) -> Failed:
    return Failed(text, 0, "")


async def test_order_is_kept_wherever_the_stream_is_cut(wire: Wire) -> None:
    messages = [failed("x" * size) for size in (0, 1, 100, 5000, 3)]
    stream = b"".join(encode_frame(message, INCARNATION) for message in messages)
    for size in (1, 7, 8, 9, 4096, len(stream)):
        wire.heard.clear()
        for start in range(0, len(stream), size):
            wire.worker.sendall(stream[start : start + size])
            await asyncio.sleep(0)
        assert await wire.hear(len(messages)) == messages


async def test_another_life_is_not_heard(wire: Wire) -> None:
    for incarnation, text in ((INCARNATION - 1, "old"), (INCARNATION, "now"), (INCARNATION + 1, "new")):
        wire.worker.sendall(encode_frame(failed(text), incarnation))
    wire.worker.sendall(encode_frame(failed("last"), INCARNATION))
    assert await wire.hear(2) == [failed("now"), failed("last")]


async def test_everything_sent_before_the_end_is_heard(wire: Wire) -> None:
    wire.worker.sendall(encode_frame(failed("last word"), INCARNATION) + b"half a frame"[:5])
    wire.worker.close()
    await wire.client.closed.wait()
    assert wire.heard == [failed("last word")]
    assert wire.client.fault is None
    assert not wire.client.send(Cancel("r", 0))


@pytest.mark.parametrize(
    ("stream", "fault"),
    [
        (FRAME_HEADER.pack(MAX_FRAME_BYTES + 1, INCARNATION), f"sent a frame of {MAX_FRAME_BYTES + 1} bytes"),
        (FRAME_HEADER.pack(3, INCARNATION) + b"\xc1\xc1\xc1", "sent a malformed message"),
        (encode_frame(Cancel("r", 0), INCARNATION), "sent a malformed message"),  # not one for the router
        (
            encode_frame(failed("bug"), INCARNATION),
            "sent a Failed that the router failed to handle: KeyError",
        ),
    ],
)
async def test_nonsense_closes(wire: Wire, stream: bytes, fault: str) -> None:
    wire.worker.sendall(stream + encode_frame(failed("after"), INCARNATION))
    await wire.client.closed.wait()
    assert wire.client.fault is not None and wire.client.fault.startswith(fault)
    assert wire.heard == []


async def test_sends_whole_frames(wire: Wire) -> None:
    prefill = Prefill("r", 1, b"\0" * 400_000, 100_000, SamplingParams(max_tokens=1, seed=0))
    assert wire.client.send(prefill)
    assert wire.client.send(Cancel("r", 1))
    loop = asyncio.get_running_loop()
    wire.worker.setblocking(False)
    received = b""
    for expected in (prefill, Cancel("r", 1)):
        while (
            len(received) < FRAME_HEADER.size
            or len(received) < FRAME_HEADER.size + FRAME_HEADER.unpack_from(received)[0]
        ):
            received += await loop.sock_recv(wire.worker, 1 << 20)
        num_bytes, incarnation = FRAME_HEADER.unpack_from(received)
        end = FRAME_HEADER.size + num_bytes
        assert incarnation == INCARNATION
        assert decode_to_worker(received[FRAME_HEADER.size : end]) == expected
        received = received[end:]


async def test_worker_that_does_not_read_is_given_up(wire: Wire) -> None:
    chunk = Prefill("r", 1, b"\0" * 100_000, 25_000, SamplingParams(max_tokens=1, seed=0))
    num_sent = 0
    while wire.client.send(chunk):
        num_sent += 1
    assert num_sent < 30  # a megabyte of its own, and what the kernel takes
    assert wire.client.fault is not None and wire.client.fault.endswith("bytes of messages unread")
    await wire.client.closed.wait()
    assert not wire.client.send(chunk)


async def test_any_frame_is_a_sign_of_life(wire: Wire) -> None:
    before = wire.client.last_heard_at
    wire.worker.sendall(encode_frame(Heartbeat(0, 0.0, Load()), INCARNATION))
    await wire.hear(1)
    assert wire.client.last_heard_at > before
