"""Comparisons: order of runs, what is compared, and the two commands against servers without a model."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, nullcontext
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner

from memserve.bench import settings
from memserve.bench.alternate import (
    FIGURES,
    Arm,
    Measured,
    alternate,
    by_arm,
    contrast,
    of_round,
    verdict,
)
from memserve.bench.bootstrap import Ratio
from memserve.bench.comparison_report import show_change, show_value
from memserve.bench.interrupt import Interrupt
from memserve.bench.load import LoadOptions
from memserve.bench.metrics import summarize
from memserve.bench.punctuality import LagMeter, punctuality
from memserve.bench.records import RequestRecord
from memserve.bench.run import Report, RunOptions, Target
from memserve.bench.settings import Workers, command
from memserve.cli import cli, serve
from memserve.errors import BenchError
from memserve.router.scheduling.policies.policies import POLICIES

FAKE = f"{sys.executable} {Path(__file__).resolve().parents[2] / 'benchmarks' / 'fake_server.py'}"
FIGURE = {figure.name: figure for figure in FIGURES}


def make_report(ttft_s: float, *, interrupted: bool = False) -> Report:
    """Four sessions of one request, with the first token after about so long, two more in 2 s."""
    records = []
    for index in range(4):
        first = ttft_s * (1 + 0.1 * index)
        records.append(
            RequestRecord(
                session=str(index),
                turn=0,
                max_tokens=3,
                scheduled_at=0.0,
                sent_at=0.0,
                chunk_times=[first, first + 1, first + 2],
                ended_at=first + 2,
                output_tokens=3,
            )
        )
    return Report(
        workload="w",
        description="",
        target=Target(url="http://x:1", model="m"),
        options=RunOptions(),
        notes=[],
        interrupted=interrupted,
        summary=summarize(records),
        punctuality=punctuality(records, LagMeter()),
        requests=records,
    )


def arm(name: str) -> Arm:
    return Arm(name, f"http://{name}", lambda: nullcontext(f"http://{name}"))


async def test_rounds_go_to_and_fro() -> None:
    seen: list[tuple[str, str, int]] = []

    async def measure(arm: Arm, url: str, number: int) -> Report:
        seen.append((arm.name, url, number))
        return make_report(1.0)

    arms, runs = [arm("a"), arm("b"), arm("c")], list[Measured]()
    await alternate(arms, 3, measure, Interrupt(), runs)
    assert "".join(name for name, _, _ in seen) == "abc" + "cba" + "abc"
    assert seen[3] == ("c", "http://c", 1)
    assert [(run.arm, run.round) for run in runs] == [(name, number) for name, _, number in seen]
    assert {name: len(reports) for name, reports in by_arm(runs, arms).items()} == {"a": 3, "b": 3, "c": 3}


async def test_what_was_measured_before_an_end_is_kept() -> None:
    interrupt, runs, arms = Interrupt(), list[Measured](), [arm("a"), arm("b")]

    async def measure(arm: Arm, url: str, number: int) -> Report:
        interrupt.pressed = len(runs) == 2
        return make_report(1.0, interrupted=interrupt.pressed)

    await alternate(arms, 3, measure, interrupt, runs)
    assert [(run.arm, run.round) for run in runs] == [("a", 0), ("b", 0), ("b", 1)]
    assert {name: len(reports) for name, reports in by_arm(runs, arms).items()} == {"a": 1, "b": 1}
    assert by_arm(runs[2:], arms) == by_arm(runs[:1], arms) == {}

    async def fail(arm: Arm, url: str, number: int) -> Report:
        if len(again) == 1:
            raise BenchError("no")
        return make_report(1.0)

    again: list[Measured] = []
    with pytest.raises(BenchError):
        await alternate(arms, 3, fail, Interrupt(), again)
    assert len(again) == 1


async def test_a_signal_while_a_server_starts() -> None:
    interrupt, runs = Interrupt(), list[Measured]()

    @asynccontextmanager
    async def starting() -> AsyncIterator[str]:
        if runs:
            interrupt.pressed = True
            task = asyncio.current_task()
            assert task is not None
            task.cancel()
            await asyncio.sleep(60)
        yield "http://x"

    async def measure(arm: Arm, url: str, number: int) -> Report:
        return make_report(1.0)

    arms = [Arm(name, "command", starting) for name in "ab"]
    await alternate(arms, 3, measure, interrupt, runs)
    assert [run.arm for run in runs] == ["a"]
    await asyncio.sleep(0)  # the task goes on


def test_each_round_has_arrivals_of_its_own() -> None:
    options = RunOptions(LoadOptions(rate=1.0, seed=5), warmup=3)
    assert of_round(options, 0) == options
    assert of_round(options, 2) == RunOptions(LoadOptions(rate=1.0, seed=7), warmup=3)


def test_a_contrast() -> None:
    reports = {"a": [make_report(1.0), make_report(2.0)], "b": [make_report(0.5), make_report(1.0)]}
    found = contrast("a", "b", reports)
    assert (found.a, found.b) == ("a", "b")
    ttft = found.ratios["TTFT mean"]
    assert (ttft.a, ttft.b, ttft.ratio) == pytest.approx((1725, 862.5, 0.5))
    assert (ttft.low, ttft.high) == pytest.approx((0.5, 0.5))  # B has half of it in every session
    assert found.ratios["TPOT mean"].ratio == pytest.approx(1)
    assert found.ratios["request rate"].ratio > 1
    assert "goodput" not in found.ratios and "cached tokens" not in found.ratios
    assert FIGURE["TTFT P50"].value(reports["a"]) == pytest.approx(1650)
    assert FIGURE["goodput"].value(reports["a"]) is None


def test_verdicts_and_cells() -> None:
    ttft, rate, cached = FIGURE["TTFT mean"], FIGURE["request rate"], FIGURE["cached tokens"]
    lower, unsure, single = (
        Ratio(2, 1, 0.5, 0.4, 0.6),
        Ratio(1, 1, 1.0, 0.9, 1.1),
        Ratio(1, 2, 2.0, None, None),
    )
    assert (verdict(ttft, lower), verdict(rate, lower), verdict(cached, lower)) == ("better", "worse", "")
    assert verdict(ttft, unsure) == verdict(ttft, single) == ""
    assert show_change(ttft, lower) == r"-50 % \[-60, -40] [green]better[/green]"
    assert show_change(ttft, single) == "+100 %" and show_change(ttft, None) == "–"
    assert show_value(cached, 0.25) == "25.0%" and show_value(ttft, 1.234) == "1.23"


def test_settings_are_command_lines_of_the_server() -> None:
    lines = [command(setting, Workers(), "--dtype float32") for setting in settings.SETTINGS]
    assert lines[0] == "memserve serve --colocated 2 --caching off --dtype float32"
    assert (
        lines[-1]
        == "memserve serve --prefill 1 --decode 1 --policy least-load --caching full --dtype float32"
    )
    assert command(settings.COLOCATED, Workers(3, 4)).split()[3] == "7"
    assert command(settings.COLOCATED, Workers(3, 4, 1)).split()[3] == "1"
    for line in lines:
        serve.make_context("serve", line.split()[2:])  # raises for options that are none
    assert len({setting.name for setting in settings.SETTINGS}) == len(lines) == 6


def test_policies_are_command_lines_of_the_server() -> None:
    lines = settings.policy_commands(Workers(2, 3), "--dtype float32")
    assert tuple(lines) == settings.POLICIES and set(lines) < set(POLICIES)
    for name, line in lines.items():
        options = serve.make_context("serve", line.split()[2:]).params
        assert (options["prefill"], options["decode"], options["policy"]) == (2, 3, name)


LOAD = ("random", "--sessions", "4", "--input-tokens", "8", "--output-tokens", "5", "--rounds", "2")


def test_compare_of_started_servers(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    out, picture = tmp_path / "c.json", tmp_path / "c.png"
    args = ["bench", "compare", f"{FAKE} --ttft-s 0.02", f"{FAKE} --ttft-s 0.2", *LOAD, "--json", str(out)]
    result = CliRunner().invoke(cli, [*args, "--plot", str(picture)])
    assert result.exit_code == 0, result.output
    file = json.loads(out.read_text())
    assert [(run["arm"], run["round"]) for run in file["runs"]] == [("A", 0), ("B", 0), ("B", 1), ("A", 1)]
    (found,) = file["contrasts"]
    ratio = msgspec.convert(found["ratios"]["TTFT mean"], Ratio)
    assert ratio.a >= 20 and ratio.b >= 200 and ratio.ratio > 1.5
    assert file["figures"]["B"]["TTFT mean"] == ratio.b
    assert "worse" in result.output and "2 of 2 rounds" in result.output
    assert "of one round" not in result.output
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_compare_with_a_server_that_does_not_start(tmp_path: Path) -> None:
    out = tmp_path / "c.json"
    args = ["bench", "compare", FAKE, "/bin/sh -c 'exit 3'", *LOAD, "--json", str(out)]
    result = CliRunner().invoke(cli, args)
    assert result.exit_code == 1
    assert "status 3 before it was ready" in result.stderr
    assert "no round is complete" in result.stdout
    assert len(json.loads(out.read_text())["runs"]) == 1  # what was measured is kept
    result = CliRunner().invoke(cli, ["bench", "compare", "/bin/sh -c 'exit 3'", FAKE, *LOAD])
    assert result.exit_code == 1 and result.stdout.count("rounds") == 0


def test_policies_one_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "policy_commands", lambda workers, options: dict.fromkeys("abc", FAKE))
    out = tmp_path / "p.json"
    args = ["bench", "policies", *LOAD, "--rounds", "1", "--warmup", "0", "--json", str(out)]
    result = CliRunner().invoke(cli, args)
    assert result.exit_code == 0, result.output
    file = json.loads(out.read_text())
    assert [(found["b"], found["a"]) for found in file["contrasts"]] == [("c", "a"), ("c", "b")]


def test_settings_one_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(settings, "command", lambda setting, workers, options: FAKE)
    out, picture = tmp_path / "s.json", tmp_path / "s.png"
    args = ["bench", "settings", *LOAD, "--rounds", "1", "--warmup", "0", "--json", str(out)]
    result = CliRunner().invoke(cli, [*args, "--plot", str(picture)])
    assert result.exit_code == 0, result.output
    assert "of one round" in result.output
    file = json.loads(out.read_text())
    assert [run["arm"] for run in file["runs"]] == [setting.name for setting in settings.SETTINGS]
    assert [(found["b"], found["a"]) for found in file["contrasts"]] == [
        ("PD-Basic", "PD-colocated"),
        ("PD-Caching-3", "PD-Basic"),
        ("PD-Caching-3", "PD-colocated, caching"),
    ]
    assert picture.read_bytes().startswith(b"\x89PNG")
