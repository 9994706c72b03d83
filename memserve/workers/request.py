"""One request on one worker: its tokens, its blocks, and where it stands.

    WAITING ──► RUNNING ──► FINISHED    a run to its end, or a prefill that ends on its first token
       │         │ ▲ └────► OFFERED     a prefill: its blocks stay until the router's Release
       │         └─┼──────► WAITING     preempted: no blocks, nothing computed, tokens kept
       └► PULLING ─┘                    a decode with an offer: its blocks are being filled

Invariant: `num_computed_tokens` tokens have their KV in `block_ids` in order; at least one token is
always left to compute, because logits come only from computing. The transitions are the scheduler's; this
file only holds the state.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum, auto

import numpy as np
from numpy.typing import NDArray

from memserve.messages import (
    Decode,
    FinishReason,
    Offer,
    Prefill,
    SamplingParams,
    TokenLogprobs,
    unpack_tokens,
)
from memserve.pool.allocator import BlockIds


class RequestKind(Enum):
    """What the router asked for: one token and an offer of the KV, or the whole run."""

    PREFILL = auto()
    DECODE = auto()


class RequestState(Enum):
    """Where a request stands; the drawing is at the top of the file."""

    WAITING = auto()
    PULLING = auto()
    RUNNING = auto()
    OFFERED = auto()
    FINISHED = auto()


@dataclass(slots=True, eq=False)
class Request:
    """State of one attempt of one request. Mutable; compared by identity.

    `arrival` counts the worker's requests: it is the order of service, and preemption takes the largest
    first. `num_tokens` counts the prompt and everything drawn so far; `output_ids` is the part after the
    prompt. `prompt_logprobs` collects what is reported with the first token, and is None if nothing is
    (any more).
    """

    request_id: str
    attempt: int
    kind: RequestKind
    sampling: SamplingParams
    num_prompt_tokens: int
    num_tokens: int
    arrival: int
    offer: Offer | None
    output_ids: list[int]
    stop_ids: frozenset[int]
    prompt_logprobs: list[TokenLogprobs | None] | None
    state: RequestState = RequestState.WAITING
    num_computed_tokens: int = 0
    num_blocks: int = 0
    overlap: bool = False
    num_told_blocks: int = 0
    _tokens: NDArray[np.int32] = field(default_factory=lambda: np.empty(0, np.int32), repr=False)
    _block_ids: BlockIds = field(default_factory=lambda: np.empty(0, np.int64), repr=False)

    @classmethod
    def of(cls, message: Prefill | Decode, arrival: int) -> Request:
        """The request a message asks for, in state WAITING.

        Prompt logprobs go with the first token, so they are not collected where that token was drawn before.
        """
        tokens = unpack_tokens(message.token_ids)
        sampling = message.sampling
        reports_prompt = sampling.prompt_logprobs is not None and len(tokens) == message.num_prompt_tokens
        return cls(
            request_id=message.request_id,
            attempt=message.attempt,
            kind=RequestKind.PREFILL if isinstance(message, Prefill) else RequestKind.DECODE,
            sampling=sampling,
            num_prompt_tokens=message.num_prompt_tokens,
            num_tokens=len(tokens),
            arrival=arrival,
            offer=message.offer if isinstance(message, Decode) else None,
            output_ids=tokens[message.num_prompt_tokens :].tolist(),
            stop_ids=frozenset(sampling.stop_token_ids),
            prompt_logprobs=[None] if reports_prompt else None,
            overlap=isinstance(message, Prefill) and message.overlap,
            _tokens=tokens,
        )

    def fault(self, max_model_len: int, vocab_size: int) -> str | None:
        """Why a request that has just come cannot be run, judged by its tokens; None if it can.

        The router checks all of this; but one bad request must never fail the step of many.
        """
        if not 0 < self.num_prompt_tokens <= self.num_tokens:
            return f"a prompt of {self.num_prompt_tokens} tokens in a request of {self.num_tokens}"
        if self.num_tokens > max_model_len:
            return f"{self.num_tokens} tokens exceed the limit of {max_model_len}"
        if self._tokens.min() < 0 or self._tokens.max() >= vocab_size:
            return f"a token id is outside the vocabulary of {vocab_size}"
        return None

    # --- tokens ---

    def tokens(self, start: int, stop: int) -> NDArray[np.int32]:
        """Token ids [start, stop): a view, good until the next `append`."""
        assert 0 <= start <= stop <= self.num_tokens
        return self._tokens[start:stop]

    @property
    def prompt_ids(self) -> NDArray[np.int32]:
        """The prompt's token ids: a view."""
        return self._tokens[: self.num_prompt_tokens]

    def append(self, token_id: int) -> None:
        """Take the token just drawn."""
        if self.num_tokens == len(self._tokens):
            grown = np.empty(max(64, 2 * self.num_tokens), np.int32)
            grown[: self.num_tokens] = self._tokens
            self._tokens = grown
        self._tokens[self.num_tokens] = token_id
        self.num_tokens += 1
        self.output_ids.append(token_id)

    def finish_reason(self, max_model_len: int) -> FinishReason | None:
        """Whether the last drawn token ends the request. All attempts count: from the prompt's end."""
        num_output = len(self.output_ids)
        if self.output_ids[-1] in self.stop_ids and num_output > self.sampling.min_tokens:
            return FinishReason.STOP
        if num_output >= self.sampling.max_tokens or self.num_tokens >= max_model_len:
            return FinishReason.LENGTH
        return None

    # --- blocks ---

    def block_ids(self, num_blocks: int) -> BlockIds:
        """The first `num_blocks` block ids in sequence order: a view, good until the blocks change."""
        assert num_blocks <= self.num_blocks
        return self._block_ids[:num_blocks]

    def add_blocks(self, block_ids: BlockIds) -> None:
        """Append blocks that now belong to this request."""
        count = self.num_blocks + len(block_ids)
        if count > len(self._block_ids):
            grown = np.empty(max(8, count + count // 2), np.int64)
            grown[: self.num_blocks] = self._block_ids[: self.num_blocks]
            self._block_ids = grown
        self._block_ids[self.num_blocks : count] = block_ids
        self.num_blocks = count

    def take_blocks(self) -> BlockIds:
        """All blocks, which the caller now owns; the KV in them is no longer the request's."""
        taken = self._block_ids[: self.num_blocks]
        self._block_ids = np.empty(0, np.int64)
        self.num_blocks = 0
        return taken

    def restart(self) -> None:
        """Everything is to be computed again, after the blocks were taken. Tokens drawn stay drawn."""
        assert self.num_blocks == 0
        self.num_computed_tokens = self.num_told_blocks = 0
        if self.prompt_logprobs is not None:
            self.prompt_logprobs = [None]

    # --- logprobs ---

    def add_prompt_logprobs(self, logprobs: Iterable[TokenLogprobs]) -> None:
        """Append those of the prompt tokens that a chunk predicted."""
        assert self.prompt_logprobs is not None
        self.prompt_logprobs.extend(logprobs)

    def take_prompt_logprobs(self) -> tuple[TokenLogprobs | None, ...] | None:
        """What to report with the first token; None ever after."""
        taken, self.prompt_logprobs = self.prompt_logprobs, None
        return None if taken is None else tuple(taken)
