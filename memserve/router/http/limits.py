"""Bounds on what HTTP requests may ask for, checked before any work is done for them (SECURITY: unbounded n,
prompt lists, bodies). Those that are no matter of choice stand as constraints in `schemas.py`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class HttpLimits:
    """Counts, bytes and seconds. `max_requests` are being served at a time, from the reading of the body on,
    with bodies of `max_held_bytes` together.

    `max_sequences` bounds prompts times n; it stays well below the engine's queue, so that one request cannot
    take it all (`for_queue`). `max_prompt_logprobs` bounds what echo with logprobs may report in one answer:
    prompt tokens times (top + 1), over all choices. At 16 bytes each that is some 4 MiB of a worker's
    message, whose limit is 64.

    `body_timeout_s` bounds the reading of a body, `write_timeout_s` one write to a client that does not read;
    both end in a closed connection. A stream's headers go out with its first token, or after
    `headers_after_s` without one; from then on a comment line breaks every `ping_interval_s` of silence.
    """

    max_requests: int = 1024
    max_body_bytes: int = 16 << 20
    max_held_bytes: int = 256 << 20
    max_prompts: int = 128
    max_sequences: int = 128
    max_prompt_logprobs: int = 1 << 18
    body_timeout_s: float = 60.0
    write_timeout_s: float = 120.0
    headers_after_s: float = 5.0
    ping_interval_s: float = 15.0

    @classmethod
    def for_queue(cls, max_waiting: int) -> HttpLimits:
        """The defaults for an engine that holds back so many sequences: one request is a quarter at most."""
        return cls(max_sequences=max(1, min(cls().max_sequences, max_waiting // 4)))
