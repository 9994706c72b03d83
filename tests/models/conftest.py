"""Small random models of every family, saved by transformers, and what it takes to run ours on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from numpy.typing import NDArray

from memserve.model_config import ModelConfig, load_model_config, weights_bytes_upper_bound
from memserve.models.step import LogitRows, SequenceSlice, build_step
from memserve.models.transformer import Transformer
from memserve.models.weights import map_weights, write_weights

# Tiny matrices: a second thread costs more in waiting than it brings, the more so beside other work.
torch.set_num_threads(1)

_SMALL: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama_mha_tied_head80": (
        "Llama",
        {"num_key_value_heads": 8, "tie_word_embeddings": True, "head_dim": 80, "rms_norm_eps": 1e-5},
    ),
    "llama_mqa_biases": ("Llama", {"num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True}),
    "llama3_rope": ("Llama", {"rope_parameters": _LLAMA3}),
    "llama_linear_rope": (
        "Llama",
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}},
    ),
    "mistral": ("Mistral", {"sliding_window": None, "head_dim": 16}),
    "mistral_window": ("Mistral", {"sliding_window": 21, "head_dim": 16}),
    "qwen2": ("Qwen2", {}),
    "qwen2_window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 17, "max_window_layers": 1}),
    "qwen2_window_first": (
        "Qwen2",
        {
            "use_sliding_window": True,
            "sliding_window": 17,
            "layer_types": ["sliding_attention", "full_attention", "full_attention"],
        },
    ),
    "qwen3": ("Qwen3", {"head_dim": 96}),
    "qwen3_biases_tied": ("Qwen3", {"head_dim": 16, "attention_bias": True, "tie_word_embeddings": True}),
}


@dataclass(slots=True)
class Run:
    """One sequence that is fed to a model piece by piece."""

    block_ids: NDArray[np.int64]
    tokens: list[int] = field(default_factory=list)


class Model:
    """Our transformer over an arena of NaN: whatever is read without having been written shows."""

    def __init__(self, folder: Path, dtype: str, block_size: int, num_tokens: int = 2560) -> None:
        self.config: ModelConfig = load_model_config(folder)
        self.block_size = block_size
        self.dtype: torch.dtype = getattr(torch, dtype)
        memory = memoryview(bytearray(weights_bytes_upper_bound(self.config, dtype)))
        manifest = write_weights(self.config, folder, dtype, "auto", 0, memory, lambda _: None)
        weights = map_weights(self.config, manifest, memory)
        limit = self.config.max_position_embeddings
        self.device = torch.device("cpu")
        self.transformer = Transformer(self.config, weights, limit, self.device, self.dtype)
        shape = (self.config.num_layers, 2, self.config.num_kv_heads, block_size, self.config.head_dim)
        num_blocks = num_tokens // block_size
        self.kv = torch.full((num_blocks, *shape), float("nan"), dtype=self.dtype)
        self._free = np.random.default_rng(0).permutation(num_blocks)

    def start(self, max_tokens: int = 256) -> Run:
        """A sequence with scattered blocks of its own."""
        count = -(-max_tokens // self.block_size)
        taken, self._free = self._free[:count], self._free[count:]
        assert len(taken) == count
        return Run(taken)

    def step(self, *pieces: tuple[Run, Sequence[int], LogitRows]) -> torch.Tensor:
        """Feed each run its new tokens; the logits wanted."""
        start, laid_out = 0, []
        for run, new, wanted in pieces:
            context = len(run.tokens)
            blocks = run.block_ids[: -(-(context + len(new)) // self.block_size)]
            laid_out.append(
                (np.array(new, dtype=np.int32), SequenceSlice(start, len(new), context, blocks), wanted)
            )
            run.tokens.extend(new)
            start += len(new)
        step = build_step(laid_out, self.config, self.block_size, self.device, self.dtype)
        with torch.inference_mode():
            return self.transformer.forward(step, self.kv)


@pytest.fixture(scope="session")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Any]]:
    """A family's folder and transformers' model of it in float32, both made once."""
    made: dict[str, tuple[Path, Any]] = {}

    def make(family: str) -> tuple[Path, Any]:
        if family not in made:
            name, changes = FAMILIES[family]
            config = getattr(transformers, f"{name}Config")(**{**_SMALL, **changes})
            config._attn_implementation = "eager"
            torch.manual_seed(len(family))
            model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
            with torch.no_grad():
                for key, parameter in model.named_parameters():
                    if parameter.ndim == 1:  # norms and biases, which start as 1 and 0, must count too
                        parameter.add_(torch.randn(parameter.shape) * 0.1)
                    assert parameter.isfinite().all(), key
            folder = tmp_path_factory.mktemp(family)
            model.save_pretrained(folder)
            made[family] = folder, model
        return made[family]

    return make


@pytest.fixture(params=sorted(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    """Each family in turn."""
    return str(request.param)


@pytest.fixture
def make_model() -> type[Model]:
    """`Model(folder, dtype, block_size)`."""
    return Model
