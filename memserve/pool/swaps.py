"""Copies between the tiers: at once where the host addresses both, else on lanes beside the steps.

    out (device → host)   after what was launched before, as its blocks may still be written; after swaps in
    in  (host → device)   after swaps out, whose memory it may read; after what was launched before
    steps                 after swaps in; after those swaps out whose device blocks are used anew

All of these waits are the GPU's. The host itself waits only in `settle`, before it touches host memory that a
copy may be using: when the host tier is made smaller. The loop stands still meanwhile, hence a deadline.
"""

from __future__ import annotations

import time
from typing import Protocol

import numpy as np
import torch

from memserve.cuda.memory import tensor_at
from memserve.errors import EngineError
from memserve.pool.allocator import BlockAllocator, BlockIds
from memserve.pool.arena import Arena
from memserve.pool.lanes import AllMarks, Lanes, Mark, as_words
from memserve.pool.pinned import PinnedBlocks, Pins
from memserve.pool.runs import runs

_SETTLE_LOOK_S = 1e-4
_SETTLE_S = 3.0  # behind a step and some gigabytes of copies


class Swaps(Protocol):
    """See the module. The caller holds all blocks."""

    def store(self, blocks: BlockIds, into: BlockIds) -> None:
        """Device blocks to host blocks."""

    def load(self, blocks: BlockIds, into: BlockIds) -> None:
        """Host blocks to device blocks."""

    def pin(self, num_blocks: int) -> None:
        """So many host blocks are used now, and backed by memory."""

    def unpin(self, num_blocks: int) -> int:
        """Only so many are used from now on; from which block on memory may be given back."""

    def settle(self) -> None:
        """Wait until no copy is under way. Raises EngineError if that takes longer than some seconds."""


class HostSwaps:
    """Copied by the caller's thread: blocks of an eviction are few, and take some ten microseconds each."""

    def __init__(self, host: Arena, device: Arena) -> None:
        self._host = host
        self._device = device

    def store(self, blocks: BlockIds, into: BlockIds) -> None:
        """See `Swaps`, here and below."""
        copy_blocks(self._host, into, self._device, blocks)

    def load(self, blocks: BlockIds, into: BlockIds) -> None:
        copy_blocks(self._device, into, self._host, blocks)

    def pin(self, num_blocks: int) -> None:
        return

    def unpin(self, num_blocks: int) -> int:
        return num_blocks

    def settle(self) -> None:
        return


class LaneSwaps:
    """Copied by the GPU, out of and into pinned memory."""

    def __init__(self, host: Arena, device: Arena, lanes: Lanes, pins: Pins) -> None:
        assert host.blocks is not None
        self._lanes = lanes
        self._pinned = PinnedBlocks(host.blocks, pins)
        self._device = as_words(device.as_bytes(), 1)
        in_host = tensor_at(host.blocks.ctypes.data, host.blocks.nbytes, torch.device("cpu"))
        self._host = in_host.view(host.blocks.shape).view(self._device.dtype)
        self._keep = host
        self._has_copied = False

    def store(self, blocks: BlockIds, into: BlockIds) -> None:
        """See `Swaps`, here and below."""
        lanes = self._lanes
        self._has_copied = True
        lanes.swap_out.wait(lanes.compute.mark())  # which is behind every swap in
        for start, stop in self._pinned.pieces(into):
            lanes.swap_out.copy_blocks(self._host, into[start:stop], self._device, blocks[start:stop])

    def load(self, blocks: BlockIds, into: BlockIds) -> None:
        lanes = self._lanes
        self._has_copied = True
        lanes.swap_in.wait(lanes.compute.mark())
        lanes.swap_in.wait(lanes.swap_out.mark())
        for start, stop in self._pinned.pieces(blocks):
            lanes.swap_in.copy_blocks(self._device, into[start:stop], self._host, blocks[start:stop])
        lanes.compute.wait(lanes.swap_in.mark())

    def pin(self, num_blocks: int) -> None:
        self._pinned.grow(num_blocks)

    def unpin(self, num_blocks: int) -> int:
        self._pinned.shrink(num_blocks)
        return max(num_blocks, self._pinned.num_pinned)

    def settle(self) -> None:
        if not self._has_copied:
            return
        marks = AllMarks((self._lanes.swap_out.mark(), self._lanes.swap_in.mark()))
        deadline = time.monotonic() + _SETTLE_S
        while not marks.is_done():
            if time.monotonic() > deadline:
                raise EngineError(f"the GPU has not ended its copies between the tiers in {_SETTLE_S:g} s")
            time.sleep(_SETTLE_LOOK_S)


class Cooling:
    """Device blocks that are free but still being copied to the host: given out only when there are no
    others, and then the next step waits for the copy. So evictions ahead of need run beside steps.
    """

    def __init__(self, allocator: BlockAllocator, lanes: Lanes) -> None:
        self._allocator = allocator
        self._lanes = lanes
        self._cooling: list[tuple[Mark, BlockIds]] = []
        self.num_blocks = 0

    def add(self, blocks: BlockIds) -> None:
        """Blocks that were freed right now, after their copies were put on the lane."""
        if len(blocks):
            self._allocator.withdraw(blocks)
            self._cooling.append((self._lanes.swap_out.mark(), blocks))
            self.num_blocks += len(blocks)

    def poll(self) -> None:
        """Those whose copies are done are free like any other."""
        while self._cooling and self._cooling[0][0].is_done():
            self._restore()

    def take(self, num_blocks: int) -> None:
        """Let at least so many be given out now, or all: the next step waits for their copies."""
        while self._cooling and num_blocks > 0:
            mark, blocks = self._cooling[0]
            self._lanes.compute.wait(mark)
            self._restore()
            num_blocks -= len(blocks)

    def _restore(self) -> None:
        _, blocks = self._cooling.pop(0)
        self._allocator.restore(blocks)
        self.num_blocks -= len(blocks)


def copy_blocks(to: Arena, to_ids: BlockIds, source: Arena, source_ids: BlockIds) -> None:
    """Copy the content of blocks, in order. A run of neighbours on both sides is one copy."""
    if to.blocks is None or source.blocks is None:  # a device that the host cannot address
        device = to.kv.device
        picked = source.kv[torch.from_numpy(source_ids).to(source.kv.device)]
        to.kv[torch.from_numpy(to_ids).to(device)] = picked.to(device)
        return
    for start, stop in runs(to_ids, source_ids):
        to_first, source_first, count = to_ids.item(start), source_ids.item(start), stop - start
        np.copyto(to.blocks[to_first : to_first + count], source.blocks[source_first : source_first + count])
