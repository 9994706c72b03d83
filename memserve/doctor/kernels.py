"""Each Triton kernel against its plain twin, on fresh random inputs, as a process of its own.

    python -m memserve.doctor.kernels cpu|cuda:N SEED

A kernel that breaks can take its process with it, and without a GPU Triton must be told to interpret before
it is imported: so the doctor asks another process, which answers with one line of JSON for each kernel.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import msgspec

from memserve.doctor.report import Finding, Verdict

if TYPE_CHECKING:
    import torch

SECTION = "kernels"
_LONGEST_S = 240.0
_TOLERANCE = {"float32": 2e-4, "bfloat16": 2e-2}


class Compared(msgspec.Struct, frozen=True):
    """One kernel: how far its result is from its twin's, relative to that; `failure` if it could not be
    run.
    """

    kernel: str
    dtype: str
    error: float = 0.0
    failure: str = ""

    @property
    def is_close(self) -> bool:
        """Whether rounding explains the difference; a NaN is none."""
        return not self.failure and self.error <= _TOLERANCE[self.dtype]


def check_kernels(device: str, seed: int) -> Iterator[Finding]:
    """Ask another process. On "cpu" Triton interprets, which checks the arithmetic and nothing of a GPU."""
    where = "interpreted" if device == "cpu" else device
    environ = dict(os.environ, **({"TRITON_INTERPRET": "1"} if device == "cpu" else {}))
    command = [sys.executable, "-m", "memserve.doctor.kernels", device, str(seed)]
    try:
        asked = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=_LONGEST_S)
        lines, failure = asked.stdout.splitlines(), ""
        if asked.returncode != 0:
            failure = f"ended with status {asked.returncode}: {(asked.stderr.splitlines() or ['?'])[-1]}"
    except subprocess.TimeoutExpired:
        lines, failure = [], f"took more than {_LONGEST_S:g} s"
    decoder = msgspec.json.Decoder(Compared)
    for compared in (decoder.decode(line) for line in lines if line.startswith("{")):
        name = f"{compared.kernel} {compared.dtype}"
        if compared.is_close:
            yield Finding(SECTION, name, Verdict.GOOD, f"{where}, error {compared.error:.1e}")
        else:
            found = compared.failure or f"{where}, error {compared.error:.1e}"
            meaning = (
                "This kernel computes something else than its plain twin: do not trust it on this machine."
            )
            yield Finding(SECTION, name, Verdict.BAD, found, meaning)
    if failure:
        yield Finding(SECTION, "all", Verdict.BAD, failure, "The kernels do not run to the end here.")


def compare(device: torch.device, seed: int) -> Iterator[Compared]:
    """Every kernel in float32; on a GPU in bfloat16 too, of which the interpreter makes wrong products."""
    import torch

    for dtype in (torch.float32, torch.bfloat16)[: 2 if device.type == "cuda" else 1]:
        generator = torch.Generator().manual_seed(seed)
        for name, run in _pairs(device, dtype, generator):
            text = str(dtype).removeprefix("torch.")
            try:
                found, expected = run()
                difference = (found.double() - expected.double()).norm()
                yield Compared(name, text, float(difference / expected.double().norm().clamp_min(1e-9)))
            except Exception as error:  # whatever a compiler can raise is what the doctor is to tell
                yield Compared(
                    name, text, failure=f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
                )


def _pairs(
    device: torch.device, dtype: torch.dtype, generator: torch.Generator
) -> Iterator[tuple[str, _Run]]:
    import numpy as np
    import torch

    from memserve.kernels import activation as plain_activation
    from memserve.kernels import norm as plain_norm
    from memserve.kernels.rotary import rotation_table
    from memserve.kernels.sampling import SamplingRow, sample
    from memserve.kernels.triton import activation, kv_store, norm
    from memserve.kernels.triton.copy_blocks import BlockMemory, copy_blocks, copy_blocks_torch
    from memserve.kernels.triton.decode_attention import decode_attention, decode_attention_torch
    from memserve.kernels.triton.prefill_attention import prefill_attention, prefill_attention_torch
    from memserve.kernels.triton.skinny_linear import skinny_gated, skinny_linear
    from memserve.kernels.triton.tuning import SkinnyConfig, Tuning
    from memserve.messages import SamplingParams
    from memserve.model_config import RopeConfig
    from memserve.models.paged_step import Staging
    from memserve.models.sampling_step import build_sampling_step, sample_step

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device=device, dtype=dtype)

    heads, kv_heads, head_dim, block_size, layers = 4, 2, 64, 16, 2
    x, weight, gate_up = randn(7, 256), randn(256), randn(5, 2 * 192)
    yield "rms_norm", lambda: (norm.rms_norm(x, weight, 1e-5), plain_norm.rms_norm(x, weight, 1e-5))
    yield "silu_and_mul", lambda: (activation.silu_and_mul(gate_up), plain_activation.silu_and_mul(gate_up))

    def add() -> tuple[torch.Tensor, torch.Tensor]:
        residual = weight.expand(7, -1).contiguous()
        twin = residual.clone()
        found = norm.add_rms_norm_(x, residual, weight, 1e-5)
        expected = norm.add_rms_norm_torch_(x, twin, weight, 1e-5)
        return torch.cat([found, residual]), torch.cat([expected, twin])

    yield "add_rms_norm", add
    matrix, few = randn(2 * 80, 256), SkinnyConfig(max_rows=32, block_n=32, block_k=128)
    products = x.double() @ matrix.double().T
    gated = plain_activation.silu_and_mul(products)
    yield "skinny_linear", lambda: (skinny_linear(x, matrix, None, few), products)
    yield "skinny_gated", lambda: (skinny_gated(x, matrix, None, few), gated)

    kv = randn(12, layers, 2, kv_heads, block_size, head_dim)
    tuning = Tuning.of(device)
    tables = torch.randperm(12, generator=generator).int().view(2, 6).to(device)
    lens = torch.tensor([90, 33], dtype=torch.int32, device=device)
    q, scale = randn(2, heads, head_dim), head_dim**-0.5

    def decode() -> tuple[torch.Tensor, torch.Tensor]:
        args = (q, kv, 1, tables, None, lens, scale, None)
        return decode_attention(*args, 90, tuning), decode_attention_torch(*args)

    yield "decode_attention", decode
    chunk = randn(23, heads, head_dim)
    starts = torch.tensor([0, 20, 23], dtype=torch.int32, device=device)

    def prefill() -> tuple[torch.Tensor, torch.Tensor]:
        args = (chunk, kv, 1, tables, starts, lens, scale, None)
        out, twin = torch.empty_like(chunk), torch.empty_like(chunk)
        return prefill_attention(*args, tuning, out, 23), prefill_attention_torch(*args, twin)

    yield "prefill_attention", prefill
    qkv = randn(3, heads + 2 * kv_heads, head_dim)
    rotations = rotation_table(RopeConfig(theta=500.0), head_dim, 64, device)
    positions, slots = torch.tensor([5, 6, 63], device=device), torch.tensor([7, 40, 100], device=device)
    tails = torch.tensor([0, 0, 0], dtype=torch.int32, device=device)

    def store() -> tuple[torch.Tensor, torch.Tensor]:
        ours, twins, written, twin = qkv.clone(), qkv.clone(), kv.clone(), kv.clone()
        rest = (None, rotations, positions, slots, tails)
        found = kv_store.rotate_and_store(ours, *rest, written, 1, heads, 1e-5)
        expected = kv_store.rotate_and_store_torch(twins, *rest, twin, 1, heads, 1e-5)
        return torch.cat([found.reshape(-1), written.view(-1)]), torch.cat(
            [expected.reshape(-1), twin.view(-1)]
        )

    yield "rotate_and_store", store

    def store_alone() -> tuple[torch.Tensor, torch.Tensor]:
        written, twin = kv.clone(), kv.clone()
        new = qkv[:, heads:].reshape(len(qkv), 2, kv_heads, -1).contiguous()
        kv_store.store_kv(new, slots, tails, written, 1)
        kv_store.store_kv_torch(new, slots, tails, twin, 1)
        return written, twin

    yield "store_kv", store_alone
    ids, others = torch.tensor([3, 0, 11], device=device), torch.tensor([1, 10, 4], device=device)

    def copy() -> tuple[torch.Tensor, torch.Tensor]:
        target, twin = torch.zeros_like(kv), torch.zeros_like(kv)
        copy_blocks(BlockMemory.of(kv), BlockMemory.of(target), ids, others)
        copy_blocks_torch(kv, twin, ids, others)
        return target, twin

    yield "copy_blocks", copy
    if dtype != torch.float32:
        return  # tokens are drawn from float32 whatever the model's type
    cuts: tuple[dict[str, Any], ...] = {"top_p": 0.8}, {"top_k": 9}, {"min_p": 0.1}, {}, {"temperature": 0.0}
    rows = [
        SamplingRow(SamplingParams(max_tokens=1, seed=index, **cut), index, np.empty(0, np.int32), [])
        for index, cut in enumerate(cuts)
    ]
    # Far apart, so that no rounding decides a draw.
    logits = (
        torch.stack([torch.randperm(999, generator=generator) for _ in rows]).float().mul(0.25).to(device)
    )

    def draw() -> tuple[torch.Tensor, torch.Tensor]:
        found = sample_step(logits, build_sampling_step(rows, 999, Staging(device))).token_ids
        return found, torch.tensor(sample(logits.cpu(), rows).token_ids, device=device)

    yield "draw", draw


if TYPE_CHECKING:
    from collections.abc import Callable

    _Run = Callable[[], tuple[torch.Tensor, torch.Tensor]]


def main() -> None:
    """Compare, and print."""
    import torch

    torch.set_num_threads(1)
    device = torch.device(sys.argv[1])
    if device.type == "cuda":
        torch.cuda.set_device(device)
    for compared in compare(device, int(sys.argv[2])):
        print(msgspec.json.encode(compared).decode(), flush=True)


if __name__ == "__main__":
    main()
