"""What a model is: its config.json read into one frozen struct, and the shape of its KV.

A leaf without torch: the router validates a model and sizes the pools before any worker exists. Everything in
config.json that changes the mathematics is either represented here or refused with a `ModelError` that
names it.
"""

from __future__ import annotations

from typing import Literal

import msgspec

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


class RopeConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Rotary embedding: `default`, `linear` (positions / factor) or `llama3` (frequency-dependent factor)."""

    kind: Literal["default", "linear", "llama3"] = "default"
    theta: float = 10000.0
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True):
    """One decoder-only transformer of the Llama family. Token counts and dimensions are in elements.

    `sliding_window[l]` is the number of last tokens layer l attends to (itself included), None = all.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: RopeConfig
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    sliding_window: tuple[int | None, ...]
    max_position_embeddings: int
    dtype: str
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None


class KVGeometry(msgspec.Struct, frozen=True, kw_only=True):
    """Shape of one pool's blocks: `[num_layers, 2, num_kv_heads, block_size, head_dim]` of `dtype`,
    contiguous.
    """

    num_layers: int
    num_kv_heads: int
    block_size: int
    head_dim: int
    dtype: str

    @classmethod
    def of(cls, model: ModelConfig, block_size: int, dtype: str) -> KVGeometry:
        """The geometry of `model`'s KV with blocks of `block_size` tokens."""
        return cls(
            num_layers=model.num_layers,
            num_kv_heads=model.num_kv_heads,
            block_size=block_size,
            head_dim=model.head_dim,
            dtype=dtype,
        )

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's K and V over all layers."""
        return self.num_layers * 2 * self.num_kv_heads * self.head_dim * DTYPE_BYTES[self.dtype]

    @property
    def block_bytes(self) -> int:
        """Bytes of one block: one contiguous run of memory."""
        return self.block_size * self.token_bytes
