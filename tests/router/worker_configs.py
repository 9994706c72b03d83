"""A plan's entries for tests in which no model is computed."""

from __future__ import annotations

from memserve.config import Role, WorkerConfig
from memserve.model_config import ModelConfig, RopeConfig

MODEL = ModelConfig(
    architecture="LlamaForCausalLM",
    vocab_size=64,
    hidden_size=16,
    intermediate_size=32,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    rms_norm_eps=1e-5,
    rope=RopeConfig(),
    tie_word_embeddings=True,
    qkv_bias=False,
    o_bias=False,
    mlp_bias=False,
    qk_norm=False,
    sliding_window=(None, None),
    max_position_embeddings=128,
    dtype="float32",
    eos_token_ids=(1,),
    bos_token_id=None,
)


def make_worker(instance: str, cpus: tuple[int, ...] = ()) -> WorkerConfig:
    return WorkerConfig(
        instance=instance,
        role=Role(instance.split("-")[0]),
        model_path="/nowhere",
        model=MODEL,
        device="cpu",
        dtype="float32",
        load_format="dummy",
        seed=0,
        block_size=16,
        num_blocks=8,
        device_memory_fraction=None,
        max_model_len=128,
        max_batch_tokens=64,
        max_running=4,
        max_step_ms=200.0,
        threads=1,
        cpus=cpus,
    )
