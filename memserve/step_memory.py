"""What one step takes on a GPU beside weights and KV: the bounds that the code keeps to, and their sum.

A leaf without torch: a worker sizes its pool with it, and so does the router where several share a GPU.
"""

from __future__ import annotations

from memserve.model_config import DTYPE_BYTES, KVGeometry, ModelConfig

# Prompt logprobs need logits of every row of a chunk: at most so many in a step, of all such chunks together.
# [256, vocab] float32 is 128 MiB for a vocabulary of 128k. A step's other rows with logits are one a request.
MAX_LOGIT_ROWS = 256
# Scores that attention holds at once: heads * queries * keys. A chunk with more is computed in parts.
MAX_SCORE_ELEMENTS = 1 << 25


def cuda_step_bytes(
    model: ModelConfig, dtype: str, *, max_batch_tokens: int, max_running: int, max_model_len: int
) -> int:
    """Bytes of a full step's activations, logits, scores, and of one gathered context; the rotations too."""
    element = DTYPE_BYTES[dtype]
    activations = max_batch_tokens * (8 * model.hidden_size + 4 * model.intermediate_size) * element
    # Sampling keeps up to four float32 forms of its rows; logprobs are taken of a few rows at a time.
    logits = model.vocab_size * (16 * max_running + (4 + element) * MAX_LOGIT_ROWS)
    # Before and after the softmax, and the mask that is added.
    scores = MAX_SCORE_ELEMENTS * 3 * element
    context = max_model_len * model.head_dim * (2 * model.num_kv_heads * element + 4)
    return activations + logits + scores + context


def cuda_pool_blocks(num_bytes: int, geometry: KVGeometry) -> int:
    """Blocks for `num_bytes` of a GPU.

    A batch of decodes gathers one layer of all its KV, padded to twice the length at most, beside its scores.
    """
    gathered = 3 * geometry.block_bytes // geometry.num_layers
    return max(num_bytes, 0) // (geometry.block_bytes + gathered)
