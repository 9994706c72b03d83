"""Does the load generator keep up? Streams from a server without a model, in a process of its own.

    python benchmarks/load_generator.py [--streams 300] [--tokens 200] [--itl-ms 50]

Two loads: a closed loop of so many sessions at once, and Poisson arrivals at a rate that keeps about as many
streams running. Said of each: how late requests were sent and how late the event loop was (P50, P99, most),
the share of a core, and what was measured beside what the server was told to do. With two cores or more the
server has the last one to itself.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import click
import uvloop

from memserve.bench.load import LoadOptions, State
from memserve.bench.run import Report, RunOptions, Target, run
from memserve.bench.workload import Session, Turn, Workload

FAKE_SERVER = Path(__file__).parent / "fake_server.py"
TTFT_S = 0.1
PROMPT_TOKENS = 500


def make_workload(num_sessions: int, num_tokens: int) -> Workload:
    """Sessions of two turns; the prompts are all the same, since nothing reads them."""
    piece = tuple(range(PROMPT_TOKENS))
    turns = (Turn(piece, piece[:num_tokens], num_tokens), Turn(piece[:20], None, num_tokens))
    return Workload("streams", tuple(Session(str(i), turns) for i in range(num_sessions)), is_text=False)


def say(name: str, report: Report, itl_ms: float) -> None:
    """One load's lines."""
    summary, kept = report.summary, report.punctuality
    assert summary.num_failed == 0 and summary.ttft and summary.tpot and kept.cpu is not None, summary
    late = (kept.late_p50_ms, kept.late_p99_ms, kept.late_max_ms)
    lag = (kept.loop_lag_p99_ms, kept.loop_lag_max_ms)
    print(f"{name}: {summary.num_requests} requests, {summary.output_throughput:.0f} chunks/s")
    print(f"  streams: mean {summary.mean_running:.0f}, most {summary.max_running}")
    print("  sent late: P50 {:.2f}, P99 {:.2f}, most {:.2f} ms".format(*late))
    print("  event loop late: P99 {:.2f}, most {:.2f} ms".format(*lag))
    print(f"  share of a core: {kept.cpu:.0%}")
    print(f"  TTFT: P50 {summary.ttft.p50:.1f}, P99 {summary.ttft.p99:.1f} ms; set: {1e3 * TTFT_S:.0f}")
    print(f"  TPOT: P50 {summary.tpot.p50:.2f}, P99 {summary.tpot.p99:.2f} ms; set: {itl_ms:g}")
    print(f"  verdict: {kept.complaint or 'kept up'}")


@click.command()
@click.option("--streams", default=300)
@click.option("--tokens", default=200)
@click.option("--itl-ms", default=50.0)
def main(streams: int, tokens: int, itl_ms: float) -> None:
    """Measure the load generator."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) > 1:
        os.sched_setaffinity(0, cores[-1:])  # inherited by the server
    command = [sys.executable, str(FAKE_SERVER), "--ttft-s", str(TTFT_S), "--itl-s", str(itl_ms / 1e3)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        os.sched_setaffinity(0, cores[:-1] or cores)
        try:
            assert server.stdout is not None
            target = Target(url=server.stdout.readline().strip())
            workload = make_workload(2 * streams, tokens)
            job_s = TTFT_S + itl_ms / 1e3 * tokens
            loads = {
                f"closed loop of {streams}": LoadOptions(concurrency=streams),
                "Poisson": LoadOptions(rate=streams / job_s),
            }
            for name, load in loads.items():
                options = RunOptions(load, flush=False)
                say(name, uvloop.run(run(target, workload, options, State())), itl_ms)
        finally:
            server.terminate()


if __name__ == "__main__":
    main()
