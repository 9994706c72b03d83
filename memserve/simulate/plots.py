"""Pictures of simulated runs. Matplotlib is imported when one is drawn."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from memserve.simulate.report import Report, groups


def plot_policies(reports: Sequence[Report], path: Path) -> None:
    """A row of bars for each load and cache size: TTFT in the mean and at P99, and the hit rate. Raises
    ImportError without matplotlib.
    """
    from matplotlib.figure import Figure

    rows = groups(reports)
    figure = Figure(figsize=(9, 3.2 * len(rows)), layout="constrained")
    for at, row in enumerate(rows):
        names = [report.policy for report in row]
        load = "" if row[0].load is None else f"load {row[0].load:.0%}, "
        panels = {
            f"TTFT, mean (ms)\n{load}pools of {row[0].cache_tokens:,} tokens": [r.ttft_ms.mean for r in row],
            "TTFT, P99 (ms)": [report.ttft_ms.p99 for report in row],
            "prompt tokens not computed (%)": [100 * report.hit_rate for report in row],
        }
        for index, (title, values) in enumerate(panels.items()):
            axes = figure.add_subplot(len(rows), len(panels), at * len(panels) + index + 1)
            axes.barh(names, values)
            axes.invert_yaxis()
            axes.set_title(title, fontsize=10)
            if index:
                axes.set_yticklabels([])
            widest = max([value for value in values if math.isfinite(value)], default=0.0)
            axes.set_xlim(0, 1.05 * (widest or 1.0))  # nothing is cached: all bars are empty
    figure.savefig(path)
