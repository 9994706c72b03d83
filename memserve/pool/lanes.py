"""What runs on a GPU beside the host and in which order: lanes, which are CUDA streams, and marks, its
events.

    compute    the model's steps              waits for swaps into and out of blocks it may use
    pull       from peers' arenas to ours     waits for what was computed and swapped out before it began
    swap_out   device tier → host tier        waits for what was computed before
    swap_in    host tier → device tier        waits for both

Waits are the GPU's: the host puts copies and waits on a lane and goes on; whether they are done it asks of a
mark. A pool whose memory the host can address has no lanes, and copies at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from memserve.pool.allocator import BlockIds
from memserve.pool.runs import runs


class Scatter(Protocol):
    """A kernel, put on the current stream."""

    def __call__(
        self,
        to: torch.Tensor,
        to_ids: torch.Tensor,
        source: torch.Tensor,
        source_ids: torch.Tensor,
        first_byte: int,
        num_bytes: int,
    ) -> None:
        """Copy so many bytes of the rows `source_ids` to the rows `to_ids`, int64 on the GPU that copies."""


class Mark(Protocol):
    """A point in a lane."""

    def is_done(self) -> bool:
        """Whether everything before it has been done. Never waits; from any thread."""


# Up to so many runs are as many copies; more of them, or parts of blocks, are one kernel.
_FEW_RUNS = 2


class Lane(Protocol):
    """What is put on it is done in order. Used by one thread, marks and waits aside."""

    def copy_blocks(
        self,
        to: torch.Tensor,
        to_ids: BlockIds,
        source: torch.Tensor,
        source_ids: BlockIds,
        columns: slice = slice(None),
    ) -> int:
        """Put a copy of `columns` of the rows `source_ids` to the rows `to_ids` on the lane; both are
        [num_blocks, columns] of one dtype. Returns the bytes. The memory must stay as long as it takes.
        """

    def mark(self) -> Mark:
        """The lane as it is now."""

    def wait(self, mark: Mark) -> None:
        """What is put on the lane from now on is done after `mark`."""


class Lanes(NamedTuple):
    """See the module."""

    compute: Lane
    pull: Lane
    swap_out: Lane
    swap_in: Lane

    @classmethod
    def on(cls, device: torch.device, scatter: Scatter | None = None) -> Lanes:
        """Of a GPU; its compute lane is the stream on which the calling thread computes there. `scatter`
        copies what is not one run on both sides.
        """
        streams = [torch.cuda.current_stream(device)]
        streams += [torch.cuda.Stream(device) for _ in range(3)]  # type: ignore[no-untyped-call]
        return cls(*(_CudaLane(stream, scatter) for stream in streams))


@dataclass(frozen=True, slots=True)
class AllMarks:
    """Several marks as one."""

    marks: Sequence[Mark]

    def is_done(self) -> bool:
        """See `Mark.is_done`."""
        return all(mark.is_done() for mark in self.marks)


class _CudaMark:
    def __init__(self, event: torch.cuda.Event) -> None:
        self.event = event

    def is_done(self) -> bool:
        # A thread that never chose a GPU would make a context on the first one, and take memory there.
        with torch.cuda.device(self.event.device):
            return bool(self.event.query())  # type: ignore[no-untyped-call]


class _CudaLane:
    def __init__(self, stream: torch.cuda.Stream, scatter: Scatter | None) -> None:
        self._stream = stream
        self._scatter = scatter

    def copy_blocks(
        self,
        to: torch.Tensor,
        to_ids: BlockIds,
        source: torch.Tensor,
        source_ids: BlockIds,
        columns: slice = slice(None),
    ) -> int:
        num_bytes = 0
        with torch.cuda.stream(self._stream), torch.inference_mode():
            pieces = list(runs(to_ids, source_ids))
            is_plain = columns == slice(None) and len(pieces) <= _FEW_RUNS
            if not is_plain and self._scatter is not None and to.is_cuda and source.device == to.device:
                first, stop, _ = columns.indices(to.shape[1])
                size = to.element_size()
                ids, others = (
                    torch.from_numpy(each).to(to.device, non_blocking=True) for each in (to_ids, source_ids)
                )
                self._scatter(to, ids, source, others, first * size, (stop - first) * size)
                return len(to_ids) * (stop - first) * size
            for start, stop in pieces:
                to_first, first, count = to_ids.item(start), source_ids.item(start), stop - start
                rows = to[to_first : to_first + count, columns]
                rows.copy_(source[first : first + count, columns], non_blocking=True)
                num_bytes += rows.nbytes
        return num_bytes

    def mark(self) -> Mark:
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(self._stream)
        return _CudaMark(event)

    def wait(self, mark: Mark) -> None:
        assert isinstance(mark, _CudaMark)
        self._stream.wait_event(mark.event)


def as_words(blocks: torch.Tensor, num_layers: int) -> torch.Tensor:
    """Blocks of uint8 [num_blocks, block_bytes] by their widest words [num_blocks, words], of which each
    layer has as many: what a GPU copies bytewise takes several times as long.
    """
    layer_bytes = blocks.shape[1] // num_layers
    for dtype in (torch.int64, torch.int32, torch.int16):
        if layer_bytes % dtype.itemsize == 0 and blocks.data_ptr() % dtype.itemsize == 0:
            return blocks.view(dtype)
    return blocks
