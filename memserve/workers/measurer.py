"""Times what the router's cost model wants to know: steps of given shapes, swaps, pulls (MemServe §Cost
model).

A `Measure` waits in line until its turn comes; each turn of the worker's loop makes one repeat of one, so
that messages are read in between and a step is never far from its end. What is measured is the worker's own
runner, pool and transport with requests made up for it: their blocks are taken for all repeats and given
back after the last, and nothing gets into the index. Only free blocks are taken: nothing is evicted for a
measurement. A worker that has requests refuses, as they would disturb each other.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from memserve.config import WorkerConfig
from memserve.core_waits import longest_wait, read_waits
from memserve.messages import (
    BlockRefs,
    Decode,
    Measure,
    Measured,
    MeasureVerb,
    Repeat,
    SamplingParams,
    StepSpec,
    Tier,
    pack_tokens,
)
from memserve.model_config import blocks_for
from memserve.pool.allocator import BlockIds
from memserve.pool.mempool import MemPool
from memserve.pool.transports.base import Pull
from memserve.workers.request import Request
from memserve.workers.steps import Chunk, Runner

logger = logging.getLogger(__name__)

# A pull that takes longer than this is given up.
_PULL_WITHIN_S = 5.0
# So long a turn looks for its end.
_LOOK_S = 0.005
_MAX_REPEATS = 64
_NO_BLOCKS: BlockIds = np.empty(0, dtype=np.int64)


class NotPossible(Exception):
    """A measurement cannot be made; the text says why."""


class _Pulling(NamedTuple):
    """A pull under way, into blocks `ids`."""

    pull: Pull
    ids: BlockIds
    began_at: float


class Measurer:
    """The measurements that one worker was asked for and has not answered yet."""

    def __init__(self, config: WorkerConfig, pool: MemPool, runner: Runner) -> None:
        self._config = config
        self._pool = pool
        self._runner = runner
        self._waiting: deque[Measure] = deque()
        # Of the first that waits:
        self._repeats: list[Repeat] = []
        self._chunks: list[Chunk] = []
        self._ids = _NO_BLOCKS
        self._pulling: _Pulling | None = None

    def __bool__(self) -> bool:
        """Whether `turn` has anything to do."""
        return bool(self._waiting)

    def add(self, command: Measure) -> None:
        """Have it answered by a later `turn`."""
        self._waiting.append(command)

    def turn(self, is_idle: bool) -> Measured | None:
        """Make one repeat, refused unless the worker is idle; the answer if it was the last. Never raises."""
        command = self._waiting[0]
        try:
            answer = self._answer(command, is_idle)
        except NotPossible as error:
            answer = Measured(command.command_id, error=str(error))
        except Exception as error:
            logger.exception("a measurement failed")
            answer = Measured(command.command_id, error=f"it failed: {error}")
        if answer is not None:
            self._waiting.popleft()
            self._clear()
        return answer

    def close(self) -> None:
        """Forget everything. The blocks of a pull that is under way stay with it."""
        self._waiting.clear()
        if self._pulling is not None:
            self._pulling.pull.cancel()
            self._pulling = None
        self._clear()

    def _clear(self) -> None:
        self._repeats.clear()
        self._chunks.clear()
        self._pool.free_mem(self._ids)
        self._ids = _NO_BLOCKS

    def _answer(self, command: Measure, is_idle: bool) -> Measured | None:
        if command.verb is MeasureVerb.WAITS:
            waits = sorted(read_waits().items())
            return Measured(command.command_id, tuple(Repeat(0.0, ms) for _, ms in waits))
        if not is_idle and self._pulling is None:  # a pull that has begun is seen to its end
            raise NotPossible("requests are running")
        if command.verb is MeasureVerb.LEND:
            return Measured(command.command_id, refs=self._lend(command))
        num_bytes = 0
        match command.verb:
            case MeasureVerb.STEP:
                self._step(command.step or StepSpec())
            case MeasureVerb.SWAP_IN:
                num_bytes = self._swap_in(command.num_blocks)
            case MeasureVerb.PULL:
                pulled = self._pull(command)
                if pulled is None:
                    return None
                num_bytes = pulled
        if len(self._repeats) < min(command.num_repeats, _MAX_REPEATS):
            return None
        return Measured(command.command_id, tuple(self._repeats), num_bytes)

    def _timed(self, work: Callable[[], None]) -> None:
        before = read_waits()
        began_at = time.perf_counter()
        work()
        if self._pool.kv.is_cuda:
            torch.cuda.synchronize(self._pool.kv.device)
        ms = (time.perf_counter() - began_at) * 1e3
        self._repeats.append(Repeat(ms, min(ms, longest_wait(before, read_waits()))))

    # --- steps ---

    def _step(self, spec: StepSpec) -> None:
        if not self._chunks:
            self._chunks = self._make(spec)
        self._timed(self._run)

    def _run(self) -> None:
        for drawn in self._runner.execute(self._chunks):
            if drawn.error is not None:
                raise NotPossible(drawn.error)

    def _make(self, spec: StepSpec) -> list[Chunk]:
        """Requests that nobody sent, all but the step's tokens computed: zeros stand for their KV."""
        config = self._config
        num_tokens = spec.context_len + spec.num_new
        fits = (
            0 < spec.num_new + spec.num_decodes <= config.max_batch_tokens
            and min(spec.num_new, spec.context_len, spec.num_decodes, spec.decode_context) >= 0
            and spec.num_decodes <= config.max_running
            and max(num_tokens, spec.decode_context) < config.max_model_len
        )
        if not fits:
            raise NotPossible(f"no worker runs such a step: {spec}")
        pieces = [(spec.decode_context + 1, 1)] * spec.num_decodes
        if spec.num_new:
            pieces.append((num_tokens, spec.num_new))
        counts = [blocks_for(length, config.block_size) for length, _ in pieces]
        self._ids = self._take(sum(counts))
        kv = self._pool.kv
        block = torch.randn(kv.shape[1:], generator=torch.Generator().manual_seed(0))
        kv[torch.from_numpy(self._ids).to(kv.device)] = block.to(kv)
        chunks: list[Chunk] = []
        start = 0
        for (length, num_new), count in zip(pieces, counts, strict=True):
            is_cut = num_new == spec.num_new and len(chunks) == spec.num_decodes and not spec.draws
            request = self._request(length + is_cut, length - num_new)
            request.table.append(self._ids[start : start + count])
            chunks.append(Chunk(request, num_new))
            start += count
        return chunks

    def _request(self, num_tokens: int, num_computed: int) -> Request:
        token_ids = pack_tokens(np.arange(num_tokens, dtype=np.int32) % self._config.model.vocab_size)
        sampling = SamplingParams(max_tokens=1, seed=0)
        request = Request.of(Decode("measured", 0, token_ids, num_tokens, sampling), arrival=0)
        request.num_computed_tokens = num_computed
        return request

    # --- copies ---

    def _lend(self, command: Measure) -> BlockRefs:
        """Addresses of free blocks: they hold as long as nobody takes the blocks."""
        ids = self._take(command.num_blocks, command.tier)
        self._pool.free_mem(ids, command.tier)
        return self._pool.addresses(ids, command.tier)

    def _swap_in(self, num_blocks: int) -> int:
        host_ids = self._take(num_blocks, Tier.HOST)
        try:
            ids = self._take(num_blocks)
            try:
                self._timed(lambda: self._pool.load(host_ids, ids))
            finally:
                self._pool.free_mem(ids)
        finally:
            self._pool.free_mem(host_ids, Tier.HOST)
        return num_blocks * self._block_bytes

    def _pull(self, command: Measure) -> int | None:
        """The bytes of a pull that has ended; None = it goes on. It may need the loop: so none waits here."""
        if self._pulling is None:
            if command.refs is None:
                raise NotPossible("a pull from nowhere")
            ids = self._take(len(command.refs.blocks))
            self._pulling = _Pulling(self._pool.fetch(command.refs, ids), ids, time.monotonic())
        pulling = self._pulling
        look_until = time.monotonic() + _LOOK_S
        while (result := pulling.pull.poll()) is None and time.monotonic() < look_until:
            time.sleep(5e-5)
        if result is None:
            if time.monotonic() > pulling.began_at + _PULL_WITHIN_S:
                pulling.pull.cancel()
            return None
        self._pulling = None
        self._pool.free_mem(pulling.ids)
        if result.failure is not None:
            raise NotPossible(result.failure)
        self._repeats.append(Repeat(result.elapsed_ms))
        return result.num_bytes

    # --- blocks ---

    @property
    def _block_bytes(self) -> int:
        kv = self._pool.kv
        return kv[0].numel() * kv.element_size()

    def _take(self, num_blocks: int, tier: Tier = Tier.DEVICE) -> BlockIds:
        stats = self._pool.stats()
        num_free = stats.free if tier is Tier.DEVICE else stats.num_host - stats.host_historical
        ids = self._pool.alloc_mem(num_blocks, tier) if 0 < num_blocks <= num_free else None
        if ids is None:
            raise NotPossible(f"{num_blocks} blocks are not free, but {num_free}")
        return ids
