"""The client against every way in which a server can fail: a typed error in the record, never a crash."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Callable

import pytest

from benchmarks.fake_server import FakeServer, Mode, serving
from memserve.bench.answer_stream import Answer, error_message, one_line
from memserve.bench.client import MAX_SESSION_NAME, Client, base_url, session_name
from memserve.bench.records import ErrorKind, RequestRecord
from memserve.bench.request_format import RequestFormat
from memserve.bench.sse import MAX_EVENT_BYTES, EventParser, EventTooLong
from memserve.errors import BenchError

NUM_TOKENS = 6


@pytest.fixture
async def server() -> AsyncIterator[FakeServer]:
    async with serving(FakeServer()) as server:
        yield server


async def ask(
    server: FakeServer,
    request_format: RequestFormat | None = None,
    *,
    keep: bool = False,
    stall_s: float = 30,
) -> tuple[RequestRecord, Answer]:
    """One request for NUM_TOKENS tokens."""
    request_format = request_format or RequestFormat("fake")
    record = RequestRecord(session="s", turn=0, max_tokens=NUM_TOKENS, scheduled_at=0.0)
    started = time.perf_counter()
    async with Client(server.url, stall_s=stall_s) as client:
        answer = await client.send(
            request_format.path,
            request_format.body(["some text"], NUM_TOKENS),
            record,
            lambda: time.perf_counter() - started,
            keep=keep,
        )
    return record, answer


def test_session_names_fit_into_headers() -> None:
    assert session_name("a b\r\nc/ü") == "a%20b%0D%0Ac%2F%C3%BC"
    assert len(session_name("é" * 1000)) == MAX_SESSION_NAME


async def test_a_request_that_goes_well(server: FakeServer) -> None:
    record, answer = await ask(server)
    assert server.seen[0].session == "s"
    assert record.completed and record.error is None and record.status == 200
    assert len(record.chunk_times) == record.output_tokens == NUM_TOKENS
    assert (record.prompt_tokens, record.cached_tokens, record.has_usage) == (len("some text"), 0, True)
    assert record.finish_reason == "length"
    assert record.sent_at is not None and record.ended_at is not None
    assert record.sent_at <= record.chunk_times[0] <= record.chunk_times[-1] <= record.ended_at
    assert record.chunk_times == sorted(record.chunk_times)
    assert record.jct_s >= server.ttft_s + (NUM_TOKENS - 1) * server.itl_s
    assert answer == Answer()  # nobody asked for it
    assert server.seen[0].body == {
        "model": "fake",
        "stream": True,
        "max_tokens": NUM_TOKENS,
        "temperature": 0.0,
        "prompt": "some text",
        "ignore_eos": True,
        "stream_options": {"include_usage": True},
    }


async def test_a_chat_and_its_opening_chunk(server: FakeServer) -> None:
    record, answer = await ask(server, RequestFormat("fake", endpoint="chat"), keep=True)
    assert record.completed and len(record.chunk_times) == NUM_TOKENS
    assert record.ttft_s >= server.ttft_s  # the chunk with the role comes at once and is no token
    assert answer.text == " t0 t1 t2 t3 t4 t5"


async def test_token_ids_of_an_answer(server: FakeServer) -> None:
    _, answer = await ask(server, RequestFormat("fake", token_ids=True), keep=True)
    assert answer.token_ids == [1000, 1001, 1002, 1003, 1004, 1005]


@pytest.mark.parametrize("mode", [Mode.NO_USAGE, Mode.LIKE_SSE_STARLETTE, Mode.NO_DONE, Mode.STAYS_OPEN])
async def test_peculiar_servers_are_no_failures(server: FakeServer, mode: Mode) -> None:
    server.mode = lambda number: mode
    record, _ = await ask(server)
    assert record.completed
    assert record.output_tokens == len(record.chunk_times) == NUM_TOKENS
    tells = mode not in (Mode.NO_USAGE, Mode.LIKE_SSE_STARLETTE)
    assert record.has_usage is tells and (record.prompt_tokens is not None) is tells


@pytest.mark.parametrize(
    ("mode", "kind", "num_chunks", "message"),
    [
        (Mode.STATUS_500, ErrorKind.HTTP, 0, "500: out of order"),
        (Mode.STATUS_PLAIN, ErrorKind.HTTP, 0, "503: <html> no server  here</html>"),
        (Mode.STALL_AT_ONCE, ErrorKind.TIMEOUT, 0, "no token after"),
        (Mode.STALL, ErrorKind.TIMEOUT, 3, "3 chunks after"),
        (Mode.CUT, ErrorKind.CUT, 3, ""),
        (Mode.CUT_AT_ONCE, ErrorKind.CUT, 0, "Server disconnected"),
        (Mode.SHORT, ErrorKind.CUT, 3, "ended after 3 chunks"),
        (Mode.HALF_EVENT, ErrorKind.CUT, 3, "ended after 3 chunks"),
        (Mode.NO_STREAM, ErrorKind.GARBAGE, 0, "no stream of events"),
        (Mode.BAD_JSON, ErrorKind.GARBAGE, 3, "{nonsense"),
        (Mode.BAD_TYPES, ErrorKind.GARBAGE, 3, "Expected `str | null`"),
        (Mode.BAD_USAGE, ErrorKind.GARBAGE, 3, "completion_tokens"),
        (Mode.NOT_HTTP, ErrorKind.GARBAGE, 0, "what is this"),
        (Mode.ERROR_EVENT, ErrorKind.SERVER, 3, "it broke"),
        (Mode.EMPTY, ErrorKind.EMPTY, 0, "no token"),
    ],
)
async def test_failures(
    server: FakeServer, mode: Mode, kind: ErrorKind, num_chunks: int, message: str
) -> None:
    server.mode = lambda number: mode
    record, _ = await ask(server, stall_s=0.3)
    assert record.error is not None and record.error.kind is kind, record.error
    assert message in record.error.message and "\n" not in record.error.message
    assert not record.completed
    assert len(record.chunk_times) == num_chunks  # what had come is kept
    assert record.sent_at is not None and record.ended_at is not None


async def test_nobody_listens() -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{sock.getsockname()[1]}"
        record, _ = await ask(FakeServer(url=url))
        assert record.error is not None and record.error.kind is ErrorKind.CONNECT
        async with Client(url) as client:
            with pytest.raises(BenchError, match="no answer from"):
                await client.models()
            assert not await client.flush_cache()


async def test_a_request_that_is_stopped(server: FakeServer) -> None:
    server.mode = lambda number: Mode.STALL
    record = RequestRecord(session="s", turn=0, max_tokens=NUM_TOKENS, scheduled_at=0.0)
    request_format = RequestFormat("fake")
    async with Client(server.url) as client:
        task = asyncio.create_task(
            client.send(
                request_format.path, request_format.body(["x"], NUM_TOKENS), record, time.perf_counter
            )
        )
        while len(record.chunk_times) < NUM_TOKENS // 2:
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert record.error is not None and record.error.kind is ErrorKind.INTERRUPTED


async def test_a_connection_is_used_again(server: FakeServer) -> None:
    request_format = RequestFormat("fake")
    async with Client(server.url) as client:
        for _ in range(3):
            record = RequestRecord(session="s", turn=0, max_tokens=1, scheduled_at=0.0)
            body = request_format.body(["x"], 1)
            await client.send(request_format.path, body, record, time.perf_counter)
            assert record.completed
    assert len(server.connections) == 1


async def test_models_and_flush(server: FakeServer) -> None:
    async with Client(server.url + "/v1/") as client:
        assert await client.models() == ["fake"]
        assert await client.flush_cache() and server.num_flushes == 1
    async with serving(FakeServer(can_flush=False)) as other, Client(other.url) as client:
        assert not await client.flush_cache()


@pytest.mark.parametrize("step", [1, 2, 7, 1000])
def test_events_cut_anywhere(step: int) -> None:
    body = b'data: {"a": 1}\n\n: ping\n\ndata:x\r\n\r\n'
    body += b"event: e\r\nid: 3\r\ndata: one\r\ndata: two\r\n\r\ndata: end"
    parser = EventParser()
    events = [event for at in range(0, len(body), step) for event in parser.feed(body[at : at + step])]
    assert events == [b'{"a": 1}', b"x", b"one\ntwo"]
    assert parser.rest() == b"end"
    assert parser.rest() is None


def test_an_event_without_end() -> None:
    parser = EventParser()
    with pytest.raises(EventTooLong):
        for _ in range(MAX_EVENT_BYTES // (1 << 20) + 1):
            parser.feed(b"x" * (1 << 20))


def test_base_urls() -> None:
    for url in ("127.0.0.1:8000", "http://127.0.0.1:8000/", "http://127.0.0.1:8000/v1", "127.0.0.1:8000/v1/"):
        assert base_url(url) == "http://127.0.0.1:8000"
    assert base_url("https://example.org/api/v1") == "https://example.org/api"
    for bad in ("ftp://x", "http://", ""):
        with pytest.raises(BenchError):
            base_url(bad)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"error": {"message": "m"}}', "m"),
        (b'{"error": "m"}', "m"),
        (b'{"message": "m"}', "m"),
        (b'{"detail": "m"}', "m"),
        (b'{"detail": [1]}', '{"detail": [1]}'),
        (b"\xff\xfe", "\ufffd\ufffd"),
    ],
)
def test_messages_of_errors(body: bytes, message: str) -> None:
    assert error_message(body) == message


def test_one_line_is_short() -> None:
    assert len(one_line("word " * 1000)) == 300
    checks: list[Callable[[], str]] = [lambda: one_line("a\x1b[31m\nb"), lambda: one_line(b"a\x1b[31m b")]
    assert [check() for check in checks] == ["a [31m b"] * 2
