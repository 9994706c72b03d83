"""The real model behind the loop: the same tokens whatever way a request takes (float32)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from memserve.messages import FinishReason, Pulled, Release
from memserve.model_config import load_model_config
from memserve.models.transformer import Transformer
from memserve.models.weights import load_weights_to_device
from memserve.workers.runner import ModelRunner

MAX_MODEL_LEN = 300
CPU = torch.device("cpu")

# Greedy; drawn; and drawn with everything that looks at the past.
SAMPLINGS = (
    {"temperature": 0.0},
    {"temperature": 1.0, "seed": 7},
    {
        "temperature": 1.2,
        "seed": 2**63 + 5,
        "top_p": 0.9,
        "top_k": 50,
        "min_p": 0.01,
        "repetition_penalty": 1.2,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.5,
        "logit_bias": ((3, 5.0), (4, -5.0)),
        "stop_token_ids": (11, 12),
        "min_tokens": 5,
        "logprobs": 3,
    },
)


@pytest.fixture(scope="module")
def transformer(model_folder: Path) -> Transformer:
    model = load_model_config(model_folder)
    weights = load_weights_to_device(model, model_folder, "float32", CPU, "auto", 0, lambda fraction: None)
    return Transformer(model, weights, MAX_MODEL_LEN, CPU, torch.float32)


@pytest.fixture(scope="module")
def real(transformer):
    """What makes a rig run the real model."""
    return {
        "model": transformer.model,
        "runner_of": lambda kv, block_size: ModelRunner(transformer, kv, block_size),
        "num_blocks": 128,
        "max_model_len": MAX_MODEL_LEN,
    }


@pytest.fixture
def make_real_rig(make_rig, real):
    return lambda **changes: make_rig(**{**real, **changes})


@pytest.fixture(scope="module")
def requests(transformer):
    """Prompts of various lengths with various sampling: (name, prompt, sampling)."""
    rng = np.random.default_rng(1)
    lengths = (1, 4, 15, 16, 17, 40, 61, 100, 3)
    return [
        (f"r{i}", rng.integers(0, transformer.model.vocab_size, length).tolist(), SAMPLINGS[i % 3])
        for i, length in enumerate(lengths)
    ]


@pytest.fixture(scope="module")
def alone(make_module_rig, real, tools, requests):
    """Each request run by itself, its prompt in one chunk."""
    rig = make_module_rig(**{**real, "max_batch_tokens": 256})
    return {request[0]: run_all(rig, tools, [request])[request[0]] for request in requests}


def run_all(rig, tools, requests):
    """Run requests colocated; the transcripts by name."""
    for name, prompt, sampling in requests:
        rig.send(tools.decode(name, prompt, max_tokens=40, **sampling))
    rig.run()
    messages = rig.take()
    rig.assert_idle()
    return {name: tools.Transcript.of(messages, name) for name, *_ in requests}


def assert_same(heard, alone):
    assert heard.keys() == alone.keys()
    for name, expected in alone.items():
        assert heard[name].failed is None
        assert heard[name].token_ids == expected.token_ids, name
        assert heard[name].finish_reason is expected.finish_reason
        for output, other in zip(heard[name].outputs, expected.outputs, strict=True):
            for found, wanted in zip(logprobs_of(output), logprobs_of(other), strict=True):
                assert found.rank == wanted.rank
                assert found.logprob == pytest.approx(wanted.logprob, abs=1e-4)
                assert [i for i, _ in found.top] == [i for i, _ in wanted.top]


def logprobs_of(output):
    """As a tuple: an `Output` has one or none, a `Prefilled` has it bare."""
    if output.logprobs is None:
        return ()
    return output.logprobs if isinstance(output.logprobs, tuple) else (output.logprobs,)


def test_the_reference_is_worth_comparing_with(alone):
    assert all(heard.token_ids and heard.finish_reason is not None for heard in alone.values())
    assert len({tuple(heard.token_ids) for heard in alone.values()}) == len(alone)
    assert any(len(set(heard.token_ids)) > 10 for heard in alone.values())
    assert FinishReason.LENGTH in {heard.finish_reason for heard in alone.values()}


@pytest.mark.parametrize("block_size", [1, 4, 16])
def test_in_one_batch_in_odd_chunks(make_real_rig, tools, requests, alone, block_size):
    rig = make_real_rig(block_size=block_size, num_blocks=2048 // block_size, max_batch_tokens=23)
    assert_same(run_all(rig, tools, requests), alone)


def test_after_preemption(make_real_rig, tools, requests, alone):
    rig = make_real_rig(num_blocks=40, max_batch_tokens=64)
    assert_same(run_all(rig, tools, requests[::-1]), dict(reversed(alone.items())))
    assert rig.worker.gauges.load().num_preemptions > 0


@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_disaggregated(make_real_rig, tools, requests, alone, fraction):
    """Also with pulls of which only the first part arrives."""

    def copy(destination, source):
        num_blocks = int(len(source) * fraction)
        np.copyto(destination[:num_blocks], source[:num_blocks])
        return num_blocks * source.shape[1]

    p = make_real_rig(instance="prefill-0")
    d = make_real_rig(instance="decode-0", copy=copy)
    p.grant_to(d)
    for name, prompt, sampling in requests:
        p.send(tools.prefill(name, prompt, max_tokens=40, **sampling))
    p.run()
    messages = p.take()
    by_name = {name: (prompt, sampling) for name, prompt, sampling in requests}
    for message in messages:
        prompt, sampling = by_name[message.request_id]
        if message.offer is not None:
            tokens = [*prompt, message.token_id]
            d.send(
                tools.decode(
                    message.request_id,
                    tokens,
                    num_prompt=len(prompt),
                    max_tokens=40,
                    offer=message.offer,
                    **sampling,
                )
            )
    d.run()
    answers = d.take()
    heard = {name: tools.Transcript.of([*messages, *answers], name) for name, *_ in requests}
    assert_same(heard, alone)
    pulls = [message for message in answers if isinstance(message, Pulled)]
    assert all((pull.failure is None) == (fraction == 1.0) for pull in pulls)
    p.send(*(Release(name, 0) for name, *_ in requests))
    p.run()
    p.assert_idle()
    d.assert_idle()


@pytest.mark.parametrize("at", [1, 7])
def test_replayed_elsewhere(make_real_rig, tools, requests, alone, at):
    rig = make_real_rig()
    for name, prompt, sampling in requests:
        tokens = [*prompt, *alone[name].token_ids[:at]]
        rig.send(tools.decode(name, tokens, num_prompt=len(prompt), attempt=1, max_tokens=40, **sampling))
    rig.run()
    messages = rig.take()
    for name, *_ in requests:
        assert tools.Transcript.of(messages, name).token_ids == alone[name].token_ids[at:]
    rig.assert_idle()


@pytest.mark.parametrize("max_batch_tokens", [16, 23, 256])
def test_prompt_logprobs(make_real_rig, tools, transformer, max_batch_tokens):
    """The same in chunks of any size as those of the drawn tokens of shorter prompts."""
    prompts = {"a": tools.prompt(60, 1), "b": tools.prompt(1, 2), "c": tools.prompt(30, 3)}
    prompts = {name: [t % transformer.model.vocab_size for t in prompt] for name, prompt in prompts.items()}
    rig = make_real_rig(max_batch_tokens=max_batch_tokens)
    for name, prompt in prompts.items():
        message = tools.prefill if name == "a" else tools.decode
        rig.send(message(name, prompt, max_tokens=3, temperature=0.0, prompt_logprobs=2))
    rig.run()
    messages = rig.take()
    rig.send(Release("a", 0))
    rig.run()
    rig.assert_idle()
    for name, prompt in prompts.items():
        first, *others = tools.Transcript.of(messages, name).outputs
        assert all(output.prompt_logprobs is None for output in others)
        assert first.prompt_logprobs[0] is None and len(first.prompt_logprobs) == len(prompt)
        for position in range(1, len(prompt)):
            # What the model draws after the tokens before is what a run of them alone reports.
            reported = first.prompt_logprobs[position]
            assert reported.top[0][1] >= reported.top[1][1]
            assert (reported.rank == 1) == (reported.top[0][0] == prompt[position])
    whole = {}
    for position in (1, 30, 59):
        rig.send(
            tools.decode(
                "x",
                prompts["a"][:position],
                max_tokens=1,
                temperature=0.0,
                logprobs=2,
                logit_bias=((prompts["a"][position], 1000.0),),
            )
        )
        rig.run()
        whole[position] = tools.Transcript.of(rig.take(), "x").outputs[0].logprobs[0]
    reported = tools.Transcript.of(messages, "a").outputs[0].prompt_logprobs
    for position, wanted in whole.items():
        assert reported[position].logprob == pytest.approx(wanted.logprob, abs=1e-4)
        assert reported[position].rank == wanted.rank


def test_a_row_that_is_not_a_number_fails_alone(make_real_rig, tools, requests, alone):
    """A request whose KV was damaged answers with an error; its neighbours are not affected."""
    rig = make_real_rig()
    name, prompt, sampling = requests[5]
    rig.send(
        tools.decode("bad", prompt, max_tokens=40), tools.decode(name, prompt, max_tokens=40, **sampling)
    )
    rig.worker.step()
    bad = rig.worker._register.get("bad")
    rig.pool.kv[int(bad.table.ids(1)[0])] = torch.nan
    rig.run()
    messages = rig.take()
    assert "not a number" in tools.Transcript.of(messages, "bad").failed
    assert tools.Transcript.of(messages, name).token_ids == alone[name].token_ids
    rig.assert_idle()


def test_an_answer_too_long_for_a_message_fails_alone(make_real_rig, tools, transformer):
    """Prompt logprobs of several requests that end in one step, in colocated runs and in prefills."""
    short, long = ([t % transformer.model.vocab_size for t in tools.prompt(n, n)] for n in (10, 120))
    rig = make_real_rig(max_batch_tokens=256)
    rig.channel.max_bytes = 5000
    options = {"max_tokens": 2, "temperature": 0.0, "prompt_logprobs": 5}
    # 1. Together they are too long for one message, and one of them is too long for any.
    rig.send(*(tools.decode(f"short{i}", short, **options) for i in range(8)))
    rig.send(tools.decode("long", long, **options), tools.decode("plain", long, max_tokens=2))
    # 2. The same as prefills.
    rig.send(
        tools.prefill("prefill", long, **options), tools.prefill("ended", long, **options | {"max_tokens": 1})
    )
    rig.run()
    messages = rig.take()
    for name in ("long", "prefill", "ended"):
        heard = tools.Transcript.of(messages, name)
        assert "too long" in heard.failed and not heard.token_ids
    for i in range(8):
        heard = tools.Transcript.of(messages, f"short{i}")
        assert len(heard.token_ids) == 2 and len(heard.outputs[0].prompt_logprobs) == 10
    assert len(tools.Transcript.of(messages, "plain").token_ids) == 2
    # 3. Nothing is left of any.
    rig.assert_idle()
