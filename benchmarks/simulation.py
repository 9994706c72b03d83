"""The simulator against the server: the same requests at the same times, measured and simulated.

    python benchmarks/simulation.py [--prefill 1] [--decode 1] [--workload "WORDS OF bench serve"]…

For each workload a server with the bundled model is loaded by `memserve bench serve`; then the report of that
run is simulated with the cost model that the server itself has measured, and mean TTFT, JCT and cached tokens
are put side by side. Two constants are no part of the cost model: what HTTP and tokenising add to a request,
and what telling a token adds to a step. They are measured here, by requests one at a time before all else
(their medians less what the model says), printed, and added.

It needs a machine with nothing else to do. The load should leave the workers idle half of the time: how busy
the simulated prefill workers were is printed too.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
import urllib.request
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import msgspec

from memserve.bench.report import File
from memserve.bench.servers import started
from memserve.router.scheduling.cost_model import CostModel, from_json
from memserve.simulate.report import simulate
from memserve.simulate.simulation import Setup, Simulation
from memserve.simulate.traces import read_trace

# Of other sessions than those that are compared, and seldom enough that they rarely meet; not one right after
# the other, as a processor that has rested is slower at first, and one that is mostly idle mostly has.
ALONE = (
    "react-like --sessions 12 --seed 1 --max-prompt-tokens 1500 --max-output-tokens 32 --rate 3 --warmup 8"
)
WORKLOADS = (
    "loogle-like --sessions 24 --max-prompt-tokens 1500 --max-output-tokens 32 --rate 6 --warmup 4",
    "react-like --sessions 24 --max-prompt-tokens 1500 --max-output-tokens 32 --rate 8 --warmup 4",
    "sharegpt-like --sessions 24 --max-prompt-tokens 1500 --max-output-tokens 64 --rate 8 --warmup 4",
)


class Figures(NamedTuple):
    """Means in ms, and the share of prompt tokens that were cached."""

    ttft_ms: float
    jct_ms: float
    cached: float


def measure(url: str, words: str, report: Path) -> Figures:
    """Load the server with a workload."""
    command = [sys.executable, "-m", "memserve", "bench", "serve", *shlex.split(words)]
    command += ["--url", url, "--json", str(report)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=1200, check=False)
    if run.returncode:
        raise SystemExit(f"{shlex.join(command)} failed:\n{run.stdout}{run.stderr}")
    summary = msgspec.json.decode(report.read_bytes(), type=File).report.summary
    assert summary.ttft is not None and summary.jct is not None
    return Figures(summary.ttft.mean, summary.jct.mean, summary.cached_ratio or 0.0)


def with_overheads(setup: Setup, report: Path) -> tuple[Setup, float]:
    """The setup with what the model does not know, learned from requests sent one at a time; and what was
    added to each step, in ms.
    """
    file = msgspec.json.decode(report.read_bytes(), type=File)
    done = [record for record in file.report.requests if len(record.chunk_times) > 2]
    ttft_ms = statistics.median((r.chunk_times[0] - (r.sent_at or 0.0)) * 1e3 for r in done)
    tpot_ms = statistics.median(
        (r.chunk_times[-1] - r.chunk_times[1]) * 1e3 / (r.output_tokens - 2) for r in done
    )

    def simulated(setup: Setup) -> tuple[float, float]:
        outcomes = Simulation(setup, read_trace(report)).run()
        # the first of them waits for the hand-over
        tpots = [(o.jct_ms - o.ttft_ms) / (o.num_new_tokens - 1) for o in outcomes]
        return statistics.median(o.ttft_ms for o in outcomes), statistics.median(tpots)

    step_ms = max(0.0, tpot_ms - simulated(setup)[1])
    operators = setup.model.operators
    operators = msgspec.structs.replace(operators, fixed_ms=operators.fixed_ms + step_ms)
    setup = replace(setup, model=msgspec.structs.replace(setup.model, operators=operators))
    return replace(setup, overhead_ms=max(0.0, ttft_ms - simulated(setup)[0])), step_ms


def pool_tokens(url: str, block_size: int = 16) -> int:
    """KV that a worker's pool holds: the smallest."""
    with urllib.request.urlopen(f"{url}/v1/workers", timeout=10) as answer:
        workers = json.load(answer)["data"]
    return min(int(worker["load"]["num_blocks"]) for worker in workers) * block_size


def calibrated(folder: Path) -> CostModel:
    """The cost model that the server has measured; of several, the first."""
    files = sorted(folder.glob("*.json"))
    if not files:
        raise SystemExit("the server has kept no calibration")
    if len(files) > 1:
        print(f"workers of {len(files)} kinds: all are simulated as {files[0].name}", file=sys.stderr)
    return from_json(files[0].read_bytes())


async def compare(args: argparse.Namespace, folder: Path) -> list[dict[str, object]]:
    """Every workload, measured and simulated."""
    command = f"memserve serve --prefill {args.prefill} --decode {args.decode} --log-level warning"
    command += f" --calibration {folder / 'calibration'} {args.serve}"
    rows: list[dict[str, object]] = []
    async with started(command, timeout_s=600) as url:
        model = calibrated(folder / "calibration")
        setup = Setup(model, args.prefill, args.decode, cache_tokens=pool_tokens(url), max_running=64)
        alone = folder / "alone.json"
        await asyncio.to_thread(measure, url, ALONE, alone)
        setup, step_ms = with_overheads(setup, alone)
        print(f"{model.name}: {setup.overhead_ms:.2f} ms a request, {step_ms:.2f} ms a step beside the model")
        print(f"{'':<16}{'TTFT ms':>22}{'JCT ms':>24}{'cached':>20}{'busy':>7}")
        for number, words in enumerate(args.workload or WORKLOADS):
            path = folder / f"report-{number}.json"
            measured = await asyncio.to_thread(measure, url, words, path)
            report = simulate(setup, read_trace(path))
            simulated = Figures(report.ttft_ms.mean, report.jct_ms.mean, report.hit_rate)
            rows.append(
                {
                    "workload": words,
                    "overhead_ms": setup.overhead_ms,
                    "step_overhead_ms": step_ms,
                    "measured": measured._asdict(),
                    "simulated": simulated._asdict(),
                    "utilisation": report.utilisation,
                }
            )
            print(line(words.split()[0], measured, simulated, report.utilisation), flush=True)
    return rows


def line(name: str, measured: Figures, simulated: Figures, utilisation: float) -> str:
    """Measured, simulated, and how far off the second is."""
    ttft = simulated.ttft_ms / measured.ttft_ms - 1
    jct = simulated.jct_ms / measured.jct_ms - 1
    points = 100 * (simulated.cached - measured.cached)
    return (
        f"{name:<16}{measured.ttft_ms:>7.1f}{simulated.ttft_ms:>7.1f}{ttft:>+8.1%}"
        f"{measured.jct_ms:>9.1f}{simulated.jct_ms:>7.1f}{jct:>+8.1%}"
        f"{measured.cached:>8.1%}{simulated.cached:>7.1%}{points:>+5.1f}{utilisation:>7.0%}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prefill", type=int, default=1)
    parser.add_argument("--decode", type=int, default=1)
    parser.add_argument("--serve", default="", help="more options of memserve serve, quoted")
    parser.add_argument("--workload", action="append", help="words of memserve bench serve, quoted")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="memserve-simulation-") as folder:
        rows = asyncio.run(compare(args, Path(folder)))
    if args.json is not None:
        args.json.write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
