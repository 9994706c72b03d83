"""config.json → ModelConfig: spellings, families, and every refusal by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from memserve.errors import ModelError
from memserve.model_config import (
    DefaultSampling,
    KVGeometry,
    RopeConfig,
    default_sampling,
    fingerprint,
    load_model_config,
    parse_model_config,
    weights_bytes_upper_bound,
)


def make_config(**changes: Any) -> dict[str, Any]:
    """A small Llama; a change to `...` removes the key."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 100,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "eos_token_id": 2,
        "bos_token_id": 1,
        "torch_dtype": "bfloat16",
        **changes,
    }
    return {key: value for key, value in config.items() if value is not ...}


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def test_a_llama() -> None:
    model = parse_model_config(make_config())
    assert (model.num_layers, model.num_heads, model.num_kv_heads, model.head_dim) == (4, 4, 2, 16)
    assert (model.dtype, model.eos_token_ids, model.bos_token_id) == ("bfloat16", (2,), 1)
    assert model.rope == RopeConfig() and model.sliding_window == (None,) * 4
    assert not (
        model.qkv_bias or model.o_bias or model.mlp_bias or model.qk_norm or model.tie_word_embeddings
    )


def test_old_and_new_spellings_mean_the_same() -> None:
    old = make_config(rope_theta=5e5, rope_scaling=LLAMA3)
    new = make_config(rope_parameters={**LLAMA3, "rope_theta": 5e5}, torch_dtype=..., dtype="bfloat16")
    older = make_config(rope_theta=5e5, rope_scaling={"type": "llama3", **LLAMA3, "rope_type": None})
    assert parse_model_config(old) == parse_model_config(new) == parse_model_config(older)
    assert parse_model_config(old).rope.original_max_position_embeddings == 64
    linear = parse_model_config(make_config(rope_scaling={"type": "linear", "factor": 2}))
    assert linear.rope == RopeConfig(kind="linear", factor=2.0)


def test_of_both_spellings_the_one_that_transformers_takes() -> None:
    """It says `rope_scaling or rope_parameters`."""
    linear, default = {"rope_type": "linear", "factor": 4.0}, {"rope_type": "default", "rope_theta": 1e6}
    both = parse_model_config(make_config(rope_scaling=linear, rope_parameters=default, rope_theta=2e4))
    assert both.rope == RopeConfig(kind="linear", factor=4.0, theta=2e4)
    for empty in ({}, None):
        model = parse_model_config(make_config(rope_scaling=empty, rope_parameters=default))
        assert model.rope == RopeConfig(theta=1e6)


def test_absent_and_null_take_the_defaults_of_the_family() -> None:
    model = parse_model_config(make_config(num_key_value_heads=None, head_dim=None, rope_scaling=None))
    assert (model.num_kv_heads, model.head_dim) == (4, 16)
    assert parse_model_config(make_config(torch_dtype=...)).dtype == "float32"


@pytest.mark.parametrize(
    ("changes", "biases", "qk_norm"),
    [
        ({"attention_bias": True, "mlp_bias": True}, (True, True, True), False),
        ({"architectures": ["MistralForCausalLM"]}, (False, False, False), False),
        ({"architectures": ["Qwen2ForCausalLM"]}, (True, False, False), False),
        ({"architectures": ["Qwen3ForCausalLM"]}, (False, False, False), True),
        ({"architectures": ["Qwen3ForCausalLM"], "attention_bias": True}, (True, True, False), True),
    ],
)
def test_families(changes: dict[str, Any], biases: tuple[bool, ...], qk_norm: bool) -> None:
    model = parse_model_config(make_config(**changes))
    assert (model.qkv_bias, model.o_bias, model.mlp_bias) == biases and model.qk_norm == qk_norm


@pytest.mark.parametrize(
    ("changes", "windows"),
    [
        ({"architectures": ["MistralForCausalLM"], "sliding_window": 9}, (9, 9, 9, 9)),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": None}, (None,) * 4),
        ({"architectures": ["MistralForCausalLM"]}, (4096,) * 4),
        (
            {"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True, "max_window_layers": 2},
            (None, None, 4096, 4096),
        ),
        (
            {
                "architectures": ["Qwen2ForCausalLM"],
                "use_sliding_window": True,
                "sliding_window": None,
                "max_window_layers": 2,
            },
            (None,) * 4,
        ),
        ({"architectures": ["Qwen2ForCausalLM"], "sliding_window": 9}, (None,) * 4),
        (
            {
                "architectures": ["Qwen2ForCausalLM"],
                "sliding_window": 9,
                "use_sliding_window": True,
                "max_window_layers": 3,
            },
            (None, None, None, 9),
        ),
        (
            {
                "architectures": ["Qwen3ForCausalLM"],
                "sliding_window": 9,
                "use_sliding_window": True,
                "layer_types": ["sliding_attention", "full_attention"] * 2,
            },
            (9, None, 9, None),
        ),
    ],
)
def test_sliding_windows(changes: dict[str, Any], windows: tuple[int | None, ...]) -> None:
    assert parse_model_config(make_config(**changes)).sliding_window == windows


REFUSED: list[dict[str, Any]] = [
    {"quantization_config": {"quant_method": "gptq"}},
    {"attn_logit_softcapping": 50.0},
    {"final_logit_softcapping": 30.0},
    {"attention_multiplier": 0.5},
    {"embedding_multiplier": 12},
    {"logits_scaling": 8},
    {"residual_multiplier": 0.2},
    {"partial_rotary_factor": 0.5},
    {"clip_qkv": 8},
    {"num_experts": 8},
    {"num_local_experts": 8},
    {"attn_output_multiplier": 0.5},
    {"mlp_multipliers": [1.0, 0.5]},
    {"v_clipping": 4.0},
    {"router_logits_softcap": 30},
    {"scale_attn_by_inverse_layer_idx": True},
    {"attn_temperature_tuning": 4},
    {"post_norm_eps": 1e-6},
    {"query_scaling": 0},
    {"hidden_act": "gelu"},
    {"torch_dtype": "float8_e4m3fn"},
    {"sliding_window": 9},
    {"layer_types": ["full_attention"] * 3},
    {"layer_types": ["chunked_attention"] * 4},
    {"layer_types": ["sliding_attention"] * 4},
    {"num_key_value_heads": 3},
    {"head_dim": 15},
    {"hidden_size": 66},
    {"hidden_size": "64"},
    {"hidden_size": True},
    {"hidden_size": 64.5},
    {"vocab_size": 0},
    {"num_hidden_layers": -1},
    {"intermediate_size": 10**400},
    {"rms_norm_eps": 0},
    {"rms_norm_eps": float("nan")},
    {"rms_norm_eps": "small"},
    {"rope_theta": -1.0},
    {"rope_theta": 10**400},
    {"rope_scaling": "llama3"},
    {"tie_word_embeddings": "yes"},
    {"eos_token_id": "</s>"},
    {"max_position_embeddings": []},
]


@pytest.mark.parametrize("changes", REFUSED, ids=lambda changes: str(changes)[:40])
def test_refusals_name_the_key(changes: dict[str, Any]) -> None:
    (key,) = changes
    with pytest.raises(ModelError, match=key) as caught:
        parse_model_config(make_config(**changes))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("rope", "key"),
    [
        ({"rope_type": "yarn", "factor": 4}, "yarn"),
        ({"type": "dynamic", "factor": 4}, "dynamic"),
        ({"rope_type": "linear"}, "factor"),
        ({"rope_type": "linear", "factor": 0}, "factor"),
        ({**LLAMA3, "high_freq_factor": 1.0}, "low_freq_factor"),
        ({**LLAMA3, "low_freq_factor": None}, "low_freq_factor"),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_type": "default", "mrope_section": [1, 2]}, "mrope_section"),
        ({"full_attention": {"rope_type": "default"}}, "full_attention"),
    ],
)
def test_rope_refusals(rope: dict[str, Any], key: str) -> None:
    for spelling in ("rope_scaling", "rope_parameters"):
        with pytest.raises(ModelError, match=key):
            parse_model_config(make_config(**{spelling: rope}))


@pytest.mark.parametrize(
    "key",
    ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"],
)
def test_missing_keys_are_named(key: str) -> None:
    with pytest.raises(ModelError, match=f"lacks {key}"):
        parse_model_config(make_config(**{key: ...}))


@pytest.mark.parametrize("names", [["GemmaForCausalLM"], [], None, "LlamaForCausalLM", [1]])
def test_unsupported_architectures(names: object) -> None:
    with pytest.raises(ModelError, match="architecture"):
        parse_model_config(make_config(architectures=names))
    with pytest.raises(ModelError, match="LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3"):
        parse_model_config(make_config(architectures=["FalconForCausalLM"]))


def test_neutral_values_are_accepted() -> None:
    unknown = {"head_multiplier": 1.0, "scale_depths": False, "clip_something": None, "flavour": 3.0}
    assert parse_model_config(make_config(**unknown)) == parse_model_config(make_config())
    neutral = {"pretraining_tp": 4, "num_experts": 0, "partial_rotary_factor": 1.0, "logits_scaling": 1}
    changes = {**neutral, "quantization_config": None, "hidden_act": "silu"}
    assert parse_model_config(make_config(**changes)) == parse_model_config(make_config())


def test_generation_config_decides_the_ending_tokens() -> None:
    model = parse_model_config(make_config(), {"eos_token_id": [3, 4, 100, -1], "bos_token_id": None})
    assert (model.eos_token_ids, model.bos_token_id) == ((3, 4), 1)


@pytest.mark.parametrize("content", ["", "[]", "{", '"text"', "[" * 100_000, "\x00"])
def test_broken_files(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ModelError, match="config.json") as caught:
        load_model_config(tmp_path)
    assert "\n" not in str(caught.value)


def test_files_that_are_missing_or_not_text(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="config.json is missing"):
        load_model_config(tmp_path)
    (tmp_path / "config.json").write_bytes(b"\xff\xfe{")
    with pytest.raises(ModelError, match="config.json"):
        load_model_config(tmp_path)


def test_default_sampling(tmp_path: Path) -> None:
    assert default_sampling(tmp_path) == DefaultSampling()

    def defaults(**values: object) -> DefaultSampling:
        (tmp_path / "generation_config.json").write_text(json.dumps(values))
        return default_sampling(tmp_path)

    assert defaults(temperature=0.6, top_p=0.9, top_k=20) == DefaultSampling(
        temperature=0.6, top_p=0.9, top_k=20
    )
    assert defaults(do_sample=False, temperature=0.6) == DefaultSampling()
    assert defaults(top_k=-1, min_p=0.1, repetition_penalty=1.1, temperature=None) == DefaultSampling(
        min_p=0.1, repetition_penalty=1.1
    )
    for bad in ({"top_p": 1.5}, {"top_p": 0}, {"temperature": -1}, {"top_k": "many"}, {"min_p": 2}):
        with pytest.raises(ModelError, match=next(iter(bad))):
            defaults(**bad)


def test_fingerprint_tells_models_and_layouts_apart() -> None:
    model = parse_model_config(make_config())
    geometry = KVGeometry.of(model, 16, "bfloat16")
    others = {
        fingerprint(model, geometry, "digest"),
        fingerprint(parse_model_config(make_config(rope_theta=5e5)), geometry, "digest"),
        fingerprint(model, KVGeometry.of(model, 8, "bfloat16"), "digest"),
        fingerprint(model, KVGeometry.of(model, 16, "float32"), "digest"),
        fingerprint(model, geometry, "another"),
    }
    assert len(others) == 5
    assert fingerprint(model, geometry, "digest") in others


def test_upper_bound_is_not_far_above_the_parameters() -> None:
    model = parse_model_config(make_config(vocab_size=32000, hidden_size=512, intermediate_size=1536))
    layer = 512 * (512 + 2 * 256 + 512) + 3 * 512 * 1536
    parameters = 2 * 32000 * 512 + 4 * layer
    assert 2 * parameters <= weights_bytes_upper_bound(model, "bfloat16") < 2.02 * parameters
