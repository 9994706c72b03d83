"""A modelled worker: its cache is the real index, its time comes from the cost model.

It prefills one prompt at a time, in order (of those whose pull has ended), and decodes a batch; while it
prefills, each step takes the batch along. It knows no events: the simulation asks when something will end,
and tells it that it has.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from memserve.pool.index import Index
from memserve.router.scheduling.holders import Addresses
from memserve.router.scheduling.load import Backlog
from memserve.router.scheduling.policies.decision import Candidate
from memserve.router.scheduling.predictor import Batch
from memserve.simulate.traces import Job


class ModelledCache:
    """Blocks that a worker keeps, LRU. `ids` are a sequence's whole blocks, from its start.

    Args:
        ids_per_block: int32 ids that stand for a block.
        num_blocks: how many there are.
    """

    def __init__(self, ids_per_block: int, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._step = 4 * ids_per_block
        self._index = Index(ids_per_block)
        self._free = list(range(num_blocks - 1, -1, -1))
        self._generations = np.zeros(num_blocks, dtype=np.int64)

    def match(self, ids: bytes, now: float) -> int:
        """Blocks of a sequence that are here; counts as a use."""
        return self._index.match("", ids, now).num_blocks

    def put(self, ids: bytes, num_active: int, now: float) -> tuple[int, Addresses, Addresses]:
        """Keep a sequence, as far as there is room beside `num_active` blocks of running requests.

        Returns:
            the number of its first block that was not there, where that and the following are now, and what
            was evicted for it.
        """
        prefix = self._index.match("", ids, now)
        known = prefix.num_blocks
        lock = self._index.lock(prefix)
        room = max(0, self.num_blocks - num_active)
        wanted = min(len(ids) // self._step - known, max(0, room - known))
        evicted = self._index.evict(max(0, self._index.num_blocks + wanted - room, wanted - len(self._free)))
        gone = self._addresses(evicted)
        self._generations[evicted] += 1
        self._free.extend(evicted.tolist())
        wanted = min(wanted, len(self._free))
        blocks = np.array([self._free.pop() for _ in range(wanted)], dtype=np.int64)
        self._index.extend(lock, ids[known * self._step : (known + wanted) * self._step], blocks, now)
        self._index.unlock(lock)
        return known, self._addresses(blocks), gone

    def _addresses(self, blocks: np.ndarray) -> Addresses:
        return Addresses(blocks, np.zeros(len(blocks), dtype=np.uint8), self._generations[blocks])


@dataclass(slots=True, eq=False)
class Task:
    """A job on its way through the workers. Times in seconds; `ready_at`: when what it pulls is there."""

    job: Job
    number: int
    prefill: ModelledWorker
    decode: ModelledWorker | None
    predicted_ttft_ms: float
    ready_at: float
    num_cached_tokens: int = 0
    first_token_at: float = 0.0
    num_left: int = 0
    num_prefill_blocks: int = 0
    num_decode_blocks: int = 0


@dataclass(slots=True, eq=False)
class ModelledWorker:
    """See the module. `decoded_at`: up to when the batch's steps are accounted for; `version` voids ends that
    were foreseen before something changed.
    """

    candidate: Candidate
    cache: ModelledCache
    backlog: Backlog = field(default_factory=Backlog)
    waiting: list[Task] = field(default_factory=list)
    running: Task | None = None
    batch: list[Task] = field(default_factory=list)
    num_context: int = 0
    decoded_at: float = 0.0
    link_free_at: float = 0.0
    busy_ms: float = 0.0
    version: int = 0

    @property
    def name(self) -> str:
        """Its instance's name."""
        return self.candidate.view.instance

    def begin_prefill(self, now: float) -> float | None:
        """Start on the first prompt that is ready; returns when it will be done, None if there is none."""
        if self.running is not None:
            return None
        task = next((task for task in self.waiting if task.ready_at <= now), None)
        if task is None:
            return None
        self.advance(now)
        self.waiting.remove(task)
        job, predictor = task.job, self.candidate.predictor
        block_size = self.candidate.view.block_size
        usable = (job.num_tokens - 1) // block_size
        task.num_cached_tokens = min(self.cache.match(job.ids, now), usable) * block_size
        batch = Batch(len(self.batch), self.num_context)
        ms = predictor.prefill_ms(job.num_tokens, task.num_cached_tokens, batch)
        self.busy_ms += ms
        self.running = task
        self.version += 1
        self.decoded_at = max(now, self.decoded_at) + ms / 1e3
        return self.decoded_at

    def end_prefill(self) -> Task:
        """The prompt is done, and its steps took the batch along."""
        task, budget = self.running, self.candidate.predictor.model.budget
        assert task is not None
        self.running = None
        num_new = task.job.num_tokens - task.num_cached_tokens
        self._decode(-(-num_new // max(16, budget.max_tokens - len(self.batch))))
        self.version += 1
        return task

    def join(self, task: Task, now: float) -> None:
        """A request decodes here from now on."""
        self.advance(now)
        if not self.batch:
            self.decoded_at = max(self.decoded_at, now)
        self.batch.append(task)
        self.num_context += task.job.num_tokens
        self.version += 1

    def next_end(self) -> float | None:
        """When the next request of the batch is done, if nothing changes; None while a prefill runs."""
        if self.running is not None or not self.batch:
            return None
        return self.decoded_at + max(0, min(task.num_left for task in self.batch)) * self._step_s()

    def advance(self, now: float) -> None:
        """Account for the steps of the batch until now."""
        if self.running is not None or not self.batch:
            return
        step_s = self._step_s()
        num_steps = int((now - self.decoded_at) / step_s + 1e-6)
        if num_steps > 0:
            self._decode(num_steps)
            self.decoded_at += num_steps * step_s

    def leave(self) -> list[Task]:
        """Requests that have drawn all their tokens."""
        done = [task for task in self.batch if task.num_left <= 0]
        for task in done:
            self.batch.remove(task)
            self.num_context -= task.job.num_tokens + task.job.num_new_tokens - 1 - task.num_left
        self.version += 1
        return done

    def _step_s(self) -> float:
        return self.candidate.predictor.decode_ms(len(self.batch), self.num_context) / 1e3

    def _decode(self, num_steps: int) -> None:
        for task in self.batch:
            task.num_left -= num_steps
        self.num_context += num_steps * len(self.batch)
