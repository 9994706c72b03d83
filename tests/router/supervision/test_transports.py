"""What a pair of workers uses, from what each announces, and what follows for `--transfer`."""

from __future__ import annotations

import msgspec
import pytest

from memserve.config import ServeConfig, Transport, WorkerConfig
from memserve.errors import ConfigError
from memserve.router.supervision.transports import (
    announced,
    between,
    check_allocator,
    peers_of,
    transfer_mode,
    uses_gloo,
)
from tests.router.worker_configs import make_worker

BOTH: tuple[Transport, ...] = ("shm", "torch_distributed")


def worker(instance: str, *transports: Transport) -> WorkerConfig:
    return msgspec.structs.replace(make_worker(instance), transports=transports)


def test_what_a_worker_announces() -> None:
    assert announced("auto", "cpu") == BOTH
    assert announced("shm", "cpu") == ("shm",)
    assert announced("torch_distributed", "cpu") == ("torch_distributed",)
    assert announced("auto", "cuda:0") == announced("cuda_ipc", "cuda:0") == ("cuda_ipc",)
    for choice in ("shm", "torch_distributed"):
        with pytest.raises(ConfigError, match=f"--transport {choice} is for workers on the CPU"):
            announced(choice, "cuda:0")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="--transport cuda_ipc is for workers on GPUs"):
        announced("cuda_ipc", "cpu")


@pytest.mark.parametrize("name", ["PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"])
@pytest.mark.parametrize(
    ("settings", "is_refused"),
    [
        ("expandable_segments:True", True),
        ("max_split_size_mb:64, expandable_segments: true", True),
        ("expandable_segments:False", False),
        ("", False),
    ],
)
def test_an_allocator_that_processes_cannot_share_is_refused(name, settings, is_refused: bool) -> None:
    on_gpus = [worker("prefill-0", "cuda_ipc"), worker("decode-0", "cuda_ipc")]
    if is_refused:
        with pytest.raises(ConfigError, match=f"{name} sets expandable_segments:True"):
            check_allocator(on_gpus, {name: settings})
    else:
        check_allocator(on_gpus, {name: settings})
    check_allocator([worker("prefill-0", *BOTH)], {name: settings})


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        (BOTH, BOTH, "shm"),
        (BOTH, ("torch_distributed",), "torch_distributed"),
        (("shm",), ("torch_distributed",), None),
        (BOTH, (), None),
        (("cuda_ipc",), ("cuda_ipc",), "cuda_ipc"),
        (BOTH, ("cuda_ipc",), None),
    ],
)
def test_a_pair_uses_the_better_one_that_both_announce(one, other, expected) -> None:
    p, d = worker("prefill-0", *one), worker("decode-0", *other)
    assert between(p, d) == between(d, p) == expected
    ways = {} if expected is None else {"decode-0": expected}
    assert peers_of(p, (p, d)) == ways


@pytest.mark.parametrize(
    ("transports", "asked", "expected"),
    [
        (BOTH, "layer", "layer"),
        (("cuda_ipc",), "layer", "layer"),
        (("torch_distributed",), "layer", "chunk"),
        (("torch_distributed",), "chunk", "chunk"),
        (("torch_distributed",), "request", "request"),
    ],
)
def test_layers_are_not_followed_over_gloo(transports, asked, expected) -> None:
    plan = [worker("prefill-0", *transports), worker("decode-0", *transports)]
    assert transfer_mode(ServeConfig(transfer=asked), plan) == expected
    assert uses_gloo(plan) == (transports == ("torch_distributed",))


def test_a_worker_alone_uses_nothing() -> None:
    alone = worker("colocated-0", "torch_distributed")
    assert not uses_gloo([alone]) and peers_of(alone, [alone]) == {}
