"""The scheduler alone: order, budget, blocks, preemption; and random histories against its invariants."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from memserve.messages import BlockRefs, Decode, Offer, Prefill, SamplingParams, Tier, pack_tokens
from memserve.pool.block_table import BlockTable
from memserve.step_memory import MAX_LOGIT_ROWS
from memserve.workers.budget import StepBudget
from memserve.workers.request import Request, RequestKind, RequestState
from memserve.workers.scheduler import Scheduler


class Blocks:
    """A pool of numbers."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.free = set(range(num_blocks))

    @property
    def num_available(self) -> int:
        return len(self.free)

    def alloc_mem(self, num_blocks: int):
        if num_blocks > len(self.free):
            return None
        taken = sorted(self.free)[:num_blocks]
        self.free -= set(taken)
        return np.array(taken, dtype=np.int64)

    def acquire(self, tokens: bytes, salt: str) -> BlockTable:
        return BlockTable()

    def copy_last(self, tokens: bytes, salt: str, into: int) -> bool:
        return False

    def release(self, table: BlockTable) -> None:
        block_ids = table.ids(table.num_blocks).tolist()
        ids = set(block_ids)
        assert len(ids) == len(block_ids) and not ids & self.free, "freed twice"
        self.free |= ids
        table.num_blocks = 0


def make_request(arrival: int, num_tokens: int, *, kind=Decode, offer_tokens: int = 0, **sampling) -> Request:
    tokens = pack_tokens(list(range(num_tokens)))
    params = SamplingParams(max_tokens=1000, seed=0, **sampling)
    if kind is Prefill:
        return Request.of(Prefill(f"r{arrival}", 0, tokens, num_tokens, params), arrival)
    refs = BlockRefs("other", 0, Tier.DEVICE, (), ())
    offer = Offer(refs, offer_tokens) if offer_tokens else None
    return Request.of(Decode(f"r{arrival}", 0, tokens, num_tokens, params, offer=offer), arrival)


@pytest.fixture
def make_scheduler():
    def make(num_blocks=64, block_size=4, max_running=8, max_tokens=64):
        blocks = Blocks(num_blocks)
        budget = StepBudget(max_tokens, None)
        return Scheduler(blocks, block_size, max_running), blocks, budget

    return make


def run_step(scheduler, budget):
    """One step whose every draw is token 0; what it computed, as (arrival, tokens)."""
    plan = scheduler.schedule(budget.open())
    for request, num_new in plan.chunks:
        request.num_computed_tokens += num_new
        if request.num_computed_tokens == request.num_tokens:
            request.append(0)
    return plan, [(request.arrival, num_new) for request, num_new in plan.chunks]


def test_first_come_first_served_in_chunks(make_scheduler):
    scheduler, _, budget = make_scheduler()
    for arrival, num_tokens in enumerate((100, 30, 10)):
        scheduler.add(make_request(arrival, num_tokens))
    assert run_step(scheduler, budget)[1] == [(0, 64)]
    assert run_step(scheduler, budget)[1] == [(0, 36), (1, 28)]
    assert run_step(scheduler, budget)[1] == [(0, 1), (1, 2), (2, 10)]
    assert run_step(scheduler, budget)[1] == [(0, 1), (1, 1), (2, 1)]


def test_no_more_seats_than_max_running(make_scheduler):
    scheduler, _, budget = make_scheduler(max_running=2)
    for arrival in range(3):
        scheduler.add(make_request(arrival, 4))
    assert run_step(scheduler, budget)[1] == [(0, 4), (1, 4)]
    scheduler.finish(scheduler.running[0])
    assert run_step(scheduler, budget)[1] == [(1, 1), (2, 4)]


def test_prompt_logprobs_bound_the_rows_of_logits_of_a_step(make_scheduler):
    """Of all requests in it together; those that ask for none are not held up."""
    scheduler, _, budget = make_scheduler(num_blocks=1000, max_tokens=2048)
    for arrival in range(4):
        scheduler.add(make_request(arrival, MAX_LOGIT_ROWS - 10, prompt_logprobs=1))
    scheduler.add(make_request(4, 600))
    scheduler.add(make_request(5, 3, prompt_logprobs=1))
    # 1. What is left after the first is a sliver, but enough for one that needs no more.
    assert run_step(scheduler, budget)[1] == [(0, MAX_LOGIT_ROWS - 10), (4, 600), (5, 3)]
    # 2. One after the other; the decodes' rows are not among those counted.
    assert run_step(scheduler, budget)[1] == [(0, 1), (4, 1), (5, 1), (1, MAX_LOGIT_ROWS - 10)]
    scheduler.finish(scheduler.running[0])
    assert (2, MAX_LOGIT_ROWS - 10) in run_step(scheduler, budget)[1]
    # 3. A long prompt comes in chunks.
    scheduler, _, budget = make_scheduler(num_blocks=1000, max_tokens=2048)
    scheduler.add(make_request(0, 600, prompt_logprobs=1))
    assert [run_step(scheduler, budget)[1] for _ in range(3)] == [[(0, 256)], [(0, 256)], [(0, 88)]]


def test_the_youngest_is_preempted_and_comes_back_in_its_place(make_scheduler):
    scheduler, blocks, budget = make_scheduler(num_blocks=8)
    # 1. Two requests of 3 blocks, and room for each to grow by one.
    scheduler.add(make_request(0, 12))
    scheduler.add(make_request(1, 12))
    scheduler.add(make_request(2, 4))
    assert run_step(scheduler, budget)[1] == [(0, 12), (1, 12)]
    for _ in range(4):
        assert run_step(scheduler, budget)[1] == [(0, 1), (1, 1)]
    # 2. Both need a fifth block: the older takes the younger's, and the younger waits before the third.
    assert run_step(scheduler, budget)[1] == [(0, 1)]
    assert scheduler.num_preemptions == 1
    assert [r.arrival for r in scheduler.waiting] == [1, 2]
    assert scheduler.waiting[0].num_computed_tokens == 0 and scheduler.waiting[0].num_tokens == 17
    # 3. It is recomputed once the older is gone.
    scheduler.finish(scheduler.running[0])
    assert run_step(scheduler, budget)[1] == [(1, 17), (2, 4)]


def test_a_request_that_is_the_youngest_preempts_itself(make_scheduler):
    scheduler, blocks, budget = make_scheduler(num_blocks=6)
    scheduler.add(make_request(0, 5))
    scheduler.add(make_request(1, 8))
    run_step(scheduler, budget)
    blocks.alloc_mem(2)  # somebody else's
    assert run_step(scheduler, budget)[1] == [(0, 1)]
    assert [r.arrival for r in scheduler.waiting] == [1]


def test_too_large_is_refused_and_the_next_one_runs(make_scheduler):
    scheduler, blocks, budget = make_scheduler(num_blocks=4)
    scheduler.add(make_request(0, 17))
    scheduler.add(make_request(1, 16))
    plan, chunks = run_step(scheduler, budget)
    assert [r.request.arrival for r in plan.refused] == [0] and chunks == [(1, 16)]
    plan, chunks = run_step(scheduler, budget)
    assert [r.request.arrival for r in plan.refused] == [1] and chunks == []
    assert plan.refused[0].request.state is RequestState.FINISHED
    assert blocks.num_available == 4


def test_a_lone_request_waits_for_offered_blocks(make_scheduler):
    scheduler, blocks, budget = make_scheduler(num_blocks=4)
    scheduler.add(make_request(0, 4, kind=Prefill))
    run_step(scheduler, budget)
    offered = scheduler.running[0]
    scheduler.offer(offered)
    assert offered.state is RequestState.OFFERED and blocks.num_available == 3
    scheduler.add(make_request(1, 12))
    assert run_step(scheduler, budget)[1] == [(1, 12)]
    # It needs a fourth block for its next token: that is offered, and comes back.
    assert run_step(scheduler, budget)[1] == []
    assert scheduler.num_preemptions == 0
    blocks.release(offered.table)
    assert run_step(scheduler, budget)[1] == [(1, 1)]


def test_a_pull_takes_a_seat_and_blocks_but_no_budget(make_scheduler):
    scheduler, blocks, budget = make_scheduler(max_running=3, max_tokens=16)
    scheduler.add(make_request(0, 100))
    scheduler.add(make_request(1, 21, offer_tokens=20))
    scheduler.add(make_request(2, 21, offer_tokens=20))
    scheduler.add(make_request(3, 4))
    plan, chunks = run_step(scheduler, budget)
    assert chunks == [(0, 16)]
    assert [r.arrival for r in plan.pulls] == [1, 2]
    assert blocks.num_available == 64 - 25 - 6 - 6
    # One arrives whole, of the other the first half: the rest is computed here.
    scheduler.pulled(plan.pulls[0], 20)
    assert run_step(scheduler, budget)[1] == [(1, 1), (0, 16)]
    scheduler.pulled(plan.pulls[1], 8)
    scheduler.finish(scheduler.running[0])
    assert run_step(scheduler, budget)[1] == [(1, 1), (2, 13)]


class History(RuleBasedStateMachine):
    """Requests come, are pulled, offered, released, cancelled; each block has one owner; all ends."""

    @initialize(
        num_blocks=st.integers(2, 24),
        block_size=st.sampled_from((1, 4, 16)),
        max_running=st.integers(1, 5),
        max_tokens=st.sampled_from((1, 16, 40)),
    )
    def start(self, num_blocks, block_size, max_running, max_tokens):
        self.blocks = Blocks(num_blocks)
        self.block_size, self.max_running = block_size, max_running
        self.budget = StepBudget(max_tokens, None)
        self.scheduler = Scheduler(self.blocks, block_size, max_running)
        self.offered: list[Request] = []
        self.arrivals = 0

    @property
    def alive(self) -> list[Request]:
        scheduler = self.scheduler
        return [*scheduler.waiting, *scheduler.running, *scheduler.pulling]

    @rule(num_tokens=st.integers(1, 80), kind=st.sampled_from(("prefill", "decode", "offer")))
    def arrive(self, num_tokens, kind):
        self.arrivals += 1
        offer_tokens = num_tokens - 1 if kind == "offer" else 0
        message = Prefill if kind == "prefill" else Decode
        self.scheduler.add(make_request(self.arrivals, num_tokens, kind=message, offer_tokens=offer_tokens))

    @rule()
    def step(self):
        running_before = list(self.scheduler.running)
        tally = self.budget.open()
        plan = self.scheduler.schedule(tally)
        num_decodes = tally.num_tokens - tally.num_chunk_tokens
        assert tally.num_chunk_tokens <= max(16, self.budget.max_tokens - num_decodes)
        chunked = [request for request, _ in plan.chunks]
        assert len(set(chunked)) == len(chunked)
        oldest = min(running_before, key=lambda r: r.arrival, default=None)
        if oldest is not None and oldest.state is RequestState.WAITING:
            assert oldest not in chunked
            raise AssertionError("the oldest was preempted")
        for request, num_new in plan.chunks:
            assert request.state is RequestState.RUNNING
            stop = request.num_computed_tokens + num_new
            assert num_new > 0 and stop <= request.num_tokens
            assert stop <= request.table.num_blocks * self.block_size
            request.num_computed_tokens = stop
            if stop == request.num_tokens:
                request.append(0)
                if request.kind is RequestKind.PREFILL:
                    self.scheduler.offer(request)
                    self.offered.append(request)
                elif len(request.output_ids) == 20:
                    self.scheduler.finish(request)

    @precondition(lambda self: self.scheduler.pulling)
    @rule(data=st.data())
    def pull_ends(self, data):
        request = data.draw(st.sampled_from(self.scheduler.pulling))
        self.scheduler.pulled(request, data.draw(st.integers(0, request.num_tokens)))

    @precondition(lambda self: self.offered)
    @rule(data=st.data())
    def release(self, data):
        request = self.offered.pop(data.draw(st.integers(0, len(self.offered) - 1)))
        self.blocks.release(request.table)

    @precondition(lambda self: self.alive)
    @rule(data=st.data())
    def cancel(self, data):
        request = data.draw(st.sampled_from(self.alive))
        if request.state is RequestState.PULLING:
            self.scheduler.abandon_pull(request)
            self.blocks.release(request.table)
        else:
            self.scheduler.finish(request)

    @invariant()
    def every_block_has_one_owner(self):
        held = [b for r in [*self.alive, *self.offered] for b in r.table.ids(r.table.num_blocks).tolist()]
        assert sorted([*held, *self.blocks.free]) == list(range(self.blocks.num_blocks))
        assert all(request.table.num_blocks == 0 for request in self.scheduler.waiting)

    @invariant()
    def queues_are_in_order(self):
        scheduler = self.scheduler
        assert len(scheduler.running) + len(scheduler.pulling) <= self.max_running
        for queue in (scheduler.waiting, scheduler.running):
            assert queue == sorted(queue, key=lambda r: r.arrival)

    def teardown(self):
        """With pulls that end and offers that are released, everything runs to its end."""
        if not hasattr(self, "scheduler"):
            return
        for _ in range(100 * (self.arrivals + 1)):
            self.step()
            for request in tuple(self.scheduler.pulling):
                self.scheduler.pulled(request, 3)
            while self.offered:
                self.blocks.release(self.offered.pop().table)
        assert not self.alive and self.blocks.num_available == self.blocks.num_blocks


History.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestHistory = History.TestCase
