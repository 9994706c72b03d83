"""What a request asks of its tokens and what comes with them: how they are drawn, how likely they were, how
much of the prompt was cached, why it ended. Parts of messages.
"""

from __future__ import annotations

from enum import StrEnum

import msgspec


class FinishReason(StrEnum):
    """Why a request ended, in OpenAI's words where they have one."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"


class SamplingParams(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """How tokens are drawn; validated and completed by the router, so a worker trusts it.

    `seed` is always set (the router draws one for requests without): token at absolute position p of the
    sequence is drawn with the number (seed, p), so a replay or another batch mix draws the same.
    `stop_token_ids` already holds the model's eos ids unless the client said ignore_eos. `top_k` 0 means off.
    `temperature` 0 means greedy. `logprobs`/`prompt_logprobs`: None = off, k = the token's and the top k's,
    of the raw model distribution (before penalties and temperature).
    """

    max_tokens: int
    seed: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Log-probability of one token, and of the most likely ones at its position (best first)."""

    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()


class CachedTokens(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Prompt tokens that were not computed, by where their KV was: the worker's `device` tier, its `host`
    tier, or another instance, `pulled_from`, from which they were pulled.
    """

    device: int = 0
    host: int = 0
    pulled: int = 0
    pulled_from: str = ""

    @property
    def total(self) -> int:
        """All of them."""
        return self.device + self.host + self.pulled


NO_CACHED_TOKENS = CachedTokens()
