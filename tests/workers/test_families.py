"""Every family through a hand-off and a preemption: in float32 the greedy tokens are transformers' own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from memserve.messages import Pulled, Release
from memserve.model_config import load_model_config
from memserve.models.transformer import Transformer
from memserve.models.weights import load_weights_to_device
from memserve.workers.runner import ModelRunner

CPU = torch.device("cpu")
MAX_TOKENS = 24
LENGTHS = (5, 16, 33, 50)
SMALL: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
# The windows are shorter than most of the prompts and not a multiple of a block.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama3_rope": ("Llama", {"rope_parameters": LLAMA3}),
    "mistral_window": ("Mistral", {"sliding_window": 21}),
    "qwen2_window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 21, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {}),
}


@dataclass(frozen=True)
class Family:
    """What makes a rig run the model; and what transformers says after each prompt."""

    options: dict[str, Any]
    prompts: dict[str, list[int]]
    expected: dict[str, list[int]]


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def family(request, tmp_path_factory) -> Family:
    name, changes = FAMILIES[request.param]
    config = getattr(transformers, f"{name}Config")(**{**SMALL, **changes})
    config._attn_implementation = "eager"
    torch.manual_seed(3)
    theirs = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.ndim == 1:  # norms and biases, which start as 1 and 0, must count too
                parameter.add_(torch.randn(parameter.shape) * 0.1)
    folder = tmp_path_factory.mktemp(request.param)
    theirs.save_pretrained(folder)

    rng = np.random.default_rng(0)
    prompts = {f"r{length}": rng.integers(3, 320, length).tolist() for length in LENGTHS}
    expected = {}
    for key, prompt in prompts.items():
        with torch.inference_mode():
            answer = theirs.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
                max_new_tokens=MAX_TOKENS,
                do_sample=False,
                eos_token_id=-1,
                pad_token_id=0,
            )
        expected[key] = answer[0, len(prompt) :].tolist()

    model = load_model_config(folder)
    weights = load_weights_to_device(model, folder, "float32", CPU, "auto", 0, lambda fraction: None)
    transformer = Transformer(model, weights, 256, CPU, torch.float32)
    options = {
        "model": model,
        "runner_of": lambda kv, block_size: ModelRunner(transformer, kv, block_size),
        "num_blocks": 64,
        "max_batch_tokens": 37,
    }
    return Family(options, prompts, expected)


def test_handed_over(make_rig, tools, family):
    # 1. Prompts in chunks on one worker, each ending in an offer.
    p = make_rig(**family.options, instance="prefill-0")
    d = make_rig(**family.options, instance="decode-0")
    p.grant_to(d)
    for name, prompt in family.prompts.items():
        p.send(tools.prefill(name, prompt, max_tokens=MAX_TOKENS, temperature=0.0))
    p.run()
    prefilled = p.take()
    # 2. All of it is pulled by the other, which goes on in one batch.
    for message in prefilled:
        prompt = family.prompts[message.request_id]
        tokens = [*prompt, message.token_id]
        d.send(
            tools.decode(
                message.request_id,
                tokens,
                num_prompt=len(prompt),
                max_tokens=MAX_TOKENS,
                temperature=0.0,
                offer=message.offer,
            )
        )
    d.run()
    answers = d.take()
    pulls = {m.request_id: (m.num_tokens, m.failure) for m in answers if isinstance(m, Pulled)}
    assert pulls == {name: (len(prompt), None) for name, prompt in family.prompts.items()}
    heard = {name: tools.Transcript.of([*prefilled, *answers], name).token_ids for name in family.prompts}
    assert heard == family.expected
    # 3. Nothing stays.
    p.send(*(Release(name, 0) for name in family.prompts))
    p.run()
    p.assert_idle()
    d.assert_idle()


def test_preempted(make_rig, tools, family):
    rig = make_rig(**{**family.options, "num_blocks": 24})
    for name, prompt in reversed(family.prompts.items()):
        rig.send(tools.decode(name, prompt, max_tokens=MAX_TOKENS, temperature=0.0))
    rig.run()
    messages = rig.take()
    assert rig.worker.gauges.load().num_preemptions > 0
    heard = {name: tools.Transcript.of(messages, name).token_ids for name in family.prompts}
    assert heard == family.expected
    rig.assert_idle()
