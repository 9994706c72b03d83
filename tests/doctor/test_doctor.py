"""What the doctor finds, on machines of every kind."""

from __future__ import annotations

import importlib.metadata
import json
import resource

import pytest
from click.testing import CliRunner

from memserve.cli import cli
from memserve.cuda.driver import CudaDriver, CudaError
from memserve.doctor import command, gpus, host
from memserve.doctor.command import summarise
from memserve.doctor.gpus import check_gpus
from memserve.doctor.host import check_host
from memserve.doctor.kernels import Compared, check_kernels
from memserve.doctor.loopback import check_loopback
from memserve.doctor.report import Finding, Verdict
from memserve.errors import MemoryError_
from memserve.router.supervision.machine import Machine
from tests.cuda.fake_driver import FakeDriver

GOOD, ABSENT, WEAK, BAD = Verdict.GOOD, Verdict.ABSENT, Verdict.WEAK, Verdict.BAD
MACHINE = Machine(cpus=(0, 1), num_cpus=2, available_bytes=8 << 30, has_bf16=True, gpus=())


def verdicts(findings: object) -> dict[str, Verdict]:
    return {finding.name: finding.verdict for finding in findings}


def no_driver() -> CudaDriver:
    raise CudaError("no CUDA driver: libcuda.so.1: cannot open shared object file")


def test_this_machine_can_serve() -> None:
    found = verdicts(check_host(MACHINE))
    assert found["shared memory"] is GOOD and found["packages"] is GOOD and found["cores"] is GOOD


def test_a_small_machine_is_weak_and_not_bad(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda which: (256, 256))
    small = Machine(cpus=(0, 1), num_cpus=1, available_bytes=1 << 30, has_bf16=False, gpus=())
    found = verdicts(check_host(small))
    assert [found[name] for name in ("cores", "memory", "bf16 on the CPU", "descriptors")] == [
        WEAK,
        WEAK,
        ABSENT,
        WEAK,
    ]


def test_a_kernel_without_memfds_serves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str, num_bytes: int) -> int:
        raise MemoryError_("cannot create shared memory for doctor: Function not implemented")

    monkeypatch.setattr(host.memfd, "create_memfd", refuse)
    findings = list(check_host(MACHINE))
    assert verdicts(findings)["shared memory"] is BAD
    assert list(summarise(findings)) == ["Nothing can be served on this machine as it is."]


def test_without_a_driver_there_is_one_finding() -> None:
    (finding,) = check_gpus(no_driver)
    assert (finding.verdict, finding.meaning) == (ABSENT, "Workers run on the CPU.")


def test_gpus_and_who_reaches_whom(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus, "_loopback", lambda driver, device: ("by descriptor", 1000.0))
    found = verdicts(check_gpus(lambda: FakeDriver(num_gpus=2), {}))
    assert found["GPU 0"] is found["GPU 1 bf16"] is found["GPU 0 and 1"] is GOOD
    assert found["GPU 0 MPS"] is ABSENT
    assert found["GPU 1 memory between processes"] is GOOD
    # they do not reach each other: slower, and said
    found = verdicts(check_gpus(lambda: FakeDriver(num_gpus=2, peers=False), {}))
    assert found["GPU 0 and 1"] is WEAK


def test_settings_that_memserve_refuses_are_bad(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus, "_loopback", lambda driver, device: ("by descriptor", 1000.0))
    environ = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    assert verdicts(check_gpus(FakeDriver, environ))["PYTORCH_CUDA_ALLOC_CONF"] is BAD


def test_memory_that_cannot_be_shared_is_bad(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(driver: object, device: object) -> tuple[str, float]:
        raise CudaError("cuMemImportFromShareableHandle failed: CUDA_ERROR_NOT_SUPPORTED (801)")

    monkeypatch.setattr(gpus, "_loopback", fail)
    findings = list(check_gpus(FakeDriver, {}))
    assert verdicts(findings)["GPU 0 memory between processes"] is BAD
    assert "cannot pass KV to each other" in list(summarise(findings))[-1]


def test_a_transfer_between_two_processes() -> None:
    (finding,) = check_loopback()
    assert finding.verdict is GOOD and "GB/s" in finding.found


def test_kernels_are_run_by_another_process() -> None:
    findings = list(check_kernels("cpu", 3))
    kernels = "rms_norm silu_and_mul add_rms_norm skinny_linear skinny_gated decode_attention"
    kernels += " prefill_attention rotate_and_store store_kv copy_blocks draw"
    assert verdicts(findings).keys() == {f"{kernel} float32" for kernel in kernels.split()}
    assert {finding.verdict for finding in findings} == {GOOD}


def test_kernels_that_end_their_process_are_bad() -> None:
    findings = list(check_kernels("cpu", -(2**70)))  # no seed that torch takes
    assert findings[-1].verdict is BAD and "status 1" in findings[-1].found


@pytest.mark.parametrize(
    ("error", "failure", "is_close"),
    [(1e-5, "", True), (0.1, "", False), (float("nan"), "", False), (0.0, "x", False)],
)
def test_only_rounding_passes(error: float, failure: str, is_close: bool) -> None:
    assert Compared("copy", "float32", error, failure).is_close is is_close


def test_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    findings = (Finding("machine", "cores", GOOD, "2"), Finding("transfer", "shared memory", GOOD, "1 GB/s"))
    monkeypatch.setattr(command, "examine", lambda seed, with_kernels: findings)
    shown = CliRunner().invoke(cli, ["doctor"])
    assert shown.exit_code == 0 and "pass KV through shared memory" in shown.stdout
    # something bad is an exit status, in either form
    findings += (Finding("transfer", "shared memory", BAD, "no"),)
    shown = CliRunner().invoke(cli, ["doctor", "--json"])
    told = json.loads(shown.stdout)
    assert shown.exit_code == 1
    assert [finding["verdict"] for finding in told["findings"]] == ["good", "good", "bad"]
    assert told["summary"][0].startswith("On the CPU a colocated worker runs")


def test_without_torch_nothing_else_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", none)
    findings = list(command.examine(seed=0, with_kernels=True))
    assert verdicts(findings)["packages"] is BAD and {each.section for each in findings} == {"machine"}
