"""A GPU's runner over the real model, on a CPU under Triton's interpreter: graphs and events are fakes, the
tensors are not. The tokens are those of the plain runner, step for step or overlapped.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from memserve.messages import Cancel, FinishReason, Release
from memserve.model_config import load_model_config
from memserve.models.transformer import Transformer
from memserve.models.triton_transformer import TritonTransformer
from memserve.models.weights import load_weights_to_device
from memserve.workers.cuda_graphs import bucket_sizes
from memserve.workers.cuda_runner import CudaRunner
from memserve.workers.runner import ModelRunner
from memserve.workers.steps import Chunk

MAX_MODEL_LEN = 64
MAX_RUNNING = 4
CPU = torch.device("cpu")


class FakeMark:
    def __init__(self, device: FakeDevice) -> None:
        self._device = device

    def wait(self) -> None:
        self._device.num_waits += 1


class FakeDevice:
    """A device that is done at once. What it is asked to capture, it does again when replayed."""

    def __init__(self) -> None:
        self.num_waits = self.num_captures = self.num_replays = 0

    def host_buffer(self, num_elements: int) -> torch.Tensor:
        return torch.full((num_elements,), -7)

    def mark(self) -> FakeMark:
        return FakeMark(self)

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        self.num_captures += 1
        work()

        def replay() -> None:
            self.num_replays += 1
            work()

        return replay


@pytest.fixture(scope="module")
def parts(model_folder: Path):
    """Both transformers over one set of weights."""
    model = load_model_config(model_folder)
    weights = load_weights_to_device(model, model_folder, "float32", CPU, "auto", 0, lambda fraction: None)
    arguments = model, weights, MAX_MODEL_LEN, CPU, torch.float32
    return Transformer(*arguments), TritonTransformer(*arguments)


@pytest.fixture
def make_real(make_rig, parts):
    plain, triton = parts
    common = {"model": plain.model, "max_model_len": MAX_MODEL_LEN, "max_running": MAX_RUNNING}

    def make(kind: str, **changes):
        def runner_of(kv: torch.Tensor, block_size: int):
            if kind == "plain":
                return ModelRunner(plain, kv, block_size)
            device = FakeDevice()
            runner = CudaRunner(triton, kv, block_size, MAX_RUNNING, device)
            runner.fake = device
            if kind == "graphs":
                runner.capture(MAX_RUNNING, MAX_MODEL_LEN)
            return runner

        return make_rig(runner_of=runner_of, **{**common, **changes})

    return make


SAMPLINGS = (
    {"temperature": 0.0},
    {"temperature": 1.0, "seed": 7},
    {"temperature": 1.2, "seed": 2**63 + 5, "top_p": 0.9, "top_k": 50, "min_p": 0.01},
    {"temperature": 1.0, "seed": 4, "presence_penalty": 0.5, "logprobs": 2},
    {"temperature": 0.0, "logit_bias": ((3, 5.0),), "min_tokens": 3, "stop_token_ids": tuple(range(100))},
    {"temperature": 0.8, "seed": 3, "stop_token_ids": tuple(range(0, 199, 5))},
)


def send_all(rig, tools, vocab_size: int, count: int) -> list[str]:
    names = []
    for i, length in enumerate((1, 5, 9, 4, 17, 3)[:count]):
        prompt = [token_id % vocab_size for token_id in tools.prompt(length, i)]
        rig.send(tools.decode(f"r{i}", prompt, max_tokens=4, **SAMPLINGS[i % len(SAMPLINGS)]))
        names.append(f"r{i}")
        rig.worker.step()
    return names


def transcripts(rig, tools, vocab_size: int, count: int):
    names = send_all(rig, tools, vocab_size, count)
    rig.run()
    messages = rig.take()
    rig.assert_idle()
    return {name: tools.Transcript.of(messages, name) for name in names}


@pytest.mark.parametrize(("kind", "count"), [("eager", 3), ("graphs", 6)])
def test_the_tokens_of_the_plain_runner(make_real, tools, parts, kind, count):
    vocab_size = parts[0].model.vocab_size
    rig = make_real(kind, max_batch_tokens=40)
    expected = transcripts(make_real("plain", max_batch_tokens=40), tools, vocab_size, count)
    found = transcripts(rig, tools, vocab_size, count)
    for name, wanted in expected.items():
        heard = found[name]
        assert heard.failed is None and wanted.failed is None
        assert heard.token_ids == wanted.token_ids, name
        assert heard.finish_reason is wanted.finish_reason
        for output, other in zip(heard.outputs, wanted.outputs, strict=True):
            assert (output.logprobs is None) == (other.logprobs is None)
            if output.logprobs is not None:
                assert output.logprobs[0].rank == other.logprobs[0].rank
                assert output.logprobs[0].logprob == pytest.approx(other.logprobs[0].logprob, abs=1e-3)
    if count == 6:
        assert {heard.finish_reason for heard in found.values()} == {FinishReason.STOP, FinishReason.LENGTH}
    assert (rig.runner.fake.num_replays > 2) == (kind == "graphs")


def test_steps_overlap_and_tokens_are_fed_on_the_device(make_real, tools, parts):
    """The host waits for each step once, after the next was begun."""
    rig = make_real("graphs")
    prompt = [token_id % parts[0].model.vocab_size for token_id in tools.prompt(10)]
    rig.send(tools.decode("a", prompt, max_tokens=5, temperature=0.0))
    waits = []
    while rig.worker.step():
        waits.append(rig.runner.fake.num_waits)
    assert waits == [0, 1, 2, 3, 4, 5] and rig.runner.fake.num_replays == 4
    other = make_real("plain")
    other.send(tools.decode("a", prompt, max_tokens=5, temperature=0.0))
    other.run()
    expected = tools.Transcript.of(other.take(), "a").token_ids
    assert tools.Transcript.of(rig.take(), "a").token_ids == expected and len(set(expected)) > 1


def test_prefills_cancels_and_preemptions(make_real, tools, parts):
    vocab_size = parts[0].model.vocab_size
    heard = {}
    for kind in ("plain", "graphs"):
        rig = make_real(kind, num_blocks=5, max_batch_tokens=64)
        for i in range(3):
            prompt = [token_id % vocab_size for token_id in tools.prompt(4, i)]
            rig.send(tools.decode(f"r{i}", prompt, max_tokens=5, temperature=0.0))
        for _ in range(3):
            rig.worker.step()
        rig.send(tools.prefill("p", prompt, temperature=0.0))
        rig.send(tools.decode("gone", prompt, max_tokens=9), Cancel("gone", 0))
        rig.run()
        rig.send(Release("p", 0))
        rig.run()
        messages = rig.take()
        rig.assert_idle()
        names = ("r0", "r1", "r2", "p")
        heard[kind] = [tools.Transcript.of(messages, name).token_ids for name in names]
        assert rig.worker.gauges.load().num_preemptions > 0
    assert heard["graphs"] == heard["plain"] and all(heard["plain"])


def test_prompt_logprobs(make_real, tools, parts):
    prompt = [token_id % parts[0].model.vocab_size for token_id in tools.prompt(20)]
    heard = {}
    for kind in ("plain", "graphs"):
        rig = make_real(kind, max_batch_tokens=16)
        rig.send(tools.decode("a", prompt, max_tokens=3, temperature=0.0, prompt_logprobs=1))
        rig.run()
        heard[kind] = tools.Transcript.of(rig.take(), "a")
    assert heard["graphs"].token_ids == heard["plain"].token_ids
    found, expected = (heard[kind].outputs[0].prompt_logprobs for kind in ("graphs", "plain"))
    assert len(found) == len(expected) == 20 and found[0] is None
    for one, other in zip(found[1:], expected[1:], strict=True):
        assert one.rank == other.rank and one.logprob == pytest.approx(other.logprob, abs=1e-3)
    assert rig.runner.fake.num_replays == 2  # what follows the prompt is plain again


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of the interpreter
def test_a_row_that_is_not_a_number_fails_alone(make_real, tools, parts, caplog):
    """Also when the next step has already begun on its token."""
    prompt = [token_id % parts[0].model.vocab_size for token_id in tools.prompt(10)]
    rig = make_real("graphs")
    rig.send(tools.decode("bad", prompt, max_tokens=9), tools.decode("good", prompt, max_tokens=5, seed=3))
    rig.worker.step()
    rig.worker.step()
    bad = rig.worker._register.get("bad")
    rig.pool.kv[int(bad.table.ids(1)[0])] = torch.nan
    rig.run()
    messages = rig.take()
    assert "not a number" in tools.Transcript.of(messages, "bad").failed
    assert "tried by itself" not in caplog.text  # the step on its token had something to compute with
    assert len(tools.Transcript.of(messages, "good").token_ids) == 5
    rig.assert_idle()


def test_each_layer_is_told_in_graphs_too(parts, make_real, tools):
    told = []
    _, triton = parts
    shape = (8, triton.model.num_layers, 2, triton.model.num_kv_heads, 4, triton.model.head_dim)
    runner = CudaRunner(triton, torch.zeros(shape), 4, 2, FakeDevice(), lambda: told.append(1))
    runner.capture(2, 32)
    assert not told
    rig = make_real("plain", num_blocks=8)
    rig.send(tools.decode("a", [1, 2, 3], max_tokens=9, temperature=0.0))
    rig.worker.step()
    (request,) = rig.worker._register
    runner.execute([Chunk(request, 1)])
    assert len(told) == triton.model.num_layers


@pytest.mark.parametrize("max_running", [1, 2, 3, 8, 64, 65, 256, 1000])
def test_bucket_sizes(max_running):
    sizes = bucket_sizes(max_running)
    assert sizes == sorted(set(sizes)) and sizes[-1] == max_running
    assert all(np.diff(sizes) <= np.maximum(4, np.array(sizes[:-1]) // 1))
    padded = [next(size for size in sizes if size >= count) / count for count in range(9, max_running + 1)]
    assert max(padded, default=1) < 1.9 and len(sizes) < 40


def test_graphs_are_made_from_the_largest_down(parts):
    _, triton = parts
    made = []

    class Device(FakeDevice):
        def capture(self, work):
            made.append(time.monotonic())
            return super().capture(work)

    shape = (8, triton.model.num_layers, 2, triton.model.num_kv_heads, 4, triton.model.head_dim)
    runner = CudaRunner(triton, torch.zeros(shape), 4, 9, Device())
    runner.capture(9, 32)
    graphs = runner._graphs
    assert len(made) == len(bucket_sizes(9)) == 5
    for count, size in ((1, 1), (3, 4), (5, 8), (9, 9)):
        assert len(graphs.find(count).logits) == size
    assert graphs.find(10) is None
    # All write to one buffer of logits.
    assert len({graphs.find(count).logits.data_ptr() for count in (1, 3, 9)}) == 1
