"""Triton compiles a kernel anew for what it specialises on: types, constants, whether pointers and integers
are multiples of 16, integers that are 1. On a GPU that takes a second, so whatever a step can ask for must
have been asked for by the time a worker is ready. What kernels are launched with shows it; none runs here.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from triton.runtime.interpreter import InterpretedFunction

from memserve.kernels.triton.sampling import DrawParams, draw
from memserve.messages import Decode, SamplingParams, pack_tokens
from memserve.model_config import blocks_for, load_model_config
from memserve.models.triton_transformer import TritonTransformer
from memserve.models.weights import load_weights_to_device
from memserve.workers.cuda_runner import CudaRunner
from memserve.workers.gpu_model import largest_step, max_rows
from memserve.workers.request import Request
from memserve.workers.steps import Chunk
from tests.workers.conftest import make_worker_config

CPU = torch.device("cpu")
BLOCK_SIZE, MAX_MODEL_LEN = 4, 300


def form_of(kernel: InterpretedFunction, arguments: dict[str, Any]) -> tuple[Any, ...]:
    """What a launch is specialised on."""
    loose = kernel.kwargs.get("do_not_specialize") or ()
    unaligned = kernel.kwargs.get("do_not_specialize_on_alignment") or ()
    form: list[Any] = [kernel.__name__]
    for name, value in arguments.items():
        if "constexpr" in str(kernel.fn.__annotations__.get(name)):
            form.append((name, value))
        elif isinstance(value, torch.Tensor):
            form.append((name, value.dtype, name not in unaligned and value.data_ptr() % 16 == 0))
        elif isinstance(value, int) and name not in loose:
            form.append((name, value.bit_length() > 31, value % 16 == 0, value == 1))
    return tuple(form)


@pytest.fixture
def forms(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[tuple[Any, ...]]]:
    """Of all launches so far, in the place of which they are."""
    found: set[tuple[Any, ...]] = set()

    def note(self: InterpretedFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        given = {**dict(zip(self.arg_names, args, strict=False)), **kwargs}
        found.add(form_of(self, given))

    monkeypatch.setattr(InterpretedFunction, "run", note)
    yield found


class Device:
    """Done at once."""

    def host_buffer(self, num_elements: int) -> torch.Tensor:
        return torch.zeros(num_elements, dtype=torch.int64)

    def mark(self) -> Device:
        return self

    def wait(self) -> None:
        pass


def chunk(index: int, context: int, num_new: int, **sampling: Any) -> Chunk:
    num_tokens = context + num_new
    params = SamplingParams(max_tokens=4, seed=index, **sampling)
    tokens = pack_tokens(np.arange(num_tokens, dtype=np.int32) % 100)
    request = Request.of(Decode(f"r{index}", 0, tokens, num_tokens, params), arrival=index)
    request.num_computed_tokens = context
    request.table.append(np.zeros(blocks_for(num_tokens, BLOCK_SIZE), dtype=np.int64))
    return Chunk(request, num_new)


@pytest.mark.parametrize("window", [None, 9])
def test_no_step_has_anything_compiled(
    forms: set[tuple[Any, ...]], model_folder: Path, window: int | None
) -> None:
    model = load_model_config(model_folder)
    model = msgspec.structs.replace(model, sliding_window=(window,) * model.num_layers)
    weights = load_weights_to_device(model, model_folder, "float32", CPU, "auto", 0, lambda fraction: None)
    triton = TritonTransformer(model, weights, MAX_MODEL_LEN, CPU, torch.float32)
    config = make_worker_config(
        model=model,
        device="cuda:0",
        max_batch_tokens=24,
        max_running=5,
        max_model_len=MAX_MODEL_LEN,
        block_size=BLOCK_SIZE,
    )
    kv = torch.zeros(1, model.num_layers, 2, model.num_kv_heads, BLOCK_SIZE, model.head_dim)
    runner = CudaRunner(triton, kv, BLOCK_SIZE, max_rows(config), Device())
    # 1. what a worker does before it is ready
    for asks_more in (False, True):
        runner.execute(largest_step(config, asks_more=asks_more))
    triton.prepare(kv)
    before = set(forms)
    # 2. prompts, chunks of them, decodes and mixtures, short and long, one and many, cut and not
    for count in (1, 2, 3, 5):
        for context in (0, 3, 17, 64, 130, 290):
            cut = {"top_p": 0.5} if count % 2 else {}
            decodes = [chunk(index, context, 1, **cut) for index in range(count)]
            runner.execute(decodes)
            runner.execute([*decodes[1:], chunk(9, context // 2, 7)])
    assert forms == before


@pytest.mark.parametrize("vocab_size", [130, 5001])
def test_draws_are_compiled_once_whatever_the_rows(forms: set[tuple[Any, ...]], vocab_size: int) -> None:
    """Parts of one allocation begin where the rows of a smaller one would end."""
    for rows in (1, 2, 3, 4, 7):
        longs = torch.arange(rows)
        params = DrawParams(
            torch.ones(rows),
            torch.full((rows,), 0.9, dtype=torch.float64),
            torch.zeros(rows),
            torch.zeros(rows, dtype=torch.int32),
            longs,
            longs,
        )
        draw(torch.randn(rows, vocab_size), params)
    assert len(forms) == len({form[0] for form in forms}) == 3
