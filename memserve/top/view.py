"""The whole screen, fitted to a terminal: pure, of a `State` and a size.

    header     the server, how long it is up, what is wrong
    workers    a row each; as many as there is room for
    KV         bars by role and tier                       │ side by side where there is room
    figures    hits, traffic, queue, latency, predictions  │
    requests   whatever lines are left

Every row is one line whatever the width, so that the lines can be counted beforehand. Made for 80x24 and
more; what is smaller is cut off, never an error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from memserve.top.figures import (
    Line,
    hit_lines,
    latency_lines,
    prediction_line,
    queue_line,
    traffic_lines,
)
from memserve.top.rates import START_TIME, Counters, worker_rates
from memserve.top.requests import request_table
from memserve.top.snapshot import Snapshot, Worker
from memserve.top.text import age, clean
from memserve.top.workers import tier_line, tiers, worker_table

# From so many columns on the figures stand side by side.
_BESIDE = 156
_NAME_COLUMNS = 11
# The words beside a bar.
_TIER_COLUMNS = 44
_MIN_REQUESTS = 3
# After so many seconds without news the header says so.
STALE_S = 3.0


@dataclass(slots=True)
class State:
    """What is known of a server. `heard_at`, `problem`: its last sign of life, and what went wrong since;
    `now` and `before` are the last two snapshots with anything in them.
    """

    url: str
    interval_s: float
    now: Snapshot | None = None
    before: Snapshot | None = None
    problem: str | None = None
    heard_at: float | None = None

    def add(self, snapshot: Snapshot, at: float) -> None:
        """Take what was told, if anything was."""
        if any((snapshot.workers, snapshot.samples, snapshot.requests)):
            self.before, self.now = self.now, snapshot
            self.problem, self.heard_at = "; ".join(snapshot.problems) or None, at
        else:
            self.problem = snapshot.problems[0] if snapshot.problems else "no answer"


def render(
    state: State, width: int, height: int, now: float, wall: float, *, once: bool = False
) -> RenderableType:
    """`now` by the clock of the snapshots, `wall` in seconds since the epoch. `once`: nothing comes after."""
    head = header(state, width, now, wall)
    snapshot = state.now
    if snapshot is None:
        return Group(*head) if once else Group(*head, Text(), Text("waiting for the server; q ends", "dim"))
    beside = width >= _BESIDE
    workers: Sequence[Worker] = snapshot.workers.value if snapshot.workers is not None else ()
    columns = width // 2 - 1 if beside else width
    left = [Line(tier.name, tier_line(tier, _bar_columns(columns))) for tier in tiers(workers)]
    right: list[Line] = []
    if snapshot.samples is not None:
        before = state.before.samples if state.before is not None else None
        counters = Counters(before, snapshot.samples)
        left += hit_lines(counters)
        right += [*traffic_lines(counters), queue_line(counters), *latency_lines(counters)]
        (left if beside else right).append(prediction_line(counters))
    num_figures = max(len(left), len(right)) if beside else len(left) + len(right)
    spaced = height >= 2 * (4 + num_figures + len(workers)) or height >= 40
    # the header, the two tables' own, and the empty lines between
    room = height - len(head) - 2 - num_figures - 3 * spaced
    num_requests = len(snapshot.requests.value) if snapshot.requests is not None else 0
    worker_rows = min(len(workers), max(1, room - min(num_requests, _MIN_REQUESTS)))
    rates = worker_rates(state.before, snapshot)
    parts: list[RenderableType] = [Group(*head), worker_table(workers, rates, worker_rows, width)]
    figures: RenderableType = _grid([*left, *right])
    if beside:
        figures = Table.grid(expand=True, padding=(0, 1, 0, 0))
        figures.add_column(ratio=1, no_wrap=True)
        figures.add_column(ratio=1, no_wrap=True)
        figures.add_row(_grid(left), _grid(right))
    parts.append(figures)
    if snapshot.requests is not None:
        rows = max(0, room - worker_rows)
        parts.append(request_table(snapshot.requests.value, rows, width))
    if spaced:
        parts = [part for each in parts for part in (each, Text())][:-1]
    return Group(*parts)


def header(state: State, width: int, now: float, wall: float) -> list[Text]:
    """A line, and one more for what is wrong."""
    line = Text("memserve top ", "bold").append(clean(state.url), "not bold")
    samples = state.now.samples if state.now is not None else None
    if samples is not None and (start := samples.value.get((START_TIME, ""))) is not None:
        line.append(f"  up {age(max(0.0, wall - start))}", "not bold")
    silent_s = 0.0 if state.heard_at is None else now - state.heard_at
    if silent_s > max(STALE_S, 2 * state.interval_s):
        line.append(f"  no news for {age(silent_s)}, trying on", "red")
    else:
        line.append(f"  every {state.interval_s:g} s", "not bold dim")
    lines = [line] if state.problem is None else [line, Text(clean(state.problem), "red")]
    for each in lines:
        each.truncate(width, overflow="ellipsis")
    return lines


def _grid(lines: Sequence[Line]) -> Table:
    grid = Table.grid(expand=True, padding=(0, 1, 0, 0))
    grid.add_column(width=_NAME_COLUMNS, no_wrap=True, overflow="ellipsis", style="bold")
    grid.add_column(ratio=1, no_wrap=True, overflow="ellipsis")
    for line in lines:
        grid.add_row(Text(clean(line.name)), line.text)
    return grid


def _bar_columns(columns: int) -> int:
    return max(8, columns - _NAME_COLUMNS - _TIER_COLUMNS - 2)
