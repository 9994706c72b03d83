"""A run's report: tables for the terminal, JSON with everything for a program.

The JSON holds the target, the workload, all options, the figures and every request with the time of every
chunk: enough to repeat the run, and to compute any other figure of it.
"""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import msgspec
from rich.console import Console
from rich.table import Table

from memserve import __version__
from memserve.bench.metrics import LATENCIES, Summary
from memserve.bench.run import Report
from memserve.errors import BenchError

_MAX_EXAMPLES = 3


def print_report(report: Report, console: Console) -> None:
    """Tables of the figures, then what is to be known about them."""
    summary = report.summary
    console.print(f"[bold]{report.workload}[/bold] on {report.target.url} ({report.target.model})")
    console.print(counts_table(report))
    if summary.num_completed:
        console.print(latency_table(summary))
    for line in warnings(report):
        console.print(f"[yellow]note:[/yellow] {_plain(line)}")
    for line in failures(report):
        console.print(f"[red]failed:[/red] {_plain(line)}")


def counts_table(report: Report) -> Table:
    """Counts, rates and ratios; two columns."""
    summary = report.summary
    table = Table(show_header=False, box=None)
    table.add_column()
    table.add_column(justify="right")
    table.add_row("requests completed", f"{summary.num_completed} of {summary.num_requests}")
    table.add_row("duration", f"{summary.elapsed_s:.2f} s")
    table.add_row("prompt tokens", _count(summary.prompt_tokens))
    table.add_row("output tokens", _count(summary.output_tokens))
    table.add_row("request rate", f"{summary.request_rate:.3f} /s")
    if summary.goodput is not None:
        limits = ", ".join(f"{name} ≤ {ms:g} ms" for name, ms in report.options.limits_ms.items())
        table.add_row(f"goodput ({limits})", f"{summary.goodput:.3f} /s")
    table.add_row("input throughput", _rate(summary.input_throughput))
    table.add_row("output throughput", _rate(summary.output_throughput))
    table.add_row("running, mean and most", f"{summary.mean_running:.1f}, {summary.max_running}")
    table.add_row("cached tokens", f"{_percent(summary.cached_ratio)} of the prompts")
    if summary.available_ratio is not None:
        table.add_row("  with an infinite cache", f"{_percent(summary.available_ratio)} of the prompts")
    kept = report.punctuality
    table.add_row("sent late, P50 and P99", f"{kept.late_p50_ms:.2f}, {kept.late_p99_ms:.2f} ms")
    return table


def latency_table(summary: Summary) -> Table:
    """A row a metric, in ms."""
    table = Table(box=None, header_style="dim")
    table.add_column("ms")
    for name in ("mean", "P50", "P90", "P99", "max"):
        table.add_column(name, justify="right")
    for metric in LATENCIES:
        values = getattr(summary, metric)
        if values is not None:
            cells = (values.mean, values.p50, values.p90, values.p99, values.max)
            table.add_row(metric.upper(), *(f"{cell:.2f}" for cell in cells))
    return table


def warnings(report: Report) -> list[str]:
    """What a reader of the figures must know."""
    summary, lines = report.summary, list(report.notes)
    if report.interrupted:
        lines.append("the run was stopped: these are partial results")
    if summary.num_skipped:
        lines.append(f"{summary.num_skipped} turns were not sent: the answer before them failed")
    if summary.num_short:
        short = f"{summary.num_short} of {summary.num_completed} answers"
        lines.append(f"{short} are not as long as was asked for")
    if report.punctuality.complaint is not None:
        lines.append(report.punctuality.complaint)
    return lines


def failures(report: Report) -> list[str]:
    """A line a kind of error: how many, and the commonest messages."""
    lines = []
    for kind, count in sorted(report.summary.errors.items()):
        messages: dict[str, int] = {}
        for record in report.requests:
            if record.error is not None and record.error.kind == kind:
                messages[record.error.message] = messages.get(record.error.message, 0) + 1
        commonest = sorted(messages, key=lambda message: -messages[message])[:_MAX_EXAMPLES]
        lines.append(f"{kind}: {count} ({'; '.join(commonest)})")
    return lines


class File(msgspec.Struct, frozen=True, kw_only=True):
    """What `--json` writes; `command` repeats the run. An infinite number is null."""

    memserve: str
    created: str
    command: list[str]
    report: Report


def write_json(path: Path, report: Report, command: list[str]) -> None:
    """Write the report. Raises BenchError if the file cannot be written."""
    created = datetime.now(UTC).isoformat(timespec="seconds")
    file = File(memserve=__version__, created=created, command=command, report=report)
    write_file(path, msgspec.json.encode(file))


class _Command(msgspec.Struct):
    command: list[str]


def read_command(path: Path) -> list[str] | None:
    """The command whose report a file is (`write_json`); None if it is something else."""
    if path.suffix != ".json" or not path.is_file():
        return None
    try:
        return msgspec.json.decode(path.read_bytes(), type=_Command).command
    except (OSError, msgspec.DecodeError, UnicodeDecodeError):
        return None


def write_file(path: Path, data: bytes) -> None:
    """Write a file of results. Raises BenchError with one line if that fails."""
    try:
        path.write_bytes(data)
    except OSError as error:
        raise BenchError(f"{path} cannot be written: {error.strerror}") from None


def _plain(text: str) -> str:
    return text.replace("[", r"\[")


def _count(count: int | None) -> str:
    return "not known" if count is None else f"{count:,}"


def _rate(tokens_a_second: float | None) -> str:
    return "not known" if tokens_a_second is None else f"{tokens_a_second:,.1f} tokens/s"


def _percent(ratio: float | None) -> str:
    return "not known" if ratio is None else f"{ratio:.1%}"
