"""A client of an OpenAI-compatible server that says of every request when its tokens came and how it failed.

    async with Client(url, …) as client:
        answer = await client.send(format.path, body, record, clock)

`send` raises nothing but its own cancellation: a server may answer 500, be silent, cut the stream, send no
usage or plain garbage, and the record says so; what had come until then stays in it. Times are taken when
bytes are handed to the program, before anything is parsed. What a load consists of is not known here.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Annotated

import aiohttp
import msgspec

from memserve.bench.records import ErrorKind, Failure, RequestRecord
from memserve.bench.sse import EventParser, EventTooLong
from memserve.errors import BenchError

# Servers on uvicorn close an idle connection after 5 s; a request must not be sent into a closing one.
_KEEP_ALIVE_S = 3.0
# How long a body may take to end after its last event.
_LINGER_S = 0.5
_MAX_MESSAGE = 300
_MAX_ERROR_BYTES = 8192
_DONE = b"[DONE]"
# Where servers drop the cached KV: memserve, SGLang, vLLM (in its development mode).
FLUSH_PATHS = ("/v1/cache/flush", "/flush_cache", "/reset_prefix_cache")

_Count = Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]


class _Details(msgspec.Struct):
    cached_tokens: _Count | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: _Count | None = None
    completion_tokens: _Count | None = None
    prompt_tokens_details: _Details | None = None


class _Delta(msgspec.Struct):
    role: str | None = None
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None
    finish_reason: str | None = None
    token_ids: list[int] | None = None


class _Chunk(msgspec.Struct):
    choices: list[_Choice] | None = None
    usage: _Usage | None = None
    error: object = None


class _Model(msgspec.Struct):
    id: str


class _Models(msgspec.Struct):
    data: list[_Model]


_chunk_decoder = msgspec.json.Decoder(_Chunk)
_models_decoder = msgspec.json.Decoder(_Models)


@dataclass(slots=True)
class Answer:
    """What a request was answered, for a live conversation."""

    texts: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)

    @property
    def text(self) -> str:
        """All of it."""
        return "".join(self.texts)


class Client:
    """One server. Use as an async context; any number of requests at once.

    Args:
        url: base URL, with or without the /v1 at its end.
        api_key: sent as a bearer token; never logged or written.
        timeout_s: longest life of one request.
        stall_s: longest silence within one.
    """

    def __init__(
        self, url: str, *, api_key: str | None = None, timeout_s: float = 600.0, stall_s: float = 120.0
    ) -> None:
        self.url = base_url(url)
        self._headers: Mapping[str, str] = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        self._timeout = aiohttp.ClientTimeout(total=timeout_s, sock_connect=stall_s, sock_read=stall_s)
        self._http: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Client:
        # No limit on connections: a client that queues requests measures itself.
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEP_ALIVE_S)
        self._http = aiohttp.ClientSession(
            connector=connector, timeout=self._timeout, headers=self._headers, read_bufsize=1 << 20
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._http is not None
        await self._http.close()

    async def models(self) -> list[str]:
        """Names of the models that the server has. Raises BenchError if it cannot say."""
        assert self._http is not None
        try:
            async with self._http.get(f"{self.url}/v1/models") as answer:
                body = await answer.read()
                if answer.status != 200:
                    raise BenchError(f"{self.url}/v1/models answers {answer.status}: {one_line(body)}")
                return [model.id for model in _models_decoder.decode(body).data]
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise BenchError(f"{self.url}/v1/models is no list of models: {one_line(error)}") from None
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
            raise BenchError(f"no answer from {self.url}: {describe(error)}") from None

    async def flush_cache(self) -> bool:
        """Have the server drop the KV it keeps for reuse; False if it cannot, or does not."""
        assert self._http is not None
        for path in FLUSH_PATHS:
            try:
                async with self._http.post(f"{self.url}{path}") as answer:
                    await answer.read()
                    if answer.status < 300:
                        return True
            except (aiohttp.ClientError, OSError, TimeoutError):
                return False
        return False

    async def send(
        self,
        path: str,
        body: bytes,
        record: RequestRecord,
        clock: Callable[[], float],
        *,
        keep: bool = False,
    ) -> Answer:
        """Send one request now and read its stream to the end; fills in `record`. `clock` gives seconds since
        the start of the run. The answer is collected if `keep` is set, else it stays empty.
        """
        assert self._http is not None
        stream = _Stream(record, Answer() if keep else None)
        record.sent_at = clock()
        failure: Failure | None = None
        try:
            async with self._http.post(
                f"{self.url}{path}", data=body, headers={"content-type": "application/json"}
            ) as response:
                record.status = response.status
                if response.status != 200:
                    text = await response.content.read(_MAX_ERROR_BYTES)
                    failure = Failure(ErrorKind.HTTP, f"{response.status}: {error_message(text)}")
                else:
                    while piece := await response.content.readany():
                        if stream.feed(piece, clock()):
                            record.ended_at = clock()
                            await _read_out(response)
                            break
                    else:
                        stream.end(clock())
        except asyncio.CancelledError:
            if record.ended_at is None:  # else all of it is here, but for the connection's end
                record.ended_at = clock()
                record.error = Failure(ErrorKind.INTERRUPTED, "the run was stopped")
            raise
        except _StreamError as error:
            failure = error.failure
        except TimeoutError:
            failure = Failure(ErrorKind.TIMEOUT, self._describe_timeout(record, clock()))
        except aiohttp.ClientConnectorError as error:
            failure = Failure(ErrorKind.CONNECT, describe(error))
        except (aiohttp.ClientResponseError, aiohttp.InvalidURL) as error:
            failure = Failure(ErrorKind.GARBAGE, describe(error))  # not HTTP
        except (aiohttp.ClientError, OSError) as error:
            failure = Failure(ErrorKind.CUT, describe(error))
        if record.ended_at is None:
            record.ended_at = clock()
        record.error = failure
        return stream.answer or Answer()

    def _describe_timeout(self, record: RequestRecord, now: float) -> str:
        assert record.sent_at is not None
        last = record.chunk_times[-1] if record.chunk_times else record.sent_at
        tokens = f"{len(record.chunk_times)} chunks" if record.chunk_times else "no token"
        return f"{tokens} after {now - record.sent_at:.1f} s, the last {now - last:.1f} s silent"


async def _read_out(response: aiohttp.ClientResponse) -> None:
    """Let the body end after [DONE], so that the connection can be used again; it may also stay open."""
    with contextlib.suppress(aiohttp.ClientError, OSError, TimeoutError):
        async with asyncio.timeout(_LINGER_S):
            while await response.content.readany():
                pass


class _StreamError(Exception):
    """A stream that cannot go on."""

    def __init__(self, kind: ErrorKind, message: str) -> None:
        self.failure = Failure(kind, message)


class _Stream:
    """The events of one answer, into its record."""

    def __init__(self, record: RequestRecord, answer: Answer | None) -> None:
        self.answer = answer
        self._record = record
        self._parser = EventParser()
        self._start = b""
        self._any = False

    def feed(self, piece: bytes, now: float) -> bool:
        """Take a piece of the body; True at [DONE]."""
        if not self._any:
            self._start = (self._start + piece)[:_MAX_MESSAGE]
        try:
            events = self._parser.feed(piece)
        except EventTooLong:
            raise _StreamError(ErrorKind.GARBAGE, "an event without an end") from None
        for event in events:
            if event.startswith(_DONE):
                self._finish()
                return True
            self._event(event, now)
        return False

    def end(self, now: float) -> None:
        """The body ended, without [DONE] so far."""
        rest = self._parser.rest()
        if rest is not None and not rest.startswith(_DONE):
            try:
                self._event(rest, now)
            except _StreamError as error:
                if error.failure.kind is ErrorKind.GARBAGE:
                    raise self._cut() from None
                raise
        if rest is None or not rest.startswith(_DONE):
            if not self._any and self._start:
                raise _StreamError(ErrorKind.GARBAGE, f"no stream of events: {one_line(self._start)}")
            if self._record.finish_reason is None:
                raise self._cut()
        self._finish()

    def _cut(self) -> _StreamError:
        num = len(self._record.chunk_times)
        return _StreamError(ErrorKind.CUT, f"the stream ended after {num} chunks, before the answer did")

    def _event(self, event: bytes, now: float) -> None:
        try:
            chunk = _chunk_decoder.decode(event)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise _StreamError(ErrorKind.GARBAGE, f"{one_line(error)}: {one_line(event)}") from None
        self._any = True
        if chunk.error is not None:
            raise _StreamError(ErrorKind.SERVER, error_message(event))
        if chunk.usage is not None:
            self._usage(chunk.usage)
        if not chunk.choices:
            return
        choice = chunk.choices[0]
        if choice.finish_reason is not None:
            self._record.finish_reason = choice.finish_reason
        text = _token_text(choice)
        if text is None:
            return
        self._record.chunk_times.append(now)
        if not self._record.has_usage:
            self._record.output_tokens += 1
        if self.answer is not None:
            self.answer.texts.append(text)
            self.answer.token_ids += choice.token_ids or ()

    def _usage(self, usage: _Usage) -> None:
        record = self._record
        record.prompt_tokens = usage.prompt_tokens
        if usage.prompt_tokens_details is not None:
            record.cached_tokens = usage.prompt_tokens_details.cached_tokens
        if usage.completion_tokens is not None:
            record.output_tokens, record.has_usage = usage.completion_tokens, True

    def _finish(self) -> None:
        if not self._record.chunk_times:
            raise _StreamError(ErrorKind.EMPTY, "the answer has no token")


def _token_text(choice: _Choice) -> str | None:
    """The text of a chunk that carries a token; it may be empty: a token that ends in half a character has
    none yet. None for a chunk that only opens a chat's answer or tells why one ended.
    """
    delta = choice.delta
    if delta is None:
        text, opening = choice.text, False
    else:
        text = delta.content or delta.reasoning_content or delta.reasoning or delta.content
        opening = delta.role is not None
    if text or choice.token_ids:
        return text or ""
    return None if text is None or opening or choice.finish_reason is not None else ""


# --- texts -------------------------------------------------------------------------------------------------


def base_url(url: str) -> str:
    """A server's URL without a path: http is assumed, a /v1 at the end dropped. Raises BenchError."""
    full = url if "://" in url else f"http://{url}"
    full = full.rstrip("/").removesuffix("/v1").rstrip("/")
    if not full.startswith(("http://", "https://")) or full.endswith("//"):
        raise BenchError(f"{url!r} is no URL of a server, such as http://127.0.0.1:8000")
    return full


def one_line(text: object) -> str:
    """The beginning of a text, of an error, or of bytes that may be anything, as one line."""
    decoded = text.decode(errors="replace") if isinstance(text, bytes) else str(text)
    line = "".join(char if char.isprintable() else " " for char in " ".join(decoded.split()))
    return line if len(line) <= _MAX_MESSAGE else line[: _MAX_MESSAGE - 1] + "…"


def describe(error: BaseException) -> str:
    """An exception as one line; some have no text of their own."""
    return one_line(error) or type(error).__name__


class _ErrorFields(msgspec.Struct):
    message: str | None = None


class _ErrorBody(msgspec.Struct):
    error: _ErrorFields | str | None = None
    message: str | None = None
    detail: str | None = None


def error_message(body: bytes) -> str:
    """What an error's body says: OpenAI's shape, some others', else the body itself."""
    try:
        fields = msgspec.json.decode(body, type=_ErrorBody)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return one_line(body)
    inner = fields.error.message if isinstance(fields.error, _ErrorFields) else fields.error
    return one_line(inner or fields.message or fields.detail or body)
