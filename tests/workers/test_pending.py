"""A request whose prefix is being pulled for another one, which is not here yet or is nobody's: it waits, and
uses what came; or takes over; or, when it has waited as long as it would take by itself, goes by itself.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import pytest

from memserve.messages import Cancel, PullAhead, PullBack, Release, Reserve, pack_tokens
from memserve.pool.mempool import MemPool
from memserve.workers.budget import StepBudget
from memserve.workers.patience import Patience
from memserve.workers.request import Request
from tests.workers.test_contention import Two

PREFIX = 160


@dataclass
class Gate:
    """The first copy waits until it may go on; those after it do so too."""

    num_bytes: int = 0
    entered: threading.Event = field(default_factory=threading.Event)
    go_on: threading.Event = field(default_factory=threading.Event)

    def copy(self, destination: np.ndarray, source: np.ndarray) -> int:
        self.entered.set()
        assert self.go_on.wait(30)
        np.copyto(destination, source)
        self.num_bytes += source.nbytes
        return source.nbytes


@pytest.fixture
def gate() -> Iterator[Gate]:
    gate = Gate()
    yield gate
    gate.go_on.set()


@pytest.fixture(params=[1, 4, 16])
def block_size(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture
def two(make_rig, tools, gate: Gate, block_size: int) -> Two:
    return Two(make_rig, tools, d={"copy": gate.copy}, block_size=block_size)


@pytest.fixture
def decodes(two: Two, tools, gate: Gate) -> tuple:
    """Of two prompts with one prefix, both prefilled; what is ahead of the first is being copied to D."""
    common = tools.prompt(PREFIX, seed=1)
    message, first = two.prefilled("a", common + tools.prompt(9, seed=2), 4)
    _, second = two.prefilled("b", common + tools.prompt(7, seed=3), 4)
    refs = first.offer.refs
    two.d.send(Reserve("a", 0, message.token_ids), PullAhead("a", 0, 0, refs))
    two.d.worker.step()
    assert gate.entered.wait(10)
    # the second comes before the first
    two.d.send(second)
    two.d.worker.step()
    (waiting,) = two.d.worker._scheduler.waiting
    assert waiting.pending is not None and waiting.table.num_blocks == 0
    return first, second


def check(two: Two, tools, decode, request_id: str, said: list) -> None:
    prompt = np.frombuffer(decode.token_ids, np.int32)[: decode.num_prompt_tokens].tolist()
    heard = tools.Transcript.of(said, request_id)
    assert heard.token_ids == tools.expected(prompt, 4)[1:]


def num_copied(two: Two, gate: Gate) -> int:
    return gate.num_bytes // two.d.pool.kv[0].nbytes


def test_it_uses_what_was_pulled_ahead_of_another(two, tools, gate, decodes, block_size):
    first, second = decodes
    # 1. the first comes, and its pull ends
    two.d.send(first)
    gate.go_on.set()
    two.d.run()
    said = two.d.take()
    # 2. the second had all of the prefix, and pulled only the rest
    (pulled,) = tools.Transcript.of(said, "b").pulled
    assert pulled.failure is None
    assert pulled.num_cached_tokens == PREFIX
    own = len(second.offer.refs.blocks) - PREFIX // block_size
    assert num_copied(two, gate) == len(first.offer.refs.blocks) + own
    for decode in decodes:
        check(two, tools, decode, decode.request_id, said)
    two.end("a", "b")


def test_it_takes_over_when_the_other_is_cancelled(two, tools, gate, decodes):
    _, second = decodes
    two.d.send(Cancel("a", 0))
    two.d.worker.step()
    gate.go_on.set()
    two.d.run()
    said = two.d.take()
    (pulled,) = tools.Transcript.of(said, "b").pulled
    assert pulled.failure is None and pulled.num_cached_tokens == 0
    check(two, tools, second, "b", said)
    two.end("a", "b")


def test_who_has_waited_long_enough_and_finds_no_room_is_not_looked_at_all_the_time(
    two, tools, gate, decodes, monkeypatch
):
    """What it needs then, blocks, rings the bell."""
    worker = two.d.worker
    common = np.frombuffer(decodes[1].token_ids, np.int32)[:PREFIX].tolist()
    # 1. the first comes, and its pull stands still; a third waits behind the second
    two.d.send(decodes[0])
    _, third = two.prefilled("c", common + tools.prompt(5, seed=4), 4)
    two.d.send(third)
    worker.step()
    assert [r.request_id for r in worker._scheduler.waiting] == ["b", "c"] and worker._scheduler.pulling
    # 2. their time is up, but there is no room for the second, and so none behind it
    with monkeypatch.context() as context:
        context.setattr(MemPool, "num_available", 0)
        two.d.clock.now += 100.0
        assert not worker.step() and len(worker._scheduler.waiting) == 2
        # 3. so the loop may sleep
        assert worker._scheduler.patience_ends is None and worker._rest_s is None
    # 4. and goes on with what they were to pull
    gate.go_on.set()
    two.d.run()
    said = two.d.take()
    for decode in (*decodes, third):
        check(two, tools, decode, decode.request_id, said)
    two.end("a", "b", "c")


def test_it_waits_only_as_long_as_it_would_take_by_itself(two, tools, gate, decodes):
    first, second = decodes
    scheduler = two.d.worker._scheduler
    # 1. it is known when to look again, and until then nothing happens
    assert scheduler.patience_ends is not None and scheduler.patience_ends > two.d.clock.now
    assert not two.d.worker.step()
    # 2. then it pulls for itself, behind what stands still
    two.d.clock.now = scheduler.patience_ends
    two.d.worker.step()
    assert scheduler.patience_ends is None and [r.request_id for r in scheduler.pulling] == ["b"]
    gate.go_on.set()
    two.d.run()
    two.d.send(first)
    two.d.run()
    said = two.d.take()
    for decode in decodes:
        check(two, tools, decode, decode.request_id, said)
    two.end("a", "b")


def test_it_recomputes_when_the_source_has_gone(two, tools, gate, decodes):
    first, second = decodes
    # 1. what is being copied is freed at the source, and evicted
    two.p.send(Release("a", 0), Release("b", 0))
    two.p.run()
    two.p.pool.flush()
    two.d.send(first)
    gate.go_on.set()
    two.d.run()
    # 2. the first computes it all, and the second finds that
    said = two.d.take()
    assert tools.Transcript.of(said, "a").pulled[0].failure is not None
    for decode in decodes:
        check(two, tools, decode, decode.request_id, said)
    two.end()


def test_it_can_be_cancelled(two, tools, gate, decodes):
    first, _ = decodes
    two.d.send(Cancel("b", 0), first)
    gate.go_on.set()
    two.d.run()
    check(two, tools, first, "a", two.d.take())
    two.end("a", "b")


@pytest.mark.parametrize("stalls", [False, True])
def test_a_prefill_waits_for_what_is_pulled_back(make_rig, tools, gate, block_size, stalls):
    common = {"num_blocks": 512, "max_model_len": 400, "max_batch_tokens": 400, "caches": True}
    p = make_rig(instance="prefill-0", block_size=block_size, copy=gate.copy, **common)
    d = make_rig(instance="decode-0", block_size=block_size, **common)
    d.grant_to(p)
    # 1. D has a conversation that is being pulled to P
    history = tools.prompt(PREFIX, seed=1)
    d.send(tools.decode("a", [*history, 1], max_tokens=1))
    d.run()
    d.take()
    tokens = pack_tokens(history)
    refs = d.pool.addresses(d.pool.match(tokens).device_blocks)
    p.send(PullBack("a", tokens, "", 0, refs))
    p.worker.step()
    assert gate.entered.wait(10)
    # 2. its next turn comes to P, and waits
    prompt = history + tools.prompt(10, seed=2)
    p.send(tools.prefill("b", prompt))
    p.worker.step()
    assert p.runner.batches == []
    # 3. it uses what came, or computes all of it by itself
    if stalls:
        p.clock.now = p.worker._scheduler.patience_ends
        p.worker.step()
    gate.go_on.set()
    p.run()
    (answer,) = tools.Transcript.of(p.take(), "b").token_ids
    assert answer == tools.expected(prompt, 1)[0]
    num_computed = sum(count for batch in p.runner.batches for _, count in batch)
    assert num_computed == (len(prompt) if stalls else 10)
    p.send(Release("b", 0))
    p.run()
    p.assert_idle()
    d.assert_idle()


def test_patience(tools):
    budget = StepBudget(max_tokens=64, max_step_ms=160.0, pair_cost=0.0)  # 10 ms a token
    patience = Patience(budget)
    prefill = Request.of(tools.prefill("a", tools.prompt(50)), 1)
    # 1. as long as it takes to compute what is new
    assert patience.seconds(prefill, 10, 50) == pytest.approx(0.4)
    # 2. at least a moment
    assert patience.seconds(prefill, 49, 50) == 0.05
    # 3. where steps are not timed, a while
    assert Patience(StepBudget(64, None)).seconds(prefill, 10, 50) == 1.0
    # 4. who has an offer may pull: as long as such pulls have taken, once any has
    message = tools.decode("b", tools.prompt(51), num_prompt=50, max_tokens=4)
    decode = Request.of(message, 2)
    decode.offer = object()  # type: ignore[assignment]
    assert patience.seconds(decode, 10, 50) == pytest.approx(0.4)
    for elapsed_ms in (400.0, 200.0, 300.0):
        patience.observe(100, elapsed_ms)
    patience.observe(0, 1e9)
    assert patience.seconds(decode, 10, 50) == pytest.approx(0.12)
