"""Matrices as the layers use them, in two storage forms with one meaning.

`StridedLinear` is torch's own `[out, in]`: any device, any dtype. `OnednnLinear` is oneDNN's packed form,
for the CPU: at the few rows of a decode step it runs close to memory speed, ~1.8 times quicker in bfloat16
than the plain form, and oneDNN folds the activation, the product and the residual sum into the matrix
product's last pass (`swish`, `times`, `plus`), rounding once. Biases have the matrix's dtype.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from memserve.kernels.activation import silu_and_mul


class Linear(Protocol):
    """`y = x W^T + b` of x [T, in], as new tensors [T, out]."""

    def __call__(self, x: Tensor) -> Tensor:
        """y."""
        ...

    def swish(self, x: Tensor) -> Tensor:
        """silu(y)."""
        ...

    def times(self, x: Tensor, other: Tensor) -> Tensor:
        """y * other."""
        ...

    def plus(self, x: Tensor, other: Tensor) -> Tensor:
        """y + other."""
        ...


class StridedLinear:
    """`weight` [out, in], `bias` [out] or None."""

    __slots__ = ("bias", "weight")

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.weight = weight
        self.bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def swish(self, x: Tensor) -> Tensor:
        return F.silu(self(x), inplace=True)

    def times(self, x: Tensor, other: Tensor) -> Tensor:
        return self(x).mul_(other)

    def plus(self, x: Tensor, other: Tensor) -> Tensor:
        return self(x).add_(other)


class OnednnLinear:
    """`packed` is a tensor of oneDNN's layout (`onednn.pack`), `bias` [out] or None."""

    __slots__ = ("_bias", "_packed")

    def __init__(self, packed: Tensor, bias: Tensor | None = None) -> None:
        self._packed = packed
        self._bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        return _pointwise(x, self._packed, self._bias, "none", [], "")  # type: ignore[no-any-return]

    def swish(self, x: Tensor) -> Tensor:
        return _pointwise(x, self._packed, self._bias, "swish", [], "")  # type: ignore[no-any-return]

    def times(self, x: Tensor, other: Tensor) -> Tensor:
        return _pointwise_binary(x, other, self._packed, self._bias, "mul")  # type: ignore[no-any-return]

    def plus(self, x: Tensor, other: Tensor) -> Tensor:
        return _pointwise_binary(x, other, self._packed, self._bias, "add")  # type: ignore[no-any-return]


_pointwise = torch.ops.mkldnn._linear_pointwise
_pointwise_binary = torch.ops.mkldnn._linear_pointwise.binary


class GatedLinear(Protocol):
    """`silu(x G^T) * (x U^T)`: the first half of the MLP."""

    def __call__(self, x: Tensor) -> Tensor:
        """[T, in] → [T, intermediate], a new tensor."""
        ...


class FusedGate:
    """Gate and up as one matrix [2 * intermediate, in]: one product, `gate_up`, then the activation."""

    __slots__ = ("gate_up",)

    def __init__(self, gate_up: Linear) -> None:
        self.gate_up = gate_up

    def __call__(self, x: Tensor) -> Tensor:
        return silu_and_mul(self.gate_up(x))


class SplitGate:
    """Gate and up as two matrices, the activation folded into their products."""

    __slots__ = ("_gate", "_up")

    def __init__(self, gate: Linear, up: Linear) -> None:
        self._gate = gate
        self._up = up

    def __call__(self, x: Tensor) -> Tensor:
        return self._up.times(x, self._gate.swish(x))
