"""Measurements on a worker: what is run, that nothing of it stays, and that it gives way."""

from __future__ import annotations

import threading

import pytest

from memserve.messages import (
    CacheCommand,
    CacheReport,
    CacheVerb,
    Measure,
    Measured,
    MeasureVerb,
    StepSpec,
    Tier,
)
from memserve.pool.transports.shm import copy_bytes


def step(num_repeats=2, command_id=1, **spec):
    return Measure(command_id, MeasureVerb.STEP, num_repeats, StepSpec(**spec))


def answer_of(rig) -> Measured:
    rig.run()
    (answer,) = [message for message in rig.take() if isinstance(message, Measured)]
    rig.assert_idle()
    return answer


@pytest.mark.parametrize("block_size", [1, 4, 16])
def test_a_step_has_the_chunk_and_the_decodes(make_rig, block_size) -> None:
    rig = make_rig(block_size=block_size, num_blocks=1024 // block_size, caches=True)
    rig.send(step(3, num_new=10, context_len=21, num_decodes=2, decode_context=33))
    answer = answer_of(rig)
    assert answer.command_id == 1 and answer.error is None
    assert len(answer.repeats) == 3 and all(r.ms > 0 and r.waited_ms >= 0 for r in answer.repeats)
    assert [[num for _, num in batch] for batch in rig.runner.batches] == [[1, 1, 10]] * 3
    assert rig.pool.stats().historical == 0, "a measurement was published"


@pytest.mark.parametrize("draws", [True, False])
def test_a_chunk_draws_only_at_its_prompts_end(make_rig, monkeypatch, draws) -> None:
    rig = make_rig()
    left = []
    execute = rig.runner.execute

    def spy(chunks):
        left.extend(c.request.num_tokens - c.request.num_computed_tokens - c.num_new for c in chunks)
        return execute(chunks)

    monkeypatch.setattr(rig.runner, "execute", spy)
    rig.send(step(1, num_new=5, context_len=3, draws=draws))
    assert answer_of(rig).error is None
    assert left == [0 if draws else 1]


@pytest.mark.parametrize(
    "spec",
    [
        {},
        {"num_new": 65},
        {"num_new": 1, "context_len": 199},
        {"num_new": 4, "context_len": -1},
        {"num_decodes": 9},
        {"num_decodes": 1, "decode_context": 200},
        {"num_decodes": 8, "decode_context": 150},
    ],
)
def test_what_no_worker_runs_or_has_no_blocks_is_refused(make_rig, spec) -> None:
    rig = make_rig()
    rig.send(step(**spec))
    assert answer_of(rig).error is not None
    assert rig.runner.batches == []


def test_one_repeat_a_turn(make_rig) -> None:
    rig = make_rig()
    rig.send(step(3, num_new=4))
    for turn in range(1, 4):
        assert rig.worker.step()
        assert len(rig.runner.batches) == turn
        rig.send(CacheCommand(turn, CacheVerb.LOOKUP))
    rig.run()
    answered = [type(message) for message in rig.take()]
    assert answered == [CacheReport, CacheReport, Measured, CacheReport]


def test_a_request_ends_a_measurement(make_rig, tools) -> None:
    rig = make_rig()
    prompt = tools.prompt(9)
    rig.send(step(50, num_new=4, context_len=8))
    rig.worker.step()
    rig.send(tools.decode("r", prompt, max_tokens=3))
    rig.run()
    sent = rig.take()
    assert [m.error for m in sent if isinstance(m, Measured)] == ["requests are running"]
    assert tools.Transcript.of(sent, "r").token_ids == tools.expected(prompt, 3)
    rig.assert_idle()


def test_nothing_is_evicted_for_a_measurement(make_rig, tools) -> None:
    rig = make_rig(caches=True, num_blocks=16)
    rig.send(tools.decode("r", tools.prompt(40), max_tokens=1))
    rig.run()
    num_cached = rig.pool.stats().historical
    rig.take()
    rig.send(step(num_new=28))
    assert "not free" in answer_of(rig).error
    assert rig.pool.stats().historical == num_cached == 10


def test_a_step_that_raises_is_an_answer(make_rig) -> None:
    rig = make_rig()
    rig.runner.poisonous.add("measured")
    rig.send(step(num_new=4), step(num_new=4, command_id=2))
    rig.run()
    assert [(m.command_id, "broken kernel" in m.error) for m in rig.take()] == [(1, True), (2, True)]
    rig.assert_idle()


def test_a_token_that_cannot_be_drawn_is_an_answer(make_rig) -> None:
    rig = make_rig()
    rig.runner.bad_requests.add("measured")
    rig.send(step(num_new=4))
    assert answer_of(rig).error == "not a number"


def test_closing_gives_the_blocks_back(make_rig) -> None:
    rig = make_rig()
    rig.send(step(5, num_new=4))
    rig.worker.step()
    rig.worker.close()
    rig.pool.assert_idle()


# --- copies ---


@pytest.mark.parametrize("tier", list(Tier))
def test_pulls_from_another_instance(make_rig, tier) -> None:
    here = make_rig(instance="here", caches=True)
    there = make_rig(instance="there", caches=True, host_blocks=8, max_host_blocks=8)
    there.grant_to(here)
    there.send(Measure(7, MeasureVerb.LEND, num_blocks=6, tier=tier))
    lent = answer_of(there)
    assert lent.refs is not None and lent.refs.tier is tier and len(lent.refs.blocks) == 6
    here.send(Measure(8, MeasureVerb.PULL, 4, refs=lent.refs))
    pulled = answer_of(here)
    assert pulled.error is None and len(pulled.repeats) == 4
    assert pulled.num_bytes == 6 * here.pool.kv[0].nbytes


def test_nothing_waits_for_a_pull(make_rig, tools) -> None:
    # 1. A pull hangs; the loop goes on reading messages.
    may_copy = threading.Event()

    def copy(destination, source):
        may_copy.wait(10)
        return copy_bytes(destination, source)

    here, there = make_rig(instance="here", copy=copy), make_rig(instance="there")
    there.grant_to(here)
    there.send(Measure(7, MeasureVerb.LEND, num_blocks=2))
    here.send(Measure(8, MeasureVerb.PULL, 3, refs=answer_of(there).refs))
    for _ in range(3):
        assert here.worker.step()
    prompt = tools.prompt(9)
    here.send(tools.decode("r", prompt, max_tokens=3))
    here.worker.step()
    assert here.take() == []

    # 2. Once it has ended the request has its turn, and what was left to measure is refused.
    may_copy.set()
    here.run()
    sent = here.take()
    assert [m.error for m in sent if isinstance(m, Measured)] == ["requests are running"]
    assert tools.Transcript.of(sent, "r").token_ids == tools.expected(prompt, 3)
    here.assert_idle()


def test_a_pull_of_what_was_taken_meanwhile_fails(make_rig, tools) -> None:
    here, there = make_rig(instance="here"), make_rig(instance="there")
    there.grant_to(here)
    there.send(Measure(7, MeasureVerb.LEND, num_blocks=2))
    refs = answer_of(there).refs
    there.send(tools.decode("r", tools.prompt(9), max_tokens=1))
    there.run()
    here.send(Measure(8, MeasureVerb.PULL, refs=refs))
    assert answer_of(here).error is not None


def test_swaps_in_from_the_host_tier(make_rig) -> None:
    rig = make_rig(caches=True, host_blocks=8, max_host_blocks=8)
    rig.send(Measure(1, MeasureVerb.SWAP_IN, 3, num_blocks=5))
    answer = answer_of(rig)
    assert answer.error is None and len(answer.repeats) == 3
    assert answer.num_bytes == 5 * rig.pool.kv[0].nbytes


def test_without_a_host_tier_there_is_nothing_to_swap(make_rig) -> None:
    rig = make_rig(caches=True)
    rig.send(Measure(1, MeasureVerb.SWAP_IN, num_blocks=5))
    assert "not free" in answer_of(rig).error


def test_waits_are_told_beside_requests(make_rig, tools) -> None:
    rig = make_rig()
    rig.send(tools.decode("r", tools.prompt(9), max_tokens=50))
    rig.worker.step()
    rig.take()
    rig.send(Measure(1, MeasureVerb.WAITS))
    rig.worker.step()
    (answer,) = rig.take()
    assert answer.error is None and all(r.waited_ms >= 0 for r in answer.repeats)
    rig.run()
