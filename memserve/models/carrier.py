"""Tensors on their way to a device: out of mapped files, through pinned memory, without waiting for either.

    file (mmap) ── the host copies ──► pinned buffer 0 ── the device copies ──► tensor
                                       pinned buffer 1     while the host fills the other

From memory that is not pinned a copy to a GPU goes through a small buffer of the driver's, and the host waits
for it; so a file would be read and copied in turn, not at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor

_BUFFER_BYTES = 64 << 20


class Carrier:
    """Brings tensors to `device`; two buffers of `buffer_bytes` for a GPU, none elsewhere."""

    def __init__(self, device: torch.device, buffer_bytes: int = _BUFFER_BYTES) -> None:
        self._device = device
        self._buffer_bytes = buffer_bytes
        self._buffers: list[Tensor] = []
        self._copied: list[torch.cuda.Event | None] = [None, None]
        self._next = 0
        if device.type != "cpu":
            self._buffers = [_host_buffer(buffer_bytes, device) for _ in range(2)]

    def carry(self, tensor: Tensor) -> Tensor:
        """The tensor on the device, for what is enqueued on the current stream from now on; itself if it is
        there. Where it comes from may be gone when this returns.
        """
        if tensor.device == self._device:
            return tensor
        carried = torch.empty(tensor.shape, dtype=tensor.dtype, device=self._device)
        source, target = _bytes(tensor.contiguous()), _bytes(carried)
        for start in range(0, len(source), self._buffer_bytes):
            part = source[start : start + self._buffer_bytes]
            self._copy(part, target[start : start + len(part)])
        return carried

    def _copy(self, part: Tensor, target: Tensor) -> None:
        turn, self._next = self._next, 1 - self._next
        copied = self._copied[turn]
        if copied is not None:
            copied.synchronize()
        buffer = self._buffers[turn][: len(part)]
        buffer.copy_(part)
        target.copy_(buffer, non_blocking=True)
        if self._device.type == "cuda":
            event = copied or torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(torch.cuda.current_stream(self._device))
            self._copied[turn] = event


def _host_buffer(num_bytes: int, device: torch.device) -> Tensor:
    return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=device.type == "cuda")


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.view(-1).view(torch.uint8)
