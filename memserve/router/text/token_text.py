"""Where in a text each of its tokens ends: what must be known before ids may stand in for a text.

Ids *read as* a text when the bytes they stand for are the text's, byte for byte, and the added tokens among
them stand exactly where the text spells one out. Two things that tokenizers do are no part of the text: ids
in front of a prompt (bos), and the blank that a sentencepiece vocabulary puts before the first word of a text
or after an added token.

    ids    <s>  ▁Hel  lo  </s>  ▁wor  ld          ends of the text "Hello</s>world"
    ends    0    3     5    9    12   14

A tokenizer that changes a text (Unicode forms, case, blanks around special tokens) has ids that do not read
as it, one whose decoder is of an unknown kind none at all: `None` is said of these, and they are left alone.
Nothing here depends on how a text would be tokenised. Pure; may be used from any thread.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from memserve.router.text.tokenizer import Tokenizer

Ints = NDArray[np.int32]

# Put before a text that is not to get a blank of its own. Most vocabularies cut after one of them at least.
_ANCHORS = ("\n", "a")


class Tokens(NamedTuple):
    """Ids that read as a text: token i's text ends before byte `ends[i]` of it."""

    token_ids: Ints
    ends: Ints


class TokenText:
    """Texts and ids of one vocabulary held against each other."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        # By id, filled in as they are met; the last place is that of every id that is not in the vocabulary.
        self._pieces = np.full(tokenizer.vocab_size + 1, b"", dtype=object)
        self._lengths = np.full(tokenizer.vocab_size + 1, -1, dtype=np.int32)
        self._lengths[-1] = 0
        self._added = {
            token_id: token.encode() for token_id, token in tokenizer.added_tokens.items() if token
        }
        longest_first = sorted(set(self._added.values()), key=len, reverse=True)
        self._longest = len(longest_first[0]) if longest_first else 0
        self._pattern = re.compile(b"|".join(map(re.escape, longest_first))) if longest_first else None
        # How many ids go in front of a prompt; None where some go behind it: then nothing goes on from one.
        front, bare, whole = (
            tokenizer.encode(text, add_special_tokens=add).tolist()
            for text, add in (("", True), ("a", False), ("a", True))
        )
        self._num_front = len(front) if whole == front + bare else None

    def ends_of_prompt(self, token_ids: Ints, text: bytes, *, has_front: bool) -> Ints | None:
        """The ends of a whole prompt's tokens; None unless they read as `text`. `has_front`: it was tokenised
        with what goes in front of a prompt, whose ends are 0.
        """
        num_front = self._num_front if has_front else 0
        if num_front is None:
            return None
        ends = self._ends(token_ids[num_front:], text, begins=True)
        return None if ends is None else np.concatenate((np.zeros(num_front, np.int32), ends))

    def encode_rest(self, text: bytes) -> Tokens | None:
        """Tokens of a text that goes on where another ends, as if it stood alone; None if none are found that
        read as it. `text` is whole UTF-8.
        """
        rest = text.decode()
        token_ids = self._tokenizer.encode(rest, add_special_tokens=False)
        ends = self._ends(token_ids, text, begins=False)
        if ends is not None:
            return Tokens(token_ids, ends)
        for anchor in _ANCHORS:
            token_ids = self._tokenizer.encode(anchor + rest, add_special_tokens=False)
            ends = self._ends(token_ids, anchor.encode() + text, begins=True)
            if ends is None:
                return None
            num_anchor = int(np.searchsorted(ends, 1, side="right"))
            if num_anchor and ends[num_anchor - 1] == 1:
                return Tokens(token_ids[num_anchor:], ends[num_anchor:] - np.int32(1))
        return None

    def added_across(self, text: bytes, cut: int) -> int | None:
        """Where an added token begins that `text` spells out across `cut`; None if there is none."""
        first, end = max(0, cut - self._longest + 1), cut + self._longest - 1
        # mostly there is none near: one look says so
        if self._pattern is not None and self._pattern.search(text, first, end) is not None:
            for start in range(first, cut):
                match = self._pattern.match(text, start)
                if match is not None and match.end() > cut:
                    return start
        return None

    def num_reading_as(self, token_ids: Ints, before: bytes, text: bytes) -> tuple[int, Ints]:
        """How many of `token_ids`, taken from the first, read as what `text` says after `before`; and where
        in `text` alone these end. Stops before a token without a text of its own.
        """
        pieces, lengths = self._spell(token_ids)
        ends = lengths.cumsum(dtype=np.int32)
        agreed = agreement(b"".join(pieces), text)
        if not agreed:
            return 0, ends[:0]
        num_tokens = int(ends.searchsorted(agreed, side="right"))
        without_text = np.flatnonzero(lengths[:num_tokens] == 0)
        num_tokens = int(without_text[0]) if len(without_text) else num_tokens
        if self._pattern is not None and num_tokens:
            whole = before[-self._longest :] + text
            shift = len(whole) - len(text)
            if self.added_across(whole, shift) is not None:
                return 0, ends[:0]
            for match in self._pattern.finditer(whole, shift):
                start, end = match.start() - shift, match.end() - shift
                if end > agreed:
                    # It may be whole only with what the text goes on with: `added_across` is asked there.
                    break
                i = int(np.searchsorted(ends, start, side="right"))
                if i >= num_tokens or ends[i] != end or int(token_ids[i]) not in self._added:
                    num_tokens = min(num_tokens, i)
                    break
        return num_tokens, ends[:num_tokens]

    def _spell(self, token_ids: Ints) -> tuple[list[bytes], Ints]:
        """The bytes of each token, for an added one its spelling, for an unknown id none; and how many."""
        lengths = self._lengths.take(token_ids, mode="clip")
        if len(lengths) and int(lengths.min()) < 0:
            for token_id in set(token_ids[lengths < 0].tolist()):
                piece = self._added.get(token_id) or self._tokenizer.token_bytes(token_id)
                self._pieces[token_id] = piece
                self._lengths[token_id] = len(piece)  # last: it says that the piece is there
            lengths = self._lengths.take(token_ids, mode="clip")
        pieces: list[bytes] = self._pieces.take(token_ids, mode="clip").tolist()
        return pieces, lengths

    def _ends(self, token_ids: Ints, text: bytes, *, begins: bool) -> Ints | None:
        """`begins`: a blank that the text does not have may come before its first word."""
        pieces, lengths = self._spell(token_ids)
        if b"".join(pieces) == text:
            return lengths.cumsum(dtype=np.int32)
        added = [i for i, token_id in enumerate(token_ids.tolist()) if token_id in self._added]
        position = first = 0
        for i in (*added, len(token_ids)):
            run = b"".join(pieces[first:i])
            if not text.startswith(run, position):
                may_lead = begins or first > 0
                if not (may_lead and pieces[first].startswith(b" ") and text.startswith(run[1:], position)):
                    return None
                lengths[first] -= 1
                run = run[1:]
            position += len(run)
            if i < len(token_ids):
                if not text.startswith(pieces[i], position):
                    return None
                position += len(pieces[i])
            first = i + 1
        return lengths.cumsum(dtype=np.int32) if position == len(text) else None


def agreement(a: bytes, b: bytes) -> int:
    """The number of leading bytes in which `a` and `b` agree."""
    length = min(len(a), len(b))
    # Texts that are nothing to each other mostly part within these: a tenth of the time of the arrays below.
    head = min(length, 16)
    if differing := int.from_bytes(a[:head], "little") ^ int.from_bytes(b[:head], "little"):
        return ((differing & -differing).bit_length() - 1) // 8
    if a.startswith(b) or b.startswith(a):
        return length
    differ = np.frombuffer(a, np.uint8, length) != np.frombuffer(b, np.uint8, length)
    return int(differ.argmax())
