"""A request whose prefix is being pulled for another one, which is not here yet or is nobody's: it waits, and
uses what came; or takes over; or, when it has waited as long as it would take by itself, goes by itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import msgspec
import numpy as np
import pytest

from memserve.messages import Cancel, PullAhead, PullBack, PulledBack, Release, Reserve, pack_tokens
from memserve.pool.mempool import MemPool
from memserve.workers.budget import StepBudget
from memserve.workers.patience import Patience
from memserve.workers.request import Request
from tests.pool.gate import Gate
from tests.workers.test_contention import Two

PREFIX = 160


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


def test_who_has_an_offer_waits_only_for_what_is_on_its_way(two, tools, gate):
    common = tools.prompt(PREFIX, seed=1)
    pairs = {name: two.prefilled(name, common + tools.prompt(9, seed=ord(name)), 4) for name in "abcd"}
    scheduler = two.d.worker._scheduler
    # 1. a is reserved, and no byte of it moves: b, which needs the same, pulls at once
    two.d.send(Reserve("a", 0, pairs["a"][0].token_ids), pairs["b"][1])
    two.d.worker.step()
    assert [r.request_id for r in scheduler.pulling] == ["b"] and not scheduler.waiting
    two.d.send(Cancel("b", 0))
    two.d.worker.step()
    # 2. once some of it moves, two others wait
    two.d.send(PullAhead("a", 0, 0, pairs["a"][1].offer.refs), pairs["c"][1], pairs["d"][1])
    two.d.worker.step()
    assert [r.request_id for r in scheduler.waiting if r.pending is not None] == ["c", "d"]
    # 3. it ends without having brought anything: one takes over, and the other waits for that
    two.d.send(Cancel("a", 0))
    two.d.worker.step()
    assert [r.request_id for r in scheduler.pulling] == ["c"]
    assert [r.leader.request_id for r in scheduler.waiting] == ["c"]
    gate.go_on.set()
    two.d.run()
    said = two.d.take()
    for name in "cd":
        check(two, tools, pairs[name][1], name, said)
    two.end(*"abcd")


def test_who_has_an_offer_waits_for_one_that_computes_no_longer_than_a_pull_takes(make_rig, tools):
    two = Two(make_rig, tools, d={"max_batch_tokens": 16})
    common = tools.prompt(PREFIX, seed=1)
    prompts = {name: common + tools.prompt(9, seed=ord(name)) for name in "abc"}
    _, decode = two.prefilled("b", prompts["b"], 4)
    scheduler = two.d.worker._scheduler
    # 1. D computes all of a, a chunk a step; b could pull the same, c could not
    two.d.send(tools.decode("a", prompts["a"], max_tokens=4), decode)
    two.d.send(tools.decode("c", prompts["c"], max_tokens=4))
    two.d.worker.step()
    b, c = scheduler.waiting
    assert b.leader.request_id == "a" and b.leader.num_computed_tokens == 16
    assert scheduler._following.follows(c, scheduler._producers(), two.d.clock.now)
    # 2. for as long as a pull would take, both wait
    two.d.worker.step()
    assert scheduler.waiting == [b, c]
    # 3. then b pulls, and c waits on
    two.d.clock.now = max(b.patience_ends, c.patience_ends)
    assert scheduler._following.follows(c, scheduler._producers(), two.d.clock.now)
    two.d.worker.step()
    assert b not in scheduler.waiting and b.cached.device < PREFIX and c in scheduler.waiting
    two.d.run()
    said = two.d.take()
    check(two, tools, decode, "b", said)
    for name in "ac":
        assert tools.Transcript.of(said, name).token_ids == tools.expected(prompts[name], 4)
    two.end("b")


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


def test_a_pull_back_behind_one_that_stalls_is_given_up(make_rig, tools, gate, block_size):
    common = {"num_blocks": 512, "max_model_len": 400, "max_batch_tokens": 400, "caches": True}
    p = make_rig(instance="prefill-0", block_size=block_size, copy=gate.copy, **common)
    d = make_rig(instance="decode-0", block_size=block_size, **common)
    d.grant_to(p)
    d.send(tools.decode("a", tools.prompt(PREFIX + 1, seed=1), max_tokens=1))
    d.run()
    tokens = pack_tokens(tools.prompt(PREFIX + 1, seed=1)[:PREFIX])
    refs = d.pool.addresses(d.pool.match(tokens).device_blocks)
    # 1. the same is pulled back twice; the first copy stands still
    p.send(PullBack("a", tokens, "", 0, refs), PullBack("b", tokens, "", 0, refs))
    p.worker.step()
    assert gate.entered.wait(10)
    assert p.take() == []
    # 2. the loop sleeps no longer than the second waits; then that one is given up
    ends_at = p.worker._pull_backs.patience_ends
    assert ends_at is not None and p.clock.now < ends_at == p.clock.now + p.worker._rest_s
    p.clock.now = ends_at
    p.worker.step()
    assert p.take() == [PulledBack("b", 0, 0, "another pull has not brought it in 5 s")]
    assert p.worker._pull_backs.patience_ends is None
    # 3. the first goes on whenever it can
    gate.go_on.set()
    p.run()
    (answer,) = p.take()
    assert (answer.request_id, answer.num_tokens, answer.failure) == ("a", PREFIX, None)
    p.assert_idle()


@pytest.mark.parametrize("has_ended", [True, False])
def test_what_another_brought_since_the_reserve_is_not_pulled_ahead(two, tools, gate, has_ended):
    common = tools.prompt(PREFIX, seed=1)
    message, first = two.prefilled("a", common + tools.prompt(9, seed=2), 4)
    _, second = two.prefilled("b", common + tools.prompt(7, seed=3), 4)
    num_fetched, fetch = [], two.d.pool.fetch

    def counted(refs, *args):
        num_fetched.append(len(refs.blocks))
        return fetch(refs, *args)

    two.d.pool.fetch = counted
    # 1. a is to come; b is there, and what it pulls has begun, or ended
    two.d.send(Reserve("a", 0, message.token_ids), second)
    two.d.worker.step()
    assert gate.entered.wait(10)
    if has_ended:
        gate.go_on.set()
        two.d.run()
    # 2. what is offered ahead of a is here, or on its way
    two.d.send(PullAhead("a", 0, 0, first.offer.refs))
    two.d.worker.step()
    gate.go_on.set()
    two.d.send(first)
    two.d.run()
    num_blocks, block_size = len(first.offer.refs.blocks), two.d.pool.block_size
    assert sum(num_fetched) == len(second.offer.refs.blocks) + num_blocks - PREFIX // block_size
    check(two, tools, first, "a", two.d.take())
    two.end("a", "b")


def test_only_what_began_with_the_offer_is_timed(make_rig, tools, monkeypatch):
    two = Two(make_rig, tools)
    patience, times_ms, num_lost = two.d.worker._patience, [], []
    fetch = two.d.pool.fetch

    class Timed:
        def __init__(self, pull) -> None:
            self.pull, self.elapsed_ms, self.is_lost = (
                pull,
                times_ms.pop(0),
                bool(num_lost) and num_lost.pop(),
            )

        def poll(self):
            result = self.pull.poll()
            if result is None:
                return None
            num_blocks = 0 if self.is_lost else result.num_blocks
            return replace(result, num_blocks=num_blocks, elapsed_ms=self.elapsed_ms)

        def cancel(self) -> None:
            self.pull.cancel()

    monkeypatch.setattr(two.d.pool, "fetch", lambda *args: Timed(fetch(*args)))

    def hand_off(name: str, num_ahead: int, *elapsed_ms: float):
        """The pull of 40 blocks of 4 tokens in two parts, some of them ahead; what was told of it."""
        times_ms[:] = elapsed_ms
        message, decode = two.prefilled(name, tools.prompt(160, seed=ord(name)), 4)
        refs = decode.offer.refs
        if num_ahead:
            two.d.send(Reserve(name, 0, message.token_ids))
            two.d.send(PullAhead(name, 0, 0, head(refs, num_ahead)))
            two.d.worker.step()
        else:
            offer = msgspec.structs.replace(decode.offer, refs=head(refs, 30), more=(refs.tail(30),))
            decode = msgspec.structs.replace(decode, offer=offer)
        two.d.send(decode)
        two.d.run()
        (pulled,) = tools.Transcript.of(two.d.take(), name).pulled
        assert pulled.failure is None and pulled.num_tokens == 160 and not times_ms
        return pulled

    # 1. parts that were begun together take as long as the longer
    assert hand_off("a", 0, 32.0, 8.0).pull_ms == 32.0
    assert list(patience._pulls_ms) == [0.2]
    # 2. what was pulled ahead is not counted, nor is anything learnt from the rest behind it
    assert hand_off("b", 30, 500.0, 16.0).pull_ms == 16.0
    assert hand_off("c", 40, 500.0).pull_ms == 0.0
    assert list(patience._pulls_ms) == [0.2]
    # 3. where what came ahead is lost, all is pulled from the offer, and timed again
    num_lost.append(True)
    assert hand_off("d", 40, 500.0, 64.0).pull_ms == 64.0
    assert list(patience._pulls_ms) == [0.2, 0.4]
    two.end(*"abcd")


def head(refs, num_blocks: int):
    return msgspec.structs.replace(
        refs, blocks=refs.blocks[:num_blocks], generations=refs.generations[:num_blocks]
    )


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
