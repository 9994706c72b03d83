"""Options that the commands of `memserve bench` share, and the frozen structs that they become.

    workload    SOURCE [FILE] and how it is shaped        → WorkloadSpec
    load        when requests are sent, and what counts   → RunOptions
    target      how a server is spoken to                 → Target

Nothing heavy is imported before a command runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from memserve.bench.option_types import (
    COUNT,
    JSON_OBJECT,
    LIMITS,
    NOT_NEGATIVE,
    OUTPUT,
    PICTURE,
    POSITIVE,
    RAMP,
    SECONDS,
    THINK_TIME,
)
from memserve.errors import BenchError

if TYPE_CHECKING:
    from memserve.bench.run import RunOptions, Target
    from memserve.bench.workload import Workload
    from memserve.bench.workload_spec import WorkloadSpec

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]
Options = Mapping[str, Any]

# Names of workload_spec.Source and request_format.Endpoint, which are too heavy for --help (a test compares).
SOURCES = (
    "sessions",
    "mooncake",
    "azure",
    "sharegpt-like",
    "loogle-like",
    "react-like",
    "prefix-repetition",
    "random",
)
ENDPOINTS = ("completions", "chat")
DEFAULT_CONCURRENCY = 8
_FILE = click.Path(path_type=Path)


# --- options -----------------------------------------------------------------------------------------------


def _all(*options: Decorator) -> Decorator:
    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def _option(name: str, help: str, metavar: str | None = "N", **attributes: Any) -> Decorator:
    return click.option(name, help=help, metavar=metavar, **attributes)


workload_options = _all(
    click.argument("source", type=click.Choice(SOURCES), metavar="SOURCE"),
    click.argument("file", type=_FILE, required=False, metavar="[FILE]"),
    _option("--sessions", "Most sessions [default: all of a file, 100 made up].", type=COUNT),
    _option("--requests", "Most requests; the last session may lose turns.", type=COUNT),
    _option("--sessions-per-prefix", "Most sessions with one shared prefix.", type=COUNT),
    _option("--max-prompt-tokens", "Cut documents and turns to this; what is shared stays so.", type=COUNT),
    _option("--max-output-tokens", "Longest answer.", type=COUNT),
    _option("--length-scale", "All lengths times this.", default=1.0, type=SECONDS),
    _option("--time-scale", "All arrivals times this: 2 halves a trace's rate.", default=1.0, type=SECONDS),
    _option("--tokenizer", "tokenizer.json or its folder, to count text by.", "PATH", type=_FILE),
    _option("--vocab-size", "Made-up token ids stay below.", type=COUNT),
    _option("--as-text", "Made-up prompts as text, for servers without token ids.", None, is_flag=True),
    _option("--input-tokens", "Of random and prefix-repetition.", type=COUNT),
    _option("--output-tokens", "Of random and prefix-repetition.", type=COUNT),
    _option("--prefix-tokens", "Of random and prefix-repetition.", type=click.IntRange(min=0)),
    _option("--num-prefixes", "Of prefix-repetition.", type=COUNT),
    _option("--seed", "Of the workload, arrivals, think times.", type=click.IntRange(min=0), default=0),
)


def load_options(answers: str = "replayed", warmup: int = 0) -> Decorator:
    """When requests are sent, and what counts; with the defaults of a command."""
    return _all(
        _option(
            "--rate", "Requests a second, Poisson arrivals of sessions; inf: all at once.", type=POSITIVE
        ),
        _option(
            "--burstiness", "Shape of the gaps: 1 Poisson, less is burstier.", type=POSITIVE, default=1.0
        ),
        _option("--ramp", "Requests a second at the start and at the end.", "A:B", type=RAMP),
        _option(
            "--concurrency",
            f"Most sessions at once; alone a closed loop [default without a rate: {DEFAULT_CONCURRENCY}].",
            type=COUNT,
        ),
        _option(
            "--think-time",
            "Seconds between answer and next turn; exp:S: exponentially distributed.",
            "[exp:]S",
            type=THINK_TIME,
            default="0",
        ),
        _option(
            "--answers",
            "Continue conversations with the logged answers or with the live ones.",
            None,
            type=click.Choice(("replayed", "live")),
            default=answers,
            show_default=True,
        ),
        _option("--duration", "Seconds after which nothing more is sent.", "S", type=SECONDS),
        _option("--warmup", "Requests before, not measured.", type=click.IntRange(min=0), default=warmup),
        _option("--flush/--no-flush", "Drop the server's cache before a run, if it can.", None, default=True),
        _option(
            "--goodput",
            "Limits in ms that a good request keeps: ttft:500,tpot:50 (also jct).",
            "LIMITS",
            type=LIMITS,
        ),
    )


target_options = _all(
    _option("--model", "Model to ask for [default: the server's first].", "NAME"),
    _option(
        "--endpoint",
        "completions, or chat: text turns as messages.",
        None,
        type=click.Choice(ENDPOINTS),
        default="completions",
        show_default=True,
    ),
    _option("--temperature", "", type=NOT_NEGATIVE, default=0.0, show_default=True),
    _option("--ignore-eos/--no-ignore-eos", "Ask for answers of exactly the set length.", None, default=True),
    _option("--extra-body", "JSON object merged into every request.", "JSON", type=JSON_OBJECT),
    _option("--api-key", "Sent as a bearer token; never written.", "KEY"),
    _option("--timeout", "Longest life of a request.", "S", type=SECONDS, default=600.0, show_default=True),
    _option(
        "--stall-timeout", "Longest silence in one.", "S", type=SECONDS, default=120.0, show_default=True
    ),
)

comparison_options = _all(
    _option("--rounds", "Runs of every server.", type=COUNT, default=3, show_default=True),
    _option("--cores", "Cores of started servers; the client has the rest [default: all].", type=COUNT),
    _option("--start-timeout", "Until a started server is ready.", "S", type=SECONDS, default=300.0),
)

fleet_options = _all(
    _option("--prefill", "Prefill workers.", type=COUNT, default=2, show_default=True),
    _option("--decode", "Decode workers.", type=COUNT, default=2, show_default=True),
)

worker_options = _all(
    _option("--prefill", "Prefill workers.", type=COUNT, default=1, show_default=True),
    _option("--decode", "Decode workers.", type=COUNT, default=1, show_default=True),
    _option("--colocated", "Workers when colocated [default: as many as the two].", type=COUNT),
)

output_options = _all(
    _option("--json", "Write everything, per request.", "FILE", type=OUTPUT),
    _option("--plot", "Write a picture (.png, .svg, .pdf).", "FILE", type=PICTURE),
)


# --- options → structs -------------------------------------------------------------------------------------


def workload_spec(options: Options) -> WorkloadSpec:
    """What is to be loaded. Raises ConfigError."""
    from memserve.bench.generators import Synthetic
    from memserve.bench.shaping import Shape
    from memserve.bench.workload_spec import Source, WorkloadSpec

    lengths = {
        name: options[name]
        for name in ("input_tokens", "output_tokens", "prefix_tokens", "num_prefixes")
        if options[name] is not None
    }
    return WorkloadSpec(
        source=Source(options["source"]),
        path=options["file"],
        seed=options["seed"],
        tokenizer=options["tokenizer"],
        vocab_size=options["vocab_size"],
        as_text=options["as_text"],
        shape=Shape(
            num_sessions=options["sessions"],
            num_requests=options["requests"],
            sessions_per_prefix=options["sessions_per_prefix"],
            max_prompt_tokens=options["max_prompt_tokens"],
            max_output_tokens=options["max_output_tokens"],
            length_scale=options["length_scale"],
            time_scale=options["time_scale"],
        ),
        synthetic=Synthetic(**lengths) if lengths else None,
    )


def run_options(options: Options, workload: Workload) -> RunOptions:
    """How the workload is sent. Raises BenchError for options that exclude each other."""
    from memserve.bench.load import LoadOptions
    from memserve.bench.run import RunOptions

    if options["rate"] is not None and options["ramp"] is not None:
        raise BenchError("--rate and --ramp exclude each other")
    concurrency = options["concurrency"]
    if not (concurrency or options["rate"] or options["ramp"] or workload.has_arrivals):
        concurrency = DEFAULT_CONCURRENCY
    load = LoadOptions(
        rate=options["rate"],
        ramp=options["ramp"],
        burstiness=options["burstiness"],
        concurrency=concurrency,
        think=options["think_time"],
        answers=options["answers"],
        duration_s=options["duration"],
        seed=options["seed"],
    )
    return RunOptions(load, options["warmup"], options["flush"], options["goodput"] or {})


def target_of(options: Options, url: str) -> Target:
    """How the server at `url` is spoken to. Raises BenchError."""
    from memserve.bench.client import base_url
    from memserve.bench.run import Target

    return Target(
        url=base_url(url),
        model=options["model"],
        endpoint=options["endpoint"],
        temperature=options["temperature"],
        ignore_eos=options["ignore_eos"],
        extra=options["extra_body"] or {},
        timeout_s=options["timeout"],
        stall_s=options["stall_timeout"],
    )
