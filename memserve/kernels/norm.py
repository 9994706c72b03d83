"""RMS normalisation, in plain torch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`x / rms(x) * weight` over the last dimension; the mean square is taken in float32. A new tensor."""
    return F.rms_norm(x, (x.shape[-1],), weight, eps)
