"""Cost models of the workers that are up: from a file of an earlier start, or measured now (MemServe §Cost
model).

    kinds of workers ─► file? ─► else measure the first worker of the kind: steps, pulls, swaps, requests
                                       ─► fit ─► check at steps held out ─► file

One worker at a time is measured, the others are idle; no requests are taken meanwhile. What is measured, and
what is made of it, is plan.py's. A worker that cannot be measured gets a guess
(scheduling/hardware.py), so that a server never fails to start for this.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from memserve.config import WorkerConfig
from memserve.messages import Measure, MeasureVerb, Repeat, StepSpec, Tier
from memserve.router.calibration.files import (
    Calibration,
    Key,
    default_folder,
    load,
    machine_name,
    save,
    torch_version,
)
from memserve.router.calibration.measured_worker import NotMeasured, Worker
from memserve.router.calibration.plan import (
    Kind,
    fit_link,
    fit_steps,
    is_hopeless,
    make_model,
    plan_copies,
    plan_steps,
    shape_of,
    too_long,
    typical_ms,
)
from memserve.router.engine import ServingEngine
from memserve.router.scheduling.cost_fit import Errors
from memserve.router.scheduling.cost_model import CostModel, Link
from memserve.router.scheduling.hardware import guess
from memserve.router.scheduling.predictor import Predictor
from memserve.router.supervision.machine import read_machine

logger = logging.getLogger(__name__)

Tokens = NDArray[np.int32]

_COPY_REPEATS = 5
_REQUEST_TOKENS = 24
# Steps of this length are repeated in fewer rounds.
_LONG_MS = 60.0
_LONG_ROUNDS = 3
_GUESS_BY = StepSpec(64)


class Effort(NamedTuple):
    """How much to measure: rounds over all steps of at most so many seconds for a kind of worker (two rounds
    in any case), and repeats of a small request.
    """

    max_rounds: int = 5
    max_s: float = 3.0
    num_requests: int = 7


NORMAL = Effort()
QUICK = Effort(max_rounds=2, max_s=1.0, num_requests=3)


class Found(NamedTuple):
    """Where a cost model came from: "file", "measured" or "guess"; `held_out` where it was checked."""

    model: CostModel
    source: str
    held_out: Errors | None = None


async def cost_models(
    engine: ServingEngine, plan: Sequence[WorkerConfig], folder: Path | None
) -> dict[str, CostModel]:
    """A cost model for each instance of `plan`, all of which are up; takes seconds the first time.

    Args:
        folder: where models are kept (`calibration_folder`); None = nothing is measured but one step each.
    """
    return {instance: found.model for instance, found in (await find_models(engine, plan, folder)).items()}


def calibration_folder(option: str | None) -> Path | None:
    """The folder that `--calibration` names: None for "off"; the default where nothing was said."""
    if option == "off":
        return None
    return default_folder(os.environ) if option is None else Path(option).expanduser()


async def find_models(
    engine: ServingEngine,
    plan: Sequence[WorkerConfig],
    folder: Path | None,
    effort: Effort = NORMAL,
    *,
    reuse: bool = True,
) -> dict[str, Found]:
    """As `cost_models`, with where each came from. `reuse` False: files are written, but not read."""
    kinds: defaultdict[Kind, list[WorkerConfig]] = defaultdict(list)
    for config in plan:
        kinds[Kind.of(config)].append(config)
    machine = "" if folder is None else await asyncio.to_thread(_machine, plan)
    engine.is_calibrating = True
    try:
        found: dict[str, Found] = {}
        for kind, configs in kinds.items():
            key = Key(machine, engine.fingerprint, kind, torch_version())
            one = await _find(engine, configs[0], plan, key, folder, effort, reuse=reuse)
            found.update({config.instance: one for config in configs})
        return found
    finally:
        engine.is_calibrating = False


async def _find(
    engine: ServingEngine,
    config: WorkerConfig,
    plan: Sequence[WorkerConfig],
    key: Key,
    folder: Path | None,
    effort: Effort,
    *,
    reuse: bool,
) -> Found:
    worker = Worker(engine, config)
    if folder is None:
        return Found(await _guess(worker), "guess")
    known = load(folder, key) if reuse else None
    if known is not None:
        return Found(known.model, "file", known.held_out)
    began_at = time.monotonic()
    try:
        peers = [other for other in plan if other.instance != config.instance]
        calibration = await _calibrate(worker, peers, key, effort)
    except NotMeasured as error:
        logger.warning("%s cannot be calibrated, a guess is used: %s", config.instance, error)
        return Found(await _guess(worker), "guess")
    took_s, held_out = time.monotonic() - began_at, calibration.held_out
    if held_out is not None:
        logger.info(
            "calibrated %s in %.1f s: %.0f %% off in the median at steps held out",
            key.kind.name,
            took_s,
            100 * held_out.median,
        )
    save(folder, calibration)
    return Found(calibration.model, "measured", held_out)


async def _guess(worker: Worker) -> CostModel:
    measured = None
    try:
        measured = shape_of(_GUESS_BY), typical_ms((await worker.step(_GUESS_BY, 3))[1:])
    except NotMeasured as error:
        logger.warning("%s did not measure a step: %s", worker.config.instance, error)
    config = worker.config
    kind = Kind.of(config)
    return make_model(config, guess(config.model, kind.device, config.threads, measured))


async def _calibrate(worker: Worker, peers: Sequence[WorkerConfig], key: Key, effort: Effort) -> Calibration:
    plan = plan_steps(worker.config, worker.num_blocks)
    times, held_out = await _measure_steps(worker, key.kind, plan.rows, plan.others, plan.held_out, effort)
    fitted = fit_steps(times, held_out)
    model = make_model(
        worker.config,
        fitted.operators,
        pull=await _pull_link(worker, peers, Tier.DEVICE),
        host_pull=await _pull_link(worker, peers, Tier.HOST),
        swap_in=await _swap_link(worker),
    )
    predicted_ms = Predictor(model).prefill_ms(_REQUEST_TOKENS, 0)
    requests = []
    for number in range(effort.num_requests):
        repeat, _ = await worker.prefill(worker.prompt(_REQUEST_TOKENS, number))
        requests.append(repeat)
    await worker.flush()
    if len(requests) > 1:
        request_ms = max(0.0, typical_ms(requests[1:]) - predicted_ms)
        model = msgspec.structs.replace(model, request_ms=request_ms)
    return Calibration(key, model, fitted.held_out)


Times = dict[StepSpec, list[Repeat]]


async def _measure_steps(
    worker: Worker,
    kind: Kind,
    rows: Sequence[StepSpec],
    others: Sequence[StepSpec],
    held_out: Sequence[StepSpec],
    effort: Effort,
    clock: Callable[[], float] = time.monotonic,
) -> tuple[Times, Times]:
    """Repeats of each step, in rounds over all of them, so that what disturbs does not disturb one alone.

    The first repeat of each is left out, as it makes what the others find made.
    """
    times: Times = {}
    deadline = clock() + effort.max_s
    for number in range(effort.max_rounds):
        for spec in (*rows, *others, *held_out) if number == 0 else tuple(times):
            if number == 0:
                if is_hopeless(kind, times, spec):
                    continue
            elif not _is_due(kind, number, typical_ms(times[spec]), is_late=clock() > deadline):
                continue
            repeats = await worker.step(spec, 2 if number == 0 else 1)
            times.setdefault(spec, []).append(repeats[-1])
    checks = {spec: times.pop(spec) for spec in held_out if spec in times}
    return times, checks


def _is_due(kind: Kind, round_number: int, ms: float, *, is_late: bool) -> bool:
    """Whether a step that was measured before is worth another repeat: long ones scatter less."""
    if too_long(kind, ms) or (is_late and round_number > 1):
        return False
    return round_number < _LONG_ROUNDS or ms < _LONG_MS


async def _pull_link(worker: Worker, peers: Sequence[WorkerConfig], tier: Tier) -> Link | None:
    """From a tier of one of the peers; None if that cannot be measured."""
    for peer in peers:
        source = Worker(worker.engine, peer)
        num_blocks = min(worker.num_blocks, source.num_blocks if tier is Tier.DEVICE else source.num_host)
        copies: dict[int, list[Repeat]] = {}
        try:
            for count in plan_copies(num_blocks, worker.block_bytes):
                lent = await source.ask(Measure(0, MeasureVerb.LEND, num_blocks=count, tier=tier))
                pull = Measure(0, MeasureVerb.PULL, 1 + _COPY_REPEATS, refs=lent.refs)
                pulled = await worker.ask(pull)
                copies[pulled.num_bytes] = list(pulled.repeats[1:])  # the first may have had to connect
        except NotMeasured as error:
            logger.info("no pull from %s was measured: %s", peer.instance, error)
            continue
        if (link := fit_link(copies)) is not None:
            return link
    return None


async def _swap_link(worker: Worker) -> Link | None:
    """From the own host tier."""
    copies: dict[int, list[Repeat]] = {}
    try:
        for count in plan_copies(min(worker.num_blocks, worker.num_host), worker.block_bytes):
            loaded = await worker.ask(Measure(0, MeasureVerb.SWAP_IN, _COPY_REPEATS, num_blocks=count))
            copies[loaded.num_bytes] = list(loaded.repeats)
    except NotMeasured as error:
        logger.debug("%s: no swap: %s", worker.config.instance, error)
    return fit_link(copies)


def _machine(plan: Sequence[WorkerConfig]) -> str:
    index = next((int(c.device.partition(":")[2]) for c in plan if c.device.startswith("cuda:")), None)
    machine = read_machine(with_gpus=index is not None)
    gpu = next((gpu.name for gpu in machine.gpus if gpu.index == index), None)
    return machine_name(len(machine.cpus), gpu)
