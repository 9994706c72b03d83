"""The GPUs: what each is, who reaches whom, and whether their memory can be shared between processes."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import msgspec

from memserve.cuda.driver import CudaDriver, DeviceInfo, LibCuda
from memserve.cuda.memory import DeviceExport, allocate, open_exported
from memserve.doctor.report import Finding, Verdict
from memserve.errors import MemserveError
from memserve.router.supervision.placement import BF16_COMPUTE_CAPABILITY
from memserve.router.supervision.transports import ALLOCATOR_SETTINGS, asks_for_expandable_segments
from memserve.sizes import format_bytes

SECTION = "GPUs"
SHARED_BYTES = 64 << 20
PATTERN = 0xA7
_WAIT_S = 90.0
_SHARED = "memory between processes"
_EXCLUSIVE = {
    1: "one process at a time (exclusive)",
    2: "no process (prohibited)",
    3: "one process (exclusive)",
}


def check_gpus(
    open_driver: Callable[[], CudaDriver] = LibCuda, environ: Mapping[str, str] = os.environ
) -> Iterator[Finding]:
    """Everything about GPUs; one finding if there are none."""
    try:
        driver = open_driver()
        devices = [driver.device(ordinal) for ordinal in range(driver.count())]
    except MemserveError as error:
        yield Finding(SECTION, "driver", Verdict.ABSENT, str(error), "Workers run on the CPU.")
        return
    if not devices:
        yield Finding(SECTION, "driver", Verdict.ABSENT, "no GPU that this process may use")
        return
    for device in devices:
        yield from _device(device)
    yield from _peers(driver, devices)
    for name in ALLOCATOR_SETTINGS:
        if asks_for_expandable_segments(environ.get(name, "")):
            meaning = f"memserve refuses to start with this: take it out of {name}."
            yield Finding(SECTION, name, Verdict.BAD, "expandable_segments:True", meaning)
    for device in devices:
        yield _shared(driver, device)


def _device(device: DeviceInfo) -> Iterator[Finding]:
    name = f"GPU {device.ordinal}"
    found = f"{device.name}, {format_bytes(device.total_bytes)}, {device.uuid}"
    yield Finding(SECTION, name, Verdict.GOOD, found)
    if device.capability >= BF16_COMPUTE_CAPABILITY:
        yield Finding(
            SECTION,
            f"{name} bf16",
            Verdict.GOOD,
            f"compute capability {device.capability[0]}.{device.capability[1]}",
        )
    else:
        yield Finding(SECTION, f"{name} bf16", Verdict.WEAK, "not in hardware", "Workers there use float32.")
    if device.compute_mode != 0:
        meaning = "A prefill and a decode worker cannot share this GPU: set its compute mode to default."
        found = _EXCLUSIVE.get(device.compute_mode, f"mode {device.compute_mode}")
        yield Finding(SECTION, f"{name} compute mode", Verdict.BAD, found, meaning)
    mps = (
        "its steps may overlap with another worker's" if device.under_mps else "two workers on it take turns"
    )
    yield Finding(SECTION, f"{name} MPS", Verdict.GOOD if device.under_mps else Verdict.ABSENT, mps)
    if device.pins_host_memory:
        yield Finding(
            SECTION, f"{name} pinned memory", Verdict.GOOD, f"{device.num_copy_engines} copy engines"
        )
    else:
        meaning = "The host tier works, at a fraction of the link's speed."
        yield Finding(SECTION, f"{name} pinned memory", Verdict.WEAK, "host memory cannot be pinned", meaning)


def _peers(driver: CudaDriver, devices: list[DeviceInfo]) -> Iterator[Finding]:
    for one in devices:
        for other in devices:
            if one.ordinal < other.ordinal:
                name = f"GPU {one.ordinal} and {other.ordinal}"
                if driver.can_access(one.ordinal, other.ordinal) and driver.can_access(
                    other.ordinal, one.ordinal
                ):
                    yield Finding(SECTION, name, Verdict.GOOD, "reach each other's memory")
                else:
                    meaning = "KV between them is staged through pinned host memory, several times slower."
                    yield Finding(SECTION, name, Verdict.WEAK, "do not reach each other's memory", meaning)


def _shared(driver: CudaDriver, device: DeviceInfo) -> Finding:
    """Have another process write memory of a GPU that this one opens."""
    name = f"GPU {device.ordinal} {_SHARED}"
    try:
        how, gb_per_s = _loopback(driver, device)
    except (MemserveError, OSError, ValueError, RuntimeError, subprocess.SubprocessError) as error:
        meaning = "Prefill and decode workers on GPUs cannot pass KV: use --colocated."
        return Finding(SECTION, name, Verdict.BAD, f"{type(error).__name__}: {error}", meaning)
    return Finding(SECTION, name, Verdict.GOOD, f"{how}, {gb_per_s:.0f} GB/s copied out of it")


def _loopback(driver: CudaDriver, device: DeviceInfo) -> tuple[str, float]:
    """How it was shared, and how fast it is copied. Raises what goes wrong."""
    import torch

    on = torch.device("cuda", device.ordinal)
    with lent_memory(device.ordinal, SHARED_BYTES) as (export, fd):
        memory = open_exported(driver, device.ordinal, export, fd)
        try:
            source = memory.tensor(on)[:SHARED_BYTES]
            copied = torch.empty_like(source)
            for _ in range(3):
                torch.cuda.synchronize(on)
                began_at = time.perf_counter()
                copied.copy_(source)
                torch.cuda.synchronize(on)
                elapsed_s = time.perf_counter() - began_at
            if not bool((copied == PATTERN).all()):
                raise ValueError("what was read is not what was written")
        finally:
            memory.close()
    return ("by handle" if export.handle else "by descriptor"), SHARED_BYTES / elapsed_s / 1e9


@contextmanager
def lent_memory(ordinal: int, num_bytes: int) -> Iterator[tuple[DeviceExport, int | None]]:
    """Memory that another process has made on a GPU and filled with PATTERN, to be opened; the descriptor is
    whoever opens it. Raises ValueError if that process fails.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.settimeout(_WAIT_S)
    command = [
        sys.executable,
        "-m",
        "memserve.doctor.gpus",
        str(theirs.fileno()),
        str(ordinal),
        str(num_bytes),
    ]
    with theirs:
        peer = subprocess.Popen(command, pass_fds=(theirs.fileno(),))
    try:
        body, fds, _, _ = socket.recv_fds(ours, 4096, 1)
        if not body:
            raise ValueError("the other process ended early")
        yield msgspec.msgpack.decode(body, type=DeviceExport), (fds[0] if fds else None)
    finally:
        ours.close()
        peer.wait(_WAIT_S)


def _serve(fd: int, ordinal: int, num_bytes: int) -> None:
    """The other process: export, and wait for the end."""
    import torch

    sock = socket.socket(fileno=fd)
    device = torch.device("cuda", ordinal)
    torch.cuda.set_device(device)
    memory = allocate(LibCuda(), ordinal, num_bytes)
    memory.tensor(device).fill_(PATTERN)
    torch.cuda.synchronize(device)
    export, memory_fd = memory.export()
    socket.send_fds(sock, [msgspec.msgpack.encode(export)], [] if memory_fd is None else [memory_fd])
    sock.recv(1)


if __name__ == "__main__":
    _serve(*map(int, sys.argv[1:]))
