"""Tables, JSON and pictures of a comparison of several servers under one load."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

import msgspec
from rich.console import Console
from rich.table import Table

from memserve import __version__
from memserve.bench.alternate import FIGURES, Arm, Contrast, Figure, Measured, by_arm, verdict
from memserve.bench.bootstrap import COVERAGE, NUM_RESAMPLES, Ratio
from memserve.bench.plots import plot_bars, plot_runs
from memserve.bench.report import failures, warnings, write_file
from memserve.bench.run import Report

# What the pictures of settings show.
_PANELS = ("TTFT mean", "TTFT P99", "TPOT mean", "JCT mean", "JCT P99")


class File(msgspec.Struct, frozen=True, kw_only=True):
    """What `--json` writes; `command` repeats it. `figures`: by arm, of the complete rounds."""

    memserve: str
    created: str
    command: list[str]
    servers: dict[str, str]
    figures: dict[str, dict[str, float | None]]
    contrasts: list[Contrast]
    runs: list[Measured]


def write_json(
    path: Path,
    command: list[str],
    arms: Sequence[Arm],
    runs: Sequence[Measured],
    contrasts: Sequence[Contrast],
) -> None:
    """Write everything. Raises BenchError if the file cannot be written."""
    file = File(
        memserve=__version__,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        command=command,
        servers={arm.name: arm.server for arm in arms},
        figures={
            arm: {figure.name: figure.value(reports) for figure in FIGURES}
            for arm, reports in by_arm(runs, arms).items()
        },
        contrasts=list(contrasts),
        runs=list(runs),
    )
    write_file(path, msgspec.json.encode(file))


def figures_table(reports: Mapping[str, Sequence[Report]]) -> Table:
    """A row a figure, a column an arm."""
    table = Table(box=None, header_style="dim")
    table.add_column("")
    for arm in reports:
        table.add_column(arm, justify="right")
    for figure in FIGURES:
        values = [figure.value(of_arm) for of_arm in reports.values()]
        if any(value is not None for value in values) and (figure.name != "failed requests" or any(values)):
            unit = f" ({figure.unit})" if figure.unit else ""
            table.add_row(figure.name + unit, *(show_value(figure, value) for value in values))
    return table


def contrasts_table(contrasts: Sequence[Contrast]) -> Table:
    """A row a figure, a column a contrast: how much more or less B is than A."""
    table = Table(box=None, header_style="dim")
    table.add_column("change")
    for found in contrasts:
        table.add_column(f"{found.b} against {found.a}", justify="right")
    for figure in FIGURES:
        if any(figure.name in found.ratios for found in contrasts):
            cells = [show_change(figure, found.ratios.get(figure.name)) for found in contrasts]
            table.add_row(figure.name, *cells)
    return table


def show_value(figure: Figure, value: float | None) -> str:
    """A figure's cell."""
    if value is None:
        return "–"
    return f"{value:.1%}" if figure.unit == "of prompts" else f"{value:.2f}"


def show_change(figure: Figure, ratio: Ratio | None) -> str:
    """`-58 % [-61, -50] better`."""
    if ratio is None:
        return "–"
    text = f"{100 * (ratio.ratio - 1):+.0f} %"
    if ratio.low is not None and ratio.high is not None:
        text += rf" \[{100 * (ratio.low - 1):+.0f}, {100 * (ratio.high - 1):+.0f}]"
    said = verdict(figure, ratio)
    colour = {"better": "green", "worse": "red"}.get(said)
    return f"{text} [{colour}]{said}[/{colour}]" if colour else text


def print_comparison(
    reports: Mapping[str, Sequence[Report]],
    contrasts: Sequence[Contrast],
    runs: Sequence[Measured],
    num_rounds: int,
    console: Console,
) -> None:
    """Tables of the complete rounds, `reports`; then what is to be known about all `runs`."""
    if reports:
        done = len(next(iter(reports.values())))
        console.print(figures_table(reports))
        console.print(contrasts_table(contrasts))
        method = f"{COVERAGE:.0%} intervals from {NUM_RESAMPLES} resamples of rounds and of sessions in them"
        console.print(f"{done} of {num_rounds} rounds; {method}", highlight=False)
        if done == 1:
            console.print("[yellow]note:[/yellow] of one round, intervals know nothing of how rounds differ")
    else:
        console.print("no round is complete: there is nothing to compare")
    for line in _once(warnings, runs):
        console.print(f"[yellow]note:[/yellow] {line}", highlight=False)
    for line in _once(failures, runs):
        console.print(f"[red]failed:[/red] {line}", highlight=False)


def _once(say: object, runs: Sequence[Measured]) -> list[str]:
    """Every line of every run with the arms that it is true of; those of all arms once."""
    assert callable(say)
    arms = {run.arm for run in runs}
    said: dict[str, set[str]] = {}
    for run in runs:
        for line in say(run.report):
            said.setdefault(line, set()).add(run.arm)
    return [
        (line if of == arms else f"{', '.join(sorted(of))}: {line}").replace("[", r"\[")
        for line, of in said.items()
    ]


def plot_comparison(path: Path, title: str, reports: Mapping[str, Sequence[Report]]) -> None:
    """CDFs and timelines of two arms; of more, bars whose whiskers are the least and the most of the rounds.
    Raises BenchError.
    """
    if len(reports) <= 2:
        plot_runs(
            path, title, {arm: [report.requests for report in of_arm] for arm, of_arm in reports.items()}
        )
        return
    panels = {}
    for figure in FIGURES:
        bars = {arm: bar for arm, of_arm in reports.items() if (bar := _bar(figure, of_arm)) is not None}
        if figure.name in _PANELS and bars:
            panels[f"{figure.name} ({figure.unit})"] = bars
    plot_bars(path, title, panels)


def _bar(figure: Figure, reports: Sequence[Report]) -> tuple[float, float, float] | None:
    value = figure.value(reports)
    singles = [single for report in reports if (single := figure.value([report])) is not None]
    return None if value is None else (value, min(singles), max(singles))
