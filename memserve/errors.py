"""The exception tree. A user's mistake is one of these; a bug is an assert or whatever Python raises.

MemserveError
├── StartupError            the server cannot start: one line for the terminal, exit status 1
│   ├── ConfigError         a bad option or combination of options
│   ├── ModelError          folder, config.json, tokenizer or weights are missing, broken or unsupported
│   ├── MemoryError_        what was asked for does not fit (says how much is missing)
│   └── WorkloadError       a workload of the benchmark is missing or malformed (says file and line)
├── RequestError            the client's mistake: becomes a 4xx in OpenAI's error shape
│   └── Overloaded          no room now: 429 with Retry-After
│       └── Unavailable     no worker to run it: 503 with Retry-After
├── EngineError             ours: becomes a 500 with the request id and nothing else
└── BenchError              a benchmark cannot be run as asked: one line for the terminal, exit status 1
"""

from __future__ import annotations


class MemserveError(Exception):
    """Base of everything memserve raises on purpose. `str(error)` is one plain line."""


class StartupError(MemserveError):
    """The server cannot start."""


class ConfigError(StartupError):
    """An option's value, or a combination of options, makes no sense."""


class ModelError(StartupError):
    """The model folder, its config, tokenizer or weights cannot be used."""


class MemoryError_(StartupError):
    """The model or the KV pool does not fit in the memory there is."""


class WorkloadError(StartupError):
    """A file of a benchmark's workload cannot be read, or says something that makes no sense."""


class RequestError(MemserveError):
    """A client's mistake.

    Args:
        message: one line for the client.
        status: HTTP status, 4xx (503 where the server is not there for the request).
        code: OpenAI's machine-readable code (`context_length_exceeded`, `model_not_found`, …) or None.
        param: the offending request field or None.
    """

    def __init__(
        self, message: str, *, status: int = 400, code: str | None = None, param: str | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param


class Overloaded(RequestError):
    """Queues are full; nothing was done for the request. `retry_after_s` goes into the Retry-After header."""

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        super().__init__(message, status=429, code="rate_limit_exceeded")
        self.retry_after_s = retry_after_s


class Unavailable(Overloaded):
    """The server is starting, ending, or without workers; nothing was done for the request."""

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        super().__init__(message, retry_after_s=retry_after_s)
        self.status = 503
        self.code = "unavailable"


class EngineError(MemserveError):
    """A request failed for a reason that is not the client's."""


class BenchError(MemserveError):
    """A benchmark cannot be run: its options contradict each other, or the server is not fit for it."""
