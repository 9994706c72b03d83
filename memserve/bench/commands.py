"""`memserve bench`: parse → frozen options → run → report. What is measured is said elsewhere (`run.py`).

Exit status: 0, all requests completed; 1, some failed, or nothing could be measured (one line says why);
2, usage; 130, stopped by Ctrl-C, with what there was until then.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, TypeVar

import click

from memserve.bench.options import (
    load_options,
    output_options,
    run_options,
    target_of,
    target_options,
    workload_options,
    workload_spec,
)
from memserve.errors import BenchError, StartupError

if TYPE_CHECKING:
    from rich.console import Console

    from memserve.bench.reuse import Reuse
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
    """Measure OpenAI-compatible servers under real workloads."""


@bench.command(cls=_Command)
@workload_options
@click.option("--url", default="http://127.0.0.1:8000", show_default=True, help="Server.", metavar="URL")
@load_options
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
            plot_runs(options["plot"], f"{workload.name} on {target.url}", {workload.name: report.requests})
        if interrupt.pressed:
            return INTERRUPTED
        return FAILED if report.summary.num_failed or not report.summary.num_completed else 0

    sys.exit(finish(measure))


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
