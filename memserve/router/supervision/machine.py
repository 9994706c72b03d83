"""What the machine has to offer: cores, memory, GPUs; read from the kernel and nvidia-smi, without torch.

A container sees the whole machine in /proc, so limits of its cgroup (v1 or v2) are taken into account. GPUs
are numbered as torch will number them in the workers, that is after CUDA_VISIBLE_DEVICES. Read once, at
start-up.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import logging
import math
import os
import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

logger = logging.getLogger(__name__)

_NVIDIA_SMI_FIELDS = "uuid,name,memory.total,memory.free,compute_cap"
_NVIDIA_SMI_TIMEOUT_S = 30.0
_BF16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}  # the last is ARM's


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU; `index` as in torch's `cuda:index`."""

    index: int
    name: str
    total_bytes: int
    free_bytes: int
    compute_capability: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Machine:
    """What this process may use.

    `cpus`: ids of logical CPUs, those that share a core beside each other, so that a run of them shares few
    cores with the rest. `num_cpus` is smaller than their number where a quota bounds the CPU time.
    """

    cpus: tuple[int, ...]
    num_cpus: int
    available_bytes: int
    has_bf16: bool
    gpus: tuple[Gpu, ...]


def read_machine(*, with_gpus: bool = True) -> Machine:
    """The machine under this process; `with_gpus` False: nobody wants its GPUs, so none are looked for."""
    root = Path("/")
    cpus = order_cpus(root, os.sched_getaffinity(0))
    quota = cpu_quota(root)
    return Machine(
        cpus=cpus,
        num_cpus=len(cpus) if quota is None else min(len(cpus), max(1, math.ceil(quota))),
        available_bytes=available_memory(root),
        has_bf16=has_bf16(root),
        gpus=read_gpus(os.environ) if with_gpus and _torch_has_cuda() else (),
    )


# --- cores -----------------------------------------------------------------------------------------------


def order_cpus(root: Path, cpus: Iterable[int]) -> tuple[int, ...]:
    """`cpus` by package, core, id; by id alone where the kernel does not tell."""

    def place(cpu: int) -> tuple[int, int, int]:
        topology = root / f"sys/devices/system/cpu/cpu{cpu}/topology"
        package = _read_int(topology / "physical_package_id")
        core = _read_int(topology / "core_id")
        return (package or 0, core if core is not None else cpu, cpu)

    return tuple(sorted(cpus, key=place))


def cpu_quota(root: Path) -> float | None:
    """CPUs' worth of time that the cgroup grants, None without a limit."""
    quotas = []
    for group in _cgroups(root, "cpu"):
        quota, period = _read_words(group / "cpu.max", 2) or (
            _read_text(group / "cpu.cfs_quota_us"),
            _read_text(group / "cpu.cfs_period_us"),
        )
        if quota.isdecimal() and period.isdecimal():  # "max" and "-1" are no limit, "" is no file
            quotas.append(int(quota) / int(period))
    return min(quotas, default=None)


def has_bf16(root: Path) -> bool:
    """Whether the CPU multiplies bfloat16 in hardware; without that float32 is quicker."""
    for line in _read_text(root / "proc/cpuinfo").splitlines():
        if line.startswith(("flags", "Features")):  # as x86 and ARM call them
            return not _BF16_FLAGS.isdisjoint(line.split())
    return False


# --- memory ----------------------------------------------------------------------------------------------


def available_memory(root: Path) -> int:
    """Bytes that can be taken without swapping or hitting a limit of the cgroup."""
    available = 0
    for line in _read_text(root / "proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) << 10
    for group in _cgroups(root, "memory"):
        limit = _read_int(group / "memory.max", group / "memory.limit_in_bytes")
        used = _read_int(group / "memory.current", group / "memory.usage_in_bytes")
        if limit is not None and used is not None:
            available = min(available, max(0, limit - used + _reclaimable(group)))
    return available


def _reclaimable(group: Path) -> int:
    """Page cache that counts as used by the cgroup but goes when something needs it."""
    for line in _read_text(group / "memory.stat").splitlines():
        name, _, value = line.partition(" ")
        if name in ("inactive_file", "total_inactive_file"):
            return int(value)
    return 0


def _cgroups(root: Path, controller: str) -> list[Path]:
    """Folders of this process's cgroup and those above it, for one controller, in either version."""
    for line in _read_text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "" and (root / "sys/fs/cgroup/cgroup.controllers").exists():
            top = root / "sys/fs/cgroup"
        elif controller in controllers.split(","):
            top = root / "sys/fs/cgroup" / controllers
            top = top if top.exists() else root / "sys/fs/cgroup" / controller
        else:
            continue
        # In a container the path may be that of the host: then the top is the container's own.
        group = top / path.lstrip("/")
        return [
            folder for folder in (group, *group.parents) if folder.is_relative_to(top) and folder.exists()
        ]
    return []


# --- GPUs ------------------------------------------------------------------------------------------------


def read_gpus(environ: Mapping[str, str]) -> tuple[Gpu, ...]:
    """The GPUs that torch will see; none where nvidia-smi is absent or fails (said in the log)."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return ()
    query = [command, f"--query-gpu={_NVIDIA_SMI_FIELDS}", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(
            query, capture_output=True, text=True, check=True, timeout=_NVIDIA_SMI_TIMEOUT_S
        )
        return parse_gpus(answer.stdout, environ.get("CUDA_VISIBLE_DEVICES"))
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        logger.warning("no GPU is used: nvidia-smi failed: %s", error)
        return ()


def parse_gpus(csv: str, visible: str | None) -> tuple[Gpu, ...]:
    """nvidia-smi's answer, filtered and numbered by CUDA_VISIBLE_DEVICES as CUDA does it.

    Raises ValueError on an answer that has not the expected form.
    """
    rows = [[field.strip() for field in line.split(",")] for line in csv.splitlines() if line.strip()]
    gpus = []
    for index, row in enumerate(_visible(rows, visible)):
        _, name, total_mib, free_mib, capability = row
        major, _, minor = capability.partition(".")
        gpus.append(Gpu(index, name, int(total_mib) << 20, int(free_mib) << 20, (int(major), int(minor))))
    return tuple(gpus)


def _visible(rows: Sequence[list[str]], visible: str | None) -> list[list[str]]:
    if visible is None:
        return list(rows)
    chosen = []
    for name in visible.split(","):
        name = name.strip()
        found = [
            row for index, row in enumerate(rows) if name == str(index) or name and row[0].startswith(name)
        ]
        if not found:  # CUDA stops at the first name that it does not know
            break
        chosen.append(found[0])
    return chosen


def _torch_has_cuda() -> bool:
    """Whether the installed torch was built for GPUs: builds without say so in their version."""
    try:
        return not importlib.metadata.version("torch").endswith("+cpu")
    except importlib.metadata.PackageNotFoundError:
        return True


# --- files of the kernel, absent ones included -------------------------------------------------------------


def _read_text(path: Path) -> str:
    with contextlib.suppress(OSError):
        return path.read_text().strip()
    return ""


def _read_words(path: Path, count: int) -> tuple[str, ...] | None:
    words = tuple(_read_text(path).split())
    return words if len(words) == count else None


def _read_int(*paths: Path) -> int | None:
    """The number in the first of `paths` that has one."""
    for path in paths:
        if (text := _read_text(path)).isdecimal():
            return int(text)
    return None
