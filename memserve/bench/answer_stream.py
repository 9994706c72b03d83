"""One streamed answer: OpenAI's events into the record of its request, and what is wrong with them.

`AnswerStream` is fed the body piece by piece and knows no sockets. A chunk counts as a token's if it has text
or token ids, or at least might: the first chunk of a chat, which only names the role, does not, nor does the
last one that only says why the answer ended.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

import msgspec

from memserve.bench.records import ErrorKind, Failure, RequestRecord
from memserve.bench.sse import EventParser, EventTooLong

_MAX_MESSAGE = 300
_DONE = b"[DONE]"

_Count = Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]


class _Details(msgspec.Struct):
    cached_tokens: _Count | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: _Count | None = None
    completion_tokens: _Count | None = None
    prompt_tokens_details: _Details | None = None


class _Delta(msgspec.Struct):
    role: str | None = None
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None
    finish_reason: str | None = None
    token_ids: list[int] | None = None


class _Chunk(msgspec.Struct):
    choices: list[_Choice] | None = None
    usage: _Usage | None = None
    error: object = None


_chunk_decoder = msgspec.json.Decoder(_Chunk)


@dataclass(slots=True)
class Answer:
    """What a request was answered, for a live conversation."""

    texts: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)

    @property
    def text(self) -> str:
        """All of it."""
        return "".join(self.texts)


class StreamError(Exception):
    """A stream that cannot go on."""

    def __init__(self, kind: ErrorKind, message: str) -> None:
        self.failure = Failure(kind, message)


class AnswerStream:
    """The events of one answer, into its record."""

    def __init__(self, record: RequestRecord, answer: Answer | None) -> None:
        self.answer = answer
        self._record = record
        self._parser = EventParser()
        self._start = b""
        self._any = False

    def feed(self, piece: bytes, now: float) -> bool:
        """Take a piece of the body; True at [DONE]."""
        if not self._any:
            self._start = (self._start + piece)[:_MAX_MESSAGE]
        try:
            events = self._parser.feed(piece)
        except EventTooLong:
            raise StreamError(ErrorKind.GARBAGE, "an event without an end") from None
        for event in events:
            if event.startswith(_DONE):
                self._finish()
                return True
            self._event(event, now)
        return False

    def end(self, now: float) -> None:
        """The body ended, without [DONE] so far."""
        rest = self._parser.rest()
        if rest is not None and not rest.startswith(_DONE):
            try:
                self._event(rest, now)
            except StreamError as error:
                if error.failure.kind is ErrorKind.GARBAGE:
                    raise self._cut() from None
                raise
        if rest is None or not rest.startswith(_DONE):
            if not self._any and self._start:
                raise StreamError(ErrorKind.GARBAGE, f"no stream of events: {one_line(self._start)}")
            if self._record.finish_reason is None:
                raise self._cut()
        self._finish()

    def _cut(self) -> StreamError:
        num = len(self._record.chunk_times)
        return StreamError(ErrorKind.CUT, f"the stream ended after {num} chunks, before the answer did")

    def _event(self, event: bytes, now: float) -> None:
        try:
            chunk = _chunk_decoder.decode(event)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise StreamError(ErrorKind.GARBAGE, f"{one_line(error)}: {one_line(event)}") from None
        self._any = True
        if chunk.error is not None:
            raise StreamError(ErrorKind.SERVER, error_message(event))
        if chunk.usage is not None:
            self._usage(chunk.usage)
        if not chunk.choices:
            return
        choice = chunk.choices[0]
        if choice.finish_reason is not None:
            self._record.finish_reason = choice.finish_reason
        text = _token_text(choice)
        if text is None:
            return
        self._record.chunk_times.append(now)
        if not self._record.has_usage:
            self._record.output_tokens += 1
        if self.answer is not None:
            self.answer.texts.append(text)
            self.answer.token_ids += choice.token_ids or ()

    def _usage(self, usage: _Usage) -> None:
        record = self._record
        record.prompt_tokens = usage.prompt_tokens
        if usage.prompt_tokens_details is not None:
            record.cached_tokens = usage.prompt_tokens_details.cached_tokens
        if usage.completion_tokens is not None:
            record.output_tokens, record.has_usage = usage.completion_tokens, True

    def _finish(self) -> None:
        if not self._record.chunk_times:
            raise StreamError(ErrorKind.EMPTY, "the answer has no token")


def _token_text(choice: _Choice) -> str | None:
    """The text of a chunk that carries a token; it may be empty: a token that ends in half a character has
    none yet. None for a chunk that only opens a chat's answer or tells why one ended.
    """
    delta = choice.delta
    if delta is None:
        text, opening = choice.text, False
    else:
        text = delta.content or delta.reasoning_content or delta.reasoning or delta.content
        opening = delta.role is not None
    if text or choice.token_ids:
        return text or ""
    return None if text is None or opening or choice.finish_reason is not None else ""


# --- texts -------------------------------------------------------------------------------------------------


def one_line(text: object) -> str:
    """The beginning of a text, of an error, or of bytes that may be anything, as one line."""
    decoded = text.decode(errors="replace") if isinstance(text, bytes) else str(text)
    line = "".join(char if char.isprintable() else " " for char in " ".join(decoded.split()))
    return line if len(line) <= _MAX_MESSAGE else line[: _MAX_MESSAGE - 1] + "…"


def describe(error: BaseException) -> str:
    """An exception as one line; some have no text of their own."""
    return one_line(error) or type(error).__name__


class _ErrorFields(msgspec.Struct):
    message: str | None = None


class _ErrorBody(msgspec.Struct):
    error: _ErrorFields | str | None = None
    message: str | None = None
    detail: str | None = None


def error_message(body: bytes) -> str:
    """What an error's body says: OpenAI's shape, some others', else the body itself."""
    try:
        fields = msgspec.json.decode(body, type=_ErrorBody)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return one_line(body)
    inner = fields.error.message if isinstance(fields.error, _ErrorFields) else fields.error
    return one_line(inner or fields.message or fields.detail or body)
