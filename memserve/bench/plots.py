"""Pictures of runs (PNG), by matplotlib from the `bench` extra, which is imported when one is asked for.

Figures are built without pyplot: no global state, no display.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from memserve.bench.metrics import latencies
from memserve.bench.records import RequestRecord
from memserve.errors import BenchError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_CDFS = ("ttft", "tpot", "jct")
_NUM_BINS = 60


def check_matplotlib() -> None:
    """Raise BenchError, with what to install, if there is no matplotlib. Costs a second; call it before a
    run whose plots are wanted.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise BenchError(
            "plots need matplotlib: pip install 'memserve[bench]', or leave --plot out"
        ) from None


def plot_runs(path: Path, title: str, runs: Mapping[str, Sequence[Sequence[RequestRecord]]]) -> None:
    """CDFs of TTFT, TPOT and JCT over all rounds of a run, one line a run, and beneath the timeline of each
    run's first round. Raises BenchError.
    """
    figure = new_figure(12, 3.6 + 2.6 * len(runs))
    figure.suptitle(title)
    grid = figure.add_gridspec(1 + len(runs), 3)
    for column, metric in enumerate(_CDFS):
        axes = figure.add_subplot(grid[0, column])
        for name, rounds in runs.items():
            _draw_cdf(axes, latencies(itertools.chain.from_iterable(rounds), metric), name)
        axes.set(xlabel=f"{metric.upper()} (ms)", ylabel="share of requests", ylim=(0, 1))
        axes.grid(alpha=0.3)
        if len(runs) > 1 and axes.lines:
            axes.legend(fontsize="small")
    for row, (name, rounds) in enumerate(runs.items(), start=1):
        _draw_timeline(figure.add_subplot(grid[row, :]), rounds[0], name)
    save_figure(figure, path)


def plot_bars(path: Path, title: str, panels: Mapping[str, Mapping[str, tuple[float, float, float]]]) -> None:
    """A panel a metric, a bar a setting with its interval: value, low and high. Raises BenchError."""
    figure = new_figure(3.4 * len(panels), 4.2)
    figure.suptitle(title)
    for index, (metric, bars) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(1, len(panels), index)
        names = list(bars)
        values = np.asarray([bars[name][0] for name in names])
        low = np.asarray([bars[name][1] for name in names])
        high = np.asarray([bars[name][2] for name in names])
        axes.bar(range(len(names)), values, color=[f"C{i}" for i in range(len(names))])
        errors = np.maximum(0.0, np.stack([values - low, high - values]))
        axes.errorbar(range(len(names)), values, yerr=errors, fmt="none", ecolor="black", capsize=3)
        axes.set_xticks(range(len(names)), names, rotation=40, ha="right", fontsize="small")
        axes.set_title(metric, fontsize="medium")
        axes.grid(axis="y", alpha=0.3)
    save_figure(figure, path)


def _draw_cdf(axes: Axes, values_ms: Sequence[float], label: str) -> None:
    if values_ms:
        ordered = np.sort(np.asarray(values_ms))
        axes.step(ordered, np.arange(1, len(ordered) + 1) / len(ordered), where="post", label=label)


def _draw_timeline(axes: Axes, records: Sequence[RequestRecord], name: str) -> None:
    """Running requests and tokens a second over the time; a mark for every failure."""
    spans = [(r.sent_at, r.ended_at) for r in records if r.sent_at is not None and r.ended_at is not None]
    end = max((ended for _, ended in spans), default=1.0) or 1.0
    bins = np.linspace(0, end, _NUM_BINS + 1)
    sent = np.sort([span[0] for span in spans])
    ended = np.sort([span[1] for span in spans])
    running = np.searchsorted(sent, bins, side="right") - np.searchsorted(ended, bins, side="right")
    tokens = np.histogram([time for r in records for time in r.chunk_times], bins)[0] / (bins[1] - bins[0])
    axes.step(bins, running, where="post", color="C0")
    axes.set(xlabel="s", xlim=(0, end), ylim=(0, None), title=name)
    axes.set_ylabel("requests running", color="C0")
    failed = [r.ended_at for r in records if r.error is not None and r.ended_at is not None]
    if failed:
        axes.plot(failed, [0.0] * len(failed), "rx", clip_on=False, label="failed")
        axes.legend(fontsize="small")
    other = axes.twinx()
    other.step(bins[:-1], tokens, where="post", color="C1", alpha=0.8)
    other.set_ylim(0, None)
    other.set_ylabel("output chunks/s", color="C1")


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, in inches. Raises BenchError without matplotlib."""
    check_matplotlib()
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: Figure, path: Path) -> None:
    """Write it as PNG. Raises BenchError."""
    try:
        figure.savefig(path, format="png", dpi=110)
    except OSError as error:
        raise BenchError(f"{path} cannot be written: {error.strerror}") from None
