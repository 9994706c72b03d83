"""The machine without its GPUs: cores, memory, limits, and what the pool needs of the kernel. No torch."""

from __future__ import annotations

import fcntl
import importlib.metadata
import mmap
import os
import platform
import resource
from collections.abc import Iterator

from memserve import memfd
from memserve.doctor.report import Finding, Verdict
from memserve.errors import MemserveError
from memserve.router.supervision.machine import Machine
from memserve.sizes import format_bytes

_LEAST_MEMORY = 2 << 30
_LEAST_DESCRIPTORS = 1024
_PROBE_BYTES = 1 << 20
SECTION = "machine"


def check_host(machine: Machine) -> Iterator[Finding]:
    """Everything about the host. `machine` is what `read_machine` says."""
    yield Finding(
        SECTION, "python", Verdict.GOOD, f"{platform.python_version()} on Linux {platform.release()}"
    )
    yield _versions()
    yield _cores(machine)
    yield _memory(machine)
    yield _bf16(machine)
    yield _descriptors()
    yield _locked()
    yield _memfd()


def _versions() -> Finding:
    found = []
    for name in ("torch", "triton"):
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"no {name}")
    if "no torch" in found:
        return Finding(
            SECTION, "packages", Verdict.BAD, ", ".join(found), "Workers compute with torch: install it."
        )
    return Finding(SECTION, "packages", Verdict.GOOD, ", ".join(found))


def _cores(machine: Machine) -> Finding:
    found = (
        f"{machine.num_cpus} of {len(machine.cpus)}"
        if machine.num_cpus < len(machine.cpus)
        else str(machine.num_cpus)
    )
    if machine.num_cpus >= 2:
        return Finding(SECTION, "cores", Verdict.GOOD, found)
    return Finding(
        SECTION,
        "cores",
        Verdict.WEAK,
        found,
        "A prefill and a decode worker share one core: --colocated 1 is the better choice.",
    )


def _memory(machine: Machine) -> Finding:
    found = f"{format_bytes(machine.available_bytes)} available"
    if machine.available_bytes >= _LEAST_MEMORY:
        return Finding(SECTION, "memory", Verdict.GOOD, found)
    return Finding(SECTION, "memory", Verdict.WEAK, found, "Enough for a small model alone.")


def _bf16(machine: Machine) -> Finding:
    if machine.has_bf16:
        return Finding(SECTION, "bf16 on the CPU", Verdict.GOOD, "in hardware")
    meaning = "CPU workers compute in float32 unless told otherwise: bfloat16 would be slower here."
    return Finding(SECTION, "bf16 on the CPU", Verdict.ABSENT, "not in hardware", meaning)


def _descriptors() -> Finding:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    found = "no limit" if soft == resource.RLIM_INFINITY else f"{soft} at once"
    if soft == resource.RLIM_INFINITY or soft >= _LEAST_DESCRIPTORS:
        return Finding(SECTION, "descriptors", Verdict.GOOD, found)
    return Finding(
        SECTION, "descriptors", Verdict.WEAK, found, "So many connections at most: raise ulimit -n."
    )


def _locked() -> Finding:
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    found = "no limit" if soft == resource.RLIM_INFINITY else format_bytes(soft)
    return Finding(SECTION, "locked memory", Verdict.GOOD, found)  # CUDA's pins do not count against it


def _memfd() -> Finding:
    """Make shared memory as the supervisor does, and let go of it."""
    name = "shared memory"
    try:
        fd = memfd.create_memfd("doctor", _PROBE_BYTES)
        try:
            readonly = memfd.reopen_readonly(fd)
            os.close(readonly)
            memfd.fallocate(fd, 0, _PROBE_BYTES)
            mapped = memfd.map_bytes(fd, _PROBE_BYTES, writable=True)
            memfd.populate(mapped)
            memfd.release(mapped)
            holes = memfd.resident_bytes(fd) < mmap.PAGESIZE
            sealed = bool(fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK)
            del mapped
        finally:
            os.close(fd)
    except (MemserveError, OSError) as error:
        meaning = "Workers share KV in memfds: without them nothing can be served."
        return Finding(SECTION, name, Verdict.BAD, f"memfd failed: {error}", meaning)
    if not (holes and sealed):
        lacking = " and ".join(word for word, there in (("holes", holes), ("seals", sealed)) if not there)
        return Finding(
            SECTION, name, Verdict.WEAK, f"memfd without {lacking}", "A host tier keeps its memory."
        )
    return Finding(SECTION, name, Verdict.GOOD, "memfd with seals, holes and read-only reopening")
