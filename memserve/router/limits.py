"""Bounds on what HTTP requests may ask for, checked before any work is done for them (SECURITY: unbounded n,
prompt lists, bodies). Those that are no matter of choice stand as constraints in `schemas.py`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class HttpLimits:
    """Counts, bytes and seconds. `max_requests` are being served at a time, from the reading of the body on.

    `body_timeout_s` bounds the reading of a body, `write_timeout_s` one write to a client that does not read;
    both end in a closed connection. `max_sequences` bounds prompts times n.
    """

    max_requests: int = 1024
    max_body_bytes: int = 16 << 20
    max_prompts: int = 256
    max_sequences: int = 512
    body_timeout_s: float = 60.0
    write_timeout_s: float = 120.0
