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
from types import TracebackType
from urllib.parse import quote, urlsplit

import aiohttp
import msgspec

from memserve.bench.answer_stream import Answer, AnswerStream, StreamError, describe, error_message, one_line
from memserve.bench.records import ErrorKind, Failure, RequestRecord
from memserve.errors import BenchError

# Servers on uvicorn close an idle connection after 5 s; a request must not be sent into a closing one.
_KEEP_ALIVE_S = 3.0
# How long a body may take to end after its last event.
_LINGER_S = 0.5
_MAX_ERROR_BYTES = 8192
# Where servers drop the cached KV: memserve, SGLang, vLLM (in its development mode).
FLUSH_PATHS = ("/v1/cache/flush", "/flush_cache", "/reset_prefix_cache")
SESSION_HEADER = "x-session-id"
MAX_SESSION_NAME = 200


class _Model(msgspec.Struct):
    id: str


class _Models(msgspec.Struct):
    data: list[_Model]


_models_decoder = msgspec.json.Decoder(_Models)


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
                async with self._http.post(f"{self.url}{path}", json={}) as answer:
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
        the start of the run. The answer is collected if `keep` is set, else it stays empty. A header names
        the conversation, for routers that go by it; other servers ignore it.
        """
        assert self._http is not None
        stream = AnswerStream(record, Answer() if keep else None)
        record.sent_at = clock()
        failure: Failure | None = None
        try:
            headers = {
                "content-type": "application/json",
                SESSION_HEADER: session_name(record.conversation or record.session),
            }
            async with self._http.post(f"{self.url}{path}", data=body, headers=headers) as response:
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
        except StreamError as error:
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


def session_name(session: str) -> str:
    """A session's id as a header may hold it."""
    return quote(session, safe="")[:MAX_SESSION_NAME]


def base_url(url: str) -> str:
    """A server's URL without a path: http is assumed, a /v1 at the end dropped. Raises BenchError."""
    full = url if "://" in url else f"http://{url}"
    full = full.rstrip("/").removesuffix("/v1").rstrip("/")
    try:
        parts = urlsplit(full)
        is_url = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # brackets that do not close, a port that is none
        is_url = False
    if not is_url:
        raise BenchError(f"{url!r} is no URL of a server, such as http://127.0.0.1:8000")
    return full
