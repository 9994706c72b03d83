"""Where the time to the first token goes, disaggregated and colocated: the same sessions through each.

    python benchmarks/ttft_parts.py FOLDER --sessions 12 --rate 3 [--max-prompt-tokens 1500] [--rounds 3]

Of every request the server tells what happened when (GET /v1/requests/{id}); the parts of the mean are

    queue       from its submission until it was given workers
    wait        from there until the first step that computed it began: messages, and prompts before it
    computing   from there to its first token, together with whatever else ran in those steps
    around      the rest of what the client saw: HTTP, tokenising, the first event's way back

and beside them how many tokens of a prompt were computed, and how long one of them took.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import urllib.request
from collections import defaultdict
from pathlib import Path
from statistics import fmean, median
from typing import Any

import click
from rig import BUNDLED_MODEL, server

FLEETS = {
    "colocated": ("--colocated", "2"),
    "PD": ("--prefill", "1", "--decode", "1", "--policy", "least-load"),
}
CACHING = {"off": ("--caching", "off"), "full": ()}
PARTS = ("ttft", "around", "queue", "wait", "computing")


def get(url: str) -> Any:
    """A JSON answer."""
    with urllib.request.urlopen(url, timeout=30) as answer:
        return json.load(answer)


def parts_of(url: str, row: dict[str, Any]) -> dict[str, float] | None:
    """Times in ms and counts of one request; None where it did not end well."""
    (choice,) = get(f"{url}/v1/requests/{row['id']}")["choices"]
    at = {event["event"]: event["at_ms"] for event in reversed(choice["timeline"])}
    if not {"placed", "computing", "first_token", "finished"} <= set(at) or choice["cached_tokens"] is None:
        return None
    cached = choice["cached_tokens"]
    computing = at["first_token"] - at["computing"]
    num_new = choice["prompt_tokens"] - cached["device"] - cached["host"] - cached["pulled"]
    return {
        "queue": at["placed"],
        "wait": at["computing"] - at["placed"],
        "computing": computing,
        "in server": at["first_token"],
        "new tokens": num_new,
    }


def measure(url: str, load: list[str], folder: Path) -> dict[str, float]:
    """Means over one run."""
    report = folder / "report.json"
    command = [sys.executable, "-m", "memserve", "bench", "serve", *load, "--url", url, "--json", str(report)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    summary = json.loads(report.read_text())["report"]["summary"]
    rows = get(f"{url}/v1/requests?limit=500")["data"]
    found = [parts for row in rows if (parts := parts_of(url, row)) is not None]
    assert len(found) >= summary["num_requests"], "requests are missing"
    means = {name: fmean(parts[name] for parts in found) for name in found[0]}
    ttft = summary["ttft"]["mean"]
    means |= {"ttft": ttft, "around": ttft - means["in server"]}
    means["us a new token"] = 1e3 * means["computing"] / means["new tokens"]
    return means


@click.command()
@click.argument("sessions_folder", type=click.Path(exists=True, path_type=Path))
@click.option("--sessions", default=12, show_default=True)
@click.option("--rate", default=3.0, show_default=True)
@click.option("--max-prompt-tokens", default=1500, show_default=True)
@click.option("--rounds", default=3, show_default=True)
@click.option("--json", "json_path", type=click.Path(path_type=Path))
def main(
    sessions_folder: Path,
    sessions: int,
    rate: float,
    max_prompt_tokens: int,
    rounds: int,
    json_path: Path | None,
) -> None:
    """Measure the parts of the time to the first token."""
    load = ["sessions", str(sessions_folder), "--tokenizer", str(BUNDLED_MODEL), "--sessions", str(sessions)]
    load += ["--max-prompt-tokens", str(max_prompt_tokens), "--max-output-tokens", "32", "--rate", str(rate)]
    load += ["--answers", "live"]
    runs: dict[str, list[dict[str, float]]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for _ in range(rounds):
            for caching, how in CACHING.items():
                for fleet, workers in FLEETS.items():
                    options = (*workers, *how, "--calibration", "off", "--log-level", "warning")
                    with server(BUNDLED_MODEL, *options, log=folder / "log") as url:
                        runs[f"{fleet}, caching {caching}"].append(measure(url, load, folder))
    columns = (*PARTS, "new tokens", "us a new token")
    print(f"means over a run in ms, median of {rounds} runs")
    print(f"{'':24}" + "".join(f"{column:>15}" for column in columns))
    for fleet, found in runs.items():
        values = (median(run[column] for run in found) for column in columns)
        print(f"{fleet:24}" + "".join(f"{value:15.1f}" for value in values), flush=True)
    if json_path is not None:
        json_path.write_text(json.dumps(runs, indent=1))


if __name__ == "__main__":
    main()
