"""From what was asked for to what every worker is told, on machines of any size."""

from __future__ import annotations

import itertools
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memserve.config import Role, ServeConfig, WorkerConfig, WorkerOptions
from memserve.errors import ConfigError, MemoryError_, StartupError
from memserve.model_config import KVGeometry, ModelConfig, RopeConfig, weights_bytes_upper_bound
from memserve.router.supervision.machine import Gpu, Machine
from memserve.router.supervision.memory import CPU_WORKER_BYTES, DEFAULT_POOL_BYTES, plan_workers
from memserve.sizes import format_bytes

MIB, GIB = 1 << 20, 1 << 30

# 128 KiB of KV a token, and 1024 tokens to the 128 MiB, in bfloat16.
MODEL = ModelConfig(
    architecture="LlamaForCausalLM",
    vocab_size=32000,
    hidden_size=1024,
    intermediate_size=2048,
    num_layers=32,
    num_heads=16,
    num_kv_heads=8,
    head_dim=128,
    rms_norm_eps=1e-5,
    rope=RopeConfig(),
    tie_word_embeddings=True,
    qkv_bias=False,
    o_bias=False,
    mlp_bias=False,
    qk_norm=False,
    sliding_window=(None,) * 32,
    max_position_embeddings=4096,
    dtype="bfloat16",
    eos_token_ids=(2,),
    bos_token_id=1,
)
TOKEN_BYTES = 128 << 10
WEIGHTS = weights_bytes_upper_bound(MODEL, "bfloat16")


def make_machine(available: int = 64 * GIB, gpus: tuple[int, ...] = ()) -> Machine:
    """`gpus`: free bytes of each."""
    return Machine(
        cpus=tuple(range(8)),
        num_cpus=8,
        available_bytes=available,
        has_bf16=True,
        gpus=tuple(Gpu(i, "H200", free + 2 * GIB, free, (9, 0)) for i, free in enumerate(gpus)),
    )


def plan(
    serve: ServeConfig, machine: Machine | None = None, model: ModelConfig = MODEL
) -> tuple[WorkerConfig, ...]:
    return plan_workers(serve, model, Path("/models/m"), machine or make_machine())


def options(**fields: object) -> WorkerOptions:
    return msgspec.convert(fields, WorkerOptions)


def tokens(config: WorkerConfig) -> int:
    assert config.num_blocks is not None
    return config.num_blocks * config.block_size


# --- everything resolved -----------------------------------------------------------------------------------


def test_a_worker_is_told_everything() -> None:
    serve = ServeConfig(seed=3, log_level="debug", load_format="dummy", decode_worker=options(max_running=7))
    prefill, decode = plan(serve)
    assert prefill == WorkerConfig(
        instance="prefill-0",
        role=Role.PREFILL,
        model_path="/models/m",
        model=MODEL,
        device="cpu",
        dtype="bfloat16",
        load_format="dummy",
        seed=3,
        block_size=16,
        num_blocks=DEFAULT_POOL_BYTES // (16 * TOKEN_BYTES),
        device_memory_fraction=None,
        max_model_len=4096,
        max_batch_tokens=2048,
        max_running=64,
        max_step_ms=200.0,
        threads=4,
        cpus=(0, 1, 2, 3),
        transports=("shm", "torch_distributed"),
        log_level="debug",
    )
    assert (decode.instance, decode.role, decode.max_running) == ("decode-0", Role.DECODE, 7)


def test_length_beyond_the_model() -> None:
    with pytest.raises(ConfigError, match="--max-model-len 4097 exceeds the model's context of 4096"):
        plan(ServeConfig(max_model_len=4097))


# --- CPU pools -------------------------------------------------------------------------------------------


def test_default_pool_holds_what_can_run() -> None:
    for config in plan(ServeConfig(max_model_len=100, worker=options(max_running=3))):
        assert tokens(config) == 304  # 300, in blocks of 16


def test_default_pools_take_a_fifth_of_the_machine() -> None:
    configs = plan(ServeConfig(prefill=2), make_machine(15 * GIB))
    assert [tokens(config) * TOKEN_BYTES for config in configs] == [GIB] * 3
    assert all(config.max_model_len == 4096 for config in configs)


def test_implicit_length_is_shortened_to_fit(caplog: pytest.LogCaptureFixture) -> None:
    configs = plan(ServeConfig(), make_machine(3 * GIB))
    assert {config.max_model_len for config in configs} == {tokens(configs[0])}
    assert 256 <= configs[0].max_model_len < 4096
    assert "not the model's 4096" in caplog.text


def test_explicit_length_takes_what_it_needs() -> None:
    for config in plan(ServeConfig(max_model_len=4000), make_machine(4 * GIB)):
        assert (config.max_model_len, tokens(config)) == (4000, 4000)


@pytest.mark.parametrize("missing", [1 * MIB, 100 * MIB])
def test_what_is_missing_is_said(missing: int) -> None:
    # Two pools of 4000 tokens, 500 MiB each, beside weights and workers.
    enough = WEIGHTS + 2 * CPU_WORKER_BYTES + 1000 * MIB
    plan(ServeConfig(max_model_len=4000), make_machine(enough))
    with pytest.raises(MemoryError_, match=f"KV pools .*: {format_bytes(missing)} are missing"):
        plan(ServeConfig(max_model_len=4000), make_machine(enough - missing))


def test_weights_that_do_not_fit() -> None:
    with pytest.raises(MemoryError_, match="the weights .* and 2 workers do not fit .* are missing"):
        plan(ServeConfig(), make_machine(WEIGHTS))


def test_nothing_left_for_a_pool() -> None:
    with pytest.raises(MemoryError_, match="KV of one request of 256 tokens does not fit"):
        plan(ServeConfig(), make_machine(WEIGHTS + 2 * CPU_WORKER_BYTES + MIB))


def test_pools_as_asked_for() -> None:
    left = 32 * GIB
    machine = make_machine(left + WEIGHTS + 2 * CPU_WORKER_BYTES)
    sizes = options(device_memory="1GiB"), options(device_memory="0.5")
    prefill, decode = plan(ServeConfig(prefill_worker=sizes[0], decode_worker=sizes[1]), machine)
    assert tokens(prefill) * TOKEN_BYTES == GIB
    assert tokens(decode) * TOKEN_BYTES == left // 2
    with pytest.raises(MemoryError_, match="KV pools of 33.0 GiB do not fit .*: 1.00 GiB are missing"):
        both = options(device_memory="16.5GiB")
        plan(ServeConfig(worker=both), machine)
    with pytest.raises(ConfigError, match="--device-memory: '17' is neither a size"):
        plan(ServeConfig(worker=options(device_memory="17")), machine)


def test_pool_asked_for_is_too_small_for_the_length_asked_for() -> None:
    serve = ServeConfig(max_model_len=4096, worker=options(device_memory="256MiB"))
    with pytest.raises(MemoryError_, match="one request of 4096 tokens does not fit: 256 MiB are missing"):
        plan(serve)


# --- CUDA pools ------------------------------------------------------------------------------------------


def test_worker_alone_on_its_gpu_sizes_its_pool() -> None:
    configs = plan(ServeConfig(), make_machine(gpus=(70 * GIB, 70 * GIB)))
    assert [config.device for config in configs] == ["cuda:0", "cuda:1"]
    for config in configs:
        assert (config.num_blocks, config.device_memory_fraction) == (None, 0.9)
        assert (config.max_batch_tokens, config.max_step_ms) == (8192, None)
        assert not config.shares_weights and config.cuda_graphs
    serve = ServeConfig(worker=options(device_memory="0.3"))
    assert plan(serve, make_machine(gpus=(70 * GIB, 70 * GIB)))[0].device_memory_fraction == 0.3


def test_workers_on_one_gpu_get_equal_pools() -> None:
    prefill, decode = plan(ServeConfig(prefill=1, decode=1), make_machine(gpus=(70 * GIB,)))
    assert prefill.device == decode.device == "cuda:0" and prefill.shares_weights and decode.shares_weights
    assert prefill.num_blocks == decode.num_blocks
    assert 26 * GIB < tokens(prefill) * TOKEN_BYTES < 31 * GIB
    assert prefill.device_memory_fraction is None


def test_pool_of_a_size_on_a_gpu() -> None:
    serve = ServeConfig(colocated=2, worker=options(device_memory="2GiB"))
    assert [tokens(config) * TOKEN_BYTES for config in plan(serve, make_machine(gpus=(70 * GIB,)))] == [
        2 * GIB
    ] * 2
    with pytest.raises(MemoryError_, match=r"available memory on GPU 0 \(H200\): .* are missing"):
        plan(ServeConfig(colocated=2, worker=options(device_memory="34GiB")), make_machine(gpus=(70 * GIB,)))


def test_gpu_too_small_for_the_weights() -> None:
    with pytest.raises(MemoryError_, match="2 workers with .* of weights for all do not fit"):
        plan(ServeConfig(colocated=2), make_machine(gpus=(2 * GIB,)))
    with pytest.raises(MemoryError_, match="1 worker with .* of weights do not fit"):
        plan(ServeConfig(colocated=1), make_machine(gpus=(1 * GIB,)))
    # whoever did not ask for two workers is told of one
    with pytest.raises(MemoryError_, match=r"2 workers with .* all \(--colocated 1 needs one\) do not fit"):
        plan(ServeConfig(), make_machine(gpus=(2 * GIB,)))


def test_length_on_a_gpu() -> None:
    small = make_machine(gpus=(4 * GIB,))
    long_model = msgspec.structs.replace(MODEL, max_position_embeddings=131072)
    # 1. Shortened by an estimate when it was not asked for.
    (config,) = plan(ServeConfig(colocated=1), small, long_model)
    assert 256 < config.max_model_len < 131072
    # 2. Left to the worker, which knows better, when it was.
    (config,) = plan(ServeConfig(colocated=1, max_model_len=131072), small, long_model)
    assert config.max_model_len == 131072


def test_a_table_on_a_gpu_has_room_for_whatever_pool_there_will_be(caplog: pytest.LogCaptureFixture) -> None:
    configs = plan(ServeConfig(prefill=1, decode=1), make_machine(gpus=(70 * GIB,) * 2))
    for config in configs:
        assert config.transports == ("cuda_ipc",)
        assert config.max_blocks * config.block_size * TOKEN_BYTES <= 72 * GIB
        assert (config.max_blocks + 1) * config.block_size * TOKEN_BYTES > 72 * GIB
    assert [config.max_blocks for config in plan(ServeConfig(), make_machine())] == [0, 0]
    assert caplog.messages == []


# --- whatever the machine --------------------------------------------------------------------------------


@given(
    available=st.integers(0, 40 * GIB),
    block_size=st.sampled_from([1, 4, 16, 256]),
    num_workers=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    max_model_len=st.none() | st.integers(2, 4096),
    device_memory=st.sampled_from([None, "1GiB", "0.2", "100MB"]),
)
def test_a_plan_always_fits(
    available: int,
    block_size: int,
    num_workers: tuple[int, int],
    max_model_len: int | None,
    device_memory: str | None,
) -> None:
    serve = ServeConfig(
        block_size=block_size,
        prefill=num_workers[0],
        decode=num_workers[1],
        max_model_len=max_model_len,
        worker=options(device_memory=device_memory),
    )
    try:
        configs = plan(serve, make_machine(available))
    except StartupError as error:
        assert "are missing" in str(error)
        return
    block_bytes = KVGeometry.of(MODEL, block_size, "bfloat16").block_bytes
    pools = sum(config.num_blocks or 0 for config in configs) * block_bytes
    assert pools + WEIGHTS + len(configs) * CPU_WORKER_BYTES <= available
    assert all(tokens(config) >= config.max_model_len for config in configs)
    assert {config.max_model_len for config in configs} <= {max_model_len or configs[0].max_model_len}
    for one, other in itertools.combinations(configs, 2):
        assert not set(one.cpus) & set(other.cpus)
