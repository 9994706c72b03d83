"""The loop over a real pool with the hash model: any mistake with a block changes the tokens."""

from __future__ import annotations

import numpy as np
import pytest

from memserve.errors import EngineError
from memserve.messages import Cancel, FinishReason, Heartbeat, Init, Release, Shutdown, StepOutputs
from memserve.workers.worker import REST_S

BLOCK_SIZES = (1, 4, 16)


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("length", [1, 3, 4, 5, 16, 17, 63, 100])
def test_colocated_run(make_rig, tools, block_size, length):
    rig = make_rig(block_size=block_size, num_blocks=512 // block_size, max_batch_tokens=23)
    prompt = tools.prompt(length)
    rig.send(tools.decode("a", prompt, max_tokens=20))
    rig.run()
    heard = tools.Transcript.of(rig.take(), "a")
    assert heard.token_ids == tools.expected(prompt, 20)
    assert heard.finish_reason is FinishReason.LENGTH
    rig.assert_idle()


def test_prompts_are_computed_in_chunks_beside_decodes(make_rig, tools):
    rig = make_rig(max_batch_tokens=32)
    short, long = tools.prompt(4, 1), tools.prompt(100, 2)
    rig.send(tools.decode("short", short, max_tokens=30))
    rig.worker.step()
    rig.send(tools.decode("long", long, max_tokens=5))
    rig.run()
    messages = rig.take()
    assert tools.Transcript.of(messages, "short").token_ids == tools.expected(short, 30)
    assert tools.Transcript.of(messages, "long").token_ids == tools.expected(long, 5)
    assert rig.runner.batches[1] == [("short", 1), ("long", 31)]
    rig.assert_idle()


def test_any_batch_mix_gives_the_same_tokens(make_rig, tools):
    """Requests come at random times, some are cancelled; preemption happens because the pool is small."""
    rng = np.random.default_rng(3)
    rig = make_rig(num_blocks=24, max_batch_tokens=40)
    prompts = {f"r{i}": tools.prompt(int(rng.integers(1, 50)), i) for i in range(30)}
    cancelled = set()
    messages = []
    for i, (name, prompt) in enumerate(prompts.items()):
        rig.send(tools.decode(name, prompt, max_tokens=20))
        for _ in range(rng.integers(0, 6)):
            rig.worker.step()
        if i % 5 == 4:
            victim = f"r{rng.integers(0, i + 1)}"
            rig.send(Cancel(victim, 0))
            cancelled.add(victim)
    rig.run()
    messages = rig.take()
    for name, prompt in prompts.items():
        heard = tools.Transcript.of(messages, name)
        expected = tools.expected(prompt, 20)
        assert heard.failed is None
        if name in cancelled:
            assert heard.token_ids == expected[: len(heard.token_ids)]
        else:
            assert heard.token_ids == expected and heard.finish_reason is FinishReason.LENGTH
    assert rig.worker.gauges.load().num_preemptions > 0
    rig.assert_idle()


def test_replay_continues_the_counts(make_rig, tools):
    rig = make_rig()
    prompt = tools.prompt(10)
    tokens = tools.expected(prompt, 8)
    rig.send(tools.decode("a", prompt + tokens[:5], num_prompt=10, max_tokens=8, attempt=1))
    rig.run()
    heard = tools.Transcript.of(rig.take(), "a")
    assert heard.token_ids == tokens[5:]
    assert heard.finish_reason is FinishReason.LENGTH
    rig.assert_idle()


def test_stop_token_is_sent_and_ends(make_rig, tools):
    rig = make_rig()
    prompt = tools.prompt(10)
    tokens = tools.expected(prompt, 20)
    rig.send(tools.decode("a", prompt, max_tokens=20, stop_token_ids=(tokens[6],)))
    rig.send(tools.decode("b", prompt, max_tokens=20, stop_token_ids=(tokens[6],), min_tokens=7))
    rig.run()
    messages = rig.take()
    heard = tools.Transcript.of(messages, "a")
    assert heard.token_ids == tokens[:7] and heard.finish_reason is FinishReason.STOP
    heard = tools.Transcript.of(messages, "b")
    assert heard.token_ids == tokens and heard.finish_reason is FinishReason.LENGTH
    rig.assert_idle()


def test_max_model_len_ends(make_rig, tools):
    rig = make_rig(max_model_len=16)
    prompt = tools.prompt(10)
    rig.send(tools.decode("a", prompt, max_tokens=20), tools.decode("b", tools.prompt(16), max_tokens=20))
    rig.run()
    messages = rig.take()
    heard = tools.Transcript.of(messages, "a")
    assert heard.token_ids == tools.expected(prompt, 6) and heard.finish_reason is FinishReason.LENGTH
    assert len(tools.Transcript.of(messages, "b").token_ids) == 1
    rig.assert_idle()


def test_bad_requests_fail_alone(make_rig, tools):
    rig = make_rig(num_blocks=8)
    good = tools.prompt(5)
    rig.send(
        tools.decode("too long", tools.prompt(201)),
        tools.decode("foreign token", [1, tools.vocab_size]),
        tools.decode("negative token", [1, -1]),
        tools.decode("no tokens", []),
        tools.decode("too large", tools.prompt(33)),
        tools.decode("good", good),
    )
    rig.run()
    messages = rig.take()
    assert "limit of 200" in tools.Transcript.of(messages, "too long").failed
    assert "vocabulary" in tools.Transcript.of(messages, "foreign token").failed
    assert "vocabulary" in tools.Transcript.of(messages, "negative token").failed
    assert "prompt of 0" in tools.Transcript.of(messages, "no tokens").failed
    assert "pool holds 32" in tools.Transcript.of(messages, "too large").failed
    assert tools.Transcript.of(messages, "good").token_ids == tools.expected(good, 8)
    rig.assert_idle()


def test_a_request_that_outgrows_the_pool_fails_and_frees_it(make_rig, tools):
    rig = make_rig(num_blocks=8)
    prompt = tools.prompt(20)
    rig.send(tools.decode("a", prompt, max_tokens=100))
    rig.run()
    heard = tools.Transcript.of(rig.take(), "a")
    assert heard.token_ids == tools.expected(prompt, 13)  # 32 tokens of KV, and one drawn from them
    assert "pool holds 32" in heard.failed
    rig.assert_idle()


def test_bad_row_fails_its_request_alone(make_rig, tools):
    rig = make_rig()
    rig.runner.bad_requests = {"bad"}
    rig.send(tools.decode("bad", tools.prompt(5)), tools.decode("good", tools.prompt(6)))
    rig.send(tools.prefill("bad", tools.prompt(5)))
    rig.run()
    messages = rig.take()
    assert tools.Transcript.of(messages, "bad").failed == "not a number"
    assert tools.Transcript.of(messages, "good").token_ids == tools.expected(tools.prompt(6), 8)
    rig.assert_idle()


def test_a_step_that_raises_fails_only_the_request_at_fault(make_rig, tools):
    rig = make_rig()
    rig.runner.poisonous = {"a"}
    rig.send(tools.decode("a", tools.prompt(5)), tools.decode("b", tools.prompt(5)))
    rig.send(tools.prefill("c", tools.prompt(5)))
    rig.run()
    rig.send(Release("c", 0))
    rig.run()
    messages = rig.take()
    assert tools.Transcript.of(messages, "a").failed == "an internal error"
    assert tools.Transcript.of(messages, "b").token_ids == tools.expected(tools.prompt(5), 8)
    assert tools.Transcript.of(messages, "c").token_ids == tools.expected(tools.prompt(5), 1)
    rig.assert_idle()


def test_a_worker_whose_steps_keep_failing_gives_up(make_rig, tools):
    rig = make_rig()
    rig.runner.poisonous = {"a", "b", "c"}
    for name in "ab":
        rig.send(tools.decode(name, tools.prompt(5)))
        rig.run()
    rig.send(tools.decode("c", tools.prompt(5)))
    with pytest.raises(EngineError, match="3 steps in a row"):
        rig.run()
    rig.worker.close()
    rig.assert_idle()


def test_an_idle_loop_sleeps_and_says_what_its_load_is(make_rig, tools):
    rig = make_rig()
    rig.send(tools.decode("a", tools.prompt(5)))
    heard = []

    class Bell:
        """1. a rest too short to tell anything; 2. a longer one; 3. and on, with nothing new to tell."""

        def wait(self, timeout_s: float | None) -> bool:
            heard.append((len(rig.runner.batches), timeout_s and round(timeout_s, 6)))
            rig.clock.now += timeout_s or 1.0
            if len(heard) == 1:
                rig.send(tools.decode("b", tools.prompt(5)))
            elif len(heard) == 3:
                rig.send(Cancel("nobody", 0))
            elif len(heard) == 4:
                rig.send(Shutdown())
            return len(heard) != 2

    rig.worker.run(Bell())
    assert heard == [(8, REST_S), (16, REST_S), (16, None), (16, None)]
    (beat,) = (message for message in rig.take() if isinstance(message, Heartbeat))
    assert (beat.num_steps, beat.load.num_running, beat.load.num_active_blocks) == (16, 0, 0)
    rig.assert_idle()


def test_a_load_is_told_once_however_often_the_loop_looks_up(make_rig, tools, monkeypatch):
    """An offer that stands grows older, which is no news; looks at what is on its way are no work."""
    rig = make_rig()
    rig.send(tools.prefill("a", tools.prompt(40)))
    rests = iter([0.004] * 20)
    monkeypatch.setattr(type(rig.worker), "_rest_s", property(lambda worker: next(rests, None)))
    told_at = []

    class Bell:
        def wait(self, timeout_s: float | None) -> bool:
            told_at.extend(rig.clock.now for message in rig.take() if isinstance(message, Heartbeat))
            if timeout_s is None:
                rig.send(Release("a", 0), Shutdown())
                return True
            rig.clock.now += timeout_s
            return False

    rig.worker.run(Bell())
    assert told_at == [pytest.approx(100.0 + REST_S)]
    rig.worker.close()
    rig.assert_idle()


def test_duplicates_are_ignored_and_newer_attempts_replace(make_rig, tools):
    rig = make_rig()
    prompt = tools.prompt(5)
    rig.send(tools.decode("a", prompt, attempt=1), tools.decode("a", prompt, attempt=1))
    rig.worker.step()
    rig.send(tools.decode("a", prompt, attempt=0))  # late
    rig.worker.step()
    rig.send(tools.decode("a", prompt, attempt=2), Cancel("a", 1))
    rig.run()
    outputs = [o for m in rig.take() if isinstance(m, StepOutputs) for o in m.outputs]
    assert [o.attempt for o in outputs] == [1] * 2 + [2] * 8
    assert [t for o in outputs[2:] for t in o.token_ids] == tools.expected(prompt, 8)
    rig.assert_idle()


def test_unknown_ids_are_ignored(make_rig):
    rig = make_rig()
    rig.send(Cancel("nobody", 0), Release("nobody", 3))
    assert not rig.worker.step()
    assert rig.take() == []


def test_a_second_init_is_an_error(make_rig, tools):
    rig = make_rig()
    rig.send(Init(rig.config, 0))
    with pytest.raises(EngineError):
        rig.worker.step()


def test_shutdown_drops_what_runs(make_rig, tools):
    rig = make_rig()
    rig.send(tools.decode("a", tools.prompt(5), max_tokens=100), tools.prefill("b", tools.prompt(5)))
    rig.worker.step()
    rig.send(Shutdown())
    rig.worker.run(doorbell=None)  # returns without waiting
    rig.worker.close()
    rig.assert_idle()


def test_cancel_while_waiting_and_while_prefilling(make_rig, tools):
    rig = make_rig(max_running=1)
    rig.send(tools.decode("a", tools.prompt(150)), tools.decode("b", tools.prompt(5)))
    rig.worker.step()
    load = rig.worker.gauges.load()
    assert (load.num_running, load.num_waiting) == (1, 1)
    rig.send(Cancel("b", 0))
    rig.worker.step()
    rig.send(Cancel("a", 0))
    assert not rig.worker.step()
    rig.assert_idle()
    assert rig.take() == []


def test_load_counts_steps_and_tokens(make_rig, tools):
    rig = make_rig()
    rig.send(tools.decode("a", tools.prompt(10), max_tokens=4))
    rig.run()
    load = rig.worker.gauges.heartbeat().load
    assert (load.num_steps, load.num_prefill_tokens, load.num_decode_tokens) == (4, 10, 3)
    assert load.num_free_blocks == 64 and load.num_active_blocks == 0
