"""CUDA graphs of decode steps: one for each of a few batch sizes, captured at start-up.

A decode step of the 8B models launches some four hundred kernels; the host takes longer to launch them than
the GPU to run them at small batches. A graph replays them at once, over the device buffer of its `StaticStep`
and always at the same size: a smaller batch is padded with rows that store nothing and see nothing.

The largest is captured first, so that the smaller find the memory of its intermediates in the pool that all
share. That is sound because no two ever run at a time, and what a replay leaves, its logits, lies outside of
the pool, in one buffer that all of them write.

`Device` is the seam to CUDA: streams, events and capture behind three calls, so that everything else here
and in cuda_runner.py runs on a CPU in tests.
"""

from __future__ import annotations

import logging
import time
from bisect import bisect_left
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from memserve.models.paged_step import Staging, StaticStep
from memserve.models.triton_transformer import TritonTransformer

logger = logging.getLogger(__name__)

# Runs before a capture: Triton compiles, cuBLAS makes its handle and workspace.
_NUM_WARM_UPS = 2


class Mark(Protocol):
    """A point in the device's work."""

    def wait(self) -> None:
        """Wait until the device is there."""
        ...


class Device(Protocol):
    """What a runner needs of a GPU beside tensors. All of it on the stream that is current."""

    def host_buffer(self, num_elements: int) -> Tensor:
        """int64 [num_elements] on the host, that the device can copy to on its own."""
        ...

    def mark(self) -> Mark:
        """Here."""
        ...

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """Run `work` until nothing about it is new, and record what it enqueues; what enqueues that again, as
        a whole, over the same memory.
        """
        ...


class CudaDevice:
    """`Device` of a real GPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()

    def host_buffer(self, num_elements: int) -> Tensor:
        """See `Device`."""
        return torch.zeros(num_elements, dtype=torch.int64, pin_memory=True)

    def mark(self) -> Mark:
        """See `Device`."""
        return _CudaMark(self._device)

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """See `Device`."""
        for _ in range(_NUM_WARM_UPS):
            work()
        torch.cuda.synchronize(self._device)
        graph = torch.cuda.CUDAGraph()
        # Other threads may look at events meanwhile, which "global" would take for an error.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            work()
        return graph.replay


class _CudaMark:
    __slots__ = ("_event",)

    def __init__(self, device: torch.device) -> None:
        # Whoever waits sleeps: it has nothing to do meanwhile, and others want the core.
        self._event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        self._event.record(torch.cuda.current_stream(device))

    def wait(self) -> None:
        self._event.synchronize()


class DecodeGraph(NamedTuple):
    """Decodes of up to `len(logits)` requests: fill `step`, then `replay`, then read `logits`."""

    step: StaticStep
    replay: Callable[[], None]
    logits: Tensor


def bucket_sizes(max_running: int) -> list[int]:
    """The batch sizes captured, ascending: powers of two up to 8, then steps of an eighth to a quarter."""
    sizes = [1, 2, 4]
    step = 8
    while sizes[-1] < max_running:
        sizes.append(sizes[-1] + step if sizes[-1] >= 8 else 8)
        if sizes[-1] >= 8 * step:
            step *= 2
    return [size for size in sizes if size < max_running] + [max_running]


class DecodeGraphs:
    """The graphs of one transformer over one arena.

    Args:
        transformer, kv, block_size: what is captured. The arena must hold nothing that matters.
        max_running: size of the largest batch.
        table_width: blocks of the longest request.
        staging: shared with all that runs on the stream.
        device: that of the transformer.
    """

    def __init__(
        self,
        transformer: TritonTransformer,
        kv: Tensor,
        block_size: int,
        max_running: int,
        table_width: int,
        staging: Staging,
        device: Device,
    ) -> None:
        began_at = time.monotonic()
        self._sizes = bucket_sizes(max_running)
        with torch.inference_mode():
            vocab_size = transformer.model.vocab_size
            logits = torch.zeros((max_running, vocab_size), dtype=torch.float32, device=transformer.device)
            graphs = []
            for size in reversed(self._sizes):
                static = StaticStep(size, table_width, block_size, staging)
                out = logits[:size]

                def work(static: StaticStep = static, out: Tensor = out) -> None:
                    transformer.forward(static.step, kv, out=out)

                graphs.append(DecodeGraph(static, device.capture(work), out))
        self._graphs = graphs[::-1]
        took_s = time.monotonic() - began_at
        logger.info("captured %d decode graphs in %.1f s", len(graphs), took_s)

    def find(self, num_decodes: int) -> DecodeGraph | None:
        """The smallest that has room for so many; None = there is none."""
        index = bisect_left(self._sizes, num_decodes)
        return self._graphs[index] if index < len(self._sizes) else None
