"""Which workers there are, on which device, on which cores."""

from __future__ import annotations

import pytest

from memserve.config import ServeConfig, WorkerOptions
from memserve.errors import ConfigError
from memserve.router.supervision.machine import Gpu, Machine
from memserve.router.supervision.placement import choose_dtype, place


def make_machine(
    num_cpus: int = 8, num_gpus: int = 0, *, quota: int | None = None, bf16: bool = True, capability: int = 9
) -> Machine:
    return Machine(
        cpus=tuple(range(num_cpus)),
        num_cpus=quota if quota is not None else num_cpus,
        available_bytes=16 << 30,
        has_bf16=bf16,
        gpus=tuple(Gpu(i, "GPU", 80 << 30, 70 << 30, (capability, 0)) for i in range(num_gpus)),
    )


def names(serve: ServeConfig, machine: Machine) -> list[str]:
    return [seat.instance for seat in place(serve, machine)]


# --- roles -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("serve", "num_gpus", "expected"),
    [
        (ServeConfig(), 0, "1P 1D"),
        (ServeConfig(), 1, "1P 1D"),
        (ServeConfig(), 2, "1P 1D"),
        (ServeConfig(), 8, "4P 4D"),
        (ServeConfig(prefill=1), 1, "1P 1D"),
        (ServeConfig(decode=1), 2, "1P 1D"),
        (ServeConfig(prefill_worker=WorkerOptions(threads=2)), 5, "2P 3D"),
        (ServeConfig(device="cpu"), 8, "1P 1D"),
        (ServeConfig(prefill=3), 0, "3P 1D"),
        (ServeConfig(prefill=3), 8, "3P 5D"),
        (ServeConfig(decode=2), 8, "6P 2D"),
        (ServeConfig(decode=9), 8, "1P 9D"),
        (ServeConfig(worker=WorkerOptions(devices=(4, 5, 6, 7))), 8, "2P 2D"),
        (ServeConfig(colocated=3), 8, "3C"),
    ],
)
def test_numbers_of_workers(serve: ServeConfig, num_gpus: int, expected: str) -> None:
    seats = place(serve, make_machine(num_gpus=num_gpus))
    roles = [seat.role.value[0].upper() for seat in seats]
    assert " ".join(f"{roles.count(role)}{role}" for role in dict.fromkeys(roles)) == expected


def test_names() -> None:
    assert names(ServeConfig(prefill=2, decode=1), make_machine()) == ["prefill-0", "prefill-1", "decode-0"]
    assert names(ServeConfig(colocated=1), make_machine()) == ["colocated-0"]


@pytest.mark.parametrize(
    "serve",
    [
        ServeConfig(colocated=1, prefill=1),
        ServeConfig(colocated=1, decode=1),
        ServeConfig(colocated=1, decode_worker=WorkerOptions(threads=2)),
        ServeConfig(prefill=0),
        ServeConfig(device="cuda"),
        ServeConfig(worker=WorkerOptions(devices=(0,))),
        ServeConfig(decode_worker=WorkerOptions(devices=(0,))),
    ],
)
def test_contradictions(serve: ServeConfig) -> None:
    with pytest.raises(ConfigError, match="--(colocated|prefill|device|devices|decode-devices)"):
        place(serve, make_machine())


@pytest.mark.parametrize(
    ("serve", "said"),
    [
        (ServeConfig(cuda_graphs=True), "--cuda-graphs is for GPUs"),
        (ServeConfig(worker=WorkerOptions(devices=(0,))), "--devices names"),
        (ServeConfig(prefill_worker=WorkerOptions(devices=(0, 1))), "--prefill-devices names"),
        (ServeConfig(decode_worker=WorkerOptions(devices=(0,))), "--decode-devices names"),
        (ServeConfig(worker=WorkerOptions(threads=33)), "--threads 33: at most 32"),
        (ServeConfig(decode_worker=WorkerOptions(threads=99)), "--decode-threads 99: at most 32"),
    ],
)
def test_what_was_given_is_named(serve: ServeConfig, said: str) -> None:
    with pytest.raises(ConfigError, match=f"^{said}"):
        place(serve, make_machine())


def test_threads_and_graphs_that_are_fine() -> None:
    assert place(ServeConfig(worker=WorkerOptions(threads=32)), make_machine())[0].threads == 32
    assert place(ServeConfig(cuda_graphs=False), make_machine())
    assert place(ServeConfig(cuda_graphs=True), make_machine(num_gpus=1))


def test_a_gpu_that_is_not_there_is_told_by_its_option() -> None:
    serve = ServeConfig(prefill_worker=WorkerOptions(devices=(5,)))
    with pytest.raises(ConfigError, match="^--prefill-devices: there is no GPU 5"):
        place(serve, make_machine(num_gpus=2))


# --- GPUs ------------------------------------------------------------------------------------------------


def gpus(serve: ServeConfig, num_gpus: int) -> list[int | None]:
    return [seat.gpu and seat.gpu.index for seat in place(serve, make_machine(num_gpus=num_gpus))]


def test_turns_on_gpus() -> None:
    assert gpus(ServeConfig(prefill=1, decode=1), 1) == [0, 0]
    assert gpus(ServeConfig(), 4) == [0, 1, 2, 3]
    assert gpus(ServeConfig(prefill=2, decode=3), 2) == [0, 1, 0, 1, 0]
    assert gpus(ServeConfig(worker=WorkerOptions(devices=(3, 1))), 4) == [3, 1]
    prefill, decode = WorkerOptions(devices=(0,)), WorkerOptions(devices=(1, 2))
    serve = ServeConfig(prefill=2, decode=2, prefill_worker=prefill, decode_worker=decode)
    assert gpus(serve, 4) == [0, 0, 1, 2]


def test_gpu_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match="there is no GPU 2, the last is 1"):
        gpus(ServeConfig(worker=WorkerOptions(devices=(0, 2))), 2)


def test_cpu_threads_beside_gpus() -> None:
    seats = place(ServeConfig(), make_machine(num_cpus=64, num_gpus=2))
    assert [(seat.threads, seat.cpus) for seat in seats] == [(8, ()), (8, ())]


# --- cores -----------------------------------------------------------------------------------------------


def cores(serve: ServeConfig, machine: Machine) -> list[tuple[int, tuple[int, ...]]]:
    return [(seat.threads, seat.cpus) for seat in place(serve, machine)]


def threads(count: int) -> WorkerOptions:
    return WorkerOptions(threads=count)


def test_cores_are_shared_out_without_overlap() -> None:
    assert cores(ServeConfig(), make_machine(8)) == [(4, (0, 1, 2, 3)), (4, (4, 5, 6, 7))]
    assert cores(ServeConfig(prefill=2), make_machine(8)) == [(3, (0, 1, 2)), (3, (3, 4, 5)), (2, (6, 7))]
    assert cores(ServeConfig(), make_machine(2)) == [(1, (0,)), (1, (1,))]


def test_too_few_cores_are_not_pinned() -> None:
    assert cores(ServeConfig(), make_machine(1)) == [(1, ()), (1, ())]
    assert cores(ServeConfig(worker=threads(2)), make_machine(2)) == [(2, ()), (2, ())]


def test_threads_asked_for_come_first() -> None:
    serve = ServeConfig(prefill_worker=threads(5))
    assert cores(serve, make_machine(8)) == [(5, (0, 1, 2, 3, 4)), (3, (5, 6, 7))]
    assert cores(ServeConfig(worker=threads(1)), make_machine(8)) == [(1, (0,)), (1, (1,))]
    assert cores(serve, make_machine(4)) == [(5, ()), (1, ())]


def test_quota_is_shared_but_not_pinned() -> None:
    assert cores(ServeConfig(), make_machine(64, quota=4)) == [(2, ()), (2, ())]


# --- dtype -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("machine", "expected"),
    [
        (make_machine(bf16=True), "bfloat16"),
        (make_machine(bf16=False), "float32"),
        (make_machine(num_gpus=1, bf16=False, capability=8), "bfloat16"),
        (make_machine(num_gpus=1, bf16=True, capability=7), "float32"),
    ],
)
def test_auto_dtype(machine: Machine, expected: str) -> None:
    serve = ServeConfig()
    assert choose_dtype(serve, place(serve, machine), machine) == expected


def test_float16_is_for_gpus() -> None:
    serve = ServeConfig(dtype="float16")
    machine = make_machine(num_gpus=1)
    assert choose_dtype(serve, place(serve, machine), machine) == "float16"
    with pytest.raises(ConfigError, match="float16"):
        choose_dtype(serve, place(serve, make_machine()), make_machine())
