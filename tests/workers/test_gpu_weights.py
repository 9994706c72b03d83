"""Weights of workers that share a GPU, here a driver over memfds: what is exported is really passed on."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from memserve.messages import WeightsExport
from memserve.model_config import load_model_config
from memserve.models.step import LogitRows, SequenceSlice, build_step
from memserve.models.transformer import Transformer
from memserve.models.weights import Weights
from memserve.workers.gpu_weights import GpuLoader
from tests.cuda.fake_driver import FakeDriver

CPU = torch.device("cpu")


class Supervisor:
    """Keeps what is exported, as the real one does."""

    def __init__(self) -> None:
        self.exports: list[tuple[WeightsExport, int]] = []

    def send(self, export: WeightsExport, fd: int | None) -> None:
        assert fd is not None
        self.exports.append((export, os.dup(fd)))


@pytest.fixture
def config(tools, model_folder: Path):
    return msgspec.structs.replace(
        tools.make_config(model=load_model_config(model_folder), model_path=str(model_folder)),
        device="cuda:0",
        load_format="auto",
        shares_weights=True,
    )


def make_loader(config, supervisor: Supervisor, driver: FakeDriver, told: list[float] | None = None):
    progress = told.append if told is not None else lambda fraction: None
    return GpuLoader(config, CPU, supervisor.send, progress, driver)


def logits(config, weights: Weights) -> torch.Tensor:
    model = config.model
    transformer = Transformer(model, weights, 64, CPU, torch.float32)
    kv = torch.zeros((4, model.num_layers, 2, model.num_kv_heads, 16, model.head_dim))
    step = build_step(
        [(np.arange(3, 23), SequenceSlice(0, 20, 0, np.array([2, 1])), LogitRows.ALL)],
        model,
        16,
        CPU,
        kv.dtype,
    )
    with torch.inference_mode():
        return transformer.forward(step, kv)


def test_one_loads_and_the_others_open(config) -> None:
    supervisor, driver = Supervisor(), FakeDriver()
    # 1. Alone, as a reference.
    alone = make_loader(msgspec.structs.replace(config, shares_weights=False), supervisor, driver).load()
    assert not supervisor.exports and not driver.open.total()
    expected = logits(config, alone)
    # 2. The first fills memory of the driver, and exports it.
    told: list[float] = []
    first = make_loader(config, supervisor, driver, told).load()
    ((export, fd),) = supervisor.exports
    assert torch.equal(logits(config, first), expected) and told[-1] == 1.0
    assert export.memory.num_bytes >= export.num_bytes
    # 3. Another opens it, reads no file, and says that it is done.
    told.clear()
    elsewhere = msgspec.structs.replace(config, model_path="/nowhere")
    second = make_loader(elsewhere, supervisor, driver, told).open(export.memory, os.dup(fd))
    assert torch.equal(logits(config, second), expected) and told == [1.0]
    assert len(supervisor.exports) == 1
    # 4. It is one memory: what the first does to it the second sees.
    first.norm.zero_()
    assert not second.norm.any()
    os.close(fd)


@pytest.mark.parametrize("trouble", ["no memory", "export fails", "not descriptors"])
def test_weights_that_cannot_be_shared_are_loaded_all_the_same(config, caplog, trouble: str) -> None:
    supervisor = Supervisor()
    driver = FakeDriver(
        exports_descriptors=trouble == "export fails",
        fails=set() if trouble == "not descriptors" else {"cuMemCreate", "cuMemAlloc"},
    )
    with caplog.at_level(logging.WARNING):
        weights = make_loader(config, supervisor, driver).load()
    assert not supervisor.exports and "shared" in caplog.text
    assert torch.isfinite(logits(config, weights)).all()
    assert not driver.open.total()


@pytest.mark.parametrize("trouble", ["cuMemImportFromShareableHandle", "another gpu", "too small"])
def test_what_cannot_be_opened_is_loaded(config, caplog, trouble: str) -> None:
    supervisor, driver = Supervisor(), FakeDriver()
    expected = logits(config, make_loader(config, supervisor, driver).load())
    ((export, fd),) = supervisor.exports
    memory = export.memory
    if trouble == "another gpu":
        memory = msgspec.structs.replace(memory, gpu="GPU-other")
    elif trouble == "too small":
        memory = msgspec.structs.replace(memory, num_bytes=1 << 16)
    else:
        driver.fails = {trouble}
    num_fds = len(os.listdir("/proc/self/fd"))
    own = msgspec.structs.replace(config, shares_weights=False)
    with caplog.at_level(logging.WARNING):
        weights = make_loader(own, supervisor, driver).open(memory, os.dup(fd))
    assert "loading our own" in caplog.text
    assert torch.equal(logits(config, weights), expected)
    assert len(os.listdir("/proc/self/fd")) == num_fds  # the descriptor that was given is closed
    os.close(fd)
