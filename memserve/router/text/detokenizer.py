"""Token ids back to text, one token at a time, without ever showing half a character.

A token is not a character: an emoji may be four tokens, and one token may end in the middle of a character.
Every vocabulary in use spells its tokens by one of a few rules, read from tokenizer.json's `decoder`
(`read_rule`):

    byte level      "Ġhé"  stands for the bytes  " h\\xc3\\xa9"     each character of the spelling is one byte
    sentencepiece   "▁hé"  stands for " hé", and "<0xC3>" for one byte

Under such a rule a token *is* a run of bytes (`TokenRule.spell`), so text is decoded by a plain incremental
UTF-8 decoder: exact, and O(1) a token (`ByteDecoder`). Anything else goes through `WindowDecoder`, which asks
the tokenizer for the text of the last few tokens with and without the new one. Streamed and whole answers
come out of the same decoder, so they are always equal.
"""

from __future__ import annotations

import codecs
import dataclasses
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

import msgspec

REPLACEMENT = "\ufffd"

_Utf8Decoder = codecs.getincrementaldecoder("utf-8")

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>\Z")
# No character spans more than four tokens; twice that covers joiners in vocabularies of unknown spelling.
_MAX_HELD_TOKENS = 8
# Tokens of the prompt that a WindowDecoder sees before the first output token (vLLM uses as many).
_CONTEXT_TOKENS = 6


class DecoderSpec(msgspec.Struct, frozen=True):
    """The `decoder` object of tokenizer.json; every kind's fields together."""

    type: str
    decoders: tuple[DecoderSpec, ...] = ()
    pattern: dict[str, str] | None = None
    content: str = ""
    start: int = 0
    stop: int = 0
    replacement: str = ""
    prepend_scheme: str = "always"


class Start(Enum):
    """What becomes of the space that a sentencepiece text begins with."""

    KEEP = "keep"
    STRIP_ONE = "strip one"
    STRIP_ALL = "strip all"


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins: bytes that print are themselves, the other 68 follow from U+0100 on."""
    printable = {
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    }
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTES_OF_ALPHABET = _byte_alphabet()


@dataclass(frozen=True, slots=True)
class TokenRule:
    """How a vocabulary spells bytes. `space` is the stand-in for a blank (sentencepiece's ▁) or empty."""

    byte_level: bool
    space: str = ""
    byte_fallback: bool = False
    start: Start = Start.KEEP

    def spell(self, token: str) -> bytes:
        """The bytes that `token`, as it is written in the vocabulary, stands for."""
        if self.byte_level:
            try:
                return bytes(_BYTES_OF_ALPHABET[char] for char in token)
            except KeyError:  # an added token, written as itself
                return token.encode()
        if self.byte_fallback and (match := _BYTE_TOKEN.match(token)):
            return bytes((int(match[1], 16),))
        return (token.replace(self.space, " ") if self.space else token).encode()


def read_rule(spec: DecoderSpec | None) -> TokenRule | None:
    """The rule that a `decoder` describes, or None if it is none of those known here."""
    if spec is None:
        return None
    steps = spec.decoders if spec.type == "Sequence" else (spec,)
    kinds = [step.type for step in steps if step.type != "Fuse"]
    if kinds == ["ByteLevel"]:
        return TokenRule(byte_level=True)
    if kinds == ["Metaspace"]:
        start = Start.KEEP if steps[0].prepend_scheme == "never" else Start.STRIP_ALL
        return TokenRule(byte_level=False, space=steps[0].replacement, start=start)
    expected = iter(("Replace", "ByteFallback", "Strip"))
    if not kinds or not all(kind in expected for kind in kinds):  # a subsequence of it, in order
        return None
    rule = TokenRule(byte_level=False, byte_fallback="ByteFallback" in kinds)
    for step in steps:
        if step.type == "Replace":
            if step.pattern is None or step.content != " " or "String" not in step.pattern:
                return None
            rule = dataclasses.replace(rule, space=step.pattern["String"])
        elif step.type == "Strip":
            if (step.content, step.start, step.stop) != (" ", 1, 0):
                return None
            rule = dataclasses.replace(rule, start=Start.STRIP_ONE)
    return rule


class IncrementalDecoder(Protocol):
    """Text of a growing sequence. What `push` and `flush` return, joined, is the text of the whole."""

    def push(self, token_id: int) -> str:
        """The text that this token completes: whole characters only, perhaps none."""
        ...

    def flush(self) -> str:
        """The end: what is held of a character that never became whole, as U+FFFD."""
        ...


class ByteDecoder:
    """For vocabularies with a rule: `spell` gives a token's bytes, none for a token to be skipped."""

    def __init__(self, spell: Callable[[int], bytes], start: Start = Start.KEEP) -> None:
        self._spell = spell
        self._utf8 = _Utf8Decoder("replace")
        self._start = start

    def push(self, token_id: int) -> str:
        piece = self._spell(token_id)
        if self._start is not Start.KEEP and piece:
            piece = piece.removeprefix(b" ") if self._start is Start.STRIP_ONE else piece.lstrip(b" ")
            self._start = Start.KEEP
        return self._utf8.decode(piece)

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)


class WindowDecoder:
    """For any vocabulary: the new token's text is what it adds to the text of the tokens before it.

        … t t t [ p p p | u u n ]      p: shown, kept as context   u: held, the text ends in U+FFFD   n: new
                prefix  read

    Eight tokens are held at most, so a run of garbage costs no more a token than text does.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], context: Sequence[int] = ()) -> None:
        self._decode = decode
        self._ids = list(context[-_CONTEXT_TOKENS:])
        self._read = len(self._ids)

    def push(self, token_id: int) -> str:
        self._ids.append(token_id)
        text = self._new_text()
        if text.endswith(REPLACEMENT) and len(self._ids) - self._read < _MAX_HELD_TOKENS:
            return ""
        self._ids = self._ids[self._read :]
        self._read = len(self._ids)
        return text

    def flush(self) -> str:
        text = self._new_text()
        self._read = len(self._ids)
        return text

    def _new_text(self) -> str:
        return self._decode(self._ids)[len(self._decode(self._ids[: self._read])) :]
