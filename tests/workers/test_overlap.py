"""Steps that overlap: the same tokens as without, whatever comes in between.

`LateRunner` computes nothing before somebody waits for it, so that a loop that used a result too early, or
wrote to a block that a step still needs, would be seen in the tokens.
"""

from __future__ import annotations

import numpy as np
import pytest

from memserve.errors import EngineError
from memserve.messages import Cancel, FinishReason, PullBack, Release, Shutdown

BLOCK_SIZES = (1, 4, 16)


@pytest.fixture
def make_late(make_rig, tools):
    return lambda **changes: make_rig(**{"runner_of": tools.LateRunner, **changes})


def test_the_next_step_begins_before_this_one_is_told(make_late, tools):
    rig = make_late()
    prompt = tools.prompt(10)
    rig.send(tools.decode("a", prompt, max_tokens=6))
    # 1. The prompt is begun, and nothing is told.
    assert rig.worker.step() and rig.take() == []
    # 2. Its first token is told when the step that depends on it has begun.
    assert rig.worker.step()
    assert tools.Transcript.of(rig.take(), "a").token_ids == tools.expected(prompt, 1)
    assert len(rig.runner.batches) == 2 and rig.runner.num_waiting == 1
    # 3. The end by length is known ahead: no step too many.
    rig.run()
    assert tools.Transcript.of(rig.take(), "a").token_ids == tools.expected(prompt, 6)[1:]
    assert rig.runner.batches == [[("a", 10)]] + [[("a", 1)]] * 5 and rig.runner.most_waiting == 2
    rig.assert_idle()


def test_a_stop_is_seen_one_step_late_and_the_surplus_is_dropped(make_late, tools):
    rig = make_late()
    prompt = tools.prompt(10)
    tokens = tools.expected(prompt, 20)
    rig.send(tools.decode("a", prompt, max_tokens=20, stop_token_ids=(tokens[6],)))
    rig.run()
    heard = tools.Transcript.of(rig.take(), "a")
    assert heard.token_ids == tokens[:7] and heard.finish_reason is FinishReason.STOP
    assert len(rig.runner.batches) == 7 + 1
    rig.assert_idle()


def test_a_request_that_looks_back_waits_for_its_tokens(make_late, tools):
    """The runner asserts that it never gets a pending token of such a request."""
    rig = make_late()
    prompt = tools.prompt(10)
    rig.send(
        tools.decode("a", prompt, presence_penalty=0.5),
        tools.decode("b", prompt, max_tokens=20),
    )
    rig.run()
    messages = rig.take()
    assert tools.Transcript.of(messages, "a").token_ids == tools.expected(prompt, 8)
    assert tools.Transcript.of(messages, "b").token_ids == tools.expected(prompt, 20)
    assert rig.runner.most_waiting == 2  # when a has ended
    rig.assert_idle()


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_a_prefill_offers_when_it_has_landed(make_late, tools, block_size):
    rig = make_late(block_size=block_size, num_blocks=512 // block_size, max_batch_tokens=23)
    prompt = tools.prompt(50)
    rig.send(tools.prefill("p", prompt), tools.decode("d", prompt, max_tokens=20))
    rig.run()
    messages = rig.take()
    heard = tools.Transcript.of(messages, "p")
    assert heard.token_ids == tools.expected(prompt, 1)
    assert heard.offer.num_tokens == 50 and len(heard.offer.refs.blocks) == -(-50 // block_size)
    assert tools.Transcript.of(messages, "d").token_ids == tools.expected(prompt, 20)
    # Nothing more is computed of it, and a decode at the same place goes on from its blocks.
    assert sum(n for batch in rig.runner.batches for name, n in batch if name == "p") == 50
    rig.send(tools.decode("p", [*prompt, *heard.token_ids], num_prompt=50, attempt=0, offer=heard.offer))
    rig.run()
    assert tools.Transcript.of(rig.take(), "p").token_ids == tools.expected(prompt, 8)[1:]
    rig.assert_idle()


def test_a_cancel_while_its_step_runs(make_late, tools):
    rig = make_late()
    rig.send(tools.decode("a", tools.prompt(10)), tools.decode("b", tools.prompt(11)))
    for _ in range(3):
        rig.worker.step()
    rig.send(Cancel("a", 0))
    rig.run()
    messages = rig.take()
    assert tools.Transcript.of(messages, "a").token_ids == tools.expected(tools.prompt(10), 2)
    assert tools.Transcript.of(messages, "b").token_ids == tools.expected(tools.prompt(11), 8)
    rig.assert_idle()


def test_a_request_that_outgrows_the_pool_tells_its_last_token_first(make_late, tools):
    rig = make_late(num_blocks=8)
    prompt = tools.prompt(20)
    rig.send(tools.decode("a", prompt, max_tokens=100))
    rig.run()
    heard = tools.Transcript.of(rig.take(), "a")
    assert heard.token_ids == tools.expected(prompt, 13) and "pool holds 32" in heard.failed
    rig.assert_idle()


@pytest.mark.parametrize("where", ["unbeginnable", "poisonous"])
def test_a_step_that_fails_harms_only_the_request_at_fault(make_late, tools, where):
    """Whether it fails at its beginning or its end, when the next step has begun on its draws."""
    rig = make_late(num_blocks=128)
    for name in "abc":
        rig.send(tools.decode(name, tools.prompt(ord(name)), max_tokens=12))
    rig.send(tools.prefill("p", tools.prompt(30)))
    for _ in range(8):
        rig.worker.step()
    getattr(rig.runner, where).add("b")
    rig.run()
    rig.send(Release("p", 0))
    rig.run()
    messages = rig.take()
    for name in "ac":
        assert tools.Transcript.of(messages, name).token_ids == tools.expected(tools.prompt(ord(name)), 12)
    assert tools.Transcript.of(messages, "b").failed == "an internal error"
    assert tools.Transcript.of(messages, "p").token_ids == tools.expected(tools.prompt(30), 1)
    rig.assert_idle()


def test_a_worker_whose_steps_keep_failing_gives_up(make_late, tools):
    rig = make_late()
    rig.runner.poisonous = {"a", "b", "c"}
    rig.send(*(tools.decode(name, tools.prompt(5)) for name in "ab"))
    with pytest.raises(EngineError, match="3 steps in a row"):
        for name in "abc":
            rig.send(tools.decode(name, tools.prompt(5), attempt=1))
            rig.run()
    rig.worker.close()
    rig.assert_idle()


def test_a_bad_row_fails_its_request_alone(make_late, tools):
    rig = make_late()
    rig.send(tools.decode("bad", tools.prompt(5)), tools.decode("good", tools.prompt(6)))
    for _ in range(3):
        rig.worker.step()
    rig.runner.bad_requests = {"bad"}
    rig.run()
    messages = rig.take()
    assert tools.Transcript.of(messages, "bad").failed == "not a number"
    assert tools.Transcript.of(messages, "good").token_ids == tools.expected(tools.prompt(6), 8)
    rig.assert_idle()


def test_shutdown_while_a_step_runs(make_late, tools):
    rig = make_late()
    rig.send(tools.decode("a", tools.prompt(5), max_tokens=100), tools.prefill("b", tools.prompt(5)))
    rig.worker.step()
    rig.send(Shutdown())
    rig.worker.run(doorbell=None)
    rig.worker.close()
    assert rig.runner.num_waiting == 0
    rig.assert_idle()


def when_fetching(rig):
    """How many steps were under way at each pull's beginning, from now on."""
    seen = []
    fetch = rig.pool.fetch

    def look(*arguments):
        seen.append(rig.runner.num_waiting)
        return fetch(*arguments)

    rig.pool.fetch = look
    return seen


def test_a_pull_begins_when_nobody_writes_to_its_blocks(make_late, make_rig, tools):
    """Requests end by a stop, so that a surplus step still writes to the blocks that a pull then gets."""
    source = make_rig(instance="prefill-0", num_blocks=128)
    rig = make_late(instance="decode-0", num_blocks=20, max_running=8)
    source.grant_to(rig)
    prompts = {f"r{i}": tools.prompt(16 + i % 3, i) for i in range(12)}
    source.send(*(tools.prefill(name, prompt) for name, prompt in prompts.items()))
    source.run()
    messages = source.take()
    waiting = when_fetching(rig)
    lengths = {}
    for i, (name, prompt) in enumerate(prompts.items()):
        heard = tools.Transcript.of(messages, name)
        tokens = tools.expected(prompt, 12)
        lengths[name] = tokens.index(tokens[3 + i % 4]) + 1
        first = [*prompt, *heard.token_ids]
        stop = (tokens[3 + i % 4],)
        rig.send(tools.decode(name, first, num_prompt=len(prompt), offer=heard.offer, stop_token_ids=stop))
        for _ in range(i % 4):
            rig.worker.step()
    rig.run()
    assert waiting == [0] * len(prompts) and rig.runner.most_waiting == 2
    answers = rig.take()
    for name, prompt in prompts.items():
        heard = tools.Transcript.of([*messages, *answers], name)
        assert heard.token_ids == tools.expected(prompt, lengths[name])
        assert all(pulled.failure is None for pulled in heard.pulled)
    rig.assert_idle()


def histories(rng, tools):
    """Requests with what happens to them: (name, prompt, options, steps before the next, cancelled later)."""
    common = tools.prompt(64, int(rng.integers(1000)))
    for i in range(30):
        shared = common[: rng.integers(0, 65)] if rng.random() < 0.5 else []
        prompt = [*shared, *tools.prompt(int(rng.integers(1, 30)), i)]
        options = {"max_tokens": int(rng.integers(1, 20))}
        tokens = tools.expected(prompt, 20)
        if rng.random() < 0.4:
            options["stop_token_ids"] = (tokens[int(rng.integers(0, 20))],)
            options["min_tokens"] = int(rng.integers(0, 3))
        if rng.random() < 0.1:
            options["repetition_penalty"] = 1.1
        yield f"r{i}", prompt, options, rng.random() < 0.2, int(rng.integers(0, 5)), rng.random() < 0.15


def reference(tools, prompt, max_tokens, stop_token_ids=(), min_tokens=0, **_):
    """What a request says, and why it ends."""
    tokens = tools.expected(prompt, max_tokens)
    for count, token_id in enumerate(tokens, start=1):
        if token_id in stop_token_ids and count > min_tokens:
            return tokens[:count], FinishReason.STOP
    return tokens, FinishReason.LENGTH


@pytest.mark.parametrize("seed", range(12))
def test_any_history_says_the_same(make_late, tools, seed):
    """Arrivals, stops, cancels, prefills, cached prefixes and preemptions, at random."""
    rng = np.random.default_rng(seed)
    block_size = BLOCK_SIZES[seed % 3]
    rig = make_late(
        block_size=block_size,
        num_blocks=(128, 192)[seed // 2 % 2] // block_size,
        max_batch_tokens=40,
        caches=seed % 4 < 2,
    )
    requests = list(histories(rng, tools))
    for name, prompt, options, is_prefill, num_steps, _ in requests:
        rig.send((tools.prefill if is_prefill else tools.decode)(name, prompt, **options))
        for _ in range(num_steps):
            rig.worker.step()
        for other, _, _, was_prefill, _, is_cancelled in requests:
            if is_cancelled and rng.random() < 0.1:
                rig.send(Cancel(other, 0))
            elif was_prefill and rng.random() < 0.3:
                rig.send(Release(other, 0))
    while rig.worker.gauges.load().num_waiting or rig.worker.gauges.load().num_offers:
        rig.send(*(Release(name, 0) for name, *_ in requests))
        rig.worker.step()
    rig.run()
    rig.send(*(Release(name, 0) for name, *_ in requests))
    rig.run()
    messages = rig.take()
    for name, prompt, options, is_prefill, _, is_cancelled in requests:
        heard = tools.Transcript.of(messages, name)
        tokens, reason = reference(tools, prompt, **options)
        assert heard.failed is None, name
        if is_cancelled:
            assert heard.token_ids == tokens[: len(heard.token_ids)]
        elif is_prefill:
            assert heard.token_ids == tokens[:1]
            assert heard.finish_reason is (reason if len(tokens) == 1 else None)
        else:
            assert heard.token_ids == tokens and heard.finish_reason is reason, name
    assert rig.runner.most_waiting == 2
    rig.assert_idle()


def test_what_others_find_is_what_has_landed(make_late, tools):
    """A prefix is found when its step has landed, and then whole; a follower waits for just that."""
    rig = make_late(caches=True, max_batch_tokens=128, num_blocks=256)
    prompt = tools.prompt(100)
    rig.send(tools.decode("a", prompt, max_tokens=4), tools.decode("b", [*prompt, 1, 2], max_tokens=4))
    rig.run()
    messages = rig.take()
    assert tools.Transcript.of(messages, "a").token_ids == tools.expected(prompt, 4)
    heard = tools.Transcript.of(messages, "b")
    assert heard.token_ids == tools.expected([*prompt, 1, 2], 4)
    assert heard.outputs[0].cached.total == 100
    rig.assert_idle()


def test_a_pull_back_begins_when_nothing_runs(make_late, make_rig, tools):
    """As a pull does: its blocks may be those of a request that has just ended, and still computes."""
    source = make_rig(instance="decode-0", caches=True)
    rig = make_late(instance="prefill-0", caches=True, num_blocks=17)
    source.grant_to(rig)
    prompt = tools.prompt(28)
    source.send(tools.decode("a", prompt, max_tokens=9))
    source.run()
    tokens = [*prompt, *tools.expected(prompt, 8)]
    packed = np.array(tokens, "<i4").tobytes()
    refs = source.pool.addresses(source.pool.match(packed).device_blocks)
    # 1. x has stopped, and a surplus step still writes to its last block, which is free.
    other = tools.prompt(30, 3)
    said = tools.expected(other, 3)
    rig.send(tools.decode("x", other, stop_token_ids=(said[2],), max_tokens=20))
    while tools.Transcript.of(rig.channel.sent, "x").finish_reason is None:
        rig.worker.step()
    assert rig.runner.num_waiting == 1 and rig.pool.stats().free == len(refs.blocks) == 9
    # 2. The pull gets all that is free, when that has landed, and holds what it should.
    waiting = when_fetching(rig)
    rig.send(PullBack("a", packed, "", 0, refs))
    rig.run()
    assert waiting == [0]
    rig.send(tools.decode("b", [*tokens, 5], max_tokens=3))
    rig.run()
    heard = tools.Transcript.of(rig.take(), "b")
    assert heard.token_ids == tools.expected([*tokens, 5], 3) and heard.outputs[0].cached.total == 36
    rig.assert_idle()


def test_a_step_that_cannot_begin_once(make_late, tools):
    """It is computed request by request before another begins, and those after it overlap again."""
    rig = make_late()
    rig.send(tools.decode("a", tools.prompt(5)), tools.decode("b", tools.prompt(6)))
    for _ in range(3):
        rig.worker.step()
    begin = rig.runner.begin

    def fail_once(chunks):
        rig.runner.begin = begin
        raise RuntimeError("not now")

    rig.runner.begin = fail_once
    rig.run()
    messages = rig.take()
    for name, length in (("a", 5), ("b", 6)):
        assert tools.Transcript.of(messages, name).token_ids == tools.expected(tools.prompt(length), 8)
    # 8 steps, of which the fourth in two parts.
    assert [len(batch) for batch in rig.runner.batches] == [2, 2, 2, 1, 1, 2, 2, 2, 2]
    rig.assert_idle()
