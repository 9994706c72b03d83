"""A model on a GPU, from its weights to a runner, and how much of the GPU is left for the KV pool.

    weights ─► GpuModel ─► profile: the largest step, on made-up input ─► room for blocks ─► runner, graphs

What a step takes beside weights and KV is measured, not worked out: a step of `max_batch_tokens` with
`max_running` draws, in the two ways in which rows are drawn. It runs over an arena of one block, to which all
tables point: what it computes is nonsense, what it allocates is not. CUDA graphs are captured only when the
arena is there, so that their room is an estimate.

Blocks are sized by `room_for_blocks`, which is pure, as is `largest_step`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from memserve.config import WorkerConfig
from memserve.errors import MemoryError_
from memserve.messages import Decode, SamplingParams, pack_tokens
from memserve.model_config import DTYPE_BYTES, KVGeometry, blocks_for
from memserve.models.triton_transformer import TritonTransformer
from memserve.models.weights import Weights
from memserve.sizes import format_bytes
from memserve.step_memory import MAX_LOGIT_ROWS
from memserve.torch_dtypes import TORCH_DTYPES
from memserve.workers.cuda_graphs import CudaDevice, Device, bucket_sizes
from memserve.workers.cuda_runner import CudaRunner
from memserve.workers.request import Request
from memserve.workers.steps import Chunk

logger = logging.getLogger(__name__)

# Share of a GPU's free memory that the pool takes where the user named none.
DEFAULT_DEVICE_MEMORY_FRACTION = 0.9
# What graphs take beside the logits that they leave: cuBLAS's workspace and the intermediates, and then each.
_GRAPHS_BYTES = 128 << 20
_GRAPH_BYTES = 8 << 20


class GpuModel:
    """See the module. Makes `device` the current one of this thread, for good."""

    def __init__(self, config: WorkerConfig, weights: Weights, device: torch.device) -> None:
        torch.cuda.set_device(device)
        self._config = config
        self._torch_device = device
        self._device: Device = CudaDevice(device)
        dtype = TORCH_DTYPES[config.dtype]
        self._transformer = TritonTransformer(config.model, weights, config.max_model_len, device, dtype)

    def num_blocks(self, geometry: KVGeometry) -> int:
        """As many as there is room for. Raises MemoryError_ if that is not enough for one request, or for
        those that the config asks for.
        """
        step_bytes = self._profile(geometry)
        free_bytes, _ = torch.cuda.mem_get_info(self._torch_device)
        return room_for_blocks(self._config, geometry, free_bytes, step_bytes)

    def runner(self, kv: Tensor, on_layer: Callable[[], None]) -> CudaRunner:
        """Over the arena, which must hold nothing yet."""
        config = self._config
        runner = CudaRunner(
            self._transformer, kv, config.block_size, max_rows(config), self._device, on_layer
        )
        self._transformer.prepare(kv)
        if config.cuda_graphs:
            runner.capture(config.max_running, config.max_model_len)
        return runner

    def _profile(self, geometry: KVGeometry) -> int:
        """Bytes that torch's allocator takes for the largest step, at their peak; all are given back."""
        config, device = self._config, self._torch_device
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_reserved(device)
        kv = torch.zeros(
            (1, geometry.num_layers, 2, geometry.num_kv_heads, geometry.block_size, geometry.head_dim),
            dtype=TORCH_DTYPES[geometry.dtype],
            device=device,
        )
        runner = CudaRunner(self._transformer, kv, config.block_size, max_rows(config), self._device)
        for asks_more in (False, True):
            runner.execute(largest_step(config, asks_more=asks_more))
        step_bytes = torch.cuda.max_memory_reserved(device) - before
        del runner, kv
        torch.cuda.empty_cache()
        logger.info("the largest step takes %s", format_bytes(step_bytes))
        return step_bytes


def max_rows(config: WorkerConfig) -> int:
    """Chunks of the largest step, that of a measurement included."""
    return config.max_running + 1


def largest_step(config: WorkerConfig, *, asks_more: bool) -> list[Chunk]:
    """Chunks of as many requests and tokens as a step can have, all drawing. `asks_more`: log-probabilities
    and penalties too, and those of as many prompt tokens as a step takes; else nucleus sampling.

    All tables name block 0 only.
    """
    left, chunks = config.max_batch_tokens, []
    for index in range(config.max_running):
        others = config.max_running - index - 1
        num_new = max(1, min(left - others, config.max_model_len - 1))
        is_reporting = asks_more and index == 0
        if is_reporting:
            num_new = min(num_new, MAX_LOGIT_ROWS)
        left -= num_new
        sampling = SamplingParams(max_tokens=1, seed=index, top_p=0.9)
        if asks_more:
            sampling = SamplingParams(
                max_tokens=1,
                seed=index,
                top_p=0.9,
                top_k=50,
                repetition_penalty=1.1,
                logprobs=20,
                prompt_logprobs=20 if is_reporting else None,
            )
        chunks.append(_chunk(config, index, num_new, sampling))
        if left <= 0:
            break
    return chunks


def room_for_blocks(config: WorkerConfig, geometry: KVGeometry, free_bytes: int, step_bytes: int) -> int:
    """Blocks for a GPU with `free_bytes` free, of which a step takes `step_bytes` at most.

    Raises MemoryError_, naming what is missing, if one request does not fit, or what the config asks for.
    """
    left = free_bytes - step_bytes - graph_bytes(config)
    needed = config.num_blocks
    if needed is None:
        needed = blocks_for(config.max_model_len, config.block_size)
        what = f"the KV of one request of {config.max_model_len} tokens"
        left = int(max(left, 0) * (config.device_memory_fraction or DEFAULT_DEVICE_MEMORY_FRACTION))
    else:
        what = f"a KV pool of {format_bytes(needed * geometry.block_bytes)}"
    lacking = needed * geometry.block_bytes - left
    if lacking > 0:
        raise MemoryError_(
            f"{what} does not fit on {config.device}: {format_bytes(lacking)} are missing "
            f"({format_bytes(free_bytes)} are free beside the weights, and the largest step takes "
            f"{format_bytes(step_bytes)})"
        )
    return config.num_blocks or left // geometry.block_bytes


def graph_bytes(config: WorkerConfig) -> int:
    """About what CUDA graphs take."""
    if not config.cuda_graphs:
        return 0
    # As the head gives them, and as float32.
    logits = config.max_running * config.model.vocab_size * (DTYPE_BYTES[config.dtype] + 4)
    return logits + _GRAPHS_BYTES + len(bucket_sizes(config.max_running)) * _GRAPH_BYTES


def _chunk(config: WorkerConfig, index: int, num_new: int, sampling: SamplingParams) -> Chunk:
    """The end of a prompt that nobody sent, as long as can be, or from its beginning if its logprobs are
    wanted.
    """
    num_tokens = num_new if sampling.prompt_logprobs is not None else config.max_model_len - 1
    token_ids = np.arange(index, index + num_tokens, dtype=np.int32) % config.model.vocab_size
    message = Decode(f"largest-{index}", 0, pack_tokens(token_ids), num_tokens, sampling)
    request = Request.of(message, arrival=index)
    request.num_computed_tokens = num_tokens - num_new
    request.table.append(np.zeros(blocks_for(num_tokens, config.block_size), dtype=np.int64))
    return Chunk(request, num_new)
