"""Made-up prompts: sequences of token ids, or of words, that are computed when asked for and never stored.

A `Vocabulary` holds, for each key (an int), an endless stream of tokens; a `Tokens` piece is the beginnings
of some streams, one after another:

    keys     [ 7        | 12   | 4              ]        equal keys give equal tokens, so two pieces share
    lengths  [ 512      | 16   | 300            ]        exactly the runs at which they agree

Token i of stream k is a counter-based hash of (seed, k, i), as in SplitMix64: no generator state, any order,
the same on every machine. The first four tokens of a stream spell its key in base `size`, lowest digit first,
so that two keys below size**4 never agree in all of the first four tokens, and neighbours differ in the
first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

KEY_DIGITS: Final = 4
MIN_SIZE: Final = 16

_MASK = (1 << 64) - 1
_STEP_OF_KEY = 0x9E3779B97F4A7C15
_STEP_OF_POSITION = 0xD1B54A32D192ED03


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What the streams are drawn from, uniformly.

    Args:
        seed: another seed gives other streams altogether.
        size: how many different tokens, at least 16.
        first_id: the ids are first_id … first_id + size - 1; of no meaning where there are words.
        words: pieces expand to text, one of these words (leading space included) a token, instead of to ids;
            exactly `size` of them.
    """

    seed: int
    size: int
    first_id: int = 0
    words: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        assert self.size >= MIN_SIZE and self.first_id >= 0
        assert self.words is None or len(self.words) == self.size

    def draw(self, keys: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
        """The beginnings of the streams `keys`, `lengths` tokens each, as numbers below `size`."""
        total = int(lengths.sum())
        ends = np.cumsum(lengths)
        position = np.arange(total, dtype=np.int64) - np.repeat(ends - lengths, lengths)
        of_key = mix_bits(keys.astype(np.uint64) * np.uint64(_STEP_OF_KEY) + np.uint64(self._seed_bits(0)))
        draws = mix_bits(
            np.repeat(of_key, lengths) + position.astype(np.uint64) * np.uint64(_STEP_OF_POSITION)
        )
        # The high half, scaled: a modulo of 64-bit numbers costs more, and is no more uniform.
        numbers = (((draws >> np.uint64(32)) * np.uint64(self.size)) >> np.uint64(32)).astype(np.int64)
        rest = keys
        for digit in range(KEY_DIGITS):
            spelled = (rest % self.size + self._seed_bits(digit + 1) % self.size) % self.size
            long_enough = lengths > digit
            numbers[(ends - lengths + digit)[long_enough]] = spelled[long_enough]
            rest = rest // self.size
        return numbers

    def _seed_bits(self, stream: int) -> int:
        return _mix_int((self.seed * _STEP_OF_POSITION + stream * _STEP_OF_KEY) & _MASK)


class Tokens:
    """A lazy piece (`workload.LazyPiece`): runs of streams. Immutable; 16 bytes a run, whatever the lengths.

    Args:
        vocabulary: shared by all pieces of a workload.
        keys: which streams, each from 0 to 2**63 - 1.
        lengths: how many tokens of each, at least 1.
    """

    __slots__ = ("_keys", "_lengths", "_num_tokens", "_vocabulary")

    def __init__(
        self,
        vocabulary: Vocabulary,
        keys: NDArray[np.int64] | list[int],
        lengths: NDArray[np.int64] | list[int],
    ) -> None:
        self._vocabulary = vocabulary
        self._keys = np.asarray(keys, np.int64)
        self._lengths = np.asarray(lengths, np.int64)
        assert self._keys.shape == self._lengths.shape and bool((self._lengths > 0).all())
        self._num_tokens = int(self._lengths.sum())

    def __len__(self) -> int:
        return self._num_tokens

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Tokens)
            and self._vocabulary == other._vocabulary
            and np.array_equal(self._keys, other._keys)
            and np.array_equal(self._lengths, other._lengths)
        )

    def __hash__(self) -> int:
        return hash((self._keys.tobytes(), self._lengths.tobytes()))

    def __repr__(self) -> str:
        return f"Tokens({len(self._keys)} runs, {self._num_tokens} tokens)"

    def expand(self) -> str | list[int]:
        """The token ids, or the text where the vocabulary has words; the caller owns them."""
        numbers = self.numbers()
        words = self._vocabulary.words
        if words is not None:
            return "".join([words[number] for number in numbers.tolist()])
        ids: list[int] = (numbers + self._vocabulary.first_id).tolist()
        return ids

    def numbers(self) -> NDArray[np.int64]:
        """One number a token, id or word: the same number is the same token. The caller owns the array."""
        return self._vocabulary.draw(self._keys, self._lengths)

    def cut(self, num_tokens: int) -> Tokens:
        """The first `num_tokens` tokens (all, if there are no more)."""
        if num_tokens >= self._num_tokens:
            return self
        ends = np.cumsum(self._lengths)
        num_runs = int(np.searchsorted(ends, num_tokens)) + 1 if num_tokens > 0 else 0
        lengths = self._lengths[:num_runs].copy()
        if num_runs:
            lengths[-1] -= int(ends[num_runs - 1]) - num_tokens
        return Tokens(self._vocabulary, self._keys[:num_runs], lengths)

    @classmethod
    def concat(cls, pieces: Sequence[Tokens]) -> Tokens:
        """One piece of several, at least one, of one vocabulary."""
        vocabulary = pieces[0]._vocabulary
        assert all(piece._vocabulary == vocabulary for piece in pieces)
        keys = np.concatenate([piece._keys for piece in pieces])
        return cls(vocabulary, keys, np.concatenate([piece._lengths for piece in pieces]))

    def scale(self, factor: float) -> Tokens:
        """Every run `factor` times as long, rounded, at least one token: equal runs stay equal."""
        lengths = np.maximum(1, np.rint(self._lengths * factor)).astype(np.int64)
        return Tokens(self._vocabulary, self._keys, lengths)


def mix_bits(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's finaliser (Steele, Lea, Flood 2014): a bijection of 64 bits without visible structure."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _mix_int(x: int) -> int:
    """The same for one number."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & _MASK
    return x ^ (x >> 31)
