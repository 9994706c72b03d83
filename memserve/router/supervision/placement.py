"""Which workers there are, and where each runs: role, device, cores. Pure: the machine is an argument."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from memserve.config import Role, ServeConfig, WorkerOptions
from memserve.errors import ConfigError
from memserve.router.supervision.machine import Gpu, Machine

BF16_COMPUTE_CAPABILITY = (8, 0)
# What is left for the CPU to do beside a GPU is launching kernels and moving small tensors.
MAX_CUDA_THREADS = 8
# More than one a core only wait for each other; the system refuses very many, and the worker dies of it.
MAX_THREADS_A_CORE = 4


@dataclass(frozen=True, slots=True)
class Seat:
    """One worker to be: `gpu` None is the CPU; `cpus` empty is not pinned."""

    instance: str
    role: Role
    options: WorkerOptions
    gpu: Gpu | None
    threads: int
    cpus: tuple[int, ...]


def check_roles(serve: ServeConfig) -> None:
    """Raises ConfigError if what is asked of the roles contradicts itself."""
    if serve.colocated is not None:
        if serve.prefill is not None or serve.decode is not None:
            raise ConfigError("--colocated excludes --prefill and --decode: a colocated worker does both")
        if serve.prefill_worker is not None or serve.decode_worker is not None:
            raise ConfigError("--colocated excludes options of prefill and decode workers: there are none")
    for name in ("prefill", "decode", "colocated"):
        count = getattr(serve, name)
        if count is not None and count < 1:
            raise ConfigError(f"--{name} must be at least 1, not {count}")


def place(serve: ServeConfig, machine: Machine) -> tuple[Seat, ...]:
    """Every worker's place, prefill first. Raises ConfigError."""
    check_roles(serve)
    _check_threads(serve, machine)
    on_gpus = _on_gpus(serve, machine)
    staff = _staff(serve, machine.gpus if on_gpus else ())
    gpus: Sequence[Gpu | None] = _take_turns(serve, staff, machine.gpus) if on_gpus else [None] * len(staff)
    cores = _cores([options.threads for _, _, options in staff], machine, pin=not on_gpus)
    return tuple(
        Seat(instance, role, options, gpu, threads, cpus)
        for (instance, role, options), gpu, (threads, cpus) in zip(staff, gpus, cores, strict=True)
    )


def choose_dtype(serve: ServeConfig, seats: Sequence[Seat], machine: Machine) -> str:
    """The dtype of weights and KV: bfloat16 where the hardware has it, else float32. Raises ConfigError."""
    gpus = [seat.gpu for seat in seats if seat.gpu is not None]
    if serve.dtype == "auto":
        have_bf16 = [gpu.compute_capability >= BF16_COMPUTE_CAPABILITY for gpu in gpus] or [machine.has_bf16]
        return "bfloat16" if all(have_bf16) else "float32"
    if serve.dtype == "float16" and not gpus:
        raise ConfigError(
            "--dtype float16 is not for CPUs, which compute it very slowly: use bfloat16 or float32"
        )
    return serve.dtype


def _on_gpus(serve: ServeConfig, machine: Machine) -> bool:
    if serve.device == "cuda" and not machine.gpus:
        raise ConfigError("--device cuda: no GPU was found, or the installed torch was built without CUDA")
    if serve.device != "cpu" and machine.gpus:
        return True
    for option, _ in _given(serve, "devices"):
        raise ConfigError(f"{option} names GPUs, but the workers run on the CPU")
    if serve.cuda_graphs:
        raise ConfigError("--cuda-graphs is for GPUs, but the workers run on the CPU")
    return False


def _check_threads(serve: ServeConfig, machine: Machine) -> None:
    most = MAX_THREADS_A_CORE * machine.num_cpus
    for option, threads in _given(serve, "threads"):
        if threads > most:
            raise ConfigError(
                f"{option} {threads}: at most {most}, {MAX_THREADS_A_CORE} for each core of the machine"
            )


def _given(serve: ServeConfig, name: str) -> list[tuple[str, Any]]:
    """(option, value) wherever a field of WorkerOptions was given: for all workers, or for a role's."""
    common = getattr(serve.worker, name)
    given = [] if common is None else [(f"--{name}", common)]
    for role, options in ((Role.PREFILL, serve.prefill_worker), (Role.DECODE, serve.decode_worker)):
        value = None if options is None else getattr(options, name)
        if value is not None and value != common:  # else it is the one for all
            given.append((f"--{role.value}-{name}", value))
    return given


def _staff(serve: ServeConfig, gpus: Sequence[Gpu]) -> list[tuple[str, Role, WorkerOptions]]:
    """Name, role and options of every worker.

    Where nothing is said of roles: one prefill and one decode worker, or half of the GPUs for each. Where one
    of the two numbers is given, the other takes the rest.
    """
    num_gpus = len(gpus) if serve.worker.devices is None else len(set(serve.worker.devices))
    if serve.colocated is not None:
        return [(f"colocated-{i}", Role.COLOCATED, serve.worker) for i in range(serve.colocated)]
    num_prefill, num_decode = serve.prefill, serve.decode
    if num_prefill is None:
        num_prefill = max(1, num_gpus // 2 if num_decode is None else num_gpus - num_decode)
    if num_decode is None:
        num_decode = max(1, num_gpus - num_prefill)
    prefill, decode = serve.prefill_worker or serve.worker, serve.decode_worker or serve.worker
    return [
        *((f"prefill-{i}", Role.PREFILL, prefill) for i in range(num_prefill)),
        *((f"decode-{i}", Role.DECODE, decode) for i in range(num_decode)),
    ]


def names_roles(serve: ServeConfig) -> bool:
    """Whether workers of some role are asked for, if only by an option of theirs."""
    asked = (serve.colocated, serve.prefill, serve.decode, serve.prefill_worker, serve.decode_worker)
    return any(value is not None for value in asked)


def _take_turns(
    serve: ServeConfig, staff: Sequence[tuple[str, Role, WorkerOptions]], gpus: Sequence[Gpu]
) -> list[Gpu]:
    """One GPU for each: workers with the same `devices` take turns on them."""
    turns: Counter[tuple[int, ...]] = Counter()
    taken = []
    for _, _, options in staff:
        devices = options.devices if options.devices is not None else tuple(range(len(gpus)))
        index = devices[turns[devices] % len(devices)]
        if not 0 <= index < len(gpus):
            option = next((each for each, value in _given(serve, "devices") if value == devices), "--devices")
            raise ConfigError(f"{option}: there is no GPU {index}, the last is {len(gpus) - 1}")
        turns[devices] += 1
        taken.append(gpus[index])
    return taken


def _cores(asked: Sequence[int | None], machine: Machine, *, pin: bool) -> list[tuple[int, tuple[int, ...]]]:
    """(threads, cores) of each worker: an even share of what others did not ask for, on cores of its own.

    Not pinned where there are not enough cores to go round, or where a quota bounds CPU time: the cores
    then are shared with who knows whom.
    """
    rest = asked.count(None)
    left = machine.num_cpus - sum(threads for threads in asked if threads is not None)
    share, extra = divmod(max(left, 0), rest) if rest else (0, 0)
    threads = []
    for wanted in asked:
        if wanted is None:
            wanted = max(1, share + (extra > 0))
            extra -= 1
            wanted = wanted if pin else min(wanted, MAX_CUDA_THREADS)
        threads.append(wanted)
    if not pin or sum(threads) > machine.num_cpus or machine.num_cpus < len(machine.cpus):
        return [(count, ()) for count in threads]
    starts = [sum(threads[:i]) for i in range(len(threads))]
    return [
        (count, machine.cpus[start : start + count]) for start, count in zip(starts, threads, strict=True)
    ]
