"""The load generator against a server that tells what it saw: order, prompts, times, limits, ends."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable

import pytest

from benchmarks.fake_server import FakeServer, Mode, serving
from memserve.bench.answer_stream import Answer
from memserve.bench.arrivals import Ramp, ThinkTime
from memserve.bench.client import Client
from memserve.bench.load import LoadOptions, State, arrival_times, run_load
from memserve.bench.punctuality import LagMeter, punctuality
from memserve.bench.records import ErrorKind, RequestRecord
from memserve.bench.request_format import RequestFormat
from memserve.bench.reuse import RequestReuse, Reuse
from memserve.bench.run import RunOptions, Target, available_ratio, run, warm_up
from memserve.bench.workload import Session, Turn, Workload
from memserve.errors import BenchError


def conversation(name: str, num_turns: int, *, answers: bool = True, max_tokens: int = 4) -> Session:
    """Turns `in0`, `in1`, … with logged answers `out0`, `out1`, …"""
    turns = (
        Turn(f"<{name} in{index}>", f"<{name} out{index}>" if answers else None, max_tokens)
        for index in range(num_turns)
    )
    return Session(name, tuple(turns))


def text_workload(*sessions: Session) -> Workload:
    return Workload("test", sessions, is_text=True)


@pytest.fixture
async def server() -> AsyncIterator[FakeServer]:
    async with serving(FakeServer(ttft_s=0.01, itl_s=0.001)) as server:
        yield server


async def load(
    server: FakeServer,
    workload: Workload,
    options: LoadOptions,
    request_format: RequestFormat | None = None,
    state: State | None = None,
) -> State:
    state = state or State()
    async with Client(server.url) as client:
        await run_load(workload, request_format or RequestFormat("fake"), options, client.send, state)
    assert not state.running and state.num_finished == len(state.records)
    return state


# --- what is sent ------------------------------------------------------------------------------------------


async def test_rows_of_a_trace_name_their_conversation_to_the_server(server: FakeServer) -> None:
    turns = (Turn("x", None, 1),)
    sessions = [Session(f"row-{i}", turns, conversation=name) for i, name in enumerate(("7", "7", None))]
    state = await load(server, text_workload(*sessions), LoadOptions(concurrency=1))
    assert [record.session for record in state.records] == ["row-0", "row-1", "row-2"]
    assert [seen.session for seen in server.seen] == ["7", "7", "row-2"]


async def test_replayed_answers_and_causal_order(server: FakeServer) -> None:
    workload = text_workload(conversation("a", 3), conversation("b", 2), conversation("c", 1))
    state = await load(server, workload, LoadOptions(concurrency=3))
    assert all(record.completed for record in state.records) and len(state.records) == 6
    by_prompt = {seen.prompt: seen for seen in server.seen}
    assert set(by_prompt) == {
        "<a in0>",
        "<a in0><a out0><a in1>",
        "<a in0><a out0><a in1><a out1><a in2>",
        "<b in0>",
        "<b in0><b out0><b in1>",
        "<c in0>",
    }
    turns = sorted((prompt for prompt in by_prompt if str(prompt).startswith("<a")), key=len)
    for before, after in zip(turns, turns[1:], strict=False):
        ended = by_prompt[before].ended
        assert ended is not None and ended <= by_prompt[after].at
    assert [(record.session, record.turn) for record in state.records if record.session == "a"] == [
        ("a", 0),
        ("a", 1),
        ("a", 2),
    ]


async def test_live_answers(server: FakeServer) -> None:
    workload = text_workload(conversation("a", 2, answers=False, max_tokens=2))
    with pytest.raises(BenchError, match="--answers live"):
        await load(server, workload, LoadOptions(concurrency=1))
    assert server.seen == []
    await load(server, workload, LoadOptions(concurrency=1, answers="live"))
    assert [seen.prompt for seen in server.seen] == ["<a in0>", "<a in0> t0 t1<a in1>"]


async def test_token_ids_replayed_and_live(server: FakeServer) -> None:
    session = Session("a", (Turn((1, 2), (8, 9), 2), Turn((3,), None, 2)))
    workload = Workload("ids", (session,), is_text=False)
    await load(server, workload, LoadOptions(concurrency=1))
    request_format = RequestFormat("fake", token_ids=True)
    await load(server, workload, LoadOptions(concurrency=1, answers="live"), request_format)
    prompts = [seen.prompt for seen in server.seen]
    assert prompts == [(1, 2), (1, 2, 8, 9, 3), (1, 2), (1, 2, 1000, 1001, 3)]
    with pytest.raises(BenchError, match="cannot be sent as chat"):
        await load(server, workload, LoadOptions(concurrency=1), RequestFormat("fake", endpoint="chat"))


async def test_chats(server: FakeServer) -> None:
    workload = text_workload(conversation("a", 2))
    await load(server, workload, LoadOptions(concurrency=1), RequestFormat("fake", endpoint="chat"))
    assert server.seen[1].prompt == (("user", "<a in0>"), ("assistant", "<a out0>"), ("user", "<a in1>"))


async def test_a_failed_turn_ends_a_live_session_only(server: FakeServer) -> None:
    server.mode = lambda number: Mode.STATUS_500 if number == 0 else Mode.WELL
    workload = text_workload(conversation("a", 3), conversation("b", 1))
    replayed = await load(server, workload, LoadOptions(concurrency=1))
    assert [record.completed for record in replayed.records] == [False, True, True, True]
    assert (replayed.num_failed, replayed.num_skipped) == (1, 0)
    server.mode = lambda number: Mode.CUT if number == 4 else Mode.WELL
    live = await load(server, workload, LoadOptions(concurrency=1, answers="live"))
    assert [record.session for record in live.records] == ["a", "b"]
    assert (live.num_failed, live.num_skipped) == (1, 2)


# --- when --------------------------------------------------------------------------------------------------


def test_rates_are_of_requests() -> None:
    sessions = [conversation(str(index), 4) for index in range(5)]  # 8 requests/s are 2 sessions/s
    assert arrival_times(sessions, LoadOptions(rate=8.0, burstiness=math.inf)) == [0, 0.5, 1, 1.5, 2]
    ramp = arrival_times(sessions, LoadOptions(ramp=Ramp(8, 8), burstiness=math.inf))
    assert ramp == pytest.approx([0, 0.5, 1, 1.5, 2])
    assert arrival_times(sessions, LoadOptions(concurrency=2)) is None
    seeded = [arrival_times(sessions, LoadOptions(rate=8.0, seed=seed)) for seed in (1, 1, 2)]
    assert seeded[0] == seeded[1] != seeded[2]


class Instant:
    """A server in the same thread that answers after `answer_s`, with a record of when it was asked."""

    def __init__(self, answer_s: float = 0.0) -> None:
        self.answer_s = answer_s
        self.running = self.most = 0

    async def send(
        self, path: str, body: bytes, record: RequestRecord, clock: Callable[[], float], *, keep: bool
    ) -> Answer:
        record.sent_at = clock()
        self.running += 1
        self.most = max(self.most, self.running)
        await asyncio.sleep(self.answer_s)
        self.running -= 1
        record.chunk_times = [clock()]
        record.output_tokens = 1
        record.ended_at = clock()
        return Answer(["x"])


async def instant(workload: Workload, options: LoadOptions, answer_s: float = 0.0) -> tuple[State, Instant]:
    state, fake = State(), Instant(answer_s)
    await run_load(workload, RequestFormat("fake"), options, fake.send, state)
    return state, fake


async def test_open_loop_sends_at_the_times_of_the_trace_whatever_runs() -> None:
    sessions = [Session(str(i), (Turn("x", None, 1),), at_s=100 + 0.05 * i) for i in (2, 0, 1)]
    state, fake = await instant(text_workload(*sessions), LoadOptions(), answer_s=0.3)
    assert [record.session for record in state.records] == ["0", "1", "2"]
    assert [record.scheduled_at for record in state.records] == pytest.approx([0, 0.05, 0.1])
    assert all(r.sent_at is not None and r.sent_at >= r.scheduled_at - 0.001 for r in state.records)
    assert fake.most == 3


async def test_closed_loop_and_think_time() -> None:
    workload = text_workload(*(conversation(name, 2) for name in "abcd"))
    state, fake = await instant(workload, LoadOptions(concurrency=2, think=ThinkTime(0.05)), answer_s=0.02)
    assert fake.most == 2
    assert [record.session for record in state.records][:2] == ["a", "b"]
    turns = {(record.session, record.turn): record for record in state.records}
    for name in "abcd":
        ended = turns[name, 0].ended_at
        assert ended is not None
        assert turns[name, 1].scheduled_at == pytest.approx(ended + 0.05, abs=0.02)
        assert (turns[name, 1].sent_at or 0) >= ended + 0.049


async def test_a_limit_holds_arrivals_back_without_being_late() -> None:
    workload = text_workload(*(conversation(name, 1) for name in "abc"))
    state, fake = await instant(workload, LoadOptions(rate=math.inf, concurrency=1), answer_s=0.05)
    assert fake.most == 1
    assert [record.session for record in state.records] == ["a", "b", "c"]
    assert state.records[0].held_s == 0
    assert state.records[1].held_s >= 0.05 and state.records[2].held_s >= 0.1
    assert state.records[2].scheduled_at == pytest.approx(state.records[2].held_s)


async def test_duration() -> None:
    workload = text_workload(*(conversation(str(index), 2) for index in range(100)))
    state, _ = await instant(workload, LoadOptions(concurrency=1, duration_s=0.1), answer_s=0.02)
    assert 1 <= len(state.records) <= 6
    assert all(record.completed for record in state.records)  # what ran may end
    options = LoadOptions(rate=20.0, burstiness=math.inf, duration_s=0.25)
    state, _ = await instant(workload, options)
    assert {record.session for record in state.records} == {"0", "1", "2"}  # every 0.1 s


# --- ends --------------------------------------------------------------------------------------------------


async def test_a_run_that_is_stopped_keeps_what_it_has(server: FakeServer) -> None:
    server.mode = lambda number: Mode.STALL if number else Mode.WELL
    workload = text_workload(*(conversation(name, 1) for name in "abcd"))
    state = State()
    running = asyncio.create_task(load(server, workload, LoadOptions(concurrency=2), state=state))
    deadline = time.monotonic() + 20
    while not (state.num_finished == 1 and len(state.running) == 2):
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)
    while not all(record.chunk_times for record in state.running.values()):
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)
    state.stop()
    await running
    assert state.interrupted
    errors = [record.error and record.error.kind for record in state.records]
    assert errors == [None, ErrorKind.INTERRUPTED, ErrorKind.INTERRUPTED]
    assert all(record.chunk_times for record in state.records)


async def test_a_run_stopped_before_it_began(server: FakeServer) -> None:
    state = State(interrupted=True)
    await load(server, text_workload(conversation("a", 1)), LoadOptions(concurrency=1), state=state)
    assert server.seen == [] and state.records == []


# --- the whole run -----------------------------------------------------------------------------------------


async def test_check_warm_up_flush_load(server: FakeServer) -> None:
    workload = text_workload(conversation("a", 2), conversation("b", 1))
    options = RunOptions(LoadOptions(concurrency=1), warmup=2, limits_ms={"jct": 60_000.0})
    state = State()
    rows = (("a", 0, 10, 0, 0), ("a", 1, 20, 8, 16), ("b", 0, 10, 4, 4), ("never sent", 0, 99, 99, 99))
    reuse = Reuse(4, tuple(RequestReuse(*row) for row in rows))
    report = await run(Target(url=server.url), workload, options, state, reuse=reuse)
    prompts = [str(seen.prompt) for seen in server.seen]
    assert len(prompts) == 1 + 2 + 3  # the check, the warm-up, the load
    assert sorted(prompts[1:3]) == ["in0> <a", "in1> <a"]
    assert server.num_flushes == 1
    # after the flush the first prompts are cold; the second turn has the first one's prompt cached
    assert [record.cached_tokens for record in report.requests] == [0, len("<a in0>"), 1]
    assert report.summary.num_completed == 3
    assert report.summary.available_ratio == 12 / 40
    assert available_ratio(reuse, report.requests, "live") == 20 / 40
    assert available_ratio(reuse, [], "live") is None
    assert report.summary.goodput == pytest.approx(report.summary.request_rate)
    assert report.target.model == "fake" and report.notes == [] and not report.interrupted


async def test_a_warm_up_that_fails_is_told(server: FakeServer) -> None:
    server.mode = lambda number: Mode.STATUS_500 if number == 1 else Mode.WELL
    workload = text_workload(conversation("a", 2))
    options = RunOptions(LoadOptions(concurrency=1), warmup=2)
    report = await run(Target(url=server.url), workload, options, State())
    assert report.notes == ["1 of 2 warm-up requests failed"] and report.summary.num_failed == 0


def test_a_warm_up_shares_nothing() -> None:
    ids = Workload("ids", (Session("a", (Turn((1, 2, 3), None, 5),)),), is_text=False)
    assert [turn.input for s in warm_up(ids, 3).sessions for turn in s.turns] == [(3, 2, 1)]


async def test_plainer_servers_are_asked_for_less() -> None:
    workload = text_workload(conversation("a", 1))
    refuses = ("ignore_eos", "stream_options")
    async with serving(FakeServer(refuses=refuses, can_flush=False)) as plain:
        report = await run(Target(url=plain.url), workload, RunOptions(LoadOptions(concurrency=1)), State())
    assert report.summary.num_completed == 1
    assert [note.split(":")[0] for note in report.notes] == [
        "the server refuses ignore_eos",
        "the server refuses stream_options",
        "the server sends no usage",
        "the server's cache could not be flushed",
    ]
    assert not set(refuses) & set(plain.seen[-1].body)


@pytest.mark.parametrize("mode", [Mode.STATUS_500, Mode.CUT, Mode.NO_STREAM])
async def test_a_server_that_fails_the_check(server: FakeServer, mode: Mode) -> None:
    server.mode = lambda number: mode
    workload = text_workload(conversation("a", 1))
    with pytest.raises(BenchError, match="fails a first small request"):
        await run(Target(url=server.url), workload, RunOptions(LoadOptions(concurrency=1)), State())
    assert len(server.seen) == 1  # a plainer request would be no better


async def test_live_ids_need_a_server_that_tells_them(server: FakeServer) -> None:
    workload = Workload("ids", (Session("a", (Turn((1,), None, 2),)),), is_text=False)
    options = RunOptions(LoadOptions(concurrency=1, answers="live"))
    report = await run(Target(url=server.url), workload, options, State())
    assert report.summary.num_completed == 1
    target = Target(url=server.url, extra={"return_token_ids": False})
    with pytest.raises(BenchError, match="return_token_ids"):
        await run(target, workload, options, State())


# --- the generator's own delay -----------------------------------------------------------------------------


def late_record(late_s: float) -> RequestRecord:
    return RequestRecord(session="s", turn=0, max_tokens=1, scheduled_at=1.0, sent_at=1.0 + late_s)


def test_a_generator_that_is_late_says_so() -> None:
    lag = LagMeter()
    lag.lags_s, lag.cpu = [0.001] * 100, 0.5
    fine = punctuality([late_record(0.002)] * 100, lag)
    assert fine.complaint is None and fine.late_p99_ms == pytest.approx(2)
    late = punctuality([late_record(0.03)] * 100, lag)
    assert late.complaint is not None and "30 ms late" in late.complaint
    lag.lags_s = [0.05] * 100
    lagging = punctuality([late_record(-0.001)] * 100, lag)
    assert lagging.late_max_ms == 0
    assert lagging.complaint is not None and "lagged by 50 ms" in lagging.complaint
    lag.lags_s, lag.cpu = [], 0.97
    busy = punctuality([], lag)
    assert busy.complaint is not None and "97% of a core" in busy.complaint


async def test_a_blocked_loop_is_noticed() -> None:
    lag = LagMeter()
    with lag.measuring():
        await asyncio.sleep(0.05)
        time.sleep(0.3)  # whatever keeps the loop from its work
        await asyncio.sleep(0.05)
    assert max(lag.lags_s) >= 0.2
