"""`memserve simulate` from its options to its files."""

from __future__ import annotations

import gzip
import random
import shutil
from dataclasses import replace
from pathlib import Path

import click
import msgspec
import pytest
from click.testing import CliRunner, Result

from memserve.errors import WorkloadError
from memserve.router.scheduling.cost_model import to_json
from memserve.router.scheduling.hardware import h800_llama_2_13b
from memserve.router.scheduling.policies.policies import POLICIES
from memserve.router.scheduling.predictor import Predictor
from memserve.simulate.command import POLICY_NAMES, at_load, simulate
from memserve.simulate.report import Report
from memserve.simulate.report import simulate as run
from memserve.simulate.simulation import Setup
from memserve.simulate.traces import read_trace

ROW = '{"timestamp": 1, "input_length": 600, "output_length": 1, "hash_ids": [1, 2]}'


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    rng = random.Random(0)
    rows = []
    for index in range(60):
        stem = rng.randrange(6) * 100
        ids = [stem, stem + 1, *(10_000 + 10 * index + i for i in range(3))]
        rows.append({"timestamp": 100 * index, "input_length": 5 * 512, "output_length": 20, "hash_ids": ids})
    path = tmp_path / "trace.jsonl.gz"
    path.write_bytes(gzip.compress(b"\n".join(map(msgspec.json.encode, rows))))
    return path


def invoke(*args: object) -> Result:
    return CliRunner().invoke(simulate, list(map(str, args)))


def test_all_policies_and_the_bound(trace: Path, tmp_path: Path) -> None:
    out = tmp_path / "reports.json"
    result = invoke("--trace", trace, "--prefill", 2, "--decode", 2, "--load", 0.5, "--json", out)
    assert result.exit_code == 0, result.output
    reports = msgspec.json.decode(out.read_bytes(), type=list[Report])
    assert [report.policy for report in reports] == [*POLICIES, "bound"] == [*POLICY_NAMES, "bound"]
    assert all(report.num_requests == 60 for report in reports)
    assert len(result.output.splitlines()) == 8
    by_name = {report.policy: report for report in reports}
    assert by_name["bound"].ttft_ms.mean <= by_name["prompt-tree"].ttft_ms.mean
    assert by_name["prompt-tree"].ttft_ms.mean < by_name["random"].ttft_ms.mean


def test_a_calibration_colocated_and_a_plot(trace: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    calibration, plot = tmp_path / "model.json", tmp_path / "plot.svg"
    calibration.write_bytes(to_json(h800_llama_2_13b()))
    result = invoke(
        *("--trace", trace, "--colocated", 2, "--instance", calibration, "--limit", 5),
        *("--policy", "session", "--no-bound", "--plot", plot),
    )
    assert result.exit_code == 0, result.output
    assert result.output.splitlines()[2].startswith("session")
    assert plot.read_text().startswith("<?xml")


def test_load_is_a_share_of_the_prefill_sides_time(trace: Path) -> None:
    model = h800_llama_2_13b()
    stretched = at_load(read_trace(trace), model, 3, 0.25)
    work_s = 60 * Predictor(model).prefill_ms(2560, 0) / 1e3
    assert stretched.dues is not None and max(stretched.dues) == pytest.approx(work_s / (3 * 0.25))


def test_what_is_sent_is_the_same_at_any_load(tmp_path: Path) -> None:
    words = "memserve bench serve random --sessions 40 --rate 200 --duration 0.1 --think-time 0.5"
    path, model = tmp_path / "report.json", h800_llama_2_13b()
    path.write_bytes(msgspec.json.encode({"command": words.split(), "report": {}}))
    trace = read_trace(path, limit=30)
    assert trace.dues is not None
    for load in (0.05, 0.9):
        stretched = at_load(trace, model, 2, load)
        assert stretched.dues is not None
        factor = stretched.dues[-1] / trace.dues[-1]
        assert stretched.duration_s == pytest.approx(0.1 * factor)
        assert stretched.think.mean_s == pytest.approx(0.5 * factor)
    out = tmp_path / "out.json"
    result = invoke(
        *("--trace", path, "--limit", 30, "--prefill", 2, "--decode", 2, "--policy", "session", "--no-bound"),
        *("--load", 0.05, "--load", 0.9, "--json", out),
    )
    assert result.exit_code == 0, result.output
    counts = [report.num_requests for report in msgspec.json.decode(out.read_bytes(), type=list[Report])]
    assert counts == [sum(due <= 0.1 for due in trace.dues)] * 2 and 1 < counts[0] < 30


@pytest.mark.parametrize("how", ["--concurrency 2", "--rate inf"])
def test_what_has_no_arrivals_cannot_be_stretched(tmp_path: Path, how: str) -> None:
    path = tmp_path / "report.json"
    words = f"memserve bench serve random --sessions 3 {how}"
    path.write_bytes(msgspec.json.encode({"command": words.split(), "report": {}}))
    result = invoke("--trace", path, "--prefill", 1, "--decode", 1, "--load", 0.5)
    assert result.exit_code == 2 and "no arrivals to stretch" in result.output, result.output


def test_a_trace_of_which_nothing_is_sent_is_refused(trace: Path) -> None:
    late = replace(read_trace(trace, limit=3), dues=(5.0, 6.0, 7.0), duration_s=1.0)
    with pytest.raises(WorkloadError, match="no request is sent"):
        run(Setup(h800_llama_2_13b(), 1, 1), late)


def test_loads_and_cache_sizes_make_a_grid(trace: Path, tmp_path: Path) -> None:
    out = tmp_path / "reports.json"
    sizes, loads = ("--cache-tokens", 20_000, "--cache-tokens", 60_000), ("--load", 0.3, "--load", 0.6)
    result = invoke(
        *("--trace", trace, "--prefill", 2, "--decode", 2, "--policy", "prompt-tree", "--limit", 20),
        *(*sizes, *loads, "--json", out),
    )
    assert result.exit_code == 0, result.output
    reports = msgspec.json.decode(out.read_bytes(), type=list[Report])
    assert [(report.load, report.cache_tokens, report.policy) for report in reports] == [
        (load, size, policy)
        for load in (0.3, 0.6)
        for size in (20_000, 60_000)
        for policy in ("prompt-tree", "bound")
    ]
    assert "load 60%, pools of 60,000 tokens, 20 requests" in result.output


@pytest.mark.parametrize(
    "options",
    [
        ["--instance", "tpu"],
        ["--prefill", "0"],
        ["--policy", "best"],
        ["--load", "0"],
        ["--trace", "nowhere"],
    ],
)
def test_mistakes_are_usage_errors(trace: Path, options: list[str]) -> None:
    result = invoke("--trace", trace, *options)
    assert result.exit_code == click.UsageError.exit_code
    assert "Error" in result.output


def test_a_trace_that_is_none_is_a_usage_error(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text("{}\n")
    assert invoke("--trace", path).exit_code == click.UsageError.exit_code


@pytest.mark.parametrize(
    "row, options, said",
    [
        ("", [], "nothing in it"),
        ('{"timestamp": -1, "input_length": 9, "output_length": 1, "hash_ids": [1]}', [], "cannot be read"),
        ('{"timestamp": 1, "input_length": 9, "output_length": 1, "hash_ids": []}', [], "cannot be read"),
        (
            ROW + '\n{"timestamp": 1e300, "input_length": 9, "output_length": 1, "hash_ids": [1]}',
            [],
            "trace.jsonl:2: Expected `float` <= 10000000000000",
        ),
        ("TIMESTAMP,ContextTokens,GeneratedTokens", [], "a Mooncake trace"),
        ('{"prompt": "hi"}', [], "or the JSON report of bench serve"),
        (ROW, ["--rate", "1e-300"], "range"),
        (ROW, ["--load", "nan"], "nan"),
        (ROW, ["--rate", "nan"], "nan"),
        (ROW, ["--overhead-ms", "nan"], "nan"),
        (ROW, ["--load", "1e-300"], "range"),
        (ROW, ["--prefill", "1000000"], "range"),
        (ROW, ["--cache-tokens", "-5"], "range"),
        (ROW, ["--cache-tokens", "5"], "has 601 tokens"),
        (ROW, ["--colocated", "2", "--prefill", "1"], "excludes"),
        (ROW, ["--json", "/nowhere/at/all.json"], "no folder"),
        (ROW, ["--plot", "x.txt"], ".png"),
    ],
)
def test_bad_input_is_said_before_any_work(tmp_path: Path, row: str, options: list[str], said: str) -> None:
    trace = tmp_path / "trace.jsonl"
    trace.write_text(row)
    result = CliRunner().invoke(simulate, ["--trace", str(trace), *options])
    assert result.exit_code == 2 and said in result.output, result.output


@pytest.mark.parametrize("option, name", [("--json", "out.json"), ("--plot", "out.png")])
def test_results_that_cannot_be_written_are_a_line(
    trace: Path, tmp_path: Path, option: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if option == "--plot":
        pytest.importorskip("matplotlib")
    out = tmp_path / "gone" / name
    out.parent.mkdir()
    # the folder goes while the simulation runs
    monkeypatch.setattr("memserve.simulate.report.table", lambda group: f"{shutil.rmtree(out.parent)}")
    given = ("--trace", trace, "--limit", 3, "--policy", "random", "--no-bound", option, out)
    result = invoke(*given)
    assert result.exit_code == 1, result.output
    last = result.output.splitlines()[-1]
    assert last == f"Error: {option} {out} cannot be written: No such file or directory"
