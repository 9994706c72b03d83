"""One request on one worker: its tokens, its blocks, and where it stands.

    WAITING ──► RUNNING ──► FINISHED    a run to its end, or a prefill that ends on its first token
       │         │ ▲ └────► OFFERED     a prefill: its blocks stay until the router's Release
       │         └─┼──────► WAITING     preempted: no blocks, nothing computed, tokens kept
       └► PULLING ─┘                    with KV to be had elsewhere: its blocks are being filled

Invariant: `num_computed_tokens` tokens have their KV in `table` in order; at least one token is always left
to compute, because logits come only from computing. The transitions are the scheduler's; this file only
holds the state.

A token is *pending* while the step that draws it runs: it counts in `num_tokens`, as the next step may begin
on it, but nobody here knows which it is until `settle`. At most one is, the last.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum, auto

import numpy as np
from numpy.typing import NDArray

from memserve.messages import (
    NO_CACHED_TOKENS,
    CachedTokens,
    Decode,
    FinishReason,
    Offer,
    Prefill,
    SamplingParams,
    TokenLogprobs,
    unpack_tokens,
)
from memserve.pool.block_table import BlockTable
from memserve.pool.pending import Pending


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
    (any more). `cached`: the tokens found in the pool when the request was first admitted, and pulled for it
    (None before).
    `began_at`: when its first step began.
    `offer` is KV to be pulled; None when there is none, or no longer.
    A waiting request may wait until the pool has its first `num_common_tokens`. They are computed or pulled
    by `leader`, another request here; or they come by `pending`, a pull for a request that is not here yet or
    for none, as what is pulled back. At most one of the two is not None; it was the `num_follows`th such. At
    `patience_ends` the request waits no more (for what a `leader` computes only if it has an offer).
    `tell_blocks`: the router hears of each block as it fills, `num_told_blocks` so far; `tell_layers`:
    already when the step begins.
    `is_drawing`: the last token is; `is_at_end`: and whichever it is, nothing follows it here.
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
    cache_salt: str = ""
    num_computed_tokens: int = 0
    cached: CachedTokens | None = None
    began_at: float | None = None
    _tells_cached: bool = True
    table: BlockTable = field(default_factory=BlockTable)
    leader: Request | None = None
    pending: Pending | None = None
    patience_ends: float = 0.0
    num_common_tokens: int = 0
    num_follows: int = 0
    tell_blocks: bool = False
    tell_layers: bool = False
    num_told_blocks: int = 0
    is_drawing: bool = False
    is_at_end: bool = False
    _tokens: NDArray[np.int32] = field(default_factory=lambda: np.empty(0, np.int32), repr=False)

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
            # log-probabilities come only from computing
            offer=None if reports_prompt else message.offer,
            output_ids=tokens[message.num_prompt_tokens :].tolist(),
            stop_ids=frozenset(sampling.stop_token_ids),
            prompt_logprobs=[None] if reports_prompt else None,
            cache_salt=message.cache_salt,
            tell_blocks=message.tell_blocks,
            tell_layers=isinstance(message, Prefill) and message.tell_layers,
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

    def token_bytes(self, start: int, stop: int) -> bytes:
        """Token ids [start, stop) as the pool's index wants them: little-endian int32."""
        return self.tokens(start, stop).astype("<i4", copy=False).tobytes()

    def cacheable(self, block_size: int) -> bytes:
        """The tokens that need not be computed if the pool has them: whole blocks, never the last token, and
        none of a prompt whose log-probabilities are asked for.
        """
        if self.prompt_logprobs is not None:
            return b""
        return self.token_bytes(0, (self.num_tokens - 1) // block_size * block_size)

    @property
    def prompt_ids(self) -> NDArray[np.int32]:
        """The prompt's token ids: a view."""
        return self._tokens[: self.num_prompt_tokens]

    def expect(self, max_model_len: int) -> None:
        """The next token is being drawn, and pending from now on."""
        assert not self.is_drawing
        self._extend(0)
        self.is_drawing = True
        self.is_at_end = self.kind is RequestKind.PREFILL or self._is_full(self.num_tokens, max_model_len)

    def unexpect(self) -> None:
        """The pending token was not drawn."""
        if self.is_drawing:
            self.num_tokens -= 1
            self.is_drawing = False

    def settle(self, token_id: int) -> None:
        """Take the pending token: it is this one."""
        self.unexpect()
        self.append(token_id)

    def append(self, token_id: int) -> None:
        """Take the token just drawn."""
        assert not self.is_drawing
        self._extend(token_id)
        self.output_ids.append(token_id)

    def _extend(self, token_id: int) -> None:
        if self.num_tokens == len(self._tokens):
            grown = np.empty(max(64, 2 * self.num_tokens), np.int32)
            grown[: self.num_tokens] = self._tokens
            self._tokens = grown
        self._tokens[self.num_tokens] = token_id
        self.num_tokens += 1

    def extend(self, token_ids: NDArray[np.int32]) -> None:
        """Take several drawn tokens at once."""
        end = self.num_tokens + len(token_ids)
        if end > len(self._tokens):
            grown = np.empty(max(64, 2 * end), np.int32)
            grown[: self.num_tokens] = self._tokens[: self.num_tokens]
            self._tokens = grown
        self._tokens[self.num_tokens : end] = token_ids
        self.num_tokens = end
        self.output_ids.extend(token_ids.tolist())

    def finish_reason(self, max_model_len: int) -> FinishReason | None:
        """Whether the last drawn token ends the request. All attempts count: from the prompt's end."""
        num_output = len(self.output_ids)
        if self.output_ids[-1] in self.stop_ids and num_output > self.sampling.min_tokens:
            return FinishReason.STOP
        return FinishReason.LENGTH if self._is_full(self.num_tokens, max_model_len) else None

    def _is_full(self, num_tokens: int, max_model_len: int) -> bool:
        num_output = num_tokens - self.num_prompt_tokens
        return num_output >= self.sampling.max_tokens or num_tokens >= max_model_len

    @property
    def looks_back(self) -> bool:
        """Whether a draw depends on which tokens were drawn before, beyond what the model makes of them."""
        sampling = self.sampling
        return bool(
            sampling.repetition_penalty != 1.0
            or sampling.presence_penalty
            or sampling.frequency_penalty
            or self.is_kept_going
        )

    @property
    def is_kept_going(self) -> bool:
        """Whether the next token, or the one before it, may not be one that stops it."""
        min_tokens = self.sampling.min_tokens
        return min_tokens > 0 and self.num_tokens - self.num_prompt_tokens <= min_tokens

    def take_table(self) -> BlockTable:
        """Its blocks, which the caller now owns."""
        taken, self.table = self.table, BlockTable()
        return taken

    def restart(self) -> None:
        """Everything is to be computed again, after the blocks were taken. Tokens drawn stay drawn."""
        assert self.table.num_blocks == 0
        self.num_computed_tokens = self.num_told_blocks = 0
        if self.prompt_logprobs is not None:
            self.prompt_logprobs = [None]

    def take_cached(self) -> CachedTokens | None:
        """What to report with the first token; None ever after."""
        if not self._tells_cached:
            return None
        self._tells_cached = False
        return self.cached or NO_CACHED_TOKENS

    # --- logprobs ---

    @property
    def reports_prompt(self) -> bool:
        """Whether the log-probabilities are asked for of what is computed next."""
        return self.prompt_logprobs is not None and self.num_computed_tokens < self.num_prompt_tokens

    def add_prompt_logprobs(self, logprobs: Iterable[TokenLogprobs]) -> None:
        """Append those of the prompt tokens that a chunk predicted."""
        assert self.prompt_logprobs is not None
        self.prompt_logprobs.extend(logprobs)

    def take_prompt_logprobs(self) -> tuple[TokenLogprobs | None, ...] | None:
        """What to report with the first token; None ever after."""
        taken, self.prompt_logprobs = self.prompt_logprobs, None
        return None if taken is None else tuple(taken)
