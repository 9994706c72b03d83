"""`memserve bench pool`: microbenchmarks of the memory pool, without a server. The one that needs torch,
which it imports when it runs.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import click

from memserve.bench.option_types import OUTPUT, PICTURE
from memserve.errors import MemserveError


@click.command()
@click.option("--quick", is_flag=True, help="Small and rough: a look in a few seconds.")
@click.option("--only", type=click.Choice(("calls", "copies")), help="One half of it.")
@click.option("--json", "json_file", type=OUTPUT, metavar="FILE", help="Write all rows.")
@click.option("--plot", "plot_file", type=PICTURE, metavar="FILE", help="Write a picture (.png, .svg, .pdf).")
def pool(quick: bool, only: str | None, json_file: Path | None, plot_file: Path | None) -> None:
    """Time every call of the memory pool, and its copies between processes and tiers beside plain memcpy.

    Takes about a minute and 1 GiB of memory. Figures of copies need two idle cores.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # it cleans up as on Ctrl-C

    from rich.console import Console

    from memserve.bench import pool_calls, pool_copies
    from memserve.bench.plots import check_matplotlib
    from memserve.bench.pool_report import Report, plot, print_report, write_json

    call_sizes, copy_sizes = pool_calls.Sizes(), pool_copies.Sizes()
    if quick:
        call_sizes = pool_calls.Sizes(num_prompts=400, num_calls=50, num_arena_blocks=2048)
        copy_sizes = pool_copies.Sizes(num_blocks=(1, 8), num_arena_blocks=64, num_repeats=3)
    terminal = Console(stderr=True)
    console = Console() if sys.stdout.isatty() else Console(width=110)
    try:
        if plot_file is not None:
            check_matplotlib()
        report = Report(calls=[], index_bytes={}, copies=[])
        with terminal.status("measuring") as status:
            if only != "copies":
                for call in pool_calls.measure_calls(call_sizes):
                    report.calls.append(call)
                    status.update(f"{call.call}, {call.state}")
                for num_prompts in pool_calls.tree_sizes(call_sizes):
                    status.update("memory of the index")
                    report.index_bytes[num_prompts] = pool_calls.index_bytes(num_prompts)
            if only != "calls":
                for copy in pool_copies.measure_copies(copy_sizes):
                    report.copies.append(copy)
                    status.update(f"{copy.mode}, {copy.layout}, {copy.num_blocks} blocks")
        print_report(report, console)
        if json_file is not None:
            write_json(json_file, report)
        if plot_file is not None:
            plot(plot_file, report)
    except MemserveError as error:
        click.echo(f"memserve bench: {error}", err=True)
        sys.exit(1)
