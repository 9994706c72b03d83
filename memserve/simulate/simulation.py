"""A fleet under a virtual clock: the router's trees, policies and cost model, with modelled workers.

    arrive ──► placed by the policy ──► (pull) ──► prefilled ──► handed over ──► decoded ──► done
                 waits while nothing has room                                      │ pulled back to the
                                                                                   ▼ prefill side
A request's way, its promises of blocks and its predicted work are followed as the dispatcher follows them,
but with one event for each change rather than one for each token, so that thousands of requests on dozens of
instances take seconds. What it leaves out: host tiers, preemption, transfers that overlap the prefill,
failures. What a prefill takes is what the cost model says, without scatter.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import msgspec

from memserve.config import Role
from memserve.router.request_state import DECODE_HEADROOM_TOKENS
from memserve.router.scheduling.cost_model import CostModel, Link, Links
from memserve.router.scheduling.holder_tree import Found
from memserve.router.scheduling.holders import Holding
from memserve.router.scheduling.load import RecentWork
from memserve.router.scheduling.policies.decision import Ask, Candidate, Decision, Source
from memserve.router.scheduling.policies.policies import POLICIES
from memserve.router.scheduling.policies.pricing import source_of
from memserve.router.scheduling.policy import WorkerView, blocks_for
from memserve.router.scheduling.predictor import Predictor
from memserve.router.scheduling.prompt_tree import PromptTree
from memserve.simulate.traces import Job, Trace
from memserve.simulate.worker import ModelledCache, ModelledWorker, Task

_FREE = Link(0.0, float("inf"))


@dataclass(frozen=True, slots=True)
class Setup:
    """What is simulated. `cache_tokens`: KV that each worker's pool holds. `is_ideal`: the bound, one cache
    of any size for all workers and transfers that take no time.
    """

    model: CostModel
    num_prefill: int
    num_decode: int
    num_colocated: int = 0
    policy: str = "prompt-tree"
    cache_tokens: int = 500_000
    max_running: int = 256
    pull_back: bool = True
    is_ideal: bool = False
    seed: int = 0


class Outcome(msgspec.Struct, frozen=True):
    """One request: times in ms, and where its prompt's tokens came from."""

    ttft_ms: float
    jct_ms: float
    predicted_ttft_ms: float
    num_tokens: int
    num_cached_tokens: int
    num_new_tokens: int


@dataclass(slots=True)
class Totals:
    """What happened besides. Bytes by way; `busy_ms` of each worker's prefills."""

    handoff_bytes: float = 0.0
    pulled_bytes: float = 0.0
    pulled_back_bytes: float = 0.0
    num_pulls: int = 0
    num_alone: int = 0
    span_s: float = 0.0
    busy_ms: dict[str, float] = field(default_factory=dict)


class Simulation:
    """One run; `run` once."""

    def __init__(self, setup: Setup, trace: Trace) -> None:
        model = setup.model
        if setup.is_ideal:
            links = Links(from_device=_FREE, from_host=_FREE, swap_in=_FREE)
            model = msgspec.structs.replace(model, links=links)
        self.setup = setup
        self.outcomes: list[Outcome] = []
        self.totals = Totals()
        self._trace = trace
        self._model = model
        self._policy = POLICIES[setup.policy]
        self._rng = random.Random(setup.seed)
        self._events: list[tuple[float, int, Callable[[float], None]]] = []
        self._serial = itertools.count()
        self._queue: deque[tuple[Job, float]] = deque()
        self._turn = 0
        self._recent = RecentWork()
        self._workers = self._make_workers()
        self._candidates = [worker.candidate for worker in self._workers.values()]
        sides = {Role.PREFILL: 0, Role.COLOCATED: 0, Role.DECODE: 1}
        self._side = {name: sides[worker.candidate.view.role] for name, worker in self._workers.items()}
        self._trees = [self._make_tree(side) for side in (0, 1)]

    def run(self) -> list[Outcome]:
        """All requests to their end."""
        for job in self._trace.jobs:
            self._at(job.at_s, partial(self._arrive, job))
        now = 0.0
        while self._events:
            now, _, happen = heapq.heappop(self._events)
            happen(now)
            self._place(now)
        assert not self._queue, "a request fits no pool"
        self.totals.span_s = now
        self.totals.busy_ms = {name: worker.busy_ms for name, worker in self._workers.items()}
        return self.outcomes

    # --- the fleet ---

    def _make_workers(self) -> dict[str, ModelledWorker]:
        setup, trace, workers = self.setup, self._trace, {}
        predictor = Predictor(self._model)
        num_blocks = setup.cache_tokens // trace.block_size
        shared = ModelledCache(trace.ids_per_block, self._all_blocks()) if setup.is_ideal else None
        roles = {
            Role.PREFILL: setup.num_prefill,
            Role.DECODE: setup.num_decode,
            Role.COLOCATED: setup.num_colocated,
        }
        for role, count in roles.items():
            for index in range(count):
                name = f"{role.value}-{index}"
                view = WorkerView(name, role, 1, num_blocks, trace.block_size, setup.max_running)
                cache = shared or ModelledCache(trace.ids_per_block, num_blocks)
                workers[name] = ModelledWorker(Candidate(view, predictor), cache)
                if role is not Role.DECODE:
                    self._recent.join(name)
        return workers

    def _all_blocks(self) -> int:
        step = 4 * self._trace.ids_per_block
        return 1 + sum(len(job.ids_after) // step for job in self._trace.all_jobs())

    def _make_tree(self, side: int) -> PromptTree:
        tree = PromptTree(self._trace.block_size, 10**8, ttl_s=1e9, ids_per_block=self._trace.ids_per_block)
        for name in self._workers:
            if self._side[name] == side:
                tree.join(name, 1)
        return tree

    # --- a request's way ---

    def _at(self, time: float, happen: Callable[[float], None]) -> None:
        heapq.heappush(self._events, (time, next(self._serial), happen))

    def _arrive(self, job: Job, now: float) -> None:
        job.at_s = now
        self._queue.append((job, now))

    def _place(self, now: float) -> None:
        while self._queue:
            job, _ = self._queue[0]
            decision = self._decide(job, now)
            if decision is None:
                return
            self._queue.popleft()
            self._start(job, decision, now)

    def _decide(self, job: Job, now: float) -> Decision | None:
        for worker in self._workers.values():
            view = worker.candidate.view
            view.queue_ms = worker.backlog.queue_ms(now)
            view.link_ms = max(0.0, worker.link_free_at - now) * 1e3
            view.num_decoding, view.num_context = len(worker.batch), worker.num_context
        for name, recent_ms in self._recent.items():
            self._workers[name].candidate.view.recent_ms = recent_ms
        found, decode_found = self._find(0, job, now), self._find(1, job, now)
        ask = Ask(
            num_tokens=job.num_tokens,
            num_new_tokens=min(job.num_new_tokens, DECODE_HEADROOM_TOKENS),
            rng=self._rng,
            turn=self._turn,
            session=job.session,
            prefill_found=found,
            decode_found=decode_found,
            source=None if self.setup.is_ideal else self._source(found, decode_found),
        )
        return self._policy(self._candidates, ask)

    def _find(self, side: int, job: Job, now: float) -> Found:
        found = self._trees[side].match("", job.ids, now)
        if not self.setup.is_ideal:
            return found
        num_tokens = next(iter(self._workers.values())).cache.match(job.ids, now) * self._trace.block_size
        life = self._trees[side].life
        live = {
            name: Holding(life(name), num_tokens, 0)
            for name in self._workers
            if self._side[name] == side and num_tokens
        }
        return found._replace(live=live)

    def _source(self, found: Found, decode_found: Found) -> Source | None:
        sources = [
            source_of(tree, each) for tree, each in zip(self._trees, (found, decode_found), strict=True)
        ]
        return max((source for source in sources if source), key=lambda s: s.num_tokens, default=None)

    def _start(self, job: Job, decision: Decision, now: float) -> None:
        row, placement = decision.prefill, decision.placement
        self._turn += 1
        prefill = self._workers[row.instance]
        decode = self._workers[placement.decode] if placement.decode is not None else None
        task = Task(job, self._turn, prefill, decode, row.total_ms + (now - job.at_s) * 1e3, now)
        block_size = self._trace.block_size
        if decode is not None:
            num_tokens = job.num_tokens + min(job.num_new_tokens, DECODE_HEADROOM_TOKENS)
            task.num_decode_blocks = self._reserve(decode, num_tokens)
        if prefill is not decode:
            task.num_prefill_blocks = self._reserve(prefill, job.num_tokens)
        elif prefill.candidate.view.role is Role.DECODE:
            self.totals.num_alone += 1
        prefill.backlog.add(str(task.number), row.swap_in_ms + row.exec_ms, now)
        if prefill.candidate.view.role is not Role.DECODE:
            self._recent.add(prefill.name, row.exec_ms)
        self._trees[self._side[prefill.name]].hold(prefill.name, 1, "", job.ids, now)
        if row.source is not None and row.num_pulled_tokens:
            source = self._workers[row.source.instance]
            upto = row.num_cached_tokens // block_size
            there = min(upto, source.cache.match(job.ids, now))
            task.ready_at = self._copy(source, prefill, row.num_pulled_tokens, now)
            self.totals.num_pulls += 1
            self.totals.pulled_bytes += row.num_pulled_tokens * self._model.kv_token_bytes
            ids = job.ids[: there * 4 * self._trace.ids_per_block]
            self._at(task.ready_at, partial(self._keep, prefill, ids))
        prefill.waiting.append(task)
        self._at(task.ready_at, partial(self._go_on, prefill))

    def _go_on(self, worker: ModelledWorker, now: float) -> None:
        """Whatever the worker does next."""
        end = worker.begin_prefill(now)
        if end is not None:
            self._at(end, partial(self._prefilled, worker))
        elif (end := worker.next_end()) is not None:
            self._at(max(now, end), partial(self._drawn, worker, worker.version))

    def _prefilled(self, worker: ModelledWorker, now: float) -> None:
        task = worker.end_prefill()
        job = task.job
        task.first_token_at, task.num_left = now, job.num_new_tokens - 1
        worker.backlog.remove(str(task.number), now)
        # its blocks are counted once, among those that are kept
        own_blocks = task.num_decode_blocks if task.decode is worker else task.num_prefill_blocks
        self._keep(worker, job.ids, now, own_blocks)
        decode = task.decode
        if decode is None or task.num_left == 0:
            self._release(task)
            self._done(task, now)
        elif decode is worker:
            decode.join(task, now)
        else:
            num_there = decode.cache.match(job.ids, now) * self._trace.block_size
            num_moved = max(0, job.num_tokens - num_there)
            self.totals.handoff_bytes += num_moved * self._model.kv_token_bytes
            self._at(self._copy(worker, decode, num_moved, now), partial(self._handed_over, task))
        self._leave(worker, now)
        self._go_on(worker, now)

    def _handed_over(self, task: Task, now: float) -> None:
        decode = task.decode
        assert decode is not None
        task.prefill.candidate.view.reserved_blocks -= task.num_prefill_blocks
        task.prefill.candidate.view.num_placed -= 1
        task.num_prefill_blocks = 0
        decode.join(task, now)
        self._go_on(decode, now)

    def _drawn(self, worker: ModelledWorker, version: int, now: float) -> None:
        if version != worker.version:
            return
        worker.advance(now)
        self._leave(worker, now)
        self._go_on(worker, now)

    def _leave(self, worker: ModelledWorker, now: float) -> None:
        for task in worker.leave():
            self._release(task)
            self._keep(worker, task.job.ids_after, now)
            self._pull_back(task, worker, now)
            self._done(task, now)

    def _pull_back(self, task: Task, decode: ModelledWorker, now: float) -> None:
        prefill, job = task.prefill, task.job
        step = 4 * self._trace.ids_per_block
        num_new = (len(job.ids_after) - len(job.ids)) // step * self._trace.block_size
        if self.setup.pull_back and prefill is not decode and num_new:
            self.totals.pulled_back_bytes += num_new * self._model.kv_token_bytes
            end = self._copy(decode, prefill, num_new, now)
            self._at(end, partial(self._keep, prefill, job.ids_after))

    def _done(self, task: Task, now: float) -> None:
        job = task.job
        self.outcomes.append(
            Outcome(
                (task.first_token_at - job.at_s) * 1e3,
                (now - job.at_s) * 1e3,
                task.predicted_ttft_ms,
                job.num_tokens,
                task.num_cached_tokens,
                job.num_new_tokens,
            )
        )
        if job.then is not None:
            self._at(now, partial(self._arrive, job.then))

    # --- promises, copies, caches ---

    def _reserve(self, worker: ModelledWorker, num_tokens: int) -> int:
        view = worker.candidate.view
        num_blocks = min(blocks_for(num_tokens, view.block_size), view.num_blocks)
        view.reserved_blocks += num_blocks
        view.num_placed += 1
        return num_blocks

    def _release(self, task: Task) -> None:
        places = [(task.decode, task.num_decode_blocks), (task.prefill, task.num_prefill_blocks)]
        for worker, num_blocks in places:
            if worker is not None and num_blocks:
                worker.candidate.view.reserved_blocks -= num_blocks
                worker.candidate.view.num_placed -= 1

    def _copy(self, source: ModelledWorker, target: ModelledWorker, num_tokens: int, now: float) -> float:
        """When a copy is there: each instance makes one at a time."""
        if num_tokens == 0:
            return now
        ms = target.candidate.predictor.pull_ms(num_tokens)
        if self.setup.is_ideal:
            return now
        end = max(now, source.link_free_at, target.link_free_at) + ms / 1e3
        source.link_free_at = target.link_free_at = end
        return end

    def _keep(self, worker: ModelledWorker, ids: bytes, now: float, own_blocks: int = 0) -> None:
        """Blocks are in a worker's cache; the router is told of them, and of what went for them."""
        view, tree = worker.candidate.view, self._trees[self._side[worker.name]]
        num_active = 0 if self.setup.is_ideal else view.reserved_blocks - own_blocks
        first, placed, gone = worker.cache.put(ids, num_active, now)
        if self.setup.is_ideal:
            return
        if len(gone.blocks):
            tree.remove_blocks(worker.name, 1, gone)
        num_blocks = first + len(placed.blocks)
        tree.hold(worker.name, 1, "", ids, now, first_block=first, addresses=placed)
        tree.remove(worker.name, 1, "", ids, num_blocks)
