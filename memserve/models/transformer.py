"""One decoder-only transformer of the Llama family, driven by its `ModelConfig`, over a paged KV arena.

It holds weights and the rotation table, no state of any request: `forward` writes the step's KV into the
arena it is given and returns logits. Inference only; call it under `torch.inference_mode()`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from memserve.kernels.attention import paged_attention
from memserve.kernels.kv_cache import store_kv
from memserve.kernels.norm import rms_norm
from memserve.kernels.rotary import rotate_, rotation_table
from memserve.model_config import ModelConfig
from memserve.models.step import StepTensors
from memserve.models.weights import LayerWeights, Weights

# Rows up to which `compile_linear` goes for logits: few requests draw in the same step.
_MOST_DRAWING = 16


def _ignore() -> None:
    pass


class Transformer:
    """The model.

    Args:
        model: what it is.
        weights: on `device`, of `dtype`; shared, never written.
        max_model_len: positions the rotation table covers.
        device: where everything lies.
        dtype: of weights, activations and arena.
    """

    def __init__(
        self,
        model: ModelConfig,
        weights: Weights,
        max_model_len: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.model = model
        self.device = device
        self.dtype = dtype
        self._weights = weights
        self._rotations = rotation_table(model.rope, model.head_dim, max_model_len, device)
        self._num_q = model.num_heads * model.head_dim
        self._scale = model.head_dim**-0.5

    def forward(self, step: StepTensors, kv: Tensor, on_layer: Callable[[], None] = _ignore) -> Tensor:
        """Run one step.

        Args:
            step: the tokens, built for this model and the arena's block size.
            kv: the arena [num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim]; the step's slots
                are written, the blocks of its sequences read.
            on_layer: told after each layer's K and V are in the arena (on a GPU: enqueued).

        Returns:
            Logits, float32 [step.num_logits, vocab_size], row by row as `step.logit_rows`.
        """
        model, weights = self.model, self._weights
        rotations = self._rotations.index_select(0, step.positions).unsqueeze(1)
        x = weights.embed_tokens.index_select(0, step.token_ids)

        for index, layer in enumerate(weights.layers[:-1]):
            q, new = self._project(layer, x, rotations)
            store_kv(kv, index, new, step.store)
            on_layer()
            plan = step.plans[model.sliding_window[index]]
            x = layer.o.plus(paged_attention(q, new, kv, index, plan, self._scale), x)
            x = layer.down.plus(layer.gate_up(rms_norm(x, layer.post_norm, model.rms_norm_eps)), x)

        index, layer = model.num_layers - 1, weights.layers[-1]
        q, new = self._project(layer, x, rotations)
        store_kv(kv, index, new, step.store)
        on_layer()
        if step.final is None:
            return torch.empty((0, model.vocab_size), dtype=torch.float32, device=self.device)
        if not step.takes_all:
            q, x = q.index_select(0, step.logit_rows), x.index_select(0, step.logit_rows)
        x = layer.o.plus(paged_attention(q, new, kv, index, step.final, self._scale), x)
        x = layer.down.plus(layer.gate_up(rms_norm(x, layer.post_norm, model.rms_norm_eps)), x)
        return weights.lm_head(rms_norm(x, weights.norm, model.rms_norm_eps))[: step.num_logits].float()

    def compile_linear(self, num_rows: int) -> None:
        """Multiply `num_rows` rows of zeros by each kind of matrix, so that the kernels which that takes
        are there when a step needs them. All layers are of one shape.
        """
        layer, weights = self._weights.layers[0], self._weights
        x = torch.zeros((num_rows, self.model.hidden_size), dtype=self.dtype, device=self.device)
        layer.qkv(x)
        layer.o.plus(x.new_zeros((num_rows, self._num_q)), x)
        layer.down.plus(layer.gate_up(x), x)
        weights.lm_head(x[: min(num_rows, _MOST_DRAWING)])

    def _project(self, layer: LayerWeights, x: Tensor, rotations: Tensor) -> tuple[Tensor, Tensor]:
        """Queries [T, num_heads, head_dim]; keys with values [T, 2, num_kv_heads, head_dim]; q and k rotated.

        Both are views of one tensor: | q heads | k heads | v heads |, rotated in place.
        """
        model = self.model
        qkv = layer.qkv(rms_norm(x, layer.input_norm, model.rms_norm_eps)).view(len(x), -1, model.head_dim)
        q, kv = qkv[:, : model.num_heads], qkv[:, model.num_heads :]
        kv = kv.view(len(x), 2, model.num_kv_heads, model.head_dim)
        if layer.q_norm is not None and layer.k_norm is not None:
            q.copy_(rms_norm(q, layer.q_norm, model.rms_norm_eps))
            kv[:, 0].copy_(rms_norm(kv[:, 0], layer.k_norm, model.rms_norm_eps))
        rotate_(qkv[:, : model.num_heads + model.num_kv_heads], rotations)
        return q, kv
