"""Tables, JSON and pictures of a report that was made by hand."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import msgspec
import pytest
from rich.console import Console

from memserve.bench.live import live_table, shown
from memserve.bench.load import LoadOptions, State
from memserve.bench.metrics import summarize
from memserve.bench.plots import check_matplotlib, plot_bars, plot_runs
from memserve.bench.punctuality import LagMeter, punctuality
from memserve.bench.records import ErrorKind, Failure, RequestRecord
from memserve.bench.report import failures, print_report, warnings, write_json
from memserve.bench.run import Report, RunOptions, Target
from memserve.errors import BenchError


def make_records(num_failed: int = 1) -> list[RequestRecord]:
    """Five requests that went well, then some that did not."""
    records = [
        RequestRecord(
            session=f"s{index}",
            turn=0,
            max_tokens=3,
            scheduled_at=0.1 * index,
            sent_at=0.1 * index,
            chunk_times=[0.1 * index + 0.2, 0.1 * index + 0.3, 0.1 * index + 0.4],
            ended_at=0.1 * index + 0.4,
            prompt_tokens=40,
            cached_tokens=16,
            output_tokens=3,
            has_usage=True,
        )
        for index in range(5)
    ]
    for index in range(num_failed):
        failure = Failure(ErrorKind.HTTP, f"500: [red] [/nothing] {min(index, 1)}")
        records.append(
            RequestRecord(
                session=f"f{index}",
                turn=0,
                max_tokens=3,
                scheduled_at=0.0,
                sent_at=0.0,
                ended_at=0.1,
                error=failure,
            )
        )
    return records


def make_report(records: list[RequestRecord], **fields: object) -> Report:
    limits = {"ttft": 250.0}
    report = Report(
        workload="react",
        description="five of five",
        target=Target(url="http://x:1", model="m"),
        options=RunOptions(LoadOptions(concurrency=2), limits_ms=limits),
        notes=["a [note]"],
        interrupted=False,
        summary=summarize(records, limits_ms=limits, available_ratio=0.25, num_skipped=1),
        punctuality=punctuality(records, LagMeter()),
        requests=records,
    )
    return msgspec.structs.replace(report, **fields)


def printed(report: Report) -> str:
    console = Console(file=io.StringIO(), width=110)
    print_report(report, console)
    return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]


def lines_with(text: str, word: str) -> list[str]:
    return [" ".join(line.split()) for line in text.splitlines() if word in line]


def test_what_is_printed() -> None:
    text = printed(make_report(make_records()))
    assert lines_with(text, "completed") == ["requests completed 5 of 6"]
    assert lines_with(text, "goodput") == ["goodput (ttft ≤ 250 ms) 6.250 /s"]
    assert lines_with(text, "cached") == ["cached tokens 40.0% of the prompts"]
    assert lines_with(text, "infinite") == ["with an infinite cache 25.0% of the prompts"]
    assert lines_with(text, "TTFT") == ["TTFT 200.00 200.00 200.00 200.00 200.00"]
    assert lines_with(text, "JCT") == ["JCT 400.00 400.00 400.00 400.00 400.00"]
    assert lines_with(text, "note: a") == ["note: a [note]"]  # what servers say is no markup
    assert lines_with(text, "failed:") == ["failed: http: 1 (500: [red] [/nothing] 0)"]


def test_a_report_without_a_completed_request() -> None:
    text = printed(make_report(make_records()[5:]))
    assert lines_with(text, "completed") == ["requests completed 0 of 1"]
    assert "TTFT" not in text and "prompt tokens" in text


def test_warnings() -> None:
    records = make_records()
    records[0].output_tokens = 2
    complaint = msgspec.structs.replace(punctuality(records, LagMeter()), complaint="it was late")
    report = make_report(records, interrupted=True, punctuality=complaint)
    assert [line.split(":")[0] for line in warnings(report)] == [
        "a [note]",
        "the run was stopped",
        "1 turns were not sent",
        "1 of 5 answers are not as long as was asked for",
        "it was late",
    ]


def test_failures_are_grouped_with_the_commonest_messages_first() -> None:
    assert failures(make_report(make_records(4))) == [
        "http: 4 (500: [red] [/nothing] 1; 500: [red] [/nothing] 0)"
    ]


def test_json_has_everything(tmp_path: Path) -> None:
    report = make_report(make_records())
    write_json(tmp_path / "r.json", report, ["memserve", "bench"])
    file = json.loads((tmp_path / "r.json").read_text())
    assert file["command"] == ["memserve", "bench"]
    read = msgspec.convert(file["report"], Report)
    assert read == report
    again = summarize(read.requests, limits_ms=read.options.limits_ms, available_ratio=0.25)
    assert msgspec.structs.replace(again, num_skipped=1) == report.summary
    with pytest.raises(BenchError, match="cannot be written: No such file"):
        write_json(tmp_path / "no" / "r.json", report, [])


def test_pictures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot_runs(tmp_path / "one.png", "title", {"a": [make_records()]})
    plot_runs(tmp_path / "two.png", "title", {"a": [make_records()] * 2, "b": [make_records(0)], "c": [[]]})
    plot_bars(tmp_path / "bars.png", "title", {"TTFT": {"a": (1.0, 0.5, 2.0), "b": (2.0, 2.0, 2.0)}})
    for name in ("one", "two", "bars"):
        data = (tmp_path / f"{name}.png").read_bytes()
        assert data.startswith(b"\x89PNG") and len(data) > 5000
    with pytest.raises(BenchError, match="cannot be written"):
        plot_runs(tmp_path / "no" / "x.png", "title", {"a": [[]]})


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(BenchError, match=r"pip install 'memserve\[bench\]'"):
        check_matplotlib()


async def test_the_live_table_and_a_terminal() -> None:
    records = make_records()
    state = State(records, num_requests=9, num_finished=6, num_failed=1, num_output_tokens=15)
    console = Console(file=io.StringIO(), width=110, force_terminal=True)
    console.print(live_table(state))
    async with shown(state, console, "react"):
        pass
    async with shown(state, Console(file=io.StringIO()), "react"):
        pass
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "200.0 ms" in text and "400.0 ms" in text and "recent TTFT" in text
