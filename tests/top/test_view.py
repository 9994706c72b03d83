"""The screen, as lines of text: what is on it, at every size, whatever the server told."""

from __future__ import annotations

import io

import msgspec
import pytest
from rich.console import Console

from memserve.top.rates import START_TIME
from memserve.top.requests import chosen
from memserve.top.snapshot import Cached, Request, Snapshot, Told, Worker, WorkerLoad
from memserve.top.text import age, amount, clean, duration
from memserve.top.view import State, render
from memserve.top.workers import Tier, bar, tiers
from tests.top.recordings import URL, recorded

SIZES = [(80, 24), (100, 30), (119, 24), (120, 24), (155, 24), (156, 24), (160, 50), (300, 100)]


def make_state(before: str | None = "before", url: str = URL) -> State:
    state = State(url, 1.0)
    if before is not None:
        state.add(recorded(before, 0.0), 0.0)
    state.add(recorded("after", 1.0), 1.0)
    return state


def lines_of(state: State, width: int = 80, height: int = 24, now: float = 1.5) -> list[str]:
    console = Console(file=io.StringIO(), width=width, height=height, record=True, force_terminal=True)
    started = 0.0
    if state.now is not None and state.now.samples is not None:
        started = state.now.samples.value.get((START_TIME, ""), 0.0)
    console.print(render(state, width, height, now, started + 75.0))
    return console.export_text().splitlines()


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_everything_has_its_place(width: int, height: int) -> None:
    lines = lines_of(make_state(), width, height)
    assert len(lines) <= height and all(len(line) <= width for line in lines)
    text = "\n".join(lines)
    assert lines[0].startswith(f"memserve top {URL}  up 75s  every 1 s")
    for worker in ("prefill-0", "prefill-1", "decode-0", "decode-1"):
        assert sum(line.startswith(worker) for line in lines) == 1, text
    for name in ("P device", "P host", "D device", "D host", "hits now", "hits all", "believed"):
        assert sum(line.startswith(name) for line in lines) == 1, text
    for name in ("P→D ", "D→P ", "prefixes", "queue", "TTFT ", "ITL ", "predicted"):
        assert text.count(name) >= 1, text
    head = next(i for i, line in enumerate(lines) if line.startswith("request "))
    rows = lines[head + 1 :]
    assert len(rows) >= 3 and "…" not in "\n".join(lines[1:head]), text
    assert "prefill-0 → decode-1" in rows[0] and "prompt-tree" in rows[0] and "288p" in rows[0]
    assert "15.1ms" in rows[0] and "138ms" in rows[0]


def test_figures_of_the_interval_and_of_all() -> None:
    lines = {line[:11].strip(): line[11:].strip() for line in lines_of(make_state())}
    assert lines["hits now"] == "48.5 %  device 36.4 % host 0.0 % pulled 12.1 %  of 2,373 tokens"
    assert lines["hits all"] == "39.4 %  device 31.5 % host 0.0 % pulled 7.9 %  of 3,656 tokens"
    assert lines["believed"] == "available 59.5 %  expected 59.5 %  captured 48.7 %"
    assert lines["P→D"] == "8.25 MiB/s  1,373 tok/s  all 18.4 MiB in 11 pulls, 0 failed"
    assert lines["queue"] == "0 waiting  5 running  0 refused"
    assert lines["TTFT"] == "P50   212ms  P99   955ms  all 333ms, 2.42s"
    assert lines["predicted"] == "TTFT off by P50 75 %  P95 97 %  all 75 %, 98 %  in sum -84 %"
    assert lines["P device"].endswith("2.07 MiB active, 13.0 MiB cached of 128 MiB")


def test_nothing_to_compare_with() -> None:
    lines = {line[:11].strip(): line[11:].strip() for line in lines_of(make_state(before=None))}
    assert lines["hits now"].startswith("–") and lines["hits all"].startswith("39.4 %")
    assert lines["P→D"].startswith("–/s      – tok/s") and lines["TTFT"].startswith("P50       –")


@pytest.mark.parametrize("width", [1, 2, 7, 20, 40, 79, 81, 121])
@pytest.mark.parametrize("height", [1, 2, 5, 13, 23])
def test_smaller_screens_are_no_error(width: int, height: int) -> None:
    lines_of(make_state(), width, height)
    lines_of(State(URL, 1.0), width, height)


# --- a server that is not there ----------------------------------------------------------------------------


def test_a_server_that_never_answered() -> None:
    state = State(URL, 1.0)
    assert "waiting for the server" in "\n".join(lines_of(state))
    state.add(Snapshot(problems=("/v1/workers: refused", "/metrics: refused")), 5.0)
    assert lines_of(state, now=6.0)[:2] == [f"memserve top {URL}  every 1 s", "/v1/workers: refused"]


def test_a_server_that_went_away_and_came_back() -> None:
    state = make_state()
    # 1. what was known stays, and the header says how old it is
    state.add(Snapshot(problems=("/v1/workers: refused",)), 2.0)
    lines = lines_of(state, 120, now=12.0)
    assert "no news for 11s, trying on" in lines[0] and lines[1] == "/v1/workers: refused"
    assert len(lines) == 24
    assert any(line.startswith("prefill-0") for line in lines)
    # 2. it is back
    state.add(recorded("after", 13.0), 13.0)
    assert lines_of(state, now=13.1)[0].endswith("every 1 s")
    # 3. it answers too slowly
    assert "no news for 7s" in lines_of(state, now=20.0)[0]


@pytest.mark.parametrize("missing", ["workers", "samples", "requests"])
def test_answers_in_part(missing: str) -> None:
    state = State(URL, 1.0)
    for at in (0.0, 1.0):
        state.add(recorded("after", at)._replace(**{missing: None}, problems=("/x: 404",)), at)
    text = "\n".join(lines_of(state))
    assert "/x: 404" in text
    assert (("steps/s" in text), ("hits all" in text), ("policy" in text)) == (
        True,
        missing != "samples",
        missing != "requests",
    )
    # then all of it, and again a part
    state.add(recorded("after", 2.0), 2.0)
    lines_of(state)


# --- many, and odd ones ------------------------------------------------------------------------------------


def make_workers(count: int, bad: int | None = None) -> list[Worker]:
    load = WorkerLoad(num_blocks=10, active_blocks=2, historical_blocks=3, free_blocks=5)
    return [Worker(f"decode-{i}", "decode", "down" if i == bad else "ready", load=load) for i in range(count)]


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_more_workers_than_lines(width: int, height: int) -> None:
    state = make_state()
    assert state.now is not None
    state.now = state.now._replace(workers=Told(1.0, make_workers(200, bad=150)))
    lines = lines_of(state, width, height)
    assert len(lines) <= height
    shown = [line for line in lines if line.startswith("decode-")]
    (more,) = [line for line in lines if line.startswith("… and ")]
    assert int(more.split()[2]) == 200 - len(shown)
    assert shown[0].startswith("decode-150") and "down" in shown[0]
    assert sum(line.startswith("D device") for line in lines) == 1
    assert sum("prompt-tree" in line for line in lines) >= 3


def test_texts_of_others_do_no_harm() -> None:
    evil = "\x1b[2J\x07[red]x[/red]\u202e\n" + "界" * 300
    worker = Worker(evil, evil, evil, 1 << 60, 1 << 60, 1 << 60, 1 << 60)
    numbers = dict.fromkeys(WorkerLoad.__struct_fields__, 1 << 60)
    request = Request(
        evil, evil, 1 << 60, 1e15, 1 << 60, evil, evil, "x", Cached(1 << 60, 1 << 60), 1e15, 1e15
    )
    now = recorded("after", 1.0)
    assert now.samples is not None
    samples = {key: value * 1e300 for key, value in now.samples.value.items()}
    loaded = msgspec.structs.replace(worker, load=WorkerLoad(**numbers))
    state = State(f"http://{evil}", 1.0)
    for at in (0.0, 1.0):
        told = (Told(at, [worker, loaded]), Told(at, samples), Told(at, [request]))
        state.add(Snapshot(*told, (evil,)), at)
    for width, height in SIZES:
        text = "\n".join(lines_of(state, width, height))
        assert not {"\x1b", "\x07", "\u202e"} & set(text)
        assert len(text.splitlines()) <= height
    assert "[red]x" in text  # no markup


def test_running_requests_come_first_and_leave_room() -> None:
    running = [Request(f"r{i}", "decoding") for i in range(4)]
    ended = [Request(f"e{i}", "finished") for i in range(4)]
    mixed = [each for pair in zip(ended, running, strict=True) for each in pair]

    def names(requests: list[Request], most: int) -> str:
        return " ".join(request.id for request in chosen(requests, most))

    assert names(mixed, 8) == "r0 r1 r2 r3 e0 e1 e2 e3"
    assert names(mixed, 4) == "r0 r1 e0 e1"
    assert names(mixed, 3) == "r0 r1 e0"
    assert names(mixed, 1) == "r0" and names(mixed, 0) == ""
    assert names(running, 3) == "r0 r1 r2" and names(ended, 3) == "e0 e1 e2"
    assert names([*ended[:1], *running], 4) == "r0 r1 r2 e0"


def test_bars() -> None:
    tier = Tier("x", 25, 50, 100, 1)
    assert bar(tier, 8).plain == "██▒▒▒▒··"
    assert bar(tier._replace(active=None), 8).plain == "▒▒▒▒····"
    assert bar(tier._replace(active=200), 8).plain == "████████"  # makes no sense, does no harm
    assert bar(tier._replace(total=0), 8).plain == "–"
    many = [*make_workers(3), replace_role(make_workers(1)[0], "colocated")]
    assert [(each.name, each.active, each.historical, each.total) for each in tiers(many)] == [
        ("D device", 6, 9, 30),
        ("P+D device", 2, 3, 10),
    ]


def replace_role(worker: Worker, role: str) -> Worker:
    return msgspec.structs.replace(worker, role=role)


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (None, "–"),
        (0, "0"),
        (0.25, "0.2"),
        (7, "7"),
        (9_999, "9,999"),
        (9_999.6, "10.0k"),
        (12_345, "12.3k"),
        (999_499, "999k"),
        (999_600, "1.0M"),
        (1_500_000, "1.5M"),
        (3e13, "30.0T"),
        (1e15, ">999T"),
    ],
)
def test_amounts(number: float | None, text: str) -> None:
    assert amount(number) == text


def test_times() -> None:
    told = [duration(ms) for ms in (0.04, 1.24, 99.96, 999.4, 999.6, 9_994, 12_340, 99_600, 3.6e6, 1e9)]
    assert told == ["0.0ms", "1.2ms", "100ms", "999ms", "1.00s", "9.99s", "12.3s", "100s", "60m", "12d"]
    ages = [age(s) for s in (0, 99, 100, 5_999, 6_000, 170_000, 172_800)]
    assert ages == [
        "0s",
        "99s",
        "2m",
        "100m",
        "2h",
        "47h",
        "2d",
    ]
    assert clean("a\tb\x1b") == "a?b?"
