"""What the terminal shows while a run goes on: a progress bar and a small table, twice a second.

Drawing takes some milliseconds of the event loop that also sends and reads, hence no more often; where there
is no terminal a plain line every ten seconds takes its place.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from memserve.bench.load import State
from memserve.bench.records import RequestRecord

_DRAW_S = 0.5
_LINE_S = 10.0
# The table's latencies are those of this many last requests.
_RECENT = 200


@contextlib.asynccontextmanager
async def shown(state: State, console: Console, title: str) -> AsyncIterator[None]:
    """Show `state` while the body runs."""
    drawing = asyncio.create_task(
        _draw(state, console, title) if console.is_terminal else _print(state, console, title)
    )
    try:
        yield
    finally:
        drawing.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await drawing


async def _draw(state: State, console: Console, title: str) -> None:
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        auto_refresh=False,
    )
    task = progress.add_task(title, total=None)
    with Live(console=console, auto_refresh=False, transient=True) as live:
        while True:
            progress.update(task, completed=state.num_finished, total=state.num_requests or None)
            live.update(Group(progress, live_table(state)), refresh=True)
            await asyncio.sleep(_DRAW_S)


async def _print(state: State, console: Console, title: str) -> None:
    while True:
        await asyncio.sleep(_LINE_S)
        line = f"{title}: {state.num_finished} of {state.num_requests} requests, {len(state.running)} running"
        console.print(f"{line}, {state.num_failed} failed", markup=False, highlight=False, soft_wrap=True)


def live_table(state: State) -> Table:
    """The state of a run as one row."""
    running = list(state.running.values())
    tokens = state.num_output_tokens + sum(record.output_tokens for record in running)
    elapsed_s = state.now()
    cells = {
        "running": str(len(running)),
        "failed": f"[red]{state.num_failed}[/red]" if state.num_failed else "0",
        "requests/s": f"{state.num_finished / elapsed_s:.2f}" if elapsed_s else "–",
        "tokens/s": f"{tokens / elapsed_s:.1f}" if elapsed_s else "–",
        "recent TTFT": _mean_ms([r.ttft_s for r in recent(state.records)]),
        "recent TPOT": _mean_ms([s for r in recent(state.records) if (s := r.tpot_s) is not None]),
        "recent JCT": _mean_ms([r.jct_s for r in recent(state.records)]),
    }
    table = Table(*cells, box=None, header_style="dim")
    table.add_row(*cells.values())
    return table


def recent(records: Sequence[RequestRecord]) -> list[RequestRecord]:
    """The completed ones among the last."""
    return [record for record in records[-_RECENT:] if record.completed]


def _mean_ms(values_s: Sequence[float]) -> str:
    return f"{1e3 * sum(values_s) / len(values_s):.1f} ms" if values_s else "–"
