"""The command line: parse → frozen config → call. Nothing else happens here.

An option comes from the command line, else from the `--config` file (TOML, with the options' names as
keys), else from the defaults in config.py. Bad values are usage errors (status 2); a server that cannot
start says why in one line (status 1). Everything heavy is imported late, so that `--help` answers at once.
"""

from __future__ import annotations

import copy
import difflib
import math
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import click
import msgspec

from memserve import __version__
from memserve.bench.commands import bench
from memserve.config import (
    Caching,
    DeviceKind,
    DtypeName,
    Eviction,
    LoadFormat,
    LogLevel,
    PolicyName,
    ServeConfig,
    Transfer,
    TransportChoice,
    WorkerOptions,
)
from memserve.doctor.command import doctor
from memserve.errors import StartupError
from memserve.simulate.command import simulate
from memserve.sizes import parse_memory
from memserve.top.command import top

# A worker's heart beats once a second; two late beats on a busy machine are no death.
MIN_PING_DEADLINE_S = 3.0
# Far above what any machine can do: more is a slip of the pen, and tables are laid out for it at the start.
MAX_RUNNING = 16_384
MAX_BATCH_TOKENS = 1 << 20
# As long a `model` as a request may have.
MAX_NAME = 512
Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def main() -> None:
    """Parse the process's arguments and do what they say. Does not return."""
    cli(prog_name="memserve")


# Exit status where a signal ended the command, as shells have it for SIGINT.
INTERRUPTED = 130


class _Cli(click.Group):
    """Ctrl-C where a command does not deal with it: while it imports or reads files. (click's own status
    would be that of a failure.)
    """

    def invoke(self, ctx: click.Context) -> Any:
        """See `click.Group`."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            click.echo("memserve: stopped", err=True)
            ctx.exit(INTERRUPTED)


@click.group(cls=_Cli, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, message="memserve %(version)s")
def cli() -> None:
    """An OpenAI-compatible LLM server that joins context caching with disaggregated inference."""


cli.add_command(bench)
cli.add_command(doctor)
cli.add_command(simulate)
cli.add_command(top)

# --- values ------------------------------------------------------------------------------------------------


def _memory(context: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    """A size or a fraction, which stays text."""
    try:
        if value is not None:
            parse_memory(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error
    return value


def _devices(context: click.Context, parameter: click.Parameter, value: str | None) -> tuple[int, ...] | None:
    """GPU indices from "0,1"."""
    if value is None:
        return None
    indices = [index.strip() for index in value.split(",")]
    if not all(index.isdecimal() for index in indices):
        raise click.BadParameter(f"{value!r} is not a list of GPU indices, such as 0,1")
    return tuple(int(index) for index in indices)


def _seconds(context: click.Context, parameter: click.Parameter, value: float | None) -> float | None:
    if value is not None and not (math.isfinite(value) and value > 0):
        raise click.BadParameter("the number of seconds must be greater than 0")
    return value


def _ping_deadline(context: click.Context, parameter: click.Parameter, value: float | None) -> float | None:
    if value is not None and not (math.isfinite(value) and value >= MIN_PING_DEADLINE_S):
        raise click.BadParameter(f"must be at least {MIN_PING_DEADLINE_S:g} s: workers report once a second")
    return value


def _api_name(context: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    """What clients send as `model`, and terminals and logs show."""
    if value is not None and not (value.strip() and value.isprintable() and len(value) <= MAX_NAME):
        raise click.BadParameter(f"a name has 1 to {MAX_NAME} characters that can be printed")
    return value


def _folder_or_off(context: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    """Found out before the measurement that it is to keep."""
    if value is None or value == "off":
        return value
    if not value.strip():
        raise click.BadParameter("an empty name is no folder")
    try:
        path = Path(value).expanduser()
        while not path.exists() and path != path.parent:
            path = path.parent  # it will be made, in the nearest that is there
        is_folder = path.is_dir()
    except (OSError, RuntimeError, ValueError) as error:  # a name too long, an unknown ~user, a NUL
        raise click.BadParameter(str(error)) from error
    if not is_folder:
        raise click.BadParameter(f"{path} is no folder")
    return value


def _read_config(context: click.Context, parameter: click.Parameter, path: Path | None) -> None:
    """Make the file's values the defaults of the options, which click then checks like any other."""
    if path is None:
        return
    try:
        values = tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise click.BadParameter(f"{path}: {error}") from error
    known = {option.name for option in context.command.params if option.name and option is not parameter}
    defaults = {}
    for key, value in values.items():
        name = key.replace("-", "_")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; is {near[0].replace('_', '-')} meant?" if near else ""
            raise click.BadParameter(f"{path}: there is no option {key}{hint}")
        defaults[name] = ",".join(map(str, value)) if isinstance(value, list) else str(value)
    context.default_map = defaults


# --- options: each names a field of ServeConfig or WorkerOptions, which holds its default -------------------


def _option(name: str, help: str, **attributes: Any) -> Decorator:
    """An option without a default of its own: None means that nobody gave it."""
    for field in (*msgspec.structs.fields(ServeConfig), *msgspec.structs.fields(WorkerOptions)):
        if field.name == name.removeprefix("--").replace("-", "_") and field.default is not None:
            help += f" [default: {field.default}]"
    attributes.setdefault("metavar", None if isinstance(attributes.get("type"), click.Choice) else "N")
    return click.option(name, help=help, **attributes)


def _at_least(least: int) -> click.IntRange:
    return click.IntRange(min=least)


def _worker_options(role: str | None) -> Decorator:
    """The options of WorkerOptions: for all workers, or with a role's prefix for that role's."""
    prefix, whose = ("--", "a worker") if role is None else (f"--{role}-", f"a {role} worker")
    options = [
        _option(
            f"{prefix}devices",
            f"GPUs of {whose}, in turn: 0,1 [default: all].",
            metavar="LIST",
            callback=_devices,
        ),
        _option(
            f"{prefix}device-memory",
            f"KV pool of {whose}: a size (2GiB) or a fraction of what is free (0.5).",
            metavar="SIZE",
            callback=_memory,
        ),
        _option(
            f"{prefix}host-memory",
            f"DRAM of {whose} for KV that its pool has no room for: a size or a fraction [default: none].",
            metavar="SIZE",
            callback=_memory,
        ),
        _option(
            f"{prefix}max-batch-tokens",
            f"Most tokens in one step of {whose}.",
            type=click.IntRange(16, MAX_BATCH_TOKENS),
        ),
        _option(
            f"{prefix}max-running",
            f"Most requests that {whose} runs at once.",
            type=click.IntRange(1, MAX_RUNNING),
        ),
        _option(f"{prefix}threads", f"CPU threads of {whose} [default: an even share].", type=_at_least(1)),
    ]

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


COUNT = click.IntRange(1, 64)


@cli.command()
@_option("--model", "Folder, or name on the Hugging Face hub [default: a bundled model].", metavar="MODEL")
@_option("--revision", "Branch, tag or commit on the hub.", metavar="NAME")
@_option("--tokenizer", "Folder, file or hub name of another tokenizer.", metavar="MODEL")
@_option("--chat-template", "Jinja file instead of the model's chat template.", metavar="FILE")
@_option("--load-format", "dummy: random weights.", type=click.Choice(get_args(LoadFormat)))
@_option("--served-model-name", "Name in the API [default: the model's].", metavar="NAME", callback=_api_name)
@_option("--prefill", "Number of prefill workers [default: 1, or half of the GPUs].", type=COUNT)
@_option("--decode", "Number of decode workers [default: 1, or half of the GPUs].", type=COUNT)
@_option("--colocated", "Number of workers that do both instead.", type=COUNT)
@_option("--device", "Where the workers run.", type=click.Choice(get_args(DeviceKind)))
@_option("--dtype", "auto: bfloat16 if the hardware has it.", type=click.Choice(get_args(DtypeName)))
@_option("--block-size", "Tokens in a block of KV.", type=click.IntRange(1, 256))
@_option("--max-model-len", "Most tokens of prompt and answer [default: what fits].", type=_at_least(2))
@_option(
    "--transfer",
    "When a prompt's KV is pulled: after it is computed, or beside it, chunk by chunk or layer by layer.",
    type=click.Choice(get_args(Transfer)),
)
@_option(
    "--transport",
    "How KV gets from worker to worker: out of mapped memory (shm), or sent over gloo on loopback "
    "(torch_distributed; local users could disturb it), or out of GPU memory that its owner shares "
    "(cuda_ipc). auto: cuda_ipc on GPUs, else shm.",
    type=click.Choice(get_args(TransportChoice)),
)
@_option(
    "--cuda-graphs/--no-cuda-graphs",
    "Replay decode steps on a GPU from CUDA graphs, captured at start-up [default: replay].",
    metavar=None,
    default=None,
)
@_option(
    "--caching",
    "Where the KV of finished requests is kept for reuse: nowhere, on prefill workers, on both sides, or on "
    "both and what was generated goes back to the prefill side.",
    type=click.Choice(get_args(Caching)),
)
@_option(
    "--reuse-history-tokens/--no-reuse-history-tokens",
    "Read an answer that comes back in a later prompt as the tokens that were generated, so that their KV is "
    "found again, and not as its text would be tokenised [default: reuse, unless caching is off].",
    metavar=None,
    default=None,
)
@_option(
    "--eviction",
    "What goes first when there is no room: the least recently or the least frequently used.",
    type=click.Choice(get_args(Eviction)),
)
@_option(
    "--cache-ttl-s",
    "How long KV that nobody uses is kept [default: until there is no room].",
    type=float,
    callback=_seconds,
)
@_option(
    "--policy",
    "How workers are chosen for a request: by the predicted time to its first token, given who has cached "
    "what (prompt-tree), by its session, or without a look at caches.",
    type=click.Choice(get_args(PolicyName)),
)
@_option(
    "--seed",
    "Makes the seeds of requests that bring none repeatable, and dummy weights [default: none].",
    type=click.IntRange(0, 2**63 - 1),
)
@_option(
    "--calibration",
    "Folder that keeps what the first start has measured of the workers' speed; off: nothing is measured "
    "[default: ~/.cache/memserve/calibration].",
    metavar="FOLDER|off",
    callback=_folder_or_off,
)
@_worker_options(None)
@_worker_options("prefill")
@_worker_options("decode")
@_option("--host", "Address to listen on.", metavar="ADDRESS")
@_option("--port", "Port to listen on; 0 for any.", type=click.IntRange(0, 65535))
@_option("--max-waiting", "Requests that may queue before 429 is answered.", type=_at_least(1))
@_option("--drain-timeout-s", "How long running requests may finish.", type=float, callback=_seconds)
@_option("--request-timeout-s", "Longest life of one request.", type=float, callback=_seconds)
@_option("--ping-deadline-s", "Silence that costs a worker its life.", type=float, callback=_ping_deadline)
@_option("--log-level", "Least level that is logged.", type=click.Choice(get_args(LogLevel)))
@click.option(
    "--config",
    help="TOML file with any of these options; the command line wins.",
    metavar="FILE",
    type=click.Path(path_type=Path),
    callback=_read_config,
    is_eager=True,
    expose_value=False,
)
def serve(**options: Any) -> None:
    """Serve a model over an OpenAI-compatible HTTP API."""
    config = serve_config({name: value for name, value in options.items() if value is not None})
    try:
        from memserve.router.supervision.placement import check_roles

        check_roles(config)
        from memserve.router.app import run

        status = run(config)
    except StartupError as error:
        click.echo(f"memserve: {' '.join(str(error).split())}", err=True)
        status = 1
    sys.exit(status)


@cli.command()
@click.option("--quick", is_flag=True, help="Fewer and shorter points: a few seconds.")
@click.option("--reuse", is_flag=True, help="Check what an earlier run has measured, if there is that.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
@click.option(
    "--plot",
    help="Draw predicted against measured to a PNG, PDF or SVG file.",
    metavar="FILE",
    type=click.Path(dir_okay=False, path_type=Path),
)
def calibrate(quick: bool, reuse: bool, as_json: bool, plot: Path | None, **options: Any) -> None:
    """Measure how fast this machine computes, and how well that is predicted."""
    config = serve_config({name: value for name, value in options.items() if value is not None})
    try:
        from memserve.router.supervision.placement import check_roles

        check_roles(config)
        from memserve.router.calibration.command import CalibrateOptions, run

        status = run(config, CalibrateOptions(quick, reuse, as_json, plot))
    except StartupError as error:
        click.echo(f"memserve: {' '.join(str(error).split())}", err=True)
        status = 1
    sys.exit(status)


_OF_REQUESTS = {
    *("tokenizer", "chat_template", "transfer", "reuse_history_tokens", "host", "port", "max_waiting"),
    *("drain_timeout_s", "request_timeout_s"),
}


def _also_for_calibrate(option: click.Parameter) -> click.Parameter:
    """An option of `serve`, out of sight if it makes no difference: a --config file may have it."""
    option = copy.copy(option)
    if isinstance(option, click.Option):
        option.hidden = option.name in _OF_REQUESTS
    return option


calibrate.params += map(_also_for_calibrate, serve.params)


# --- options → config --------------------------------------------------------------------------------------


def serve_config(options: dict[str, Any]) -> ServeConfig:
    """The config of the options that were given, by their names with underscores."""
    names = WorkerOptions.__struct_fields__
    worker = WorkerOptions(**{name: options.pop(name) for name in names if name in options})

    def of_role(role: str) -> WorkerOptions | None:
        own = {name: options.pop(f"{role}_{name}") for name in names if f"{role}_{name}" in options}
        return msgspec.structs.replace(worker, **own) if own else None

    prefill_worker, decode_worker = of_role("prefill"), of_role("decode")
    return ServeConfig(**options, worker=worker, prefill_worker=prefill_worker, decode_worker=decode_worker)
