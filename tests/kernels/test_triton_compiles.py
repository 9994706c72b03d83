"""The kernels pass Triton's compiler for a Hopper GPU, which needs none to be there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

KERNELS = {
    "_decode_kernel",
    "_join_kernel",
    "_prefill_kernel",
    "_store_kernel",
    "_rms_norm_kernel",
    "_silu_and_mul_kernel",
    "_skinny_kernel",
    "_scan_kernel",
    "_pick_kernel",
    "_truncate_kernel",
    "_copy_kernel",
}
# Of one SM, less what each program is charged for.
SHARED_BYTES = 227 * 1024


@pytest.mark.slow
def test_every_kernel_compiles(tmp_path: Path) -> None:
    script = Path(__file__).with_name("compile_for_hopper.py")
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=110
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line.split() for line in done.stdout.splitlines()]
    found = {name: (int(shared), wgmma == "True", copies == "True") for name, shared, wgmma, copies in lines}
    assert found.keys() == KERNELS
    assert all(shared <= SHARED_BYTES for shared, _, _ in found.values())
    assert found["_prefill_kernel"][1:] == (True, True)  # the matrix unit, and loads that run ahead
    assert found["_decode_kernel"][2] and found["_skinny_kernel"][2]
