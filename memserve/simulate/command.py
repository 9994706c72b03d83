"""`memserve simulate`: policies on a trace, for fleets that this machine cannot hold. Parse → run → print."""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from memserve.bench.option_types import OUTPUT, PICTURE
from memserve.config import PolicyName

if TYPE_CHECKING:
    from memserve.router.scheduling.cost_model import CostModel
    from memserve.simulate.traces import Trace

DEFAULT_CACHE_TOKENS = 500_000
COUNT = click.IntRange(1, 1024)


class _Number(click.FloatRange):
    """A number in a range. A nan is in none, though click's own lets it pass."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """See `click.ParamType`."""
        number = super().convert(value, param, ctx)
        if math.isnan(number):
            self.fail("nan is no number", param, ctx)
        return number


POLICY_NAMES: tuple[PolicyName, ...] = ("random", "round-robin", "least-load", "session", "prompt-tree")
TRANSFERS = ("request", "chunk", "layer")


@click.command()
@click.option(
    "--trace",
    "path",
    required=True,
    type=click.Path(exists=True, path_type=Path),
    help="A Mooncake trace or sessions (.jsonl, .jsonl.gz, a folder), or the JSON report of a run of "
    "bench serve, which repeats it.",
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
    "cache_sizes",
    multiple=True,
    type=click.IntRange(1, 10**9),
    help="Tokens that a worker's pool holds [default: 500000]; again for other sizes.",
)
@click.option(
    "--max-running", default=256, show_default=True, type=COUNT, help="Requests on a worker at once."
)
@click.option("--policy", "policies", multiple=True, type=click.Choice(POLICY_NAMES), help="Default: all.")
@click.option("--bound/--no-bound", default=True, help="Also an unlimited shared cache with free transfers.")
@click.option(
    "--load",
    "loads",
    multiple=True,
    type=_Number(0.001, 100.0),
    help="Stretch the times so that computing every prompt whole would keep the prefill side so busy (0.5); "
    "again for other loads.",
)
@click.option(
    "--rate",
    type=_Number(1e-6, 1e6),
    help="Requests a second, for a trace without times [default: 1].",
)
@click.option("--limit", type=click.IntRange(1), help="Only so many rows, or sessions, of the trace.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0), help="Of arrivals and choices.")
@click.option(
    "--tokenizer",
    type=click.Path(exists=True, path_type=Path),
    help="tokenizer.json or its folder, for text.",
)
@click.option("--block-size", type=click.IntRange(1, 4096), help="Tokens [default: 16; of Mooncake's, 512].")
@click.option(
    "--transfer", default="layer", show_default=True, type=click.Choice(TRANSFERS), help="As in serve."
)
@click.option(
    "--overhead-ms",
    default=0.0,
    show_default=True,
    type=_Number(0, 1e6),
    help="What HTTP and tokenising add to each request: measured elsewhere.",
)
@click.option("--json", "json_path", type=OUTPUT, metavar="FILE", help="Write the reports here.")
@click.option("--plot", "plot_path", type=PICTURE, metavar="FILE", help="Draw them here (.png, .svg, .pdf).")
def simulate(
    prefill: int | None,
    decode: int | None,
    colocated: int | None,
    instance: str,
    cache_sizes: tuple[int, ...],
    policies: tuple[PolicyName, ...],
    bound: bool,
    loads: tuple[float, ...],
    json_path: Path | None,
    plot_path: Path | None,
    **options: Any,
) -> None:
    """Simulate policies on a trace of requests.

    The dispatcher, its policies and the workers' schedulers are those of the server; what steps and copies
    take comes from a cost model.
    """
    import msgspec

    from memserve.errors import WorkloadError
    from memserve.simulate.report import simulate as run
    from memserve.simulate.report import table
    from memserve.simulate.simulation import Setup

    # pulls that come too late are part of what is simulated, and counted
    logging.getLogger("memserve").addHandler(logging.NullHandler())
    model = read_model(instance)
    if colocated is not None and (prefill is not None or decode is not None):
        raise click.UsageError("--colocated excludes --prefill and --decode")
    num_colocated = colocated or 0
    num_prefill, num_decode = (0, 0) if num_colocated else (prefill or 8, decode or 8)
    cache_sizes = cache_sizes or (DEFAULT_CACHE_TOKENS,)
    trace = _read(options, min(cache_sizes))
    names: tuple[PolicyName, ...] = policies or POLICY_NAMES
    reports = []
    for load in loads or (None,):
        try:
            loaded = trace if load is None else at_load(trace, model, num_prefill or num_colocated, load)
        except WorkloadError as error:
            raise click.UsageError(f"--load {load:g}: {error}") from error
        for cache_tokens in cache_sizes:
            setup = Setup(
                model=model,
                num_prefill=num_prefill,
                num_decode=num_decode,
                num_colocated=num_colocated,
                cache_tokens=cache_tokens,
                max_running=options["max_running"],
                transfer=options["transfer"],
                overhead_ms=options["overhead_ms"],
                seed=options["seed"],
            )
            setups = [replace(setup, policy=name) for name in names]
            if bound:
                setups.append(replace(setup, is_ideal=True))
            try:
                group = [run(each, loaded, load) for each in setups]
            except WorkloadError as error:
                raise click.UsageError(f"--trace {options['path']}: {error}") from error
            click.echo(table(group))
            reports += group
    if json_path is not None:
        try:
            json_path.write_bytes(msgspec.json.format(msgspec.json.encode(reports), indent=2))
        except OSError as error:
            raise click.ClickException(f"--json {json_path} cannot be written: {error.strerror}") from error
    if plot_path is not None:
        from memserve.simulate.plots import plot_policies

        try:
            plot_policies(reports, plot_path)
        except ImportError as error:
            raise click.UsageError("--plot needs matplotlib: pip install 'memserve[bench]'") from error
        except OSError as error:
            raise click.ClickException(f"--plot {plot_path} cannot be written: {error.strerror}") from error


def at_load(trace: Trace, model: CostModel, num_workers: int, load: float) -> Trace:
    """The trace with its times stretched, so that computing every prompt whole would take a share `load` of
    the prefill side's time. Raises WorkloadError where it has no times.
    """
    from memserve.router.scheduling.predictor import Predictor

    predictor = Predictor(model)
    return trace.at_load(load, num_workers, lambda num_tokens: predictor.prefill_ms(num_tokens, 0))


def read_model(instance: str) -> CostModel:
    """A built-in one by its name, or a calibration file's. Raises click.UsageError."""
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


def _read(options: dict[str, Any], cache_tokens: int) -> Trace:
    from memserve.errors import MemserveError
    from memserve.simulate.traces import read_trace

    path = options["path"]
    try:
        trace = read_trace(
            path,
            rate=options["rate"],
            seed=options["seed"],
            limit=options["limit"],
            tokenizer=options["tokenizer"],
            block_size=options["block_size"],
        )
    except MemserveError as error:
        raise click.UsageError(f"--trace {path} cannot be read: {error}") from error
    longest = max(num_prompt + num_new for num_prompt, num_new in trace.lengths())
    if longest > cache_tokens // trace.block_size * trace.block_size:
        raise click.UsageError(f"--cache-tokens {cache_tokens}: a request of the trace has {longest} tokens")
    return trace
