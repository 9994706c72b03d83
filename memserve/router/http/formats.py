"""The two endpoints' formats: a job's choices as one JSON answer, or as the events of a stream.

chat         role chunk a choice, then deltas, then a chunk with the finish_reason
completions  deltas, then a chunk with the finish_reason
both         on demand a chunk with the usage, at last `data: [DONE]`
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import msgspec

from memserve.messages import CachedTokens
from memserve.router.http.choices import Choice, ChoiceUpdate, TokenEntry
from memserve.router.http.openai import (
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatDelta,
    ChatMessage,
    ChatObject,
    CompletionChoice,
    CompletionObject,
    PromptTokensDetails,
    Usage,
    chat_logprobs,
    legacy_logprobs,
    to_json,
)
from memserve.router.text.tokenizer import Tokenizer

DONE = b"data: [DONE]\n\n"

CACHED_HEADER = "x-memserve-cached"
CACHE_SOURCES = ("device", "host", "pulled")

UsageField = Usage | None | msgspec.UnsetType


def cached_of(choices: Sequence[Choice]) -> list[CachedTokens]:
    """What was cached of each prompt: what the first of its choices found."""
    return [choice.cached for choice in _firsts(choices)]


def cached_header(choices: Sequence[Choice]) -> str:
    """Cached tokens by source, those of all prompts together: "device=512, host=64, pulled=0"; what was
    pulled also names the instances that it came from.
    """
    device = host = pulled = 0
    sources = set()
    for each in cached_of(choices):
        device, host, pulled = device + each.device, host + each.host, pulled + each.pulled
        if each.pulled:
            sources.add(each.pulled_from)
    text = f"device={device}, host={host}, pulled={pulled}"
    return f"{text};from={'+'.join(sorted(sources))}" if sources else text


def _firsts(choices: Sequence[Choice]) -> Iterable[Choice]:
    """The first choice of each prompt."""
    if len(choices) == 1:
        return choices
    return {choice.plan.prompt_index: choice for choice in reversed(choices)}.values()


def usage_of(choices: Sequence[Choice]) -> Usage:
    """A prompt counts once however many choices it has; what was cached of it is what its first found."""
    firsts = _firsts(choices)
    prompt_tokens = sum([len(choice.plan.prompt.token_ids) for choice in firsts])
    completion_tokens = sum([choice.num_completion_tokens for choice in choices])
    return Usage(
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        total_tokens=prompt_tokens + completion_tokens,
        prompt_tokens_details=PromptTokensDetails(sum([choice.cached.total for choice in firsts])),
    )


def event(chunk: msgspec.Struct) -> bytes:
    """One server-sent event."""
    return b"data: " + to_json(chunk) + b"\n\n"


def _or_unset(token_ids: Sequence[int] | None) -> tuple[int, ...] | msgspec.UnsetType:
    return msgspec.UNSET if token_ids is None else tuple(token_ids)


def count_logprobs(entries: Sequence[TokenEntry] | None) -> int:
    """How many numbers the log-probabilities of `entries` are: one a token, and one for each of its top."""
    return sum(1 if entry.logprobs is None else 1 + len(entry.logprobs.top) for entry in entries or ())


class Collected:
    """A choice's updates joined, for an answer in one piece."""

    def __init__(self) -> None:
        self.text = ""
        self.token_ids: list[int] | None = None
        self.entries: list[TokenEntry] | None = None
        self.finish_reason: str | None = None

    def add(self, update: ChoiceUpdate) -> None:
        """Takes the next update of the choice."""
        self.text += update.text
        if update.token_ids is not None:
            self.token_ids = self.token_ids or []
            self.token_ids.extend(update.token_ids)
        if update.entries is not None:
            self.entries = self.entries or []
            self.entries.extend(update.entries)
        self.finish_reason = update.finish_reason


class Format(Protocol):
    """How an endpoint writes its answers."""

    @property
    def id(self) -> str:
        """The answer's."""
        ...

    def whole(self, collected: Sequence[Collected], usage: Usage) -> bytes:
        """The answer in one piece; `collected` in the order of index."""
        ...

    def opening(self, num_choices: int, usage: UsageField) -> Sequence[msgspec.Struct]:
        """Chunks before any token."""
        ...

    def chunks(self, update: ChoiceUpdate, usage: UsageField) -> Sequence[msgspec.Struct]:
        """What an update becomes: its text if there is any, its end if it has come."""
        ...

    def usage_chunk(self, usage: Usage) -> msgspec.Struct:
        """The chunk without choices that ends a stream with include_usage."""
        ...


@dataclass(frozen=True, slots=True)
class CompletionFormat:
    """/v1/completions."""

    id: str
    created: int
    model: str
    tokenizer: Tokenizer

    def whole(self, collected: Sequence[Collected], usage: Usage) -> bytes:
        """See Format."""
        choices = []
        for index, choice in enumerate(collected):
            logprobs = (
                None if choice.entries is None else legacy_logprobs(tuple(choice.entries), self.tokenizer)
            )
            token_ids = _or_unset(choice.token_ids)
            choices.append(CompletionChoice(index, choice.text, logprobs, choice.finish_reason, token_ids))
        return to_json(self._object(choices, usage))

    def opening(self, num_choices: int, usage: UsageField) -> Sequence[msgspec.Struct]:
        """See Format."""
        return ()

    def chunks(self, update: ChoiceUpdate, usage: UsageField) -> Sequence[msgspec.Struct]:
        """See Format."""
        chunks = []
        if update.text or update.num_tokens or update.entries:
            token_ids = _or_unset(update.token_ids)
            logprobs = legacy_logprobs(update.entries, self.tokenizer) if update.entries else None
            choice = CompletionChoice(update.index, update.text, logprobs, None, token_ids)
            chunks.append(self._object([choice], usage))
        if update.finish_reason is not None:
            choice = CompletionChoice(update.index, "", None, update.finish_reason)
            chunks.append(self._object([choice], usage))
        return chunks

    def usage_chunk(self, usage: Usage) -> msgspec.Struct:
        """See Format."""
        return self._object([], usage)

    def _object(self, choices: list[CompletionChoice], usage: UsageField) -> CompletionObject:
        return CompletionObject(self.id, "text_completion", self.created, self.model, choices, usage)


@dataclass(frozen=True, slots=True)
class ChatFormat:
    """/v1/chat/completions."""

    id: str
    created: int
    model: str
    tokenizer: Tokenizer

    def whole(self, collected: Sequence[Collected], usage: Usage) -> bytes:
        """See Format."""
        choices = []
        for index, choice in enumerate(collected):
            logprobs = (
                None if choice.entries is None else chat_logprobs(tuple(choice.entries), self.tokenizer)
            )
            message = ChatMessage("assistant", choice.text)
            token_ids = _or_unset(choice.token_ids)
            choices.append(ChatChoice(index, message, logprobs, choice.finish_reason, token_ids))
        return to_json(ChatObject(self.id, "chat.completion", self.created, self.model, choices, usage))

    def opening(self, num_choices: int, usage: UsageField) -> Sequence[msgspec.Struct]:
        """See Format."""
        delta = ChatDelta("assistant", "")
        return [self._chunk([ChatChunkChoice(i, delta, None, None)], usage) for i in range(num_choices)]

    def chunks(self, update: ChoiceUpdate, usage: UsageField) -> Sequence[msgspec.Struct]:
        """See Format."""
        chunks = []
        if update.text or update.num_tokens or update.entries:
            token_ids = _or_unset(update.token_ids)
            logprobs = chat_logprobs(update.entries, self.tokenizer) if update.entries else None
            delta = ChatDelta(content=update.text)
            choice = ChatChunkChoice(update.index, delta, logprobs, None, token_ids)
            chunks.append(self._chunk([choice], usage))
        if update.finish_reason is not None:
            choice = ChatChunkChoice(update.index, ChatDelta(), None, update.finish_reason)
            chunks.append(self._chunk([choice], usage))
        return chunks

    def usage_chunk(self, usage: Usage) -> msgspec.Struct:
        """See Format."""
        return self._chunk([], usage)

    def _chunk(self, choices: list[ChatChunkChoice], usage: UsageField) -> ChatChunk:
        return ChatChunk(self.id, "chat.completion.chunk", self.created, self.model, choices, usage)
