"""Asks a server how it is. Never raises: what went wrong is a line of the snapshot.

A server may be gone, silent, slow, another program, or hostile: answers are bounded in time and size.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from types import TracebackType
from typing import TypeVar

import aiohttp

from memserve.bench.answer_stream import describe, error_message, one_line
from memserve.bench.client import base_url
from memserve.top.snapshot import Snapshot, Told, read_requests, read_samples, read_workers

MAX_BODY_BYTES = 8 << 20
MAX_REQUESTS = 50
Value = TypeVar("Value")


class TopClient:
    """One server. Use as an async context.

    Args:
        url: base URL. Raises BenchError if it is none.
        clock: seconds, monotone.
        timeout_s: longest wait for one answer.
    """

    def __init__(self, url: str, clock: Callable[[], float], timeout_s: float = 10.0) -> None:
        self.url = base_url(url)
        self._clock = clock
        self._timeout = aiohttp.ClientTimeout(total=timeout_s)
        self._http: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> TopClient:
        self._http = aiohttp.ClientSession(timeout=self._timeout)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._http is not None
        await self._http.close()

    async def ask(self) -> Snapshot:
        """All that is shown."""
        problems: list[str] = []
        workers, samples, requests = await asyncio.gather(
            self._get("/v1/workers", read_workers, problems),
            self._get("/metrics", read_samples, problems),
            self._get(f"/v1/requests?limit={MAX_REQUESTS}", read_requests, problems),
        )
        return Snapshot(workers, samples, requests, tuple(problems))

    async def _get(
        self, path: str, read: Callable[[bytes], Value], problems: list[str]
    ) -> Told[Value] | None:
        assert self._http is not None
        try:
            async with self._http.get(f"{self.url}{path}", allow_redirects=False) as answer:
                try:
                    body = await _body(answer)
                    told_at = self._clock()
                    if answer.status == 200:
                        return Told(told_at, read(body))
                    problem = f"{answer.status} {error_message(body)}"
                except ValueError as error:
                    problem = f"an answer that makes no sense: {one_line(error)}"
        except TimeoutError:
            problem = "no answer in time"
        except ValueError:  # nothing was sent: a URL or a name that no server can have
            problem = "this is no URL of a server"
        except aiohttp.ClientConnectorDNSError:
            problem = "there is no host of this name"
        except aiohttp.ClientConnectorError as error:  # its own text is long, and names the host again
            problem = os.strerror(error.errno) if error.errno else describe(error.os_error)
        except (aiohttp.ClientError, OSError) as error:
            problem = describe(error)
        problems.append(f"{path.partition('?')[0]}: {problem}")
        return None


async def _body(answer: aiohttp.ClientResponse) -> bytes:
    """Raises ValueError if it is too long."""
    body = bytearray()
    while piece := await answer.content.readany():
        body += piece
        if len(body) > MAX_BODY_BYTES:
            answer.close()
            raise ValueError(f"more than {MAX_BODY_BYTES >> 20} MiB")
    return bytes(body)
