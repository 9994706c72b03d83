"""The machine's facts, read from made-up /proc and /sys trees and from nvidia-smi's answers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from memserve.router.supervision.machine import (
    Gpu,
    available_memory,
    cpu_quota,
    has_bf16,
    order_cpus,
    parse_gpus,
    read_gpus,
    read_machine,
)

GIB = 1 << 30
MEMINFO = f"MemTotal: {64 << 20} kB\nMemFree: {1 << 20} kB\nMemAvailable: {32 << 20} kB\n"


def write(root: Path, files: dict[str, object]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n")
    return root


# --- memory ----------------------------------------------------------------------------------------------


def test_memory_without_limits(tmp_path: Path) -> None:
    assert available_memory(write(tmp_path, {"proc/meminfo": MEMINFO})) == 32 * GIB


def test_memory_of_a_v2_group_and_those_above(tmp_path: Path) -> None:
    top = "sys/fs/cgroup"
    files: dict[str, object] = {
        "proc/meminfo": MEMINFO,
        "proc/self/cgroup": "0::/slice/service",
        f"{top}/cgroup.controllers": "cpu memory",
        f"{top}/slice/memory.max": 8 * GIB,
        f"{top}/slice/memory.current": 5 * GIB,
        f"{top}/slice/memory.stat": f"anon 1\ninactive_file {GIB}\nactive_file 2",
        f"{top}/slice/service/memory.max": "max",
        f"{top}/slice/service/memory.current": GIB,
    }
    # 1. The service has no limit, its slice has: 8 - 5, and 1 of page cache that would go.
    assert available_memory(write(tmp_path, files)) == 4 * GIB
    # 2. The nearest limit is the narrowest.
    assert available_memory(write(tmp_path, {f"{top}/slice/service/memory.max": 2 * GIB})) == GIB
    # 3. Nothing is left, or less.
    assert available_memory(write(tmp_path, {f"{top}/slice/service/memory.max": GIB // 2})) == 0


@pytest.mark.parametrize("path", ["/", "/docker/0123", "/seen/from/the/host"])
def test_memory_of_a_v1_group(path: str, tmp_path: Path) -> None:
    top = "sys/fs/cgroup/memory"
    files: dict[str, object] = {
        "proc/meminfo": MEMINFO,
        "proc/self/cgroup": f"9:name=systemd:/\n4:memory:{path}\n2:cpu,cpuacct:/\n0::/",
        f"{top}/memory.limit_in_bytes": 3 * GIB,
        f"{top}/memory.usage_in_bytes": GIB,
        f"{top}/docker/0123/memory.limit_in_bytes": 9223372036854771712,
        f"{top}/docker/0123/memory.usage_in_bytes": GIB,
    }
    assert available_memory(write(tmp_path, files)) == 2 * GIB


# --- cores -----------------------------------------------------------------------------------------------


def test_siblings_stand_together(tmp_path: Path) -> None:
    # Two packages of two cores of two threads, numbered as Linux does: all first threads, then all second
    # ones.
    for cpu in range(8):
        topology = f"sys/devices/system/cpu/cpu{cpu}/topology"
        write(tmp_path, {f"{topology}/physical_package_id": cpu % 4 // 2, f"{topology}/core_id": cpu % 2})
    assert order_cpus(tmp_path, range(8)) == (0, 4, 1, 5, 2, 6, 3, 7)
    assert order_cpus(tmp_path, {5, 1, 2}) == (1, 5, 2)


def test_order_without_topology(tmp_path: Path) -> None:
    assert order_cpus(tmp_path, {3, 1, 2}) == (1, 2, 3)


@pytest.mark.parametrize(("text", "quota"), [("150000 100000", 1.5), ("max 100000", None)])
def test_quota_v2(text: str, quota: float | None, tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "0::/box",
        "sys/fs/cgroup/cgroup.controllers": "cpu",
        "sys/fs/cgroup/box/cpu.max": text,
    }
    assert cpu_quota(write(tmp_path, files)) == quota


@pytest.mark.parametrize(("microseconds", "quota"), [(400000, 4.0), (-1, None)])
def test_quota_v1(microseconds: int, quota: float | None, tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "2:cpu,cpuacct:/",
        "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": microseconds,
        "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": 100000,
    }
    assert cpu_quota(write(tmp_path, files)) == quota


@pytest.mark.parametrize(
    ("flags", "expected"), [("fpu avx2 avx512_bf16", True), ("amx_bf16", True), ("fpu avx512f", False)]
)
def test_bf16(flags: str, expected: bool, tmp_path: Path) -> None:
    assert has_bf16(write(tmp_path, {"proc/cpuinfo": f"processor : 0\nflags\t\t: {flags}"})) is expected


def test_a_kernel_that_tells_nothing(tmp_path: Path) -> None:
    assert (available_memory(tmp_path), cpu_quota(tmp_path), has_bf16(tmp_path)) == (0, None, False)


# --- GPUs ------------------------------------------------------------------------------------------------

THREE_GPUS = """\
GPU-aaaa-1, NVIDIA H200, 143771, 143000, 9.0
GPU-bbbb-2, NVIDIA H200, 143771, 100, 9.0
GPU-cccc-3, Tesla T4, 15360, 15000, 7.5
"""


def test_gpus_as_nvidia_smi_lists_them() -> None:
    gpus = parse_gpus(THREE_GPUS, None)
    assert gpus[1] == Gpu(1, "NVIDIA H200", 143771 << 20, 100 << 20, (9, 0))
    assert [gpu.index for gpu in gpus] == [0, 1, 2]
    assert parse_gpus("", None) == ()


@pytest.mark.parametrize(
    ("visible", "free_mib"),
    [
        ("2,0", [15000, 143000]),
        ("GPU-bbbb", [100]),
        ("1,7,0", [100]),  # nothing after an unknown one, as CUDA has it
        ("-1", []),
        ("", []),
    ],
)
def test_visible_devices(visible: str, free_mib: list[int]) -> None:
    gpus = parse_gpus(THREE_GPUS, visible)
    assert [gpu.free_bytes >> 20 for gpu in gpus] == free_mib
    assert [gpu.index for gpu in gpus] == list(range(len(free_mib)))


@pytest.mark.parametrize("body", ["exit 9", "echo garbage", "echo 'GPU-1, X, [N/A], 1, 9.0'"])
def test_broken_nvidia_smi_is_said_and_survived(
    body: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    command = tmp_path / "nvidia-smi"
    command.write_text(f"#!/bin/sh\n{body}\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert read_gpus({}) == ()
    assert "nvidia-smi failed" in caplog.text


def test_this_machine_without_torch() -> None:
    machine = read_machine()
    assert 1 <= machine.num_cpus <= len(machine.cpus)
    assert machine.available_bytes > 0
    code = """
import sys
import memserve.cli, memserve.router.display, memserve.model_files
import memserve.router.supervision.memory, memserve.router.supervision.supervisor
from memserve.router.supervision.machine import read_machine
read_machine()
assert "torch" not in sys.modules, "the router imports torch"
"""
    root = Path(__file__).parents[3]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)
