"""What `memserve bench pool` has measured: rows, tables, JSON, picture. Does not import torch."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import msgspec
from rich.console import Console
from rich.table import Table

from memserve import __version__
from memserve.bench.report import write_file


class CallRow(msgspec.Struct, frozen=True, kw_only=True):
    """One call of the API on `num_blocks` blocks, timed `num_calls` times. `state` says in what pool."""

    call: str
    state: str
    num_blocks: int
    num_calls: int
    p50_us: float
    p99_us: float

    @property
    def ns_per_block(self) -> float:
        """The median, of one block."""
        return 1e3 * self.p50_us / max(1, self.num_blocks)


class CopyRow(msgspec.Struct, frozen=True, kw_only=True):
    """`num_blocks` blocks of `num_bytes` in all by one mode, medians. `memcpy_ms` is one copy of as many
    bytes between the same two mappings, taken by turns with it; `of_memcpy` the median of memcpy's time by
    the mode's: 1 = as quick. Of pulls over gloo also what one bare send and recv of as many bytes takes, and
    the median of the pull's time by its: 1.25 = a quarter longer.
    """

    mode: str
    layout: str
    num_blocks: int
    num_bytes: int
    median_ms: float
    memcpy_ms: float
    of_memcpy: float
    send_recv_ms: float | None = None
    of_send_recv: float | None = None

    @property
    def gb_per_s(self) -> float:
        """Bytes by the median, in 10^9 a second."""
        return self.num_bytes / self.median_ms / 1e6


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """All rows. `index_bytes` is what an indexed block costs beside its token ids, by prompts in the tree."""

    calls: list[CallRow]
    index_bytes: dict[int, float]
    copies: list[CopyRow]


class File(msgspec.Struct, frozen=True, kw_only=True):
    """What `--json` writes."""

    memserve: str
    created: str
    report: Report


def write_json(path: Path, report: Report) -> None:
    """Write the report. Raises BenchError if the file cannot be written."""
    created = datetime.now(UTC).isoformat(timespec="seconds")
    write_file(path, msgspec.json.encode(File(memserve=__version__, created=created, report=report)))


def print_report(report: Report, console: Console) -> None:
    """A table of calls, and one of copies."""
    table = _table("call", "pool", "blocks", "p50 us", "p99 us", "ns a block", "calls")
    for row in report.calls:
        table.add_row(
            row.call,
            row.state,
            f"{row.num_blocks:,}",
            f"{row.p50_us:.1f}",
            f"{row.p99_us:.1f}",
            f"{row.ns_per_block:.0f}",
            f"{row.num_calls:,}",
        )
    console.print(table)
    for num_prompts, size in report.index_bytes.items():
        console.print(f"index of {num_prompts:,} prompts: {size:.1f} bytes a block beside the token ids")
    table = _table("copy", "layout", "blocks", "MB", "ms", "GB/s", "memcpy ms", "of memcpy", "of send/recv")
    for copy in report.copies:
        table.add_row(
            copy.mode,
            copy.layout,
            f"{copy.num_blocks}",
            f"{copy.num_bytes / 1e6:.1f}",
            f"{copy.median_ms:.3f}",
            f"{copy.gb_per_s:.1f}",
            f"{copy.memcpy_ms:.3f}",
            f"{copy.of_memcpy:.0%}",
            "" if copy.of_send_recv is None else f"{copy.of_send_recv:.0%}",
        )
    console.print(table)


def plot(path: Path, report: Report) -> None:
    """Bandwidth over the number of blocks, a line a mode; and what calls cost. Raises BenchError."""
    from memserve.bench.plots import new_figure, save_figure

    figure = new_figure(13, 5)
    axes = figure.add_subplot(1, 2, 1)
    lines: dict[str, list[CopyRow]] = {}
    for row in report.copies:
        lines.setdefault(f"{row.mode}, {row.layout}", []).append(row)
    for name, rows in lines.items():
        axes.plot([row.num_blocks for row in rows], [row.gb_per_s for row in rows], marker="o", label=name)
    axes.set(xscale="log", yscale="log", xlabel="blocks", ylabel="GB/s")
    axes.grid(alpha=0.3)
    if lines:
        axes.legend(fontsize="small")
    axes = figure.add_subplot(1, 2, 2)
    names = [f"{row.call} ({row.state}, {row.num_blocks:,})" for row in report.calls][::-1]
    axes.barh(range(len(names)), [row.p99_us for row in report.calls][::-1], color="C1", label="p99")
    axes.barh(range(len(names)), [row.p50_us for row in report.calls][::-1], color="C0", label="p50")
    axes.set_yticks(range(len(names)), names, fontsize=4)
    axes.set(xscale="log", xlabel="us a call")
    axes.legend(fontsize="small")
    save_figure(figure, path)


def _table(first: str, second: str, *columns: str) -> Table:
    table = Table(box=None, header_style="dim")
    for name in (first, second):
        table.add_column(name)
    for name in columns:
        table.add_column(name, justify="right")
    return table


def quantile(ordered: Sequence[float], share: float) -> float:
    """Of values in ascending order."""
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]
