"""Chat history keeps its tokens: what was generated is read again as the ids that were generated.

The next turn of a conversation sends an answer back as text. Tokenised, that text rarely gives the ids that
were drawn, and the KV that is kept for them goes unused from the first difference on. So the ids of prompts
and answers are remembered with their text, and a prompt that begins like one of them begins with its ids:

    remembered   <user> hi <assistant> │ Hel lo there │            drawn: between the bars
    prompt       <user> hi <assistant>   Hello there    <user> …
    read as      <user> hi <assistant>   Hel lo there │ <user> …   the rest tokenised alone

The rule: ids read as the prompt's text exactly (`token_text.py`), whatever they are, or they are not used.
The cut always lies behind a token that was drawn, so text that no model wrote is tokenised as ever. Who
generates with one salt can influence how another's text with the same salt is cut into tokens, never what it
says; salts share nothing.

The texts of a scope stand in one sorted list. Those that share most with a prompt are next to its own place
there: a look-up is a binary search and a comparison or two, whatever is remembered. A sequence that another
goes on from is forgotten for it, so that a conversation is one sequence, however many turns it has; beyond
`max_bytes` the one goes that was not used for the longest time.

Pure but for that state, which a lock guards: prompts are read in threads.
"""

from __future__ import annotations

import threading
from bisect import bisect_left, bisect_right, insort
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import msgspec
import numpy as np

from memserve.router.text.token_text import Ints, TokenText, agreement
from memserve.router.text.tokenizer import Tokenizer

# Of a sequence, beside its text and numbers: objects, places in the list and in the order.
_OVERHEAD_BYTES = 1024
# Sequences that are looked at for one prompt; more than two only where answers begin like one another.
_MAX_STEPS = 4


class Scope(NamedTuple):
    """Who may share: one `cache_salt`, and one way of tokenising (whether bos and so on come in front)."""

    cache_salt: str
    add_special_tokens: bool


@dataclass(slots=True)
class _Sequence:
    """`token_ids` read as `text`; those of the ranges `drawn` (from, to; ascending) were generated.

    `ends` may be those of the last tokens alone, of an answer to a prompt that nothing was reused for: the
    prompt is spelled when somebody comes back (`TokenHistory._is_spelled`), which few do. Until then the
    first of the drawn tokens begins where the first of `ends` is counted from, at byte `num_prompt_bytes`.
    """

    text: bytes
    token_ids: Ints
    ends: Ints
    drawn: tuple[tuple[int, int], ...]
    num_prompt_bytes: int = 0

    @property
    def num_bytes(self) -> int:
        numbers = 2 * self.token_ids.nbytes
        return len(self.text) + numbers + 128 * len(self.drawn) + _OVERHEAD_BYTES


class Reading(msgspec.Struct, frozen=True):
    """A prompt's ids. The first `num_reused` of them are remembered ones.

    `diverged_at`: the prompt agrees in so many tokens with what is remembered, which then goes on otherwise;
    None where it goes on from it, ends within it, or has nothing in common with it. `data` is the prompt;
    `known` the same as what was remembered of it and what follows.
    """

    token_ids: Ints
    scope: Scope
    data: bytes
    num_reused: int = 0
    diverged_at: int | None = None
    known: _Sequence | None = None


class TokenHistory:
    """The sequences of one tokenizer. `read` a prompt, `remember` it with its answer."""

    def __init__(self, tokenizer: Tokenizer, max_bytes: int = 64 << 20) -> None:
        self._tokenizer = tokenizer
        self._texts = TokenText(tokenizer)
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._sorted: dict[Scope, list[bytes]] = {}
        self._sequences: OrderedDict[tuple[Scope, bytes], _Sequence] = OrderedDict()
        self.num_bytes = 0

    def read(self, text: str, scope: Scope, *, may_reuse: bool = True) -> Reading:
        """`text` as token ids; without `may_reuse` as the tokenizer alone would have it."""
        data = text.encode()
        nearest, num_reused = self._nearest(scope, data)
        known = None
        if nearest is not None and may_reuse:
            known = self._continued(nearest, num_reused, data)
        if known is not None:
            token_ids = known.token_ids
        else:
            num_reused = 0
            token_ids = self._tokenizer.encode(text, add_special_tokens=scope.add_special_tokens)
        diverged_at = None if nearest is None else _divergence(token_ids, nearest.token_ids)
        return Reading(token_ids, scope, data, num_reused, diverged_at, known)

    def remember(self, prompt: Reading, token_ids: Sequence[int], text: str) -> None:
        """An answer to `prompt` has ended: `token_ids` were drawn, `text` was delivered. Of the ids those are
        kept that read as the text: no stop token, no half character, nothing that a stop string took away.
        """
        before, data = prompt.data, text.encode()
        drawn = np.asarray(token_ids, dtype=np.int32)
        num_kept, ends = self._texts.num_reading_as(drawn, before, data)
        if not num_kept:
            return
        first = len(prompt.token_ids)
        whole = before + data[: int(ends[-1])]
        all_ids = np.concatenate((prompt.token_ids, drawn[:num_kept]))
        ends = ends + np.int32(len(before))
        span, known = (first, first + num_kept), prompt.known
        if known is None:
            sequence = _Sequence(whole, all_ids, ends, (span,), len(before))
        else:
            sequence = _Sequence(whole, all_ids, np.concatenate((known.ends, ends)), (*known.drawn, span))
        self._add(prompt.scope, sequence)

    def clear(self) -> None:
        """Forget all."""
        with self._lock:
            self._sorted.clear()
            self._sequences.clear()
            self.num_bytes = 0

    def __len__(self) -> int:
        """How many sequences are remembered."""
        return len(self._sequences)

    def _is_spelled(self, scope: Scope, sequence: _Sequence) -> bool:
        """Whether the ends of all its tokens are known, from now on. Not where the prompt's ids do not read
        as its text: then it is forgotten.
        """
        known = sequence.ends  # looked at once: other threads may be spelling it too
        num_lacking = len(sequence.token_ids) - len(known)
        if num_lacking:
            prompt = sequence.text[: sequence.num_prompt_bytes]
            ends = self._texts.ends_of_prompt(
                sequence.token_ids[:num_lacking], prompt, has_front=scope.add_special_tokens
            )
            if ends is None:
                with self._lock:
                    if self._sequences.get((scope, sequence.text)) is sequence:
                        self._forget(scope, sequence.text)
                return False
            sequence.ends = np.concatenate((ends, known))
        return True

    # --- reading -------------------------------------------------------------------------------------------

    def _nearest(self, scope: Scope, data: bytes) -> tuple[_Sequence | None, int]:
        """The sequence that `data` shares most with, and how many of its tokens may be reused; it counts as
        used. Of several that reach equally far it is one that `data` goes on from.
        """
        best: tuple[int, bool, int] | None = None
        nearest, num_reusable = None, 0
        for sequence, num_agreed in self._neighbours(scope, data):
            num_tokens = self._num_reusable(scope, sequence, num_agreed, data)
            cut = int(sequence.ends[num_tokens - 1]) if num_tokens else 0
            rank = (cut, num_agreed == len(sequence.text), num_agreed)
            if best is None or rank > best:
                best, nearest, num_reusable = rank, sequence, num_tokens
        if nearest is not None:
            with self._lock:
                if (scope, nearest.text) in self._sequences:
                    self._sequences.move_to_end((scope, nearest.text))
        return nearest, num_reusable

    def _neighbours(self, scope: Scope, data: bytes) -> list[tuple[_Sequence, int]]:
        """Sequences that begin like `data`, with the number of bytes in which they agree: the ones beside its
        place, and back from there to the longest that `data` goes on from, or as far as it is worth it.
        """
        found: list[tuple[_Sequence, int]] = []
        with self._lock:
            texts = self._sorted.get(scope, [])
            place = bisect_right(texts, data)
            if place < len(texts) and (num_agreed := agreement(texts[place], data)):
                found.append((self._sequences[scope, texts[place]], num_agreed))
            for _ in range(_MAX_STEPS):
                if not place or not (num_agreed := agreement(texts[place - 1], data)):
                    break
                found.append((self._sequences[scope, texts[place - 1]], num_agreed))
                if num_agreed == len(texts[place - 1]):
                    break
                place = bisect_right(texts, data[:num_agreed], hi=place - 1)
        return found

    def _num_reusable(self, scope: Scope, sequence: _Sequence, num_agreed: int, data: bytes) -> int:
        """How many of its tokens `data` may begin with: up to a drawn one, and no character or added token of
        `data` lies across the end.
        """
        if num_agreed <= sequence.num_prompt_bytes or not self._is_spelled(scope, sequence):
            return 0  # it agrees in no drawn token
        ends = sequence.ends
        limit = num_agreed
        for first, last in reversed(sequence.drawn):
            if ends[first] > limit:
                continue  # it agrees in none of these
            num_tokens = min(last, int(np.searchsorted(ends, limit, side="right")))
            while num_tokens > first:
                cut = int(ends[num_tokens - 1])
                inside = _inside_character(data, cut)
                across = None if inside else self._texts.added_across(data, cut)
                if not inside and across is None:
                    return num_tokens
                limit = cut - 1 if across is None else across
                num_tokens = int(np.searchsorted(ends, limit, side="right"))
        return 0

    def _continued(self, sequence: _Sequence, num_tokens: int, data: bytes) -> _Sequence | None:
        """`data` as its first `num_tokens` tokens and the rest; None if either is missing."""
        if not num_tokens:
            return None
        token_ids, ends = sequence.token_ids, sequence.ends
        cut = int(ends[num_tokens - 1])
        rest = self._texts.encode_rest(data[cut:])
        if rest is None:
            return None
        drawn = tuple((first, min(last, num_tokens)) for first, last in sequence.drawn if first < num_tokens)
        return _Sequence(
            data,
            np.concatenate((token_ids[:num_tokens], rest.token_ids)),
            np.concatenate((ends[:num_tokens], rest.ends + np.int32(cut))),
            drawn,
        )

    # --- the store -----------------------------------------------------------------------------------------

    def _add(self, scope: Scope, sequence: _Sequence) -> None:
        if sequence.num_bytes + len(scope.cache_salt) > self._max_bytes:
            return
        with self._lock:
            if (scope, sequence.text) in self._sequences:
                self._forget(scope, sequence.text)
            texts = self._sorted.setdefault(scope, [])
            insort(texts, sequence.text)
            place = bisect_left(texts, sequence.text)
            before = self._sequences[scope, texts[place - 1]] if place else None
            self._sequences[scope, sequence.text] = sequence
            self.num_bytes += sequence.num_bytes + len(scope.cache_salt)
            if before is not None and _goes_on_from(sequence, before):
                self._forget(scope, before.text)
            while self.num_bytes > self._max_bytes:
                self._forget(*next(iter(self._sequences)))

    def _forget(self, scope: Scope, text: bytes) -> None:
        sequence = self._sequences.pop((scope, text))
        self.num_bytes -= sequence.num_bytes + len(scope.cache_salt)
        texts = self._sorted[scope]
        del texts[bisect_left(texts, text)]
        if not texts:
            del self._sorted[scope]


def _goes_on_from(sequence: _Sequence, before: _Sequence) -> bool:
    """Whether `before` says nothing that `sequence` does not say too."""
    num_tokens = len(before.token_ids)
    return (
        sequence.text.startswith(before.text)
        and sequence.drawn[: len(before.drawn)] == before.drawn
        and np.array_equal(sequence.token_ids[:num_tokens], before.token_ids)
    )


def _divergence(token_ids: Ints, remembered: Ints) -> int | None:
    length = min(len(token_ids), len(remembered))
    differ = token_ids[:length] != remembered[:length]
    first = int(differ.argmax()) if length else 0
    return first if first and differ[first] else None


def _inside_character(data: bytes, cut: int) -> bool:
    """Whether `cut` lies between two bytes of one character."""
    return cut < len(data) and data[cut] & 0xC0 == 0x80
