"""Tensors in parts through two buffers; the device is one that only holds shapes, or the host itself."""

from __future__ import annotations

import pytest
import torch

from memserve.models import carrier
from memserve.models.carrier import Carrier

CPU = torch.device("cpu")


def test_what_is_there_is_left_there() -> None:
    tensor = torch.arange(5)
    assert Carrier(CPU).carry(tensor) is tensor


@pytest.mark.parametrize("num_bytes", [8, 24, 64, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parts_make_the_whole(monkeypatch: pytest.MonkeyPatch, num_bytes: int, dtype: torch.dtype) -> None:
    """As on a GPU: every part goes through one of two buffers in turn."""
    copies: list[int] = []
    through = Carrier(torch.device("meta"), num_bytes)
    through._buffers = [torch.empty(num_bytes, dtype=torch.uint8) for _ in range(2)]
    through._device = CPU

    class Elsewhere(torch.Tensor):
        @property
        def device(self) -> torch.device:  # type: ignore[override]
            return torch.device("meta")

    copy = through._copy

    def count(part: torch.Tensor, target: torch.Tensor) -> None:
        copies.append(through._next)
        copy(part, target)

    monkeypatch.setattr(through, "_copy", count)
    tensor = torch.randn(7, 9, generator=torch.Generator().manual_seed(0)).to(dtype)
    carried = through.carry(tensor.T.as_subclass(Elsewhere))
    assert torch.equal(carried, tensor.T) and carried.is_contiguous()
    assert copies == [i % 2 for i in range(-(-tensor.nbytes // num_bytes))]


def test_the_buffers_are_of_the_size_asked_for() -> None:
    assert carrier._BUFFER_BYTES == 64 << 20
    assert [len(buffer) for buffer in Carrier(torch.device("meta"), 10)._buffers] == [10, 10]
