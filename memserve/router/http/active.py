"""The requests that are being served: how many there may be, and how one is cancelled by its id.

A request is active from before its body is read until it is answered. Its ids are the `x-request-id` of the
answer and the answer's own id; a client may choose the former, and use it twice: then a cancel means both.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from memserve.errors import Overloaded
from memserve.router.http.generation import Generation
from memserve.router.http.limits import HttpLimits


class ActiveRequest:
    """One of them. `num_bytes`: what it holds of the allowance for bodies."""

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        self._cancelled = False
        self._generation: Generation | None = None

    def start(self, generation: Generation) -> None:
        """Its body was read and understood: run it, or end it if it was cancelled meanwhile."""
        self._generation = generation
        if self._cancelled:
            generation.abort()
        else:
            generation.start()

    def cancel(self) -> None:
        """End it in whatever phase it is; it is still answered, with what there is. Idempotent."""
        if self._generation is not None and not self._cancelled:
            self._generation.abort()
        self._cancelled = True


class ActiveRequests:
    """All of them, within the limits."""

    def __init__(self, limits: HttpLimits) -> None:
        self._limits = limits
        self._requests: set[ActiveRequest] = set()
        self._by_id: dict[str, set[ActiveRequest]] = {}

    @contextmanager
    def admit(self, ids: tuple[str, ...], num_bytes: int) -> Iterator[ActiveRequest]:
        """A request of these ids, active within the context. Raises Overloaded."""
        if len(self._requests) >= self._limits.max_requests:
            raise Overloaded("too many requests are being served", retry_after_s=1.0)
        num_held = sum(request.num_bytes for request in self._requests)
        if num_held + num_bytes > self._limits.max_held_bytes:
            raise Overloaded("too many bytes of requests are being served", retry_after_s=1.0)
        request = ActiveRequest(num_bytes)
        self._requests.add(request)
        for name in ids:
            self._by_id.setdefault(name, set()).add(request)
        try:
            yield request
        finally:
            self._requests.discard(request)
            for name in ids:
                self._by_id[name].discard(request)
                if not self._by_id[name]:
                    del self._by_id[name]

    def cancel(self, name: str) -> bool:
        """Cancel what has this id; whether there was any."""
        found = self._by_id.get(name, ())
        for request in found:
            request.cancel()
        return bool(found)
