"""Try tile shapes of the Triton kernels on the GPU at hand, and keep the quickest for it.

    python benchmarks/tune_kernels.py
    python benchmarks/tune_kernels.py --only skinny,decode     # parts of it, some minutes each

Writes memserve/kernels/triton/tuned/<GPU>.json: of attention with heads of 128 in two bytes, and of products
of few rows (and up to how many rows they beat the library's), whatever computes what the default does, within
rounding, in the least time. Takes minutes, most of them the compiler's. Run nothing else meanwhile.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from kernels import ELEMENT, Case, decode_case, make_arena, matrices, median_ms, prefill_case, randn

PARTS = ("decode", "prefill", "skinny")


def tune(kv: torch.Tensor, parts: Sequence[str]) -> None:
    """Try tile shapes for 2-byte elements and heads of 128, keep the quickest that computes the same."""
    import msgspec

    from memserve.kernels.triton import tuning as tuning_module
    from memserve.kernels.triton.tuning import DecodeConfig, KernelConfigs, PrefillConfig, Tuning

    current, key = Tuning.of(torch.device("cuda")), "2x128"
    decodes = [
        DecodeConfig(block_n=n, num_warps=warps, num_stages=stages, programs_per_sm=programs)
        for n, warps, stages, programs in itertools.product((32, 64, 128), (2, 4, 8), (2, 3, 4), (8, 16, 32))
        if n * stages <= 256
    ]
    prefills = [
        PrefillConfig(block_m=m, block_n=n, num_warps=warps, num_stages=stages)
        for m, n, warps, stages in itertools.product((64, 128), (32, 64, 128), (4, 8), (2, 3, 4))
        if m * 4 >= warps * 32
    ]

    def total(
        configs: KernelConfigs, make: Callable[[Any], list[Case]], expected: list[torch.Tensor]
    ) -> float:
        torch.manual_seed(0)
        cases = make(Tuning(current.num_sms, configs))
        for case, right in zip(cases, expected, strict=True):
            found = case.run()
            assert isinstance(found, torch.Tensor)
            error = (found.float() - right).norm() / right.norm()
            if not error < 1e-2:
                raise ValueError(f"wrong by {error:.3g}")
        return sum(median_ms(case.run, rep=50) for case in cases)

    def best(field: str, candidates: list[Any], make: Callable[[Any], list[Case]]) -> Any:
        torch.manual_seed(0)
        expected = [case.run().float().clone() for case in make(current)]  # type: ignore[attr-defined]
        found = []
        for config in candidates:
            entries = {**getattr(current.configs, field), key: config}
            try:
                ms = total(msgspec.structs.replace(current.configs, **{field: entries}), make, expected)
            except Exception as error:  # whatever does not compile or fit is no candidate
                print(f"{config}: {type(error).__name__}: {str(error)[:80]}")
                continue
            found.append((ms, len(found), config))
            print(f"{ms:9.3f} ms  {config}", flush=True)
        return min(found)[2]

    name = tuning_module.file_name(torch.cuda.get_device_name())
    path = Path(tuning_module.__file__).parent / "tuned" / f"{name}.json"
    chosen = KernelConfigs()
    if path.exists():
        chosen = msgspec.json.decode(path.read_bytes(), type=KernelConfigs)
    for part in parts:
        if part == "decode":
            decode = best(
                "decode",
                decodes,
                lambda t: [decode_case("", kv, [4096] * 64, t), decode_case("", kv, [2048] * 8, t)],
            )
            chosen = msgspec.structs.replace(chosen, decode={**chosen.decode, key: decode})
        elif part == "prefill":
            prefill = best(
                "prefill",
                prefills,
                lambda t: [prefill_case("", kv, [(0, 8192)], t), prefill_case("", kv, [(6144, 2048)], t)],
            )
            chosen = msgspec.structs.replace(chosen, prefill={**chosen.prefill, key: prefill})
        else:
            chosen = msgspec.structs.replace(chosen, skinny=tune_skinny())
        path.write_bytes(msgspec.json.format(msgspec.json.encode(chosen)) + b"\n")
        print(f"written, with {part}: {path}", flush=True)


def layer_ms(weights: list[tuple[torch.Tensor, bool]], rows: int, config: Any, rep: int) -> float:
    """The products of one layer by the kernel for few rows, or by the library where `config` is None."""
    from memserve.kernels.triton.activation import silu_and_mul
    from memserve.kernels.triton.skinny_linear import skinny_gated, skinny_linear

    total = 0.0
    for weight, is_gated in weights:
        x = randn(rows, weight.shape[1])

        def library(x: torch.Tensor = x, weight: torch.Tensor = weight, is_gated: bool = is_gated) -> Any:
            product = torch.nn.functional.linear(x, weight)
            return silu_and_mul(product) if is_gated else product

        def ours(x: torch.Tensor = x, weight: torch.Tensor = weight, is_gated: bool = is_gated) -> Any:
            return (skinny_gated if is_gated else skinny_linear)(x, weight, None, config)

        if config is None:
            total += median_ms(library, rep)
            continue
        right, found = library().float(), ours().float()
        error = (found - right).norm() / right.norm()
        if not error < 2e-2:
            raise ValueError(f"wrong by {error:.3g}")
        total += median_ms(ours, rep)
    return total


def tune_skinny() -> Any:
    """The best shape at one row, and up to how many rows it beats the library; None = at none."""
    import msgspec

    from memserve.kernels.triton.skinny_linear import MAX_ROWS
    from memserve.kernels.triton.tuning import SkinnyConfig

    weights, found = matrices(), []
    for n, k, warps, stages in itertools.product((16, 32, 64), (128, 256, 512), (2, 4, 8), (3, 4, 5)):
        config = SkinnyConfig(max_rows=MAX_ROWS, block_n=n, block_k=k, num_warps=warps, num_stages=stages)
        if not 1 << 15 <= n * k * stages * ELEMENT <= 1 << 17:
            continue
        try:
            found.append((layer_ms(weights, 1, config, 50), len(found), config))
        except Exception as error:  # whatever does not compile or fit is no candidate
            print(f"{config}: {type(error).__name__}: {str(error)[:80]}")
            continue
        print(f"{found[-1][0]:9.4f} ms  {config}", flush=True)
    config, best_rows = min(found)[2], 0
    for rows in (1, 2, 4, 8, 16, 32):
        ours, library = layer_ms(weights, rows, config, 200), layer_ms(weights, rows, None, 200)
        print(f"{rows} rows: {ours:.4f} ms, the library {library:.4f} ms")
        if ours > library:
            break
        best_rows = rows
    return msgspec.structs.replace(config, max_rows=best_rows) if best_rows else None


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default=",".join(PARTS), metavar="PARTS", help=f"of {','.join(PARTS)}")
    parts = parser.parse_args().only.split(",")
    if not set(parts) <= set(PARTS):
        parser.error(f"the parts are {', '.join(PARTS)}")
    if not torch.cuda.is_available():
        sys.exit("benchmarks/tune_kernels.py measures a GPU, and torch finds none here")
    tune(make_arena(64 * 4096), parts)


if __name__ == "__main__":
    main()
