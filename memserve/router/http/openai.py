"""Answers in OpenAI's shapes: a struct for every object, and log-probabilities in both of their forms.

What OpenAI leaves out is left out (`omit_defaults`, UNSET), what it writes as null is None. `formats.py`
fills the objects in.
"""

from __future__ import annotations

import msgspec

from memserve.messages import TokenLogprobs
from memserve.router.http.choices import TokenEntry
from memserve.router.text.tokenizer import Tokenizer

# Stands in for minus infinity, which JSON does not have (vLLM uses the same number).
_MIN_LOGPROB = -9999.0


class PromptTokensDetails(msgspec.Struct, frozen=True):
    cached_tokens: int


class Usage(msgspec.Struct, frozen=True):
    """Tokens of a whole answer, or of what was streamed so far."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class LegacyLogprobs(msgspec.Struct, frozen=True):
    """/v1/completions: parallel lists, one entry a token. `text_offset` counts characters of the choice's
    text.
    """

    text_offset: list[int]
    token_logprobs: list[float | None]
    tokens: list[str]
    top_logprobs: list[dict[str, float] | None]


class TopLogprob(msgspec.Struct, frozen=True):
    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprob(msgspec.Struct, frozen=True):
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct, frozen=True):
    """/v1/chat/completions."""

    content: list[ChatTokenLogprob]
    refusal: None = None


class _Answer(msgspec.Struct, frozen=True):
    """What every answer, whole or a chunk, begins with."""

    id: str
    object: str
    created: int
    model: str


class CompletionChoice(msgspec.Struct, frozen=True):
    """Whole, or a piece of a stream: the same shape. `token_ids` where `return_token_ids` asks for them."""

    index: int
    text: str
    logprobs: LegacyLogprobs | None
    finish_reason: str | None
    token_ids: tuple[int, ...] | msgspec.UnsetType = msgspec.UNSET


class CompletionObject(_Answer, frozen=True):
    """A whole answer or a chunk of /v1/completions."""

    choices: list[CompletionChoice]
    usage: Usage | None | msgspec.UnsetType = msgspec.UNSET


class ChatMessage(msgspec.Struct, frozen=True):
    role: str
    content: str
    refusal: None = None


class ChatChoice(msgspec.Struct, frozen=True):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: str | None
    token_ids: tuple[int, ...] | msgspec.UnsetType = msgspec.UNSET


class ChatObject(_Answer, frozen=True):
    """A whole answer of /v1/chat/completions."""

    choices: list[ChatChoice]
    usage: Usage


class ChatDelta(msgspec.Struct, frozen=True, omit_defaults=True):
    role: str | None = None
    content: str | None = None


class ChatChunkChoice(msgspec.Struct, frozen=True):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: str | None
    token_ids: tuple[int, ...] | msgspec.UnsetType = msgspec.UNSET


class ChatChunk(_Answer, frozen=True):
    """A chunk of /v1/chat/completions."""

    choices: list[ChatChunkChoice]
    usage: Usage | None | msgspec.UnsetType = msgspec.UNSET


class ModelObject(msgspec.Struct, frozen=True):
    """A row of /v1/models."""

    id: str
    created: int
    max_model_len: int
    object: str = "model"
    owned_by: str = "memserve"


class ModelList(msgspec.Struct, frozen=True):
    data: list[ModelObject]
    object: str = "list"


class CancelledObject(msgspec.Struct, frozen=True):
    """That a request was cancelled; it is not OpenAI's."""

    id: str
    object: str = "request"
    status: str = "cancelled"


class ErrorBody(msgspec.Struct, frozen=True):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorObject(msgspec.Struct, frozen=True):
    """Every error, as a response and inside a stream."""

    error: ErrorBody


_encoder = msgspec.json.Encoder()


def to_json(value: msgspec.Struct) -> bytes:
    """JSON of one of the objects above."""
    return _encoder.encode(value)


# --- log-probabilities --------------------------------------------------------------------------------------


def legacy_logprobs(entries: tuple[TokenEntry, ...], tokenizer: Tokenizer) -> LegacyLogprobs:
    """`top_logprobs` holds the token itself too, even when it is not among the top ones."""
    tops: list[dict[str, float] | None] = []
    for entry in entries:
        tops.append(None if entry.logprobs is None else _top_dict(entry.token_id, entry.logprobs, tokenizer))
    return LegacyLogprobs(
        text_offset=[entry.text_offset for entry in entries],
        token_logprobs=[None if e.logprobs is None else _finite(e.logprobs.logprob) for e in entries],
        tokens=[_legacy_name(entry.token_id, tokenizer) for entry in entries],
        top_logprobs=tops,
    )


def chat_logprobs(entries: tuple[TokenEntry, ...], tokenizer: Tokenizer) -> ChatLogprobs:
    """`bytes` are the token's own, so that those of a split character join to the whole."""
    content = []
    for token_id, logprobs, _ in entries:
        assert logprobs is not None  # only a prompt's first token has none, and chats echo no prompt
        token = tokenizer.token_bytes(token_id)
        tops = [
            TopLogprob(_chat_name(piece), _finite(logprob), list(piece))
            for piece, logprob in ((tokenizer.token_bytes(top), value) for top, value in logprobs.top)
        ]
        content.append(ChatTokenLogprob(_chat_name(token), _finite(logprobs.logprob), list(token), tops))
    return ChatLogprobs(content)


def _top_dict(token_id: int, logprobs: TokenLogprobs, tokenizer: Tokenizer) -> dict[str, float]:
    """Different ids of the same name are one entry: the likelier one's."""
    named: dict[str, float] = {}
    for top_id, logprob in ((token_id, logprobs.logprob), *logprobs.top):
        name = _legacy_name(top_id, tokenizer)
        named[name] = max(named.get(name, _MIN_LOGPROB), _finite(logprob))
    return named


def _legacy_name(token_id: int, tokenizer: Tokenizer) -> str:
    """The token's text; `bytes:\\xe2\\x80` for a part of a character, as OpenAI writes it."""
    piece = tokenizer.token_bytes(token_id)
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)


def _chat_name(piece: bytes) -> str:
    return piece.decode("utf-8", errors="backslashreplace")


def _finite(logprob: float) -> float:
    return max(logprob, _MIN_LOGPROB)
