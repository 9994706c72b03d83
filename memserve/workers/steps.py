"""One step as data: what the scheduler plans, and what the runner makes of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from memserve.messages import TokenLogprobs
from memserve.workers.request import Request


class Chunk(NamedTuple):
    """The next `num_new` tokens of a request after its computed ones."""

    request: Request
    num_new: int


class Refusal(NamedTuple):
    """A request that can never run here. It holds nothing any more."""

    request: Request
    message: str


@dataclass(slots=True)
class StepPlan:
    """One step: what is computed, which pulls begin now, who is refused."""

    chunks: list[Chunk] = field(default_factory=list)
    pulls: list[Request] = field(default_factory=list)
    refused: list[Refusal] = field(default_factory=list)


class Drawn(NamedTuple):
    """What a step made of one chunk.

    `token_id` is None where the chunk does not reach the request's last token. `prompt_logprobs` are
    those of the prompt tokens that the chunk's rows predict. `error` says why no token could be drawn.
    """

    token_id: int | None = None
    logprobs: TokenLogprobs | None = None
    prompt_logprobs: Sequence[TokenLogprobs] = ()
    error: str | None = None


class Step(Protocol):
    """A step that was begun."""

    def result(self) -> list[Drawn]:
        """One `Drawn` per chunk, in their order; waits until they are computed. To be called once."""
        ...


class Computed(NamedTuple):
    """A step that was computed at once."""

    drawn: list[Drawn]

    def result(self) -> list[Drawn]:
        """See `Step`."""
        return self.drawn


class Runner(Protocol):
    """What the loop needs: the chunks' KV written, one `Drawn` per chunk in the same order."""

    @property
    def overlaps(self) -> bool:
        """Whether a step may begin before the one before it has ended: its input tokens may then be pending
        (`Request.expect`), drawn by that one.
        """
        ...

    def begin(self, chunks: Sequence[Chunk]) -> Step:
        """Start a step, after all that were begun before; what it needs of the requests is read now."""
        ...

    def execute(self, chunks: Sequence[Chunk]) -> list[Drawn]:
        """A step from beginning to end, with no other under way."""
        ...
