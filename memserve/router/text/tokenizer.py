"""Text to token ids and back, by the model folder's tokenizer.json, with Hugging Face's rules for special
tokens.

`Tokenizer.load` reads tokenizer.json and, beside it, tokenizer_config.json and special_tokens_map.json, which
name the special tokens and say whether a prompt begins with one. Nothing of the folder is executed. After
that the object never changes, and may be used from any thread; `encode` releases the interpreter lock, so a
long prompt costs the event loop nothing when it is encoded in a thread.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import msgspec
import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers.processors import TemplateProcessing

from memserve.errors import ModelError
from memserve.router.text.detokenizer import (
    ByteDecoder,
    DecoderSpec,
    IncrementalDecoder,
    Start,
    TokenRule,
    WindowDecoder,
    read_rule,
)
from memserve.router.text.tokenizer_files import AddedToken, one_line, read_json, special_tokens


class _TokenizerFile(msgspec.Struct):
    decoder: DecoderSpec | None = None


class _TokenizerConfig(msgspec.Struct):
    """What matters here of tokenizer_config.json."""

    add_bos_token: bool | None = None
    add_eos_token: bool | None = None
    added_tokens_decoder: dict[str, AddedToken] = {}


class Tokenizer:
    """One vocabulary. Token ids are int32 NumPy arrays going out, any sequence of ints coming in."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        rule: TokenRule | None,
        special_tokens: Mapping[str, str] | None = None,
    ) -> None:
        """`special_tokens` are those with a name (bos_token, …), as chat templates know them."""
        self._backend = backend
        self._rule = rule
        self._pieces: dict[int, bytes] = {}
        self.special_tokens: Mapping[str, str] = MappingProxyType(dict(special_tokens or {}))
        self.special_ids = frozenset(
            token_id for token_id, token in backend.get_added_tokens_decoder().items() if token.special
        )
        # Special or not: where a text spells one of them out, it is this token.
        self.added_tokens: Mapping[int, str] = MappingProxyType(
            {token_id: token.content for token_id, token in backend.get_added_tokens_decoder().items()}
        )
        vocabulary = backend.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        self._longest_token = max(map(len, vocabulary), default=1)

    @classmethod
    def load(cls, path: Path) -> Tokenizer:
        """Reads a model folder, or a tokenizer.json itself. Raises ModelError if there is none or it is
        broken.
        """
        file = path / "tokenizer.json" if path.is_dir() else path
        try:
            data = file.read_bytes()
        except FileNotFoundError:
            raise ModelError(
                f"no tokenizer: {file} does not exist (only tokenizer.json is supported)"
            ) from None
        except OSError as error:
            raise ModelError(f"the tokenizer {file} cannot be read: {error.strerror}") from None
        try:
            spec = msgspec.json.decode(data, type=_TokenizerFile)
            backend = tokenizers.Tokenizer.from_buffer(data)
        except Exception as error:  # the library raises bare Exception for whatever is wrong with the file
            raise ModelError(f"the tokenizer {file} is broken: {one_line(error)}") from None
        backend.no_truncation()
        backend.no_padding()
        config = read_json(file.parent / "tokenizer_config.json", _TokenizerConfig) or _TokenizerConfig()
        named = special_tokens(file.parent)
        marked = [token.content for token in config.added_tokens_decoder.values() if token.special]
        known = [token for token in (*marked, *named.values()) if backend.token_to_id(token) is not None]
        backend.add_special_tokens(known)
        if config.add_bos_token is not None or config.add_eos_token is not None:
            bos = named.get("bos_token") if config.add_bos_token else None
            eos = named.get("eos_token") if config.add_eos_token else None
            _set_affixes(backend, bos, eos)
        return cls(backend, read_rule(spec.decoder), named)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> NDArray[np.int32]:
        """Token ids of `text`; special tokens written out in it count as such, as in Hugging Face.

        `add_special_tokens` adds what the model expects around a prompt, if anything (bos).
        """
        # The batch form is the one that releases the interpreter lock.
        (encoding,) = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        return np.asarray(encoding.ids, dtype=np.int32)

    def max_chars(self, num_tokens: int) -> int:
        """No text of more characters fits into so many tokens: a check that needs no tokenising."""
        return num_tokens * self._longest_token

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of a whole sequence, by the library; unknown ids give nothing."""
        text: str = self._backend.decode(token_ids, skip_special_tokens=skip_special_tokens)
        return text

    def decoder(
        self, *, skip_special_tokens: bool = True, context: Sequence[int] | None = None
    ) -> IncrementalDecoder:
        """A decoder for what follows `context` (the end of a prompt), or for a text from its start (None)."""
        if self._rule is None:

            def decode(token_ids: Sequence[int]) -> str:
                return self.decode(token_ids, skip_special_tokens=skip_special_tokens)

            return WindowDecoder(decode, context or ())
        spell = self._spell_ordinary if skip_special_tokens else self.token_bytes
        return ByteDecoder(spell, self._rule.start if context is None else Start.KEEP)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that one token stands for, maybe a part of a character; none for an unknown id."""
        piece = self._pieces.get(token_id)
        if piece is None:
            token = self._backend.id_to_token(token_id)
            if token is None:
                piece = b""
            elif self._rule is None or token_id in self.special_ids:
                piece = self.decode([token_id], skip_special_tokens=False).encode()
            else:
                piece = self._rule.spell(token)
            self._pieces[token_id] = piece
        return piece

    def _spell_ordinary(self, token_id: int) -> bytes:
        return b"" if token_id in self.special_ids else self.token_bytes(token_id)


def _set_affixes(backend: tokenizers.Tokenizer, bos: str | None, eos: str | None) -> None:
    """Makes a prompt begin with `bos` and end with `eos`, in place of what tokenizer.json says (as
    transformers).
    """
    affixes = [(token, backend.token_to_id(token)) for token in (bos, eos) if token is not None]
    for token, token_id in affixes:
        if token_id is None:
            raise ModelError(f"tokenizer_config.json names the special token {token!r}, which has no id")
    template = [*([bos] if bos else []), "$A", *([eos] if eos else [])]
    backend.post_processor = TemplateProcessing(single=template, special_tokens=affixes)
