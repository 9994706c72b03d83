"""Compile every kernel for sm_90 without a GPU, as the wrappers would launch it, and say what came of it.

The interpreter forgives what the compiler refuses (types that change in a loop, what pointers may be). So the
wrappers run here with a launch that only compiles: arguments on the CPU, of real shapes, and no result.
Prints one line a kernel: name, bytes of shared memory, whether its PTX has wgmma and asynchronous copies.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from memserve.kernels.rotary import rotation_table
from memserve.kernels.triton.activation import silu_and_mul
from memserve.kernels.triton.copy_blocks import BlockMemory, copy_blocks
from memserve.kernels.triton.decode_attention import decode_attention
from memserve.kernels.triton.kv_store import rotate_and_store
from memserve.kernels.triton.norm import add_rms_norm_
from memserve.kernels.triton.prefill_attention import prefill_attention
from memserve.kernels.triton.sampling import DrawParams, draw
from memserve.kernels.triton.skinny_linear import skinny_gated
from memserve.kernels.triton.tuning import SkinnyConfig, Tuning, read_configs
from memserve.model_config import RopeConfig

_POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.bool: "*i1",
}


def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
    """In place of a launch."""
    given = dict(zip(self.arg_names, args, strict=False))
    given.update({name: value for name, value in kwargs.items() if name in self.arg_names})
    options = {name: value for name, value in kwargs.items() if name not in self.arg_names}
    signature, constants, attributes = {}, {}, {}
    for index, param in enumerate(self.params):
        value = given[param.name]
        is_aligned = False
        if param.is_constexpr:
            signature[param.name], constants[(index,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[param.name] = _POINTERS[value.dtype]
            is_aligned = not param.do_not_specialize_on_alignment
        elif isinstance(value, float):
            signature[param.name] = "fp32"
        else:
            signature[param.name] = "i32" if abs(value) < 2**31 else "i64"
            is_aligned = not param.do_not_specialize and value % 16 == 0
        if is_aligned:
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=self, signature=signature, constexprs=constants, attrs=attributes)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    ptx = made.asm["ptx"]
    print(self.__name__, made.metadata.shared, "wgmma" in ptx, "cp.async" in ptx, flush=True)


def main() -> None:
    JITFunction.run = compile_only
    tuning, size, zeros = Tuning(132, read_configs("default")), 16, torch.zeros

    def half(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16)

    def ints(*shape: int) -> torch.Tensor:
        return zeros(shape, dtype=torch.int32)

    kv, tables = half(8, 2, 2, 8, size, 128), ints(64, 256)
    decode_attention(half(64, 32, 128), kv, 1, tables, ints(64), ints(64), 0.1, 4096, 8192, tuning)
    q = half(512, 32, 128)
    prefill_attention(q, kv, 1, tables, ints(65), ints(64), 0.1, 4096, tuning, torch.empty_like(q), 512)
    rotations = rotation_table(RopeConfig(), 128, 64, torch.device("cpu"))
    longs = zeros(64, dtype=torch.int64)
    norms = half(128), half(128)
    rotate_and_store(half(64, 48, 128), norms, rotations, longs, longs, ints(64), kv, 1, 32, 1e-5)
    add_rms_norm_(half(64, 4096), half(64, 4096), half(4096), 1e-5)
    silu_and_mul(half(64, 28672))
    skinny_gated(half(4, 4096), half(28672, 4096), None, SkinnyConfig(max_rows=4))
    params = DrawParams(zeros(64), zeros(64, dtype=torch.float64), zeros(64), ints(64), longs, longs)
    draw(zeros(64, 128256), params)
    copy_blocks(BlockMemory(1 << 40, 8, 1 << 21), BlockMemory(1 << 41, 8, 1 << 21), longs, longs)


if __name__ == "__main__":
    main()
