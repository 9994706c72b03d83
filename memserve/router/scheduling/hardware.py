"""Cost models of instances that are not at hand, or are not to be measured, from the roofline of their
hardware.

    rows        max(weights read once a step, multiplications of the rows)
    attention   prefill by multiplications, decode by the KV that is read
    copies      the link's bandwidth

Peaks are the vendor's (dense bf16); the shares of them that are reached are round figures as published
engines reach them, not measurements of ours.
"""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from memserve.model_config import ModelConfig
from memserve.router.scheduling.cost_model import (
    Budget,
    CostModel,
    Link,
    Links,
    Operators,
    Ramp,
    StepShape,
    Waves,
)

_TFLOP_PER_MS = 1e9
_GB_PER_MS = 1e6
_COMPUTE_SHARE = 0.6
_ATTENTION_SHARE = 0.45
_BANDWIDTH_SHARE = 0.8


class Device(NamedTuple):
    """One GPU: peak TFLOP/s in bf16; GB/s of its memory, of the link to its peers (one way), to the host."""

    tflops: float
    memory_gb_s: float
    peer_gb_s: float
    host_gb_s: float


class Shape(NamedTuple):
    """One decoder-only transformer of the Llama family."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int


H200 = Device(tflops=989, memory_gb_s=4800, peer_gb_s=450, host_gb_s=55)
H800 = Device(tflops=989, memory_gb_s=3350, peer_gb_s=200, host_gb_s=55)
# One core of a server.
CPU_CORE = Device(tflops=0.1, memory_gb_s=10, peer_gb_s=5, host_gb_s=5)
# Copies between two memories of one machine, where nothing is known.
PLAIN_LINK = Link(0.5, 4e6)
LLAMA_3_8B = Shape(32, 4096, 14336, 32, 8, 128, 128_256)
LLAMA_2_13B = Shape(40, 5120, 13824, 40, 40, 128, 32_000)


def roofline(
    name: str,
    device: Device,
    shape: Shape,
    *,
    num_devices: int = 1,
    max_tokens: int = 8192,
    fixed_ms: float = 2.0,
) -> CostModel:
    """A cost model by arithmetic, in bf16.

    Args:
        num_devices: tensor parallel. The sums between them go over the peer link, twice a layer.
        max_tokens: of one step.
        fixed_ms: what a step costs however small.
    """
    q, kv = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    layer = shape.hidden_size * (2 * q + 2 * kv + 3 * shape.intermediate_size)
    weights, head = shape.num_layers * layer, shape.hidden_size * shape.vocab_size
    flops_ms = num_devices * device.tflops * _TFLOP_PER_MS
    bytes_ms = num_devices * device.memory_gb_s * _GB_PER_MS * _BANDWIDTH_SHARE
    read_ms = 2 * (weights + head) / bytes_ms
    row_ms = 2 * weights / (flops_ms * _COMPUTE_SHARE)
    bend = max(1, round(read_ms / row_ms))
    sums_ms = 0.0
    if num_devices > 1:
        exchanged = 2 * shape.num_layers * 2 * (num_devices - 1) / num_devices * 2 * shape.hidden_size
        sums_ms = exchanged / (device.peer_gb_s * _GB_PER_MS * _BANDWIDTH_SHARE)
    pair_ms = 4 * q * shape.num_layers / (flops_ms * _ATTENTION_SHARE)
    kv_token_bytes = shape.num_layers * 2 * kv * 2
    peer = Link(0.1, num_devices * device.peer_gb_s * _GB_PER_MS * _BANDWIDTH_SHARE)
    host = Link(0.1, num_devices * device.host_gb_s * _GB_PER_MS * _BANDWIDTH_SHARE)
    return CostModel(
        name=name,
        operators=Operators(
            # every step reads the weights; rows cost more than that only past the bend
            rows=Ramp((0, bend), (sums_ms, row_ms + sums_ms)),
            fixed_ms=fixed_ms + read_ms,
            pair_ms=pair_ms,
            square_ms=pair_ms / 2,
            context_ms=kv_token_bytes / bytes_ms,
            logit_row_ms=2 * head / (flops_ms * _COMPUTE_SHARE),
        ),
        budget=Budget(max_tokens),
        kv_token_bytes=kv_token_bytes,
        links=Links(from_device=peer, from_host=host, swap_in=host),
    )


def h200_llama_3_8b() -> CostModel:
    """Llama-3-8B on one H200."""
    return roofline("h200-llama-3-8b", H200, LLAMA_3_8B)


def h800_llama_2_13b() -> CostModel:
    """Llama-2-13B on two H800, as in the paper."""
    return roofline("h800-llama-2-13b", H800, LLAMA_2_13B, num_devices=2)


def rough_guess(kv_token_bytes: int) -> CostModel:
    """Something to go by before anything was measured: only what is relative counts, more tokens being more
    work, and a copy being cheaper than computing.
    """
    link = Link(0.5, 5e6)
    return CostModel(
        name="rough guess",
        operators=Operators(rows=Ramp((0,), (0.3,)), fixed_ms=3.0, pair_ms=1e-5, square_ms=5e-6),
        budget=Budget(2048),
        kv_token_bytes=kv_token_bytes,
        links=Links(from_device=link, from_host=link, swap_in=link),
    )


BUILT_IN = {"h200-llama-3-8b": h200_llama_3_8b, "h800-llama-2-13b": h800_llama_2_13b}


def guess(
    model: ModelConfig, device: str, num_threads: int, measured: tuple[StepShape, float] | None
) -> Operators:
    """Operators of a device ("cpu" or "cuda") that were not calibrated: the roofline's, scaled so that one
    measured step (its shape and ms) comes out right.
    """
    shape = Shape(
        model.num_layers,
        model.hidden_size,
        model.intermediate_size,
        model.num_heads,
        model.num_kv_heads,
        model.head_dim,
        model.vocab_size,
    )
    if device == "cpu":
        operators = roofline("", CPU_CORE, shape, num_devices=1, fixed_ms=1.0).operators
        factor = 1 / max(1, num_threads)
    else:
        operators, factor = roofline("", H200, shape).operators, 1.0
    if measured is not None:
        step, ms = measured
        factor = ms / operators.step_ms(step)
    return scaled(operators, factor)


def scaled(operators: Operators, factor: float) -> Operators:
    """All times multiplied."""
    rows = operators.rows
    if isinstance(rows, Ramp):
        rows = Ramp(rows.knots, tuple(slope * factor for slope in rows.slopes))
    else:
        rows = Waves(rows.wave_rows, rows.full_ms * factor, rows.last_ms * factor, rows.last_row_ms * factor)
    times = {
        name: getattr(operators, name) * factor for name in Operators.__struct_fields__ if name != "rows"
    }
    return msgspec.structs.replace(operators, rows=rows, **times)
