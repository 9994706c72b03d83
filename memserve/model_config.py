"""What a model is: its config.json read into one frozen struct, and the shape of its KV.

A leaf without torch: the router validates a model and sizes the pools before any worker exists. Everything in
config.json that changes the mathematics is either represented here or refused with a `ModelError` that
names it.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Literal

import msgspec

from memserve.errors import ModelError
from memserve.json_fields import JsonFields

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def blocks_for(num_tokens: int, block_size: int) -> int:
    """Blocks that hold `num_tokens` tokens, the last one perhaps in part."""
    return -(-num_tokens // block_size)


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
    """Shape of a pool's blocks: `[num_layers, 2, num_kv_heads, block_size, head_dim]`, contiguous."""

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

    @property
    def description(self) -> str:
        """In words, for a message that compares two."""
        return (
            f"{self.dtype}, {self.num_layers} layers of {self.num_kv_heads} heads of {self.head_dim}, "
            f"{self.block_size} tokens a block"
        )


class DefaultSampling(msgspec.Struct, frozen=True, kw_only=True):
    """Sampling where a request says nothing: the model's generation_config.json over OpenAI's defaults."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


# --- reading config.json -----------------------------------------------------------------------------------

SUPPORTED_ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")

# Keys of related models that change the mathematics, with the values under which they do not.
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "quantization_config": (),
    "compression_config": (),
    "attn_logit_softcapping": (),
    "final_logit_softcapping": (),
    "query_pre_attn_scalar": (),
    "clip_qkv": (),
    "attention_chunk_size": (),
    "dual_chunk_attention_config": (),
    "no_rope_layers": (),
    "no_rope_layer_interval": (),
    "attention_multiplier": (1,),
    "embedding_multiplier": (1,),
    "residual_multiplier": (1,),
    "logits_scaling": (1,),
    "logit_scale": (1,),
    "scale_emb": (1,),
    "scale_depth": (),
    "dim_model_base": (),
    "partial_rotary_factor": (1,),
    "rotary_pct": (1,),
    "rope_interleave": (False,),
    "rope_interleaved": (False,),
    "num_experts": (0,),
    "num_local_experts": (0,),
    "n_routed_experts": (0,),
    "alibi": (False,),
    "use_qk_norm": (False,),
    "qk_layernorm": (False,),
    "is_encoder_decoder": (False,),
    "use_bidirectional_attention": (False,),
}
# A key nobody here knows, but whose name says that it scales or bounds what the layers compute.
_SUSPICIOUS = re.compile(r"scal(e|ing)|softcap|multiplier|clip|norm(?!al)|temperature_|_temperature")
_UNSUSPICIOUS = {"rms_norm_eps", "rope_scaling"}
# transformers' defaults where config.json leaves a key out; where it says null, there is no window.
_DEFAULT_WINDOW = 4096
_ROPE_KEYS = {
    "type",
    "rope_type",
    "rope_theta",
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
    "partial_rotary_factor",
}


def load_model_config(folder: Path) -> ModelConfig:
    """The model in a Hugging Face folder (config.json, generation_config.json). Raises ModelError."""
    generation = folder / "generation_config.json"
    return _parse(
        JsonFields.read(folder / "config.json"),
        JsonFields.read(generation) if generation.exists() else None,
    )


def parse_model_config(
    config: dict[str, object], generation_config: dict[str, object] | None = None
) -> ModelConfig:
    """The model that a config.json, and a generation_config.json where there is one, describe.

    Old spellings and new ones are read alike (`rope_theta`, `rope_scaling`, `torch_dtype`; `rope_parameters`,
    `dtype`). Raises ModelError for what is missing, malformed or not implemented.
    """
    generation = None
    if generation_config is not None:
        generation = JsonFields(generation_config, "generation_config.json")
    return _parse(JsonFields(config, "config.json"), generation)


def default_sampling(folder: Path) -> DefaultSampling:
    """The model's own sampling defaults, unless its generation_config.json says `do_sample: false`."""
    path = folder / "generation_config.json"
    if not path.exists():
        return DefaultSampling()
    fields = JsonFields.read(path)
    if not fields.flag("do_sample", True):
        return DefaultSampling()
    top_p, min_p = fields.number("top_p", 1.0), fields.number("min_p", 0.0, open_low=False)
    for key, value in (("top_p", top_p), ("min_p", min_p)):
        if value > 1:
            raise fields.fail(key, "is out of range (must be at most 1)")
    return DefaultSampling(
        temperature=fields.number("temperature", 1.0, open_low=False),
        top_p=top_p,
        top_k=max(fields.integer("top_k", 0, minimum=-1), 0),
        min_p=min_p,
        repetition_penalty=fields.number("repetition_penalty", 1.0),
    )


def _parse(fields: JsonFields, generation: JsonFields | None) -> ModelConfig:
    architecture = _architecture(fields)
    _refuse_unknown_mathematics(fields)
    num_layers, num_heads = fields.integer("num_hidden_layers"), fields.integer("num_attention_heads")
    num_kv_heads = fields.integer("num_key_value_heads", num_heads)
    if num_heads % num_kv_heads:
        raise fields.fail("num_key_value_heads", f"does not divide num_attention_heads = {num_heads}")
    hidden_size = fields.integer("hidden_size")
    if not fields.has("head_dim") and hidden_size % num_heads:
        raise fields.fail("hidden_size", f"is no multiple of num_attention_heads = {num_heads}")
    head_dim = fields.integer("head_dim", hidden_size // num_heads or 1)
    if head_dim % 2:
        raise fields.fail("head_dim", f"makes heads of {head_dim}, and rotary embedding needs an even number")

    is_qwen2, is_qwen3 = architecture == "Qwen2ForCausalLM", architecture == "Qwen3ForCausalLM"
    attention_bias = architecture == "LlamaForCausalLM" or is_qwen3
    attention_bias = attention_bias and fields.flag("attention_bias", False)
    vocab_size = fields.integer("vocab_size")
    max_positions = fields.integer("max_position_embeddings")
    return ModelConfig(
        architecture=architecture,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=fields.integer("intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
        rope=_rope(fields, max_positions),
        tie_word_embeddings=fields.flag("tie_word_embeddings", False),
        qkv_bias=is_qwen2 or attention_bias,
        o_bias=attention_bias,
        mlp_bias=architecture == "LlamaForCausalLM" and fields.flag("mlp_bias", False),
        qk_norm=is_qwen3,
        sliding_window=_sliding_window(fields, architecture, num_layers),
        max_position_embeddings=max_positions,
        dtype=_dtype(fields),
        eos_token_ids=_token_ids("eos_token_id", vocab_size, generation, fields),
        bos_token_id=next(iter(_token_ids("bos_token_id", vocab_size, generation, fields)), None),
    )


def _architecture(fields: JsonFields) -> str:
    names = fields.strings("architectures")
    found = next((name for name in names if name in SUPPORTED_ARCHITECTURES), None)
    if found is None:
        named = f"the architecture {', '.join(names)}" if names else "a config.json without architectures"
        raise ModelError(f"{named} is not supported; supported: {', '.join(SUPPORTED_ARCHITECTURES)}")
    return found


def _refuse_unknown_mathematics(fields: JsonFields) -> None:
    for key, neutral in _NEUTRAL.items():
        if fields.has(key) and fields.get(key) not in neutral:
            raise fields.fail(key, "is not supported")
    for key in fields.keys():  # noqa: SIM118
        if key in _NEUTRAL or key in _UNSUSPICIOUS or not _SUSPICIOUS.search(key):
            continue
        value = fields.get(key)
        if value is not False and (isinstance(value, bool) or value != 1):
            raise fields.fail(key, "is not known, and may change the mathematics")
    if fields.text("hidden_act", "silu") not in ("silu", "swish"):
        raise fields.fail("hidden_act", "is not supported; supported: silu")


def _rope(fields: JsonFields, max_positions: int) -> RopeConfig:
    """`rope_parameters` (new) holds everything; `rope_scaling` (old) all but `rope_theta`, which stands
    beside it. As in transformers the old one, unless it is empty, goes before the new one.
    """
    key = "rope_scaling" if fields.get("rope_scaling") else "rope_parameters"
    rope = fields.nested(key) or JsonFields({}, f"config.json: {key}")
    unknown = [name for name in rope.keys() if name not in _ROPE_KEYS]  # noqa: SIM118
    kind = rope.text("rope_type" if rope.has("rope_type") else "type", "default")
    if kind not in ("default", "linear", "llama3"):
        name = "rope_type" if rope.has("rope_type") else "type"
        raise rope.fail(name, "is not supported; supported: default, linear, llama3")
    if unknown:
        raise rope.fail(unknown[0], "is not supported")
    if rope.has("partial_rotary_factor") and rope.get("partial_rotary_factor") != 1:
        raise rope.fail("partial_rotary_factor", "is not supported")
    theta = rope.number("rope_theta") if rope.has("rope_theta") else fields.number("rope_theta", 10000.0)
    if kind == "default":
        return RopeConfig(theta=theta)
    if kind == "linear":
        return RopeConfig(kind="linear", theta=theta, factor=rope.number("factor"))
    low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
    if low >= high:
        raise rope.fail("low_freq_factor", f"is not below high_freq_factor = {high:g}")
    return RopeConfig(
        kind="llama3",
        theta=theta,
        factor=rope.number("factor"),
        low_freq_factor=low,
        high_freq_factor=high,
        original_max_position_embeddings=rope.integer("original_max_position_embeddings", max_positions),
    )


def _sliding_window(fields: JsonFields, architecture: str, num_layers: int) -> tuple[int | None, ...]:
    is_qwen, is_llama = architecture.startswith("Qwen"), architecture == "LlamaForCausalLM"
    if fields.has("sliding_window") and is_llama:
        raise fields.fail("sliding_window", f"is not supported for {architecture}")
    has_window = not is_llama and (not is_qwen or fields.flag("use_sliding_window", False))
    if fields.is_null("sliding_window"):
        has_window = False
    window = fields.integer("sliding_window", _DEFAULT_WINDOW) if has_window else None
    kinds = fields.strings("layer_types")
    if not kinds:
        # Qwen's first max_window_layers layers attend to everything.
        first = fields.integer("max_window_layers", 28, minimum=0) if is_qwen else 0
        return tuple(window if index >= first else None for index in range(num_layers))
    if len(kinds) != num_layers:
        raise fields.fail("layer_types", f"does not have num_hidden_layers = {num_layers} entries")
    for kind in kinds:
        if kind not in ("full_attention", "sliding_attention"):
            raise fields.fail("layer_types", f"is not supported: {kind}")
        if kind == "sliding_attention" and window is None:
            raise fields.fail("layer_types", "has sliding_attention, but there is no sliding_window")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _dtype(fields: JsonFields) -> str:
    key = "dtype" if fields.has("dtype") else "torch_dtype"
    name = fields.text(key, "float32").removeprefix("torch.")
    if name not in DTYPE_BYTES:
        raise fields.fail(key, f"is not supported; supported: {', '.join(DTYPE_BYTES)}")
    return name


def _token_ids(key: str, vocab_size: int, *places: JsonFields | None) -> tuple[int, ...]:
    """The first place that has the key decides. Ids outside the vocabulary, never drawn, are left out."""
    for fields in places:
        if fields is not None and fields.has(key):
            return tuple(token_id for token_id in fields.integers(key) if 0 <= token_id < vocab_size)
    return ()


# --- what follows from it ---------------------------------------------------------------------------------

WEIGHT_ALIGNMENT = 64
# Kernels that lay a matrix out for themselves pad its sides to a multiple of this at most.
_PADDING = 64
# Changes whenever the same model and geometry mean other bytes in a block.
_LAYOUT_VERSION = 1


def fingerprint(model: ModelConfig, geometry: KVGeometry, digest: str) -> str:
    """What two pools must have in common to exchange blocks; `digest` stands for the weights' content."""
    parts = (_LAYOUT_VERSION, msgspec.json.encode(model), msgspec.json.encode(geometry), digest)
    return hashlib.sha256(msgspec.json.encode([str(part) for part in parts])).hexdigest()


def packed_bytes_bound(rows: int, columns: int, element_bytes: int) -> int:
    """Most bytes a matrix may take in memory, in whatever layout it is kept."""
    return (-(-rows // _PADDING) * _PADDING) * (-(-columns // _PADDING) * _PADDING) * element_bytes


def weights_bytes_upper_bound(model: ModelConfig, dtype: str) -> int:
    """Bytes that the weights take at most, laid out for CPU workers; a tied embedding counts twice (it is
    kept plain for the look-up and packed for the head).
    """
    q, kv = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    hidden, inner = model.hidden_size, model.intermediate_size
    matrices = ((q + 2 * kv, hidden), (hidden, q), (inner, hidden), (inner, hidden), (hidden, inner))
    vectors = 4 * (q + 2 * kv + hidden + 2 * inner + 2 * model.head_dim) + 64 * WEIGHT_ALIGNMENT
    element = DTYPE_BYTES[dtype]
    layer = sum(packed_bytes_bound(rows, columns, element) for rows, columns in matrices) + vectors
    ends = 2 * packed_bytes_bound(model.vocab_size, hidden, element) + 4 * hidden + 4 * WEIGHT_ALIGNMENT
    return model.num_layers * layer + ends
