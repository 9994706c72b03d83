"""`memserve bench`: parse → frozen options → run → report. What is measured is said elsewhere (`run.py`).

Exit status: 0, all requests completed; 1, some failed, or nothing could be measured (one line says why);
2, usage; 130, stopped by Ctrl-C, with what there was until then.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, TypeVar

import click

from memserve.bench.options import (
    comparison_options,
    fleet_options,
    load_options,
    output_options,
    run_options,
    target_of,
    target_options,
    worker_options,
    workload_options,
    workload_spec,
)
from memserve.bench.pool_command import pool
from memserve.errors import BenchError, StartupError

if TYPE_CHECKING:
    from rich.console import Console

    from memserve.bench.alternate import Arm, Measured
    from memserve.bench.reuse import Reuse
    from memserve.bench.run import Report
    from memserve.bench.workload import Workload

FAILED, INTERRUPTED = 1, 130
_WORDS = "memserve.bench.words"
_SECRET = "--api-key"
Result = TypeVar("Result")


class _Command(click.Command):
    """Remembers its words, for the report."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """See `click.Command`."""
        ctx.meta[_WORDS] = [*ctx.command_path.split(), *without_secrets(args)]
        return super().parse_args(ctx, args)


@click.group()
def bench() -> None:
    """Measure OpenAI-compatible servers under real workloads, or the memory pool alone."""


bench.add_command(pool)


@bench.command(cls=_Command)
@workload_options
@click.option("--url", default="http://127.0.0.1:8000", show_default=True, help="Server.", metavar="URL")
@load_options()
@target_options
@output_options
@click.pass_context
def serve(context: click.Context, /, url: str, **options: Any) -> None:
    """Load a server with a workload and report its latencies, throughput and use of its cache.

    \b
    SOURCE is one of
      sessions FILE     conversations, JSON lines {id, prefix, turns: [{in, out}]}
      mooncake FILE     a trace of times, lengths and shared blocks
      azure FILE        a trace of times and lengths
      sharegpt-like, loogle-like, react-like, prefix-repetition, random
                        made up, without a file
    """
    console = make_console()

    async def measure() -> int:
        from memserve.bench.interrupt import Interrupt
        from memserve.bench.live import shown
        from memserve.bench.plots import check_matplotlib, plot_runs
        from memserve.bench.report import print_report, write_json
        from memserve.bench.run import run

        if options["plot"] is not None:
            check_matplotlib()
        target = target_of(options, url)
        workload, reuse = load(options, console)
        interrupt = Interrupt()
        state = interrupt.new_state()
        how = run_options(options, workload)
        with interrupt.listening():
            async with shown(state, console, workload.name):
                report = await run(target, workload, how, state, api_key=options["api_key"], reuse=reuse)
        print_report(report, console)
        if options["json"] is not None:
            write_json(options["json"], report, context.meta[_WORDS])
        if options["plot"] is not None:
            plot_runs(options["plot"], f"{workload.name} on {target.url}", {workload.name: [report.requests]})
        if interrupt.pressed:
            return INTERRUPTED
        return FAILED if report.summary.num_failed or not report.summary.num_completed else 0

    sys.exit(finish(measure))


@bench.command(cls=_Command)
@click.argument("a")
@click.argument("b")
@workload_options
@comparison_options
@load_options()
@target_options
@output_options
@click.pass_context
def compare(context: click.Context, /, a: str, b: str, **options: Any) -> None:
    """Put the same load on two servers by turns, and say how B differs from A, and how sure that is.

    A and B are URLs, or command lines of servers in quotes, which are started and stopped for every run:
    {port} stands for a free port; without it --port N is added.

    \b
      memserve bench compare http://127.0.0.1:8000 http://127.0.0.1:9000 react-like
      memserve bench compare "memserve serve --caching off" "memserve serve" sharegpt-like --rate 2
    """

    def prepare() -> tuple[list[Arm], list[tuple[str, str]]]:
        arms = [arm_of(name, server, options) for name, server in (("A", a), ("B", b))]
        return arms, [("A", "B")]

    sys.exit(finish(lambda: _compared(prepare, options, context.meta[_WORDS])))


@bench.command(cls=_Command)
@workload_options
@click.option("--serve", default="", metavar="OPTIONS", help="Options of memserve serve for all, quoted.")
@worker_options
@comparison_options
@load_options(answers="live", warmup=4)
@target_options
@output_options
@click.pass_context
def settings(context: click.Context, /, serve: str, **options: Any) -> None:
    """Measure the settings of the MemServe paper with our own server, all on the same cores.

    PD-colocated without and with caching, PD-Basic and PD-Caching-1, -2, -3 are started and stopped by turns
    under the same load, and the paper's three contrasts drawn. Answers are live: what a server generated can
    be found in its cache only if the next turn has it.
    """

    def prepare() -> tuple[list[Arm], list[tuple[str, str]]]:
        from memserve.bench.settings import CONTRASTS, SETTINGS, Workers, command

        workers = Workers(options["prefill"], options["decode"], options["colocated"])
        commands = {setting.name: command(setting, workers, serve) for setting in SETTINGS}
        arms = [arm_of(name, line, options) for name, line in commands.items()]
        return arms, [(against.name, setting.name) for setting, against in CONTRASTS]

    sys.exit(finish(lambda: _compared(prepare, options, context.meta[_WORDS])))


@bench.command(cls=_Command)
@workload_options
@click.option("--serve", default="", metavar="OPTIONS", help="Options of memserve serve for all, quoted.")
@fleet_options
@comparison_options
@load_options(answers="live", warmup=4)
@target_options
@output_options
@click.pass_context
def policies(context: click.Context, /, serve: str, **options: Any) -> None:
    """Measure the policies by which our server places requests, on the same workers.

    Servers with round-robin, least-load, session and prompt-tree are started and stopped by turns under the
    same load; prompt-tree is compared with each of the others. The first server measures its workers, if that
    was not done before, and the others go by what it found.
    """

    def prepare() -> tuple[list[Arm], list[tuple[str, str]]]:
        from memserve.bench.settings import Workers, policy_commands

        workers = Workers(options["prefill"], options["decode"])
        commands = policy_commands(workers, serve)
        arms = [arm_of(name, line, options) for name, line in commands.items()]
        *others, best = commands
        return arms, [(other, best) for other in others]

    sys.exit(finish(lambda: _compared(prepare, options, context.meta[_WORDS])))


async def _compared(
    prepare: Callable[[], tuple[list[Arm], list[tuple[str, str]]]], options: dict[str, Any], words: list[str]
) -> int:
    """The runs of all arms and the contrasts (a, b) between them; the exit status."""
    from memserve.bench.alternate import alternate, by_arm, contrast, of_round
    from memserve.bench.comparison_report import plot_comparison, print_comparison, write_json
    from memserve.bench.interrupt import Interrupt
    from memserve.bench.live import shown
    from memserve.bench.plots import check_matplotlib
    from memserve.bench.run import run
    from memserve.bench.servers import cores_shared

    if options["plot"] is not None:
        check_matplotlib()
    console, num_rounds = make_console(), options["rounds"]
    arms, pairs = prepare()
    workload, reuse = load(options, console)
    how = run_options(options, workload)
    for arm in arms:
        console.print(f"[bold]{arm.name}[/bold]: {arm.server}", highlight=False)
    interrupt = Interrupt()

    async def measure(arm: Arm, url: str, number: int) -> Report:
        state = interrupt.new_state()
        async with shown(state, console, f"round {number + 1} of {num_rounds}: {arm.name}"):
            return await run(
                target_of(options, url),
                workload,
                of_round(how, number),
                state,
                api_key=options["api_key"],
                reuse=reuse,
            )

    runs: list[Measured] = []
    broken: BenchError | None = None
    try:
        with interrupt.listening(), cores_shared(options["cores"]):
            await alternate(arms, num_rounds, measure, interrupt, runs)
    except BenchError as error:
        if not runs:
            raise
        broken = error  # what was measured before is reported first
    reports = by_arm(runs, arms)
    contrasts = [contrast(a, b, reports) for a, b in pairs if a in reports and b in reports]
    print_comparison(reports, contrasts, runs, num_rounds, console)
    if options["json"] is not None:
        write_json(options["json"], words, arms, runs, contrasts)
    if options["plot"] is not None and reports:
        plot_comparison(options["plot"], workload.name, reports)
    if interrupt.pressed:
        return INTERRUPTED
    if broken is not None:
        raise broken
    return FAILED if any(measured.report.summary.num_failed for measured in runs) else 0


# --- what the commands share -------------------------------------------------------------------------------


def load(options: dict[str, Any], console: Console) -> tuple[Workload, Reuse | None]:
    """The workload, and what an infinite cache could do with it; None where logged answers are missing.
    Raises StartupError.
    """
    from memserve.bench.load import has_answers
    from memserve.bench.reuse import measure_reuse
    from memserve.bench.text_tokens import TextTokens
    from memserve.bench.workload_spec import load_workload

    spec = workload_spec(options)
    with console.status("reading the workload"):
        text = TextTokens.load(spec.tokenizer)
        workload = load_workload(spec, text)
        reuse = measure_reuse(workload, text) if has_answers(workload.sessions) else None
    console.print(f"[bold]{workload.name}[/bold]: {workload.description}", highlight=False)
    return workload, reuse


def arm_of(name: str, server: str, options: dict[str, Any]) -> Arm:
    """A server by its URL or its command line. Raises BenchError."""
    from memserve.bench.alternate import Arm
    from memserve.bench.client import base_url
    from memserve.bench.servers import is_url, place, server_cores, started

    if is_url(server):
        url = base_url(server)
        return Arm(name, url, lambda: contextlib.nullcontext(url))
    place(server, 1)
    cpus = server_cores(options["cores"])
    return Arm(name, server, lambda: started(server, cpus=cpus, timeout_s=options["start_timeout"]))


def finish(measure: Callable[[], Coroutine[Any, Any, int]]) -> int:
    """Run to the exit status; errors of the user's become one line."""
    import asyncio

    import uvloop

    try:
        return uvloop.run(measure())
    except (BenchError, StartupError) as error:
        click.echo(f"memserve bench: {error}", err=True)
        return FAILED
    except (KeyboardInterrupt, asyncio.CancelledError):
        click.echo("memserve bench: stopped", err=True)
        return INTERRUPTED


def make_console() -> Console:
    """Where reports go; wide enough for the tables where there is no terminal."""
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=110)


def without_secrets(words: list[str]) -> list[str]:
    """A command's words, but for its key."""
    shown = list(words)
    for index, word in enumerate(words):
        if word.startswith(f"{_SECRET}="):
            shown[index] = f"{_SECRET}=…"
        elif index and words[index - 1] == _SECRET:
            shown[index] = "…"
    return shown
