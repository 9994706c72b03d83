"""How many tokens a text has, where to cut it, and which ids or words a made-up prompt may use.

With a tokenizer (a tokenizer.json, or a folder that holds one) counts and cuts are exact for that vocabulary,
without the special tokens that a server may put around a prompt. Without one a token is taken to be four
bytes of UTF-8: the data sets of English text that this was compared with have 4.0 to 4.8 bytes a token in
GPT-NeoX's vocabulary of 50k (agents' tool output in JSON 3.0), so the estimate is mostly a little high; for
a vocabulary of a few thousand it is low.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

import numpy as np
import tokenizers

from memserve.bench.tokens import Vocabulary
from memserve.errors import ConfigError, WorkloadError

BYTES_PER_TOKEN: Final = 4
DEFAULT_VOCAB_SIZE: Final = 500
"""Any model of today has ids up to this one."""
FIRST_ID: Final = 10
"""Below stand most models' special tokens."""
MAX_WORDS: Final = 4096
MIN_WORDS: Final = 64

# Single tokens, with their space, in the vocabularies of GPT-2, GPT-NeoX, Llama, Mistral and Qwen alike.
_COMMON = (
    " the of and to in is that for it as was with be by on not he his but at are this have an had they"
    " you were their one all we can her has there been if more when will would who so no out up into do"
    " any your what them than time its only some could these two may then other first new now people my"
    " made over did like even most after also well back years many where way down should because long"
    " each just state those too good very make world still see work between life being under before day"
    " same another know great year since against go came right used take three"
)
COMMON_WORDS: Final = tuple(" " + word for word in _COMMON.split())


class TextTokens:
    """Counts and cuts text. Pure: the same text always gives the same answer."""

    def __init__(self, tokenizer: tokenizers.Tokenizer | None = None) -> None:
        self._tokenizer = tokenizer

    @classmethod
    def load(cls, path: Path | None) -> TextTokens:
        """From a tokenizer.json or its folder; None: the estimate. Raises WorkloadError."""
        if path is None:
            return cls()
        file = path / "tokenizer.json" if path.is_dir() else path
        try:
            data = file.read_bytes()
        except OSError as error:
            raise WorkloadError(f"{file}: the tokenizer cannot be read: {error.strerror}") from None
        try:
            tokenizer = tokenizers.Tokenizer.from_buffer(data)
        except Exception as error:  # the library raises bare Exception for whatever is wrong with the file
            raise WorkloadError(f"{file}: not a tokenizer: {' '.join(str(error).split())}") from None
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return cls(tokenizer)

    @property
    def exact(self) -> bool:
        """Whether there is a tokenizer."""
        return self._tokenizer is not None

    def ids(self, text: str) -> list[int]:
        """Token ids; without a tokenizer, numbers that stand for four bytes each."""
        if self._tokenizer is not None:
            ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
            return ids
        data = _utf8(text)
        padded = data + bytes(-len(data) % BYTES_PER_TOKEN)
        ids = np.frombuffer(padded, dtype="<u4").tolist()
        return ids

    def count(self, text: str) -> int:
        """Tokens; of a text that is not empty at least 1."""
        if self._tokenizer is not None:
            return len(self._tokenizer.encode(text, add_special_tokens=False).ids)
        return -(-len(_utf8(text)) // BYTES_PER_TOKEN)

    def cut(self, text: str, num_tokens: int) -> str:
        """The longest beginning, of whole characters and (with a tokenizer) of the text's own tokens, that
        has at most `num_tokens` tokens when it stands alone.
        """
        if num_tokens <= 0:
            return ""
        if self._tokenizer is None:
            return _utf8(text)[: num_tokens * BYTES_PER_TOKEN].decode(errors="ignore")
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        if len(encoding.ids) <= num_tokens:
            return text
        # Mostly the first try fits; tokens that are parts of one character share its end, and take more.
        for kept in range(num_tokens, 0, -1):
            candidate = text[: encoding.offsets[kept - 1][1]]
            if self.count(candidate) <= num_tokens:
                return candidate
        return ""

    def vocabulary(self, seed: int, *, vocab_size: int | None, as_text: bool) -> Vocabulary:
        """What made-up prompts are drawn from: ordinary ids, or words that are one token each.

        Args:
            seed: of the streams.
            vocab_size: ids below this one; None: as many as the tokenizer has, or 500 without one.
            as_text: words instead of ids. Without a tokenizer they are common English words.

        Raises ConfigError if there are too few.
        """
        if as_text:
            words = self._words() if self._tokenizer is not None else COMMON_WORDS
            if len(words) < MIN_WORDS:
                raise ConfigError(f"the tokenizer has only {len(words)} words of one token; use token ids")
            return Vocabulary(seed=seed, size=len(words), words=words)
        first, end = self._ordinary_ids()
        end = min(end, vocab_size) if vocab_size is not None and self.exact else vocab_size or end
        if end - first < MIN_WORDS:
            raise ConfigError(f"a vocabulary of {end} ids is too small: at least {first + MIN_WORDS}")
        return Vocabulary(seed=seed, size=end - first, first_id=first)

    def _ordinary_ids(self) -> tuple[int, int]:
        """The longest range of ids without a special or added token: (first, end)."""
        if self._tokenizer is None:
            return FIRST_ID, DEFAULT_VOCAB_SIZE
        size = self._tokenizer.get_vocab_size(with_added_tokens=True)
        added = sorted(token_id for token_id in self._tokenizer.get_added_tokens_decoder() if token_id < size)
        cuts = [-1, *added, size]
        end, first = max((b - a, b, a + 1) for a, b in zip(cuts, cuts[1:], strict=False))[1:]
        return first, end

    def _words(self) -> tuple[str, ...]:
        """Words that stay one token each in a row of words, in the order of their ids."""
        assert self._tokenizer is not None
        by_id = sorted((token_id, token) for token, token_id in self._tokenizer.get_vocab().items())
        marked = [(token_id, token) for token_id, token in by_id if re.fullmatch("[Ġ▁ ][a-z]{2,}", token)]
        words = [(token_id, " " + token[1:]) for token_id, token in marked[: 2 * MAX_WORDS]]
        # The first of a row may have a token before it, or none of its own: some tokenizers add a space.
        rows = self._tokenizer.encode_batch([word * 4 for _, word in words], add_special_tokens=False)
        kept = [
            word
            for (token_id, word), row in zip(words, rows, strict=True)
            if row.ids[1:][-3:] == [token_id] * 3
        ]
        return tuple(kept[:MAX_WORDS])


def _utf8(text: str) -> bytes:
    return text.encode(errors="surrogatepass")
