"""`memserve calibrate`: start the workers, calibrate them, hold the cost models against real prefills, stop.

The log goes to stderr, the result to stdout: a table for each kind of worker, or JSON. A file that is there
already is replaced, or with `reuse` checked as it is.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import setproctitle
import uvloop
from rich.console import Console
from rich.table import Table

from memserve.config import ServeConfig, WorkerConfig
from memserve.errors import ConfigError
from memserve.model_config import load_model_config
from memserve.model_files import resolve_model, served_model_name
from memserve.router.app import INTERRUPTED, StopSignals, start_workers, stop_workers
from memserve.router.calibration.accuracy import AccuracyPoint, measure_accuracy, plan_lengths, summary
from memserve.router.calibration.measured_worker import NotMeasured, Worker
from memserve.router.calibration.models import NORMAL, QUICK, Found, calibration_folder, find_models
from memserve.router.calibration.plan import Kind
from memserve.router.dispatcher import Dispatcher
from memserve.router.display import Display, log_through
from memserve.router.engine import ServingEngine
from memserve.router.scheduling.cost_fit import Errors
from memserve.router.scheduling.cost_model import CostModel
from memserve.router.scheduling.predictor import Predictor
from memserve.router.supervision.machine import read_machine
from memserve.router.supervision.memory import plan_workers
from memserve.router.supervision.supervisor import Supervisor
from memserve.router.supervision.transports import check_allocator

logger = logging.getLogger(__name__)

_PICTURES = (".png", ".pdf", ".svg")


@dataclass(frozen=True, slots=True)
class CalibrateOptions:
    """What is asked for beside the server's options. `quick`: fewer and shorter points."""

    quick: bool = False
    reuse: bool = False
    as_json: bool = False
    plot: Path | None = None


class KindReport(msgspec.Struct, frozen=True):
    """One kind of worker. `source`: "measured", "file" or "guess". `held_out_steps` and `prefills_error` are
    relative errors, of single steps that were not fitted to, and of `prefills`.
    """

    kind: str
    instances: tuple[str, ...]
    source: str
    held_out_steps: Errors | None
    prefills_error: Errors | None
    prefills: tuple[AccuracyPoint, ...]
    model: CostModel


class Report(msgspec.Struct, frozen=True):
    """Everything, as `--json` prints it."""

    model: str
    kinds: tuple[KindReport, ...]


def run(config: ServeConfig, options: CalibrateOptions) -> int:
    """Do it; the process's exit status. Raises StartupError."""
    setproctitle.setproctitle("memserve: calibrate")
    console = Console(stderr=True)
    log_through(console, config.log_level)
    if options.plot is not None:
        _check_plot(options.plot)
    folder = resolve_model(config.model, config.revision, config.load_format)
    machine = read_machine(with_gpus=config.device != "cpu")
    plan = plan_workers(config, load_model_config(folder), folder, machine)
    check_allocator(plan, os.environ)
    report = uvloop.run(_calibrate(config, options, plan, console))
    if report is None:
        return INTERRUPTED
    if options.as_json:
        sys.stdout.write(msgspec.json.format(msgspec.json.encode(report), indent=2).decode() + "\n")
    else:
        _print(report, Console())
    if options.plot is not None:
        _plot(report, options.plot)
        logger.info("plotted in %s", options.plot)
    return 0


async def _calibrate(
    config: ServeConfig, options: CalibrateOptions, plan: tuple[WorkerConfig, ...], console: Console
) -> Report | None:
    """The report; None if a signal came first."""
    name = config.served_model_name or served_model_name(config.model)
    display = Display(config, plan, name, console)
    engine = ServingEngine(Dispatcher(), plan, on_progress=display.on_progress)
    supervisor = Supervisor(plan, config, engine)
    engine.connect(supervisor.send)
    stop = StopSignals()
    kinds: list[KindReport] = []

    async def measure() -> None:
        folder = calibration_folder(config.calibration)
        effort = QUICK if options.quick else NORMAL
        found = await find_models(engine, plan, folder, effort, reuse=options.reuse)
        for kind in dict.fromkeys(map(Kind.of, plan)):
            configs = [worker for worker in plan if Kind.of(worker) == kind]
            kinds.append(await _report(engine, configs, found[configs[0].instance], options))

    try:
        if not await start_workers(supervisor, stop, display):
            return None
        engine.is_calibrating = True
        if not await stop.or_first(measure()):
            return None
        return Report(name, tuple(kinds))
    except NotMeasured as error:
        raise ConfigError(f"cannot be measured: {error}") from error
    finally:
        display.close()
        await stop_workers(supervisor, stop)


async def _report(
    engine: ServingEngine, configs: Sequence[WorkerConfig], found: Found, options: CalibrateOptions
) -> KindReport:
    worker, predictor = Worker(engine, configs[0]), Predictor(found.model)
    max_tokens = min(configs[0].max_model_len - 1, worker.num_blocks * configs[0].block_size // 2)
    lengths = plan_lengths(max_tokens, predictor, most=3 if options.quick else None)
    points = await measure_accuracy(
        worker,
        predictor,
        lengths,
        num_repeats=3 if options.quick else 5,
        on_point=lambda point: logger.info(
            "%s: %d tokens, %d cached: predicted %.1f ms, measured %.1f ms",
            found.model.name,
            point.num_tokens,
            point.num_cached,
            point.predicted_ms,
            point.measured_ms,
        ),
    )
    return KindReport(
        kind=found.model.name,
        instances=tuple(config.instance for config in configs),
        source=found.source,
        held_out_steps=found.held_out,
        prefills_error=summary(points) if points else None,
        prefills=tuple(points),
        model=found.model,
    )


def _print(report: Report, console: Console) -> None:
    for kind in report.kinds:
        console.print(table(kind))
        for title, errors in (("steps held out", kind.held_out_steps), ("prefills", kind.prefills_error)):
            if errors is not None:
                console.print(f"{title}: error {errors.median:.1%} in the median, P95 {errors.p95:.1%}")
        console.print()


def table(kind: KindReport) -> Table:
    """Predicted against measured, a row a prompt."""
    title = f"{kind.kind}: {', '.join(kind.instances)} (cost model: {kind.source})"
    drawn = Table(title=title, title_justify="left")
    for column in ("tokens", "cached", "predicted ms", "measured ms", "error", "by the clock ms", "quiet"):
        drawn.add_column(column, justify="right")
    for point in kind.prefills:
        drawn.add_row(
            f"{point.num_tokens}",
            f"{point.num_cached / point.num_tokens:.0%}",
            f"{point.predicted_ms:.1f}",
            f"{point.measured_ms:.1f}",
            f"{point.error:+.1%}",
            f"{point.wall_ms:.1f}",
            f"{point.num_quiet}/{point.num_repeats}",
        )
    return drawn


def _check_plot(path: Path) -> None:
    """Raises ConfigError before anything was started."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ConfigError("--plot needs matplotlib: pip install 'memserve[bench]'") from error
    if path.suffix not in _PICTURES:
        raise ConfigError(f"--plot: {path} is none of {', '.join(_PICTURES)}")
    if not path.resolve().parent.is_dir():
        raise ConfigError(f"--plot: there is no folder {path.resolve().parent}")


def _plot(report: Report, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5 * len(report.kinds)), layout="constrained")
    for number, kind in enumerate(report.kinds, start=1):
        axes = figure.add_subplot(len(report.kinds), 1, number)
        shares = sorted({round(point.num_cached / point.num_tokens, 1) for point in kind.prefills})
        for index, share in enumerate(shares):
            points = [p for p in kind.prefills if round(p.num_cached / p.num_tokens, 1) == share]
            lengths = [point.num_tokens for point in points]
            color = f"C{index}"
            axes.plot(lengths, [p.predicted_ms for p in points], color=color, label=f"{share:.0%} cached")
            axes.plot(lengths, [p.measured_ms for p in points], "o", color=color)
        axes.set(
            xscale="log",
            yscale="log",
            xlabel="tokens of the prompt",
            ylabel="ms to the first token",
            title=f"{report.model}, {kind.kind}: predicted (lines), measured (dots)",
        )
        axes.legend()
    try:
        figure.savefig(path)
    except OSError as error:
        raise ConfigError(f"--plot: {path} cannot be written: {error.strerror}") from error
