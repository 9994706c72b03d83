"""The frame around a message on the socket between router and worker.

A frame is `u32 body length | u32 incarnation | body`, little-endian; the body is msgpack of one tagged,
array-like struct. The length is capped before anything is allocated for it. The incarnation is that of the
worker, in both directions: a frame of a worker's earlier life is dropped by whoever reads it.
"""

from __future__ import annotations

import struct

import msgspec

from memserve.messages.to_router import ToRouter
from memserve.messages.to_worker import ToWorker

MAX_FRAME_BYTES = 64 << 20
FRAME_HEADER = struct.Struct("<II")

_encoder = msgspec.msgpack.Encoder()
_to_worker: msgspec.msgpack.Decoder[ToWorker] = msgspec.msgpack.Decoder(ToWorker)
_to_router: msgspec.msgpack.Decoder[ToRouter] = msgspec.msgpack.Decoder(ToRouter)


def encode_frame(message: ToWorker | ToRouter, incarnation: int) -> bytes:
    """One frame, ready for the socket. Raises ValueError if the body exceeds MAX_FRAME_BYTES."""
    body = _encoder.encode(message)
    if len(body) > MAX_FRAME_BYTES:
        raise ValueError(f"a message of {len(body)} bytes exceeds the frame limit of {MAX_FRAME_BYTES}")
    return FRAME_HEADER.pack(len(body), incarnation) + body


def decode_to_worker(body: bytes | memoryview) -> ToWorker:
    """Body of a frame read by a worker. Raises msgspec.DecodeError on anything malformed."""
    return _to_worker.decode(body)


def decode_to_router(body: bytes | memoryview) -> ToRouter:
    """Body of a frame read by the router. Raises msgspec.DecodeError on anything malformed."""
    return _to_router.decode(body)
