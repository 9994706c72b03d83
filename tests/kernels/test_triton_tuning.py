"""Tile shapes: every size has one, a GPU's file goes before the defaults, and CPU workers load none of it."""

from __future__ import annotations

import subprocess
import sys

import msgspec
import pytest
import torch

from memserve.kernels.triton import tuning
from memserve.kernels.triton.tuning import KernelConfigs, Tuning, file_name, read_configs


@pytest.mark.parametrize("name", ["default", "interpreter"])
@pytest.mark.parametrize("element_bytes", [2, 4])
@pytest.mark.parametrize("block_d", [16, 64, 128, 256])
def test_every_size_has_an_entry(name: str, element_bytes: int, block_d: int) -> None:
    found = Tuning(4, read_configs(name))
    for config in (found.prefill(element_bytes, block_d), found.decode(element_bytes, block_d)):
        sizes = [getattr(config, "block_m", config.block_n), config.block_n]
        assert all(size >= 16 and size & (size - 1) == 0 for size in sizes)


def test_the_exact_size_goes_first_then_the_next_wider() -> None:
    default = read_configs("default")
    narrow = msgspec.structs.replace(default.decode["2x128"], block_n=32)
    own = Tuning(4, KernelConfigs(decode={**default.decode, "2x64": narrow}))
    assert own.decode(2, 64) == own.decode(2, 32) == narrow
    assert own.decode(2, 128) == default.decode["2x128"]
    with pytest.raises(AssertionError, match="no tile shapes"):
        own.decode(1, 64)


def test_a_gpu_s_file_is_laid_over_the_defaults(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    default = read_configs("default")
    changed = msgspec.structs.replace(default.prefill["2x128"], block_n=32)
    (tmp_path / "tuned").mkdir()
    (tmp_path / "tuned/default.json").write_bytes(msgspec.json.encode(default))
    own = tmp_path / f"tuned/{file_name('NVIDIA H200')}.json"
    own.write_bytes(msgspec.json.encode({"prefill": {"2x128": changed}}))
    monkeypatch.setattr(tuning.resources, "files", lambda _: tmp_path)
    assert own.name == "NVIDIA_H200.json"
    found = read_configs("NVIDIA_H200")
    assert found.prefill == {**default.prefill, "2x128": changed} and found.decode == default.decode
    assert read_configs("another") == default


def test_the_interpreter_has_its_own() -> None:
    assert Tuning.of(torch.device("cpu")).configs == read_configs("interpreter")


def test_workers_on_a_cpu_do_not_load_triton() -> None:
    code = "import sys, memserve.workers.process; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
