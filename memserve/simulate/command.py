"""`memserve simulate`: policies on a trace, for fleets that this machine cannot hold. Parse → run → print."""

from __future__ import annotations

import math
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from memserve.router.scheduling.cost_model import CostModel
    from memserve.simulate.report import Report
    from memserve.simulate.traces import Trace

COUNT = click.IntRange(1, 1024)
OUTPUT = click.Path(dir_okay=False, writable=True, path_type=Path)


def _a_number(context: click.Context, parameter: click.Parameter, value: float | None) -> float | None:
    if value is not None and math.isnan(value):
        raise click.BadParameter("nan is no load")
    return value


def _writable(context: click.Context, parameter: click.Parameter, value: Path | None) -> Path | None:
    """Found out before the work, not after it."""
    if value is not None and not value.parent.is_dir():
        raise click.BadParameter(f"there is no folder {value.parent}")
    return value


def _drawable(context: click.Context, parameter: click.Parameter, value: Path | None) -> Path | None:
    if value is not None and value.suffix not in (".png", ".svg", ".pdf"):
        raise click.BadParameter(f"{value} is no .png, .svg or .pdf")
    return _writable(context, parameter, value)


POLICY_NAMES = ("random", "round-robin", "least-load", "session", "prompt-tree")


@click.command()
@click.option(
    "--trace",
    "path",
    required=True,
    type=click.Path(exists=True, path_type=Path),
    help="A Mooncake trace (.jsonl, .jsonl.gz), or a folder with sessions.jsonl.gz.",
)
@click.option("--prefill", type=COUNT, help="Prefill workers [default: 8].")
@click.option("--decode", type=COUNT, help="Decode workers [default: 8].")
@click.option("--colocated", type=COUNT, help="Colocated workers, in place of both.")
@click.option(
    "--instance",
    default="h200-llama-3-8b",
    show_default=True,
    help="What a worker is: h200-llama-3-8b, h800-llama-2-13b, or a calibration file.",
)
@click.option(
    "--cache-tokens",
    default=500_000,
    show_default=True,
    type=click.IntRange(1, 10**9),
    help="Tokens that a worker's pool holds.",
)
@click.option("--policy", "policies", multiple=True, type=click.Choice(POLICY_NAMES), help="Default: all.")
@click.option("--bound/--no-bound", default=True, help="Also an unlimited shared cache with free transfers.")
@click.option(
    "--load",
    type=click.FloatRange(0.001, 100.0),
    callback=_a_number,
    help="Stretch the times so that computing every prompt whole would keep the prefill side so busy (0.5).",
)
@click.option("--limit", type=click.IntRange(1), help="Only so many requests, or sessions, of the trace.")
@click.option("--seed", default=0, show_default=True)
@click.option("--json", "json_path", type=OUTPUT, callback=_writable, help="Write the reports here.")
@click.option(
    "--plot", "plot_path", type=OUTPUT, callback=_drawable, help="Draw them here (.png, .svg, .pdf)."
)
def simulate(
    path: Path,
    prefill: int | None,
    decode: int | None,
    colocated: int | None,
    instance: str,
    cache_tokens: int,
    policies: tuple[str, ...],
    bound: bool,
    load: float | None,
    limit: int | None,
    seed: int,
    json_path: Path | None,
    plot_path: Path | None,
) -> None:
    """Simulate policies on a trace of requests."""
    import msgspec

    from memserve.simulate.report import simulate as run
    from memserve.simulate.report import table
    from memserve.simulate.simulation import Setup

    model = _model(instance)
    if colocated is not None and (prefill is not None or decode is not None):
        raise click.UsageError("--colocated excludes --prefill and --decode")
    num_colocated = colocated or 0
    num_prefill, num_decode = (0, 0) if num_colocated else (prefill or 8, decode or 8)
    reports = []
    for policy in (*(policies or POLICY_NAMES), *(["bound"] if bound else [])):
        trace = _read(path, limit, seed)
        longest = max(job.num_tokens + job.num_new_tokens for job in trace.all_jobs())
        if longest > cache_tokens:
            raise click.UsageError(
                f"--cache-tokens {cache_tokens}: a request of the trace has {longest} tokens"
            )
        if load is not None:
            trace = at_load(trace, model, num_prefill or num_colocated, load)
        setup = Setup(
            model=model,
            num_prefill=num_prefill,
            num_decode=num_decode,
            num_colocated=num_colocated,
            policy="prompt-tree" if policy == "bound" else policy,
            cache_tokens=cache_tokens,
            is_ideal=policy == "bound",
            seed=seed,
        )
        reports.append(run(setup, trace))
    click.echo(table(reports))
    if json_path is not None:
        json_path.write_bytes(msgspec.json.format(msgspec.json.encode(reports), indent=2))
    if plot_path is not None:
        _plot(reports, plot_path)


def at_load(trace: Trace, model: CostModel, num_workers: int, load: float) -> Trace:
    """The trace with its times stretched, so that computing every prompt whole would take a share `load` of
    the prefill side's time.
    """
    from memserve.router.scheduling.predictor import Predictor

    predictor = Predictor(model)
    work_s = sum(predictor.prefill_ms(job.num_tokens, 0) for job in trace.all_jobs()) / 1e3
    span_s = max(job.at_s for job in trace.jobs)
    return trace.stretched(work_s / (num_workers * load) / span_s) if span_s > 0 else trace


def _model(instance: str) -> CostModel:
    import msgspec

    from memserve.router.scheduling.cost_model import from_json
    from memserve.router.scheduling.hardware import BUILT_IN

    if instance in BUILT_IN:
        return BUILT_IN[instance]()
    try:
        return from_json(Path(instance).read_bytes())
    except (OSError, msgspec.DecodeError) as error:
        names = ", ".join(BUILT_IN)
        raise click.UsageError(
            f"--instance {instance} is neither of {names} nor a calibration: {error}"
        ) from error


def _read(path: Path, limit: int | None, seed: int) -> Trace:
    import msgspec

    from memserve.simulate.traces import read_mooncake, read_sessions

    try:
        if path.is_dir():
            trace = read_sessions(path, rate=1.0, seed=seed, limit=limit)
        else:
            trace = read_mooncake(path, limit)
    except (OSError, EOFError, KeyError, UnicodeDecodeError, zlib.error, msgspec.DecodeError) as error:
        raise click.UsageError(f"--trace {path} cannot be read: {error}") from error
    if not trace.jobs:
        raise click.UsageError(f"--trace {path} has no requests")
    return trace


def _plot(reports: list[Report], path: Path) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise click.UsageError("--plot needs matplotlib: pip install 'memserve[bench]'") from error
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    names = [report.policy for report in reports]
    panels = {
        "TTFT, mean (ms)": [report.ttft_ms.mean for report in reports],
        "TTFT, P99 (ms)": [report.ttft_ms.p99 for report in reports],
        "prompt tokens not computed (%)": [100 * report.hit_rate for report in reports],
    }
    for index, (title, values) in enumerate(panels.items()):
        axes = figure.add_subplot(1, len(panels), index + 1)
        axes.barh(names, values)
        axes.invert_yaxis()
        axes.set_title(title, fontsize=10)
        if index:
            axes.set_yticklabels([])
        axes.set_xlim(0, 1.05 * max([value for value in values if math.isfinite(value)], default=1.0))
    figure.savefig(path)
