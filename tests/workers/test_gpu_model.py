"""What a GPU has room for, and the step by which that is measured."""

from __future__ import annotations

import msgspec
import pytest
import torch

from memserve.errors import MemoryError_
from memserve.model_config import KVGeometry, load_model_config
from memserve.models.triton_transformer import TritonTransformer
from memserve.models.weights import load_weights_to_device
from memserve.step_memory import MAX_LOGIT_ROWS
from memserve.workers.cuda_runner import CudaRunner
from memserve.workers.gpu_model import graph_bytes, largest_step, max_rows, room_for_blocks

MIB = 1 << 20
CPU = torch.device("cpu")


@pytest.fixture
def make_config(tools):
    def make(**changes):
        fields = {"device": "cuda:0", "num_blocks": None, "max_batch_tokens": 512, "max_model_len": 400}
        return tools.make_config(**{**fields, **changes})

    return make


@pytest.mark.parametrize("asks_more", [False, True])
@pytest.mark.parametrize("max_batch_tokens", [4, 8, 100, 512, 5000])
def test_the_largest_step_is_as_large_as_can_be(make_config, max_batch_tokens, asks_more):
    config = make_config(max_batch_tokens=max_batch_tokens, max_running=8, max_model_len=400)
    chunks = largest_step(config, asks_more=asks_more)
    num_tokens = sum(num_new for _, num_new in chunks)
    assert num_tokens <= max_batch_tokens and len(chunks) == min(8, max_batch_tokens)
    if max_batch_tokens <= 8 * 256:
        assert num_tokens == max_batch_tokens
    for request, num_new in chunks:
        assert request.num_computed_tokens + num_new == request.num_tokens < 400  # each draws
        assert set(request.table.ids(request.table.num_blocks).tolist()) == {0}
    reporting = [num_new for request, num_new in chunks if request.reports_prompt]
    assert len(reporting) == asks_more and sum(reporting) <= MAX_LOGIT_ROWS


def test_the_largest_step_runs_over_one_block(make_config, model_folder):
    """What it draws means nothing, but it is drawn."""
    model = load_model_config(model_folder)
    weights = load_weights_to_device(model, model_folder, "float32", CPU, "auto", 0, lambda fraction: None)
    config = make_config(model=model, max_batch_tokens=24, max_running=3, max_model_len=40, block_size=4)
    triton = TritonTransformer(model, weights, config.max_model_len, CPU, torch.float32)

    class Device:
        def host_buffer(self, num_elements):
            return torch.zeros(num_elements, dtype=torch.int64)

        def mark(self):
            return self

        def wait(self):
            pass

    kv = torch.zeros(1, model.num_layers, 2, model.num_kv_heads, 4, model.head_dim)
    runner = CudaRunner(triton, kv, 4, max_rows(config), Device())
    for asks_more in (False, True):
        drawn = runner.execute(largest_step(config, asks_more=asks_more))
        assert len(drawn) == 3 and all(result.error is None for result in drawn)
        assert all(result.token_id is not None for result in drawn)
        assert (drawn[0].logprobs is not None) == bool(drawn[0].prompt_logprobs) == asks_more


def test_room_for_blocks(make_config):
    config = make_config(device_memory_fraction=0.5, cuda_graphs=False)
    geometry = KVGeometry.of(config.model, config.block_size, config.dtype)
    free = 100 * MIB
    assert room_for_blocks(config, geometry, free, 20 * MIB) == 40 * MIB // geometry.block_bytes
    # Without a fraction nine tenths; and graphs take their part.
    config = msgspec.structs.replace(config, device_memory_fraction=None)
    assert room_for_blocks(config, geometry, free, 20 * MIB) == 72 * MIB // geometry.block_bytes
    with_graphs = msgspec.structs.replace(config, cuda_graphs=True)
    assert graph_bytes(config) == 0 < 128 * MIB < graph_bytes(with_graphs)
    few = room_for_blocks(with_graphs, geometry, free + graph_bytes(with_graphs), 20 * MIB)
    assert few == 72 * MIB // geometry.block_bytes
    # What is asked for is given.
    asked = msgspec.structs.replace(config, num_blocks=123)
    assert room_for_blocks(asked, geometry, free, 20 * MIB) == 123


def test_what_does_not_fit_is_refused(make_config):
    config = make_config(cuda_graphs=False)
    geometry = KVGeometry.of(config.model, config.block_size, config.dtype)
    needed = 100 * geometry.block_bytes  # of 4 tokens each
    with pytest.raises(MemoryError_, match=r"one request of 400 tokens does not fit on cuda:0: .* missing"):
        room_for_blocks(config, geometry, 20 * MIB + needed, 20 * MIB)  # a tenth stays free
    assert room_for_blocks(config, geometry, 20 * MIB + 2 * needed, 20 * MIB) == 180
    with pytest.raises(MemoryError_, match="missing"):
        room_for_blocks(config, geometry, MIB, 20 * MIB)
    asked = msgspec.structs.replace(config, num_blocks=101)
    with pytest.raises(MemoryError_, match="a KV pool of .* does not fit"):
        room_for_blocks(asked, geometry, 20 * MIB + needed, 20 * MIB)
