"""Calibrating workers over the engine: measured once, then found in a file; and what else can happen."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest

from memserve.errors import Unavailable
from memserve.messages import (
    NO_CACHED_TOKENS,
    BlockRefs,
    CacheCommand,
    CacheReport,
    Failed,
    FinishReason,
    Load,
    Measure,
    Measured,
    MeasureVerb,
    Offer,
    Prefill,
    Prefilled,
    Ready,
    Release,
    Repeat,
    Tier,
    ToWorker,
    num_packed,
)
from memserve.router.calibration import measured_worker, models
from memserve.router.calibration.accuracy import AccuracyPoint, measure_accuracy, plan_lengths, summary
from memserve.router.calibration.measured_worker import Worker
from memserve.router.calibration.measurements import Measurements
from memserve.router.calibration.models import QUICK, calibration_folder, cost_models, find_models
from memserve.router.calibration.plan import make_model, shape_of
from memserve.router.dispatcher import Dispatcher
from memserve.router.engine import ServingEngine
from memserve.router.scheduling.cost_model import CostModel, Operators, Ramp
from memserve.router.scheduling.predictor import Predictor
from tests.router.worker_configs import make_worker

TRUTH = Operators(rows=Ramp((0, 16), (0.1, 0.05)), fixed_ms=3.0, pair_ms=5e-5, context_ms=6e-4, draw_ms=0.5)
BLOCK_BYTES = 1000


class Workers:
    """Several workers in one object, which take exactly as long as TRUTH says."""

    def __init__(self, *instances: str, num_threads: dict[str, int] | None = None) -> None:
        threads = num_threads or {}
        self.plan = tuple(
            msgspec.structs.replace(
                make_worker(name), max_model_len=4096, max_batch_tokens=512, threads=threads.get(name, 1)
            )
            for name in instances
        )
        self.engine = ServingEngine(Dispatcher(), self.plan)
        self.engine.connect(self.receive)
        self.asked: list[tuple[str, ToWorker]] = []
        self.silent: set[str] = set()
        self.errors: Iterator[str | None] = iter(())
        self.was_calibrating: set[bool] = set()
        for config in self.plan:
            ready = Ready(600, 16, 4096, "fingerprint", "cpu", "float32", 0.0)
            self.engine.on_worker_up(config, 0, ready)

    def receive(self, instance: str, message: ToWorker) -> None:
        if isinstance(message, Measure | Prefill | CacheCommand):
            self.asked.append((instance, message))
            self.was_calibrating.add(self.engine.is_calibrating)
            if instance in self.silent:
                asyncio.get_running_loop().call_soon(self.engine.on_worker_down, instance, 0, "killed")
            else:
                asyncio.get_running_loop().call_soon(self.answer, instance, message)

    def answer(self, instance: str, message: Measure | Prefill | CacheCommand) -> None:
        if isinstance(message, Prefill):
            answer = Prefilled(
                message.request_id, 0, 1, None, None, NO_CACHED_TOKENS, FinishReason.LENGTH, None, Load()
            )
        elif isinstance(message, CacheCommand):
            answer = CacheReport(message.command_id)
        else:
            answer = self.measure(instance, message)
        self.engine.on_worker_message(instance, 0, answer)

    def measure(self, instance: str, command: Measure) -> Measured:
        if (error := next(self.errors, None)) is not None:
            return Measured(command.command_id, error=error)
        repeats: tuple[Repeat, ...] = ()
        num_bytes, refs = 0, None
        match command.verb:
            case MeasureVerb.STEP:
                assert command.step is not None
                repeats = (Repeat(TRUTH.step_ms(shape_of(command.step))),) * command.num_repeats
            case MeasureVerb.LEND:
                refs = BlockRefs(
                    instance, 0, command.tier, (0,) * command.num_blocks, (0,) * command.num_blocks
                )
            case MeasureVerb.PULL:
                assert command.refs is not None and command.refs.instance != instance
                num_bytes = len(command.refs.blocks) * BLOCK_BYTES
                repeats = (Repeat(0.5 + num_bytes / 1e5),) * command.num_repeats
            case MeasureVerb.WAITS:
                repeats = (Repeat(0.0, 0.0),)
        return Measured(command.command_id, repeats, num_bytes, refs)

    def count(self) -> Counter[tuple[str, str]]:
        """How often each was asked for what."""
        verbs = [(name, m.verb if isinstance(m, Measure) else type(m).__name__) for name, m in self.asked]
        return Counter(verbs)


# --- models ---


async def test_measured_once_then_found_in_a_file(tmp_path: Path) -> None:
    # 1. The first start measures one worker of the kind, and a pull from the other.
    first = Workers("prefill-0", "decode-0")
    found = await find_models(first.engine, first.plan, tmp_path, QUICK)
    assert {one.source for one in found.values()} == {"measured"} and list(found) == ["prefill-0", "decode-0"]
    counts = first.count()
    assert counts["prefill-0", "step"] > 20 and counts["decode-0", "step"] == 0
    assert counts["prefill-0", "pull"] == counts["decode-0", "lend"] > 1
    assert counts["prefill-0", "Prefill"] == 3 and counts["prefill-0", "CacheCommand"] == 1
    assert first.was_calibrating == {True} and not first.engine.is_calibrating

    # 2. It has learned what the worker is.
    model = found["prefill-0"].model
    assert found["prefill-0"].held_out is not None and found["prefill-0"].held_out.p95 < 0.03
    assert model.operators.fixed_ms + model.operators.draw_ms == pytest.approx(3.5, rel=0.1)
    assert model.links.from_device.latency_ms == pytest.approx(0.5)
    assert model.links.from_device.bytes_per_ms == pytest.approx(1e5)

    # 3. The next start asks no worker anything.
    second = Workers("prefill-0", "decode-0", "decode-1")
    assert await cost_models(second.engine, second.plan, tmp_path) == dict.fromkeys(
        ("prefill-0", "decode-0", "decode-1"), model
    )
    assert second.asked == []

    # 4. Unless it is to.
    again = await find_models(second.engine, second.plan, tmp_path, QUICK, reuse=False)
    assert again["decode-1"].source == "measured" and second.asked


async def test_each_kind_is_measured(tmp_path: Path) -> None:
    workers = Workers("prefill-0", "decode-0", "decode-1", num_threads={"decode-0": 2, "decode-1": 2})
    found = await find_models(workers.engine, workers.plan, tmp_path, QUICK)
    measured = {name for name, verb in workers.count() if verb == "step"}
    assert measured == {"prefill-0", "decode-0"}
    assert [one.model.name for one in found.values()] == ["cpu-float32-1", "cpu-float32-2", "cpu-float32-2"]
    assert len(list(tmp_path.iterdir())) == 2


async def test_off_is_a_guess_by_one_step() -> None:
    workers = Workers("prefill-0", "decode-0")
    found = await find_models(workers.engine, workers.plan, None)
    assert {one.source for one in found.values()} == {"guess"}
    assert workers.count() == {("prefill-0", "step"): 1}
    step = shape_of(models._GUESS_BY)
    assert found["decode-0"].model.operators.step_ms(step) == pytest.approx(TRUTH.step_ms(step))


async def test_a_worker_that_dies_is_guessed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    workers = Workers("prefill-0")
    workers.silent.add("prefill-0")
    with caplog.at_level(logging.WARNING):
        found = await find_models(workers.engine, workers.plan, tmp_path, QUICK)
    assert found["prefill-0"].source == "guess" and "a guess is used" in caplog.text
    assert Predictor(found["prefill-0"].model).prefill_ms(100, 0) > 0
    assert list(tmp_path.iterdir()) == [] and not workers.engine.is_calibrating


async def test_requests_that_came_before_are_waited_for(tmp_path: Path) -> None:
    workers = Workers("prefill-0")
    workers.errors = iter(["requests are running"] * 2)
    found = await find_models(workers.engine, workers.plan, tmp_path, QUICK)
    assert found["prefill-0"].source == "measured"


async def test_no_requests_are_taken_meanwhile() -> None:
    workers = Workers("prefill-0", "decode-0")
    assert workers.engine.ready()
    workers.engine.is_calibrating = True
    assert not workers.engine.ready()
    with pytest.raises(Unavailable):
        workers.engine.check_room(1)


def test_the_folder_that_is_asked_for(tmp_path: Path) -> None:
    assert calibration_folder("off") is None
    assert calibration_folder(str(tmp_path)) == tmp_path
    default = calibration_folder(None)
    assert default is not None and default.parts[-2:] == ("memserve", "calibration")


# --- measurements ---


async def test_a_prefill_is_timed_and_released() -> None:
    sent: list[ToWorker] = []
    now = iter((10.0, 10.25))
    measurements = Measurements(lambda instance, message: sent.append(message), lambda: next(now))
    task = asyncio.create_task(measurements.prefill("p", np.arange(5, dtype=np.int32), "salt"))
    await asyncio.sleep(0)
    (prefill,) = sent
    assert isinstance(prefill, Prefill) and prefill.cache_salt == "salt" and prefill.sampling.max_tokens == 1
    assert num_packed(prefill.token_ids) == 5
    offer = Offer(BlockRefs("p", 0, Tier.DEVICE, (0,), (1,)), 5)
    answer = Prefilled(prefill.request_id, 0, 1, None, None, NO_CACHED_TOKENS, None, offer, Load())
    assert not measurements.take("p", msgspec.structs.replace(answer, request_id="a client's"))
    assert measurements.take("other", answer) and not task.done()
    assert measurements.take("p", answer)
    assert (await task) == (250.0, 0)
    assert sent[1:] == [Release(prefill.request_id, 0)]
    assert not measurements.take("p", answer)


@pytest.mark.parametrize("how", ["failed", "down"])
async def test_a_prefill_that_fails_is_none(how: str) -> None:
    sent: list[ToWorker] = []
    measurements = Measurements(lambda instance, message: sent.append(message))
    task = asyncio.create_task(measurements.prefill("p", np.arange(5, dtype=np.int32), ""))
    await asyncio.sleep(0)
    if how == "failed":
        assert measurements.take("p", Failed(sent[0].request_id, 0, "too long"))  # type: ignore[union-attr]
    else:
        measurements.on_down("other")
        measurements.on_down("p")
    assert await task is None


# --- accuracy ---


def the_model(workers: Workers) -> CostModel:
    return make_model(workers.plan[0], TRUTH)


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process always had a core, however busy the machine is: no repeat is made in hope of quiet."""
    monkeypatch.setattr(measured_worker, "read_waits", lambda: {"1": 0.0})


@pytest.mark.usefixtures("quiet")
async def test_points_are_of_real_prefills() -> None:
    workers = Workers("prefill-0")
    worker, predictor = Worker(workers.engine, workers.plan[0]), Predictor(the_model(workers))
    heard: list[AccuracyPoint] = []
    points = await measure_accuracy(worker, predictor, [40, 100], num_repeats=2, on_point=heard.append)
    assert points == heard and [point.num_tokens for point in points] == [40] * 3 + [100] * 5
    prefills = [m for _, m in workers.asked if isinstance(m, Prefill)]
    shared = [num_packed(m.token_ids) for m in prefills]
    assert {17, 33, 49, 65, 81} <= set(shared), "what is cached before the prompts"
    assert {39, 40, 41, 99, 100, 101} & set(shared) == {40, 41, 100, 101}
    for point in points:
        assert point.predicted_ms == predictor.prefill_ms(point.num_tokens, point.num_cached)
        assert point.num_repeats >= 2
    assert len({bytes(m.token_ids) for m in prefills}) == len(prefills), "a prompt twice would be cached"


async def test_a_worker_that_caches_nothing_has_one_ratio() -> None:
    workers = Workers("prefill-0")
    config = msgspec.structs.replace(workers.plan[0], caches=False)
    worker = Worker(workers.engine, config)
    points = await measure_accuracy(worker, Predictor(the_model(workers)), [40, 100], num_repeats=1)
    assert [(point.num_tokens, point.num_cached) for point in points] == [(40, 0), (100, 0)]


def test_lengths_up_to_what_fits() -> None:
    predictor = Predictor(the_model(Workers("prefill-0")))
    assert plan_lengths(1016, predictor) == [50, 120, 300, 700, 1000]
    assert plan_lengths(720, predictor) == [50, 120, 300, 700]
    assert plan_lengths(36, predictor) == [20]
    assert plan_lengths(1000, predictor, most=2) == [50, 120]
    slow = msgspec.structs.replace(TRUTH, rows=Ramp((0,), (20.0,)))
    slow_model = msgspec.structs.replace(predictor.model, operators=slow)
    assert plan_lengths(1000, Predictor(slow_model)) == [50, 120]


def test_errors_are_relative_to_what_was_measured() -> None:
    points = [AccuracyPoint(10, 0, predicted, 10.0, 10.0, 5, 5) for predicted in (9.0, 10.0, 13.0)]
    assert [point.error for point in points] == pytest.approx([-0.1, 0.0, 0.3])
    assert summary(points).median == pytest.approx(0.1)
