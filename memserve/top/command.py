"""`memserve top`: parse → run. Exit status: 0, also on Ctrl-C; 1, `--once` and the server told nothing; 2,
usage; 143, terminated.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import signal
import sys
import time
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any

import click

from memserve.errors import BenchError

if TYPE_CHECKING:
    from rich.console import Console

TERMINATED = 143


def _finite(context: click.Context, parameter: click.Parameter, value: float) -> float:
    if math.isnan(value):  # is in no range, and passes as in all
        raise click.BadParameter("nan is no number of seconds")
    return value


@click.command()
@click.option("--url", default="http://127.0.0.1:8000", show_default=True, help="Server.", metavar="URL")
@click.option(
    "--interval",
    default=1.0,
    show_default=True,
    type=click.FloatRange(0.1, 3600.0),
    callback=_finite,
    help="Seconds between two looks.",
    metavar="N",
)
@click.option("--once", is_flag=True, help="Print one view, of one interval, and exit.")
def top(url: str, interval: float, once: bool) -> None:
    """Watch a running server: workers, KV, hit ratio, traffic, latency, decisions."""
    from rich.console import Console

    encoding = (getattr(sys.stdout, "encoding", None) or "").lower().replace("-", "")
    if not encoding.startswith("utf") and hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # bars and arrows
    console = Console()
    if not once and (not console.is_terminal or console.is_dumb_terminal):
        raise click.UsageError("this is no terminal that a screen can be drawn on; use --once")
    try:
        found = _run(_top(url, interval, once, console))
    except BenchError as error:
        raise click.UsageError(str(error)) from None
    sys.exit(0 if found else 1)


async def _top(url: str, interval: float, once: bool, console: Console) -> bool:
    from memserve.top.client import TopClient
    from memserve.top.screen import snapshot, watch

    clock = time.monotonic
    async with TopClient(url, clock) as client:
        if once:
            return await snapshot(client, interval, console, clock)
        with contextlib.suppress(asyncio.CancelledError):
            await watch(client, interval, console, clock)
    return True


def _run(coroutine: Coroutine[Any, Any, bool]) -> bool:
    """Told to terminate, it gives the terminal back first, as on Ctrl-C."""
    terminated = False

    async def main() -> bool:
        task = asyncio.current_task()
        assert task is not None

        def terminate() -> None:
            nonlocal terminated
            terminated = True
            task.cancel()

        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, terminate)
        return await coroutine

    found = False
    with contextlib.suppress(asyncio.CancelledError):
        found = asyncio.run(main())
    if terminated:
        sys.exit(TERMINATED)
    return found
