"""What is kept of every request: when its parts happened, how many tokens it had, how it failed.

A record is made when its request is scheduled, filled in while it runs (`client.py`), and written into the
report as it is. All times are seconds since the start of the run; None: did not happen, or the server did
not say. Figures are derived from records alone (`metrics.py`), so a report can be computed anew.
"""

from __future__ import annotations

from enum import StrEnum

import msgspec


class ErrorKind(StrEnum):
    """How a request failed."""

    CONNECT = "connect"  # no connection
    HTTP = "http"  # a status other than 200
    TIMEOUT = "timeout"  # too long in all, or silent for too long
    CUT = "cut"  # the connection or the stream ended before the answer did
    GARBAGE = "garbage"  # status 200 and something that is no stream of OpenAI's events
    SERVER = "server"  # an error inside the stream
    EMPTY = "empty"  # ended well, without a token
    INTERRUPTED = "interrupted"  # the run was stopped while it was running


class Failure(msgspec.Struct, frozen=True):
    """Why a request failed; `message` is one line of at most some hundred characters."""

    kind: ErrorKind
    message: str


class RequestRecord(msgspec.Struct, kw_only=True):
    """One request.

    Args:
        session, turn: which one of the workload; turns count from 0.
        conversation: by which name the server was told of it, where that is not the session (a trace).
        max_tokens: how long the answer was to be.
        scheduled_at: when the load's own rules had it go: its arrival, or the end of the turn before it and
            the think time, or when the limit on concurrency let its session in.
        held_s: how long that limit had held it back before.
        sent_at: when the HTTP request was begun.
        chunk_times: when each chunk with a new token arrived. A server may put several tokens in one.
        ended_at: when the answer was complete, or failed.
        prompt_tokens, cached_tokens: as the server's usage says.
        output_tokens: as the usage says, else the number of chunks (`has_usage` False).
    """

    session: str
    turn: int
    max_tokens: int
    scheduled_at: float
    conversation: str | None = None
    held_s: float = 0.0
    sent_at: float | None = None
    chunk_times: list[float] = []
    ended_at: float | None = None
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    output_tokens: int = 0
    has_usage: bool = False
    finish_reason: str | None = None
    status: int | None = None
    error: Failure | None = None

    @property
    def completed(self) -> bool:
        """Ended well: only such a request has latencies."""
        return self.error is None and self.ended_at is not None

    @property
    def ttft_s(self) -> float:
        """Time to first token: from sending to the first chunk. Only of a completed request."""
        assert self.sent_at is not None
        return self.chunk_times[0] - self.sent_at

    @property
    def jct_s(self) -> float:
        """Job completion time: from sending to the last token. Only of a completed request."""
        assert self.sent_at is not None
        return self.chunk_times[-1] - self.sent_at

    @property
    def tpot_s(self) -> float | None:
        """Time per output token after the first; None for an answer of one. Only of a completed request."""
        if self.output_tokens < 2:
            return None
        return (self.jct_s - self.ttft_s) / (self.output_tokens - 1)

    @property
    def itls_s(self) -> list[float]:
        """Inter-token latencies: the gaps between chunks."""
        times = self.chunk_times
        return [after - before for before, after in zip(times, times[1:], strict=False)]
