"""What the HTTP layer knows of the model that is served."""

from __future__ import annotations

from dataclasses import dataclass, field

from memserve.model_config import DefaultSampling
from memserve.router.request_seeds import RequestSeeds
from memserve.router.text.chat_template import ChatTemplate
from memserve.router.text.token_history import TokenHistory
from memserve.router.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class ServedModel:
    """One model under one name. `chat_template` is None where the model has none: chat requests are refused.

    `created` is a Unix time, for /v1/models. `eos_token_ids` end a sequence unless the client says
    ignore_eos. `seeds` has one for each request that brings none. `history` is None where ids are not reused.
    """

    name: str
    created: int
    max_model_len: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    tokenizer: Tokenizer
    chat_template: ChatTemplate | None
    default_sampling: DefaultSampling
    seeds: RequestSeeds = field(default_factory=RequestSeeds)
    history: TokenHistory | None = None
