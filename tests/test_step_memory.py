"""What a step is allowed to take, and the pool that is left."""

from __future__ import annotations

import pytest

from memserve.model_config import KVGeometry, ModelConfig, parse_model_config
from memserve.step_memory import cuda_pool_blocks, cuda_step_bytes

LLAMA_8B: ModelConfig = parse_model_config(
    {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
    }
)


def step_gib(**changes: int) -> float:
    sizes = {"max_batch_tokens": 8192, "max_running": 64, "max_model_len": 131072}
    return cuda_step_bytes(LLAMA_8B, "bfloat16", **{**sizes, **changes}) / 2**30


def test_a_step_takes_a_few_gib_however_long_the_context() -> None:
    assert 1.5 < step_gib(max_model_len=8192) < step_gib() < 3.5
    # Each of the sizes counts.
    for name, size in (("max_batch_tokens", 16384), ("max_running", 128), ("max_model_len", 262144)):
        assert step_gib(**{name: size}) > step_gib() + 0.1


@pytest.mark.parametrize("num_bytes", [-1, 0, 1, 10**6, 10**10, 10**11])
def test_a_pool_leaves_room_for_what_decodes_gather(num_bytes: int) -> None:
    geometry = KVGeometry.of(LLAMA_8B, 16, "bfloat16")
    num_blocks = cuda_pool_blocks(num_bytes, geometry)
    pool_bytes = num_blocks * geometry.block_bytes
    assert num_blocks >= 0 and pool_bytes * (1 + 2 / 32) <= max(num_bytes, 0)
    assert pool_bytes >= num_bytes * 0.9 - geometry.block_bytes
