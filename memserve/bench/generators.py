"""Workloads that need no file: made-up prompts with stated distributions of turns, lengths and sharing.

LN(m, s) is a log-normal with median m, whose logarithm has the standard deviation s, rounded and clipped to
the range given. Lengths are tokens. Tokens are random (`tokens.py`): only lengths and sharing mean anything.

sharegpt-like   chat. Turns: 1 with probability 0.27, else 2 + a geometric number, 5.75 on average, at most
                40; message LN(78, 1.2) in 4…2,048, mean about 160; answer LN(225, 0.9) in 4…2,048, mean about
                330. Nothing shared between sessions. The means of turns and lengths are what is commonly
                cited for ShareGPT; the shapes are a choice.
loogle-like     questions about long documents. One turn; document LN(18,000, 0.31) in 4,000…40,000; question
                LN(24, 0.34) in 8…128; answer LN(13, 1.1) in 1…256; 12 sessions a document. Fitted to LooGLE's
                short- and long-dependency questions in GPT-NeoX tokens (60 questions on 5 documents).
react-like      an agent with tools. All sessions share an instruction with examples of 1,619 tokens; 2 to 6
                turns (4, 57, 14, 10, 4 of 89 sessions); question LN(27, 0.23) in 8…64; observation
                LN(136, 0.89) in 8…1,100; thought and action LN(38, 0.27) in 10…128. Fitted to ReAct's runs on
                HotpotQA in GPT-NeoX tokens (89 trajectories).
prefix-repetition, random
                as in `vllm bench serve`, defaults included: see `Synthetic`.

A sharing ratio (`sessions_per_prefix`) replaces the number of sessions a document, instruction or prefix.
Pure: equal arguments give equal sessions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from memserve.bench.shaping import Draft, DraftSession
from memserve.bench.tokens import Tokens, Vocabulary
from memserve.bench.workload import Piece, Turn
from memserve.errors import ConfigError

LOOGLE_SESSIONS_PER_DOCUMENT = 12
REACT_PREFIX_TOKENS = 1619
_REACT_TURNS = {2: 4, 3: 57, 4: 14, 5: 10, 6: 4}


@dataclass(frozen=True, slots=True)
class Synthetic:
    """Lengths of `random` and `prefix-repetition`, in tokens; None: the default of `vllm bench serve`.

    Args:
        input_tokens: after the prefix; 1,024 (random), 256 (prefix-repetition).
        output_tokens: 128.
        prefix_tokens: 0 (random: one prefix for all), 256 (prefix-repetition).
        num_prefixes: of prefix-repetition, 10; each is used by as many requests, give or take one.
        range_ratio: of random: lengths are uniform in (1 ± range_ratio) times the length, from 0 below 1.
    """

    input_tokens: int | None = None
    output_tokens: int | None = None
    prefix_tokens: int | None = None
    num_prefixes: int | None = None
    range_ratio: float = 0.0

    def __post_init__(self) -> None:
        """Raises ConfigError."""
        for name, least in (("input_tokens", 1), ("output_tokens", 1), ("prefix_tokens", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"{name} must be at least {least}, not {value}")
        if self.num_prefixes is not None and self.num_prefixes < 1:
            raise ConfigError(f"num_prefixes must be at least 1, not {self.num_prefixes}")
        if not 0 <= self.range_ratio < 1:
            raise ConfigError(f"range_ratio must be at least 0 and below 1, not {self.range_ratio}")


class _Maker:
    """Draws lengths, and hands out pieces that share nothing with any other."""

    def __init__(self, vocabulary: Vocabulary, seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        self._vocabulary = vocabulary
        self._next_key = 0

    def piece(self, num_tokens: int) -> Tokens:
        self._next_key += 1
        return Tokens(self._vocabulary, [self._next_key], [num_tokens])

    def log_normal(self, median: float, sigma: float, low: int, high: int) -> int:
        return int(np.clip(round(median * np.exp(sigma * self._rng.standard_normal())), low, high))

    def uniform(self, length: int, ratio: float) -> int:
        low, high = max(1, int(np.ceil(length * (1 - ratio)))), max(1, int(length * (1 + ratio)))
        return int(self._rng.integers(low, high, endpoint=True))

    def chat_turns(self) -> int:
        if self._rng.random() < 0.27:
            return 1
        return min(40, 1 + int(self._rng.geometric(1 / 6.5)))

    def react_turns(self) -> int:
        counts = np.array(list(_REACT_TURNS.values()))
        return int(self._rng.choice(list(_REACT_TURNS), p=counts / counts.sum()))

    def turn(self, num_input: int, num_output: int) -> Turn:
        return Turn(self.piece(num_input), self.piece(num_output), num_output)


def sharegpt_like(vocabulary: Vocabulary, num_sessions: int, seed: int) -> Draft:
    """Chat of several turns."""
    make = _Maker(vocabulary, seed)
    sessions = []
    for number in range(num_sessions):
        turns = [
            make.turn(make.log_normal(78, 1.2, 4, 2048), make.log_normal(225, 0.9, 4, 2048))
            for _ in range(make.chat_turns())
        ]
        sessions.append(DraftSession(f"chat-{number}", tuple(turns)))
    return Draft(tuple(sessions))


def loogle_like(
    vocabulary: Vocabulary, num_sessions: int, seed: int, sessions_per_prefix: int | None
) -> Draft:
    """Questions about long documents."""
    make = _Maker(vocabulary, seed)
    per_document = sessions_per_prefix or LOOGLE_SESSIONS_PER_DOCUMENT
    prefixes: dict[str, Piece] = {}
    sessions = []
    for number in range(num_sessions):
        name = f"document-{number // per_document}"
        if name not in prefixes:
            prefixes[name] = make.piece(make.log_normal(18_000, 0.31, 4_000, 40_000))
        turn = make.turn(make.log_normal(24, 0.34, 8, 128), make.log_normal(13, 1.1, 1, 256))
        sessions.append(DraftSession(f"question-{number}", (turn,), name))
    return Draft(tuple(sessions), prefixes)


def react_like(
    vocabulary: Vocabulary, num_sessions: int, seed: int, sessions_per_prefix: int | None
) -> Draft:
    """An agent with tools, under one instruction (or several, by the sharing ratio)."""
    make = _Maker(vocabulary, seed)
    per_prefix = sessions_per_prefix or num_sessions
    prefixes: dict[str, Piece] = {}
    sessions = []
    for number in range(num_sessions):
        name = f"instruction-{number // per_prefix}"
        if name not in prefixes:
            prefixes[name] = make.piece(REACT_PREFIX_TOKENS)
        turns = [
            make.turn(
                make.log_normal(136, 0.89, 8, 1100) if later else make.log_normal(27, 0.23, 8, 64),
                make.log_normal(38, 0.27, 10, 128),
            )
            for later in range(make.react_turns())
        ]
        sessions.append(DraftSession(f"agent-{number}", tuple(turns), name))
    return Draft(tuple(sessions), prefixes)


def prefix_repetition(
    vocabulary: Vocabulary, num_sessions: int, seed: int, lengths: Synthetic, sessions_per_prefix: int | None
) -> Draft:
    """Requests of one turn, each a prefix out of a few and a suffix of its own."""
    if lengths.range_ratio:
        raise ConfigError("range_ratio is an option of random alone")
    if lengths.num_prefixes is not None and sessions_per_prefix is not None:
        raise ConfigError("num_prefixes and sessions_per_prefix say the same thing: give one of them")
    make = _Maker(vocabulary, seed)
    num_prefixes = lengths.num_prefixes or 10
    if sessions_per_prefix is not None:
        num_prefixes = -(-num_sessions // sessions_per_prefix)
    prefix_tokens = 256 if lengths.prefix_tokens is None else lengths.prefix_tokens
    prefixes: dict[str, Piece] = {}
    if prefix_tokens:
        prefixes = {f"prefix-{number}": make.piece(prefix_tokens) for number in range(num_prefixes)}
    sessions = [
        DraftSession(
            f"request-{number}",
            (make.turn(lengths.input_tokens or 256, lengths.output_tokens or 128),),
            f"prefix-{number % num_prefixes}" if prefixes else None,
        )
        for number in range(num_sessions)
    ]
    return Draft(tuple(sessions), prefixes)


def random_tokens(vocabulary: Vocabulary, num_sessions: int, seed: int, lengths: Synthetic) -> Draft:
    """Requests of one turn that share at most one prefix."""
    if lengths.num_prefixes is not None:
        raise ConfigError("num_prefixes is an option of prefix-repetition alone")
    make = _Maker(vocabulary, seed)
    prefixes: dict[str, Piece] = {}
    if lengths.prefix_tokens:
        prefixes["prefix"] = make.piece(lengths.prefix_tokens)
    sessions = [
        DraftSession(
            f"request-{number}",
            (
                make.turn(
                    make.uniform(lengths.input_tokens or 1024, lengths.range_ratio),
                    make.uniform(lengths.output_tokens or 128, lengths.range_ratio),
                ),
            ),
            "prefix" if prefixes else None,
        )
        for number in range(num_sessions)
    ]
    return Draft(tuple(sessions), prefixes)
