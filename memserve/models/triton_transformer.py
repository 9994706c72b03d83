"""The transformer of `models.transformer` over Triton kernels: for GPUs, and for the interpreter in tests.

Same weights, same arena, same logits up to rounding. It reads a `PagedStep`, whose tensors alone say what is
to be done: `forward` waits for nothing, branches on host figures only and allocates through torch, so a step
without longer sequences can be captured in a CUDA graph and replayed over other content (`StaticStep`).
Inference only; call it under `torch.inference_mode()`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from memserve.kernels.rotary import rotation_table
from memserve.kernels.triton.activation import silu_and_mul
from memserve.kernels.triton.decode_attention import decode_attention
from memserve.kernels.triton.kv_store import rotate_and_store
from memserve.kernels.triton.norm import add_rms_norm_, rms_norm
from memserve.kernels.triton.prefill_attention import prefill_attention
from memserve.kernels.triton.skinny_linear import skinny_gated, skinny_linear
from memserve.kernels.triton.tuning import Tuning
from memserve.model_config import ModelConfig
from memserve.models.linear import FusedGate, GatedLinear, Linear, StridedLinear
from memserve.models.paged_step import PagedStep
from memserve.models.weights import LayerWeights, Weights


def _ignore() -> None:
    pass


class TritonTransformer:
    """The model.

    Args:
        model: what it is.
        weights: on `device`, of `dtype`, not packed (`load_weights_to_device`); shared, never written.
        max_model_len: positions the rotation table covers.
        device: where everything lies.
        dtype: of weights, activations and arena.
        tuning: tile shapes; None = the file of the device.
    """

    def __init__(
        self,
        model: ModelConfig,
        weights: Weights,
        max_model_len: int,
        device: torch.device,
        dtype: torch.dtype,
        tuning: Tuning | None = None,
    ) -> None:
        self.model = model
        self.device = device
        self.dtype = dtype
        self.tuning = tuning or Tuning.of(device)
        self._weights = weights
        self._rotations = rotation_table(model.rope, model.head_dim, max_model_len, device)
        self._scale = model.head_dim**-0.5

    def prepare(self, kv: Tensor) -> None:
        """Have every form of the attention kernels compiled that a step may ask for, depending on its batch
        and its longest sequence: the first to need one would wait a second for the compiler. Touches nothing
        of the arena.
        """
        model, device = self.model, self.device
        q = torch.zeros((1, model.num_heads, model.head_dim), dtype=self.dtype, device=device)
        tables, none = (torch.zeros(shape, dtype=torch.int32, device=device) for shape in ((1, 1), 2))
        longest = len(self._rotations)
        for window in set(model.sliding_window):
            for exponent in range(longest.bit_length() + 1):
                for sequences in (None, none[:1]):
                    decode_attention(
                        q, kv, 0, tables, sequences, none[:1], self._scale, window, 1 << exponent, self.tuning
                    )
            prefill_attention(
                q, kv, 0, tables, none, none[:1], self._scale, window, self.tuning, torch.empty_like(q), 1
            )

    def forward(
        self, step: PagedStep, kv: Tensor, on_layer: Callable[[], None] = _ignore, out: Tensor | None = None
    ) -> Tensor:
        """Enqueue one step.

        Args:
            step: built for the arena's block size.
            kv: the arena [num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim]; the step's slots
                are written, the blocks of its sequences read.
            on_layer: told after each layer's K and V are enqueued to be in the arena.
            out: where to leave the logits; None = in a new tensor.

        Returns:
            Logits, float32 [len(step.logit_rows), vocab_size], row by row as `step.logit_rows`. A padding
            row's are finite and mean nothing.
        """
        model, weights = self.model, self._weights
        x = weights.embed_tokens.index_select(0, step.token_ids)
        normed = rms_norm(x, weights.layers[0].input_norm, model.rms_norm_eps)
        last = model.num_layers - 1
        for index, layer in enumerate(weights.layers):
            q = self._queries(layer, normed, step, kv, index)
            on_layer()
            if index < last or step.takes_all:
                found = self._attend(q, step, kv, index)
            elif len(step.logit_rows) == 0:
                return torch.empty((0, model.vocab_size), dtype=torch.float32, device=self.device)
            else:
                # Past the last layer's K and V only rows with logits matter: each is a decode of its own.
                x = x.index_select(0, step.logit_rows)
                found = decode_attention(
                    q.index_select(0, step.logit_rows), kv, index, step.block_tables, step.logit_sequences,
                    step.logit_lens, self._scale, model.sliding_window[index], step.max_key_len, self.tuning,
                )  # fmt: skip
            attended = self._product(layer.o, found.flatten(1))
            normed = add_rms_norm_(attended, x, layer.post_norm, model.rms_norm_eps)
            inner = self._product(layer.down, self._gated(layer.gate_up, normed))
            following = weights.norm if index == last else weights.layers[index + 1].input_norm
            normed = add_rms_norm_(inner, x, following, model.rms_norm_eps)
        logits = self._product(weights.lm_head, normed)
        return logits.float() if out is None else out.copy_(logits)

    def _queries(
        self, layer: LayerWeights, normed: Tensor, step: PagedStep, kv: Tensor, index: int
    ) -> Tensor:
        """Queries [T, num_heads, head_dim], rotated; the layer's K and V are stored."""
        model = self.model
        qkv = self._product(layer.qkv, normed).view(len(normed), -1, model.head_dim)
        norms = None
        if layer.q_norm is not None and layer.k_norm is not None:
            norms = layer.q_norm, layer.k_norm
        return rotate_and_store(
            qkv, norms, self._rotations, step.positions, step.slots, step.tails, kv, index,
            model.num_heads, model.rms_norm_eps,
        )  # fmt: skip

    def _product(self, linear: Linear, x: Tensor) -> Tensor:
        """`linear(x)`; of few rows by the kernel for them, where tuning says so."""
        config = self.tuning.skinny(len(x), x.element_size())
        if config is None or not isinstance(linear, StridedLinear):
            return linear(x)
        return skinny_linear(x, linear.weight, linear.bias, config)

    def _gated(self, gate: GatedLinear, x: Tensor) -> Tensor:
        """silu(gate) * up of x."""
        assert isinstance(gate, FusedGate), "packed weights are for CPU workers"
        config = self.tuning.skinny(len(x), x.element_size())
        if config is None or not isinstance(gate.gate_up, StridedLinear):
            return silu_and_mul(gate.gate_up(x))
        return skinny_gated(x, gate.gate_up.weight, gate.gate_up.bias, config)

    def _attend(self, q: Tensor, step: PagedStep, kv: Tensor, index: int) -> Tensor:
        """Attention of all rows: the decodes, then the longer sequences. [T, num_heads, head_dim]."""
        window, decodes = self.model.sliding_window[index], step.num_decodes
        num_rows, num_sequences = len(q), len(step.key_lens)
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        if decodes:
            decode_attention(
                q[:decodes], kv, index, step.block_tables, None, step.key_lens[:decodes],
                self._scale, window, step.max_key_len, self.tuning, out[:decodes],
            )  # fmt: skip
        if decodes < num_sequences:
            prefill_attention(
                q, kv, index, step.block_tables[decodes:], step.query_starts[decodes:],
                step.key_lens[decodes:], self._scale, window, self.tuning, out, num_rows - decodes,
            )  # fmt: skip
        return out
