"""Every policy against the bound of an unlimited shared cache with free transfers, simulated: over workloads,
loads and cache sizes.

    python benchmarks/policies_simulated.py ../shared/data --json FILE --markdown FILE --plot FILE

Two tables. The first has each policy's mean and P99 TTFT with pools that hold all that is reused. The second
has by how much the mean TTFT of prompt-tree exceeds the bound's (its regret) as pools shrink: a size of 1 is
a fleet whose prefill workers together hold all that the workload ever computes (the working set) once, with
no room for anything that runs. Pools too small to run eight requests are left out. Simulated time,
so the machine's load does not matter; it takes some ten minutes on one core.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np

from memserve.bench.reuse import InfiniteCache
from memserve.config import PolicyName
from memserve.router.scheduling.hardware import BUILT_IN
from memserve.simulate.clients import Clients, Question
from memserve.simulate.command import at_load
from memserve.simulate.report import Report, regret, simulate
from memserve.simulate.simulation import Setup
from memserve.simulate.traces import Trace, read_trace

POLICIES: tuple[PolicyName, ...] = ("round-robin", "least-load", "session", "prompt-tree")
OTHERS = POLICIES[:-1]
LOADS = (0.5, 0.7)
SIZES = (0.25, 0.5, 1.0, 2.0)
AMPLE = 4.0
LEAST_REQUESTS = 8


class Job(NamedTuple):
    """A workload, on so many workers of each role; `limit` rows of a trace."""

    path: str
    num_workers: int
    limit: int | None = None


JOBS = (
    Job("loogle", 4),
    Job("squality", 4),
    Job("react_hotpotqa", 4),
    Job("react_fever", 4),
    Job("tau_bench_airline", 4),
    Job("mt_bench_101", 4),
    Job("oasst_trees", 4),
    Job("mooncake/synthetic_trace.jsonl.gz", 8),
    Job("mooncake/conversation_trace.jsonl.gz", 8, 2000),
)


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One workload at one load and pool size; `size` in working sets, all prefill workers' pools together."""

    workload: str
    size: float
    working_set_tokens: int
    reports: list[Report]

    def of(self, policy: str) -> Report:
        """The report of a policy, or of "bound"."""
        return next(report for report in self.reports if report.policy == policy)


def working_set(trace: Trace) -> int:
    """Tokens that a cache without bounds would hold in the end, of a trace with arrivals."""
    assert trace.dues is not None  # in a closed loop sessions follow on sessions, which is not done here
    clients, cache = Clients(trace), InfiniteCache(trace.block_size)
    num_tokens = 0
    for _, session in clients.arrivals():
        question: Question | None = clients.begin(session)
        while question is not None:
            ids = np.concatenate([question.prompt, question.answer]).astype(np.int64)
            whole = ids[: (len(ids) - 1) // trace.block_size * trace.block_size]
            num_tokens += len(whole) - min(len(whole), cache.match(np.append(whole, 0)))
            cache.insert(whole)
            then = clients.answered(question)
            question = then[1] if then is not None and isinstance(then[1], Question) else None
    return num_tokens


def rows_of(folder: Path, job: Job, model_name: str) -> Iterator[Row]:
    """A workload at every load: all policies with ample pools, prompt-tree and the bound with smaller."""
    model = BUILT_IN[model_name]()
    trace = read_trace(folder / job.path, limit=job.limit)
    num_tokens, lengths = working_set(trace), [sum(pair) for pair in trace.lengths()]
    least = max(max(lengths) + trace.block_size, LEAST_REQUESTS * sum(lengths) // len(lengths))
    name = job.path.split("/")[-1].split(".")[0]
    for load in LOADS:
        loaded = at_load(trace, model, job.num_workers, load)

        for size in (*SIZES, AMPLE):
            cache_tokens = round(size * num_tokens / job.num_workers)
            if size == AMPLE:
                cache_tokens = max(cache_tokens, 4 * least)
            elif cache_tokens < least:
                continue
            setup = Setup(model, job.num_workers, job.num_workers, cache_tokens=cache_tokens)
            policies = POLICIES if size == AMPLE else POLICIES[-1:]
            setups = [*(replace(setup, policy=policy) for policy in policies), replace(setup, is_ideal=True)]
            reports = [simulate(each, loaded, load) for each in setups]
            yield Row(workload=name, size=size, working_set_tokens=num_tokens, reports=reports)


def markdown(rows: Sequence[Row]) -> str:
    """Both tables."""
    ample = [row for row in rows if len(row.reports) > 2]
    lines = [
        "| workload, load | " + " | ".join(POLICIES) + " | bound | regret |",
        "|---" * (len(POLICIES) + 3) + "|",
    ]
    for row in ample:
        cells = [_cell(row.of(policy)) for policy in (*POLICIES, "bound")]
        over = regret(row.of("prompt-tree"), row.of("bound"))
        load = row.reports[0].load
        lines.append(f"| {row.workload}, {load:.0%} | " + " | ".join(cells) + f" | {over:+.1%} |")
    lines += [
        "",
        "| workload (working set, tokens) | load | "
        + " | ".join(f"{size:g}" for size in (*SIZES, AMPLE))
        + " |",
        "|---" * (len(SIZES) + 3) + "|",
    ]
    for (workload, load), group in _grouped(rows).items():
        by_size = {row.size: f"{regret(row.of('prompt-tree'), row.of('bound')):+.1%}" for row in group}
        cells = [by_size.get(size, "") for size in (*SIZES, AMPLE)]
        name = f"{workload} ({group[0].working_set_tokens:,})"
        lines.append(f"| {name} | {load:.0%} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def complaints(rows: Sequence[Row]) -> list[str]:
    """Where prompt-tree does not beat another policy, or is more than 15 % off the bound though the pools
    hold the working set.
    """
    found = []
    for row in rows:
        where, best = f"{row.workload} at {row.reports[0].load:.0%}", row.of("prompt-tree")
        if row.size >= 1.0 and regret(best, row.of("bound")) > 0.15:
            found.append(f"{where}, size {row.size:.2g}: {regret(best, row.of('bound')):+.1%} off the bound")
        for report in row.reports:
            if report.policy not in OTHERS:
                continue
            for name in ("mean", "p99"):
                ours, theirs = getattr(best.ttft_ms, name), getattr(report.ttft_ms, name)
                if ours >= theirs:
                    found.append(f"{where}: {name} TTFT {ours:.1f} ms, {report.policy} {theirs:.1f} ms")
    return found


def plot(rows: Sequence[Row], path: Path) -> None:
    """Regret over pool size, a line for each workload, a panel for each load."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    for index, load in enumerate(LOADS):
        axes = figure.add_subplot(1, len(LOADS), index + 1)
        for (workload, of_load), group in _grouped(rows).items():
            if of_load == load:
                over = [100 * regret(row.of("prompt-tree"), row.of("bound")) for row in group]
                axes.plot([row.size for row in group], over, marker="o", label=workload)
        axes.axhline(15, color="grey", linewidth=0.8, linestyle="--")
        axes.set_xscale("log")
        axes.set_xticks((*SIZES, AMPLE), [f"{size:g}" for size in (*SIZES, AMPLE)])
        axes.minorticks_off()
        axes.set_yscale("symlog", linthresh=10)
        axes.set_ylim(bottom=0)
        axes.set_title(f"load {load:.0%}", fontsize=10)
        axes.set_xlabel("pools of the prefill workers, in working sets")
        axes.set_ylabel("mean TTFT over the bound (%)")
    axes.legend(fontsize=7)
    figure.savefig(path)


def _cell(report: Report) -> str:
    return f"{report.ttft_ms.mean:,.1f} / {report.ttft_ms.p99:,.0f}"


def _grouped(rows: Sequence[Row]) -> dict[tuple[str, float], list[Row]]:
    groups: dict[tuple[str, float], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.workload, row.reports[0].load or 0.0), []).append(row)
    return groups


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("--instance", choices=BUILT_IN, default="h200-llama-3-8b")
    parser.add_argument("--only", action="append", help="workloads whose path begins so")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    logging.getLogger("memserve").addHandler(logging.NullHandler())
    rows: list[Row] = []
    for job in JOBS:
        if args.only and not job.path.startswith(tuple(args.only)):
            continue
        for row in rows_of(args.data, job, args.instance):
            rows.append(row)
            best, bound = row.of("prompt-tree"), row.of("bound")
            print(
                f"{row.workload} at {best.load:.0%}, size {row.size:.2g}: TTFT {best.ttft_ms.mean:.1f} ms, "
                f"bound {bound.ttft_ms.mean:.1f} ms, {regret(best, bound):+.1%}",
                file=sys.stderr,
                flush=True,
            )
        _write(rows, args)
    print(markdown(rows))
    for complaint in complaints(rows):
        print(f"! {complaint}")


def _write(rows: Sequence[Row], args: argparse.Namespace) -> None:
    """What there is so far: it takes minutes."""
    if args.json is not None:
        args.json.write_bytes(msgspec.json.format(msgspec.json.encode(rows), indent=2))
    if args.markdown is not None:
        args.markdown.write_text(markdown(rows) + "\n")
    if args.plot is not None:
        plot(rows, args.plot)


if __name__ == "__main__":
    main()
