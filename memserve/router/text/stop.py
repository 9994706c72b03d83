"""Stop strings in a stream: found across deltas, cut out, and never shown in part.

Each stop string has a Knuth-Morris-Pratt automaton whose state is the length of its longest prefix that the
text ends in. The largest state is what has to be held back; a full one is a match. Going character by
character makes the result independent of how the text was cut into deltas: the match that *ends* first wins,
of those that end together the longest.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class StopResult(NamedTuple):
    """`text` may be shown. `matched`: a stop string follows it, and nothing after that is to be shown."""

    text: str
    matched: bool


class _Automaton:
    """Progress of one stop string through the text."""

    def __init__(self, pattern: str) -> None:
        self._pattern = pattern
        self._fallback = _prefix_function(pattern)
        self.state = 0

    def step(self, char: str) -> bool:
        """Advances by one character; True when the pattern is complete."""
        state = self.state
        while state and self._pattern[state] != char:
            state = self._fallback[state - 1]
        self.state = state + 1 if self._pattern[state] == char else 0
        return self.state == len(self._pattern)


def _prefix_function(pattern: str) -> list[int]:
    """For each prefix of `pattern`, the length of its longest proper prefix that is also its suffix."""
    lengths = [0] * len(pattern)
    for i in range(1, len(pattern)):
        length = lengths[i - 1]
        while length and pattern[length] != pattern[i]:
            length = lengths[length - 1]
        lengths[i] = length + (pattern[length] == pattern[i])
    return lengths


class StopMatcher:
    """Looks for any of `stops` (none empty) in a text that comes in pieces. Not to be pushed to after a
    match.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._automata = [_Automaton(stop) for stop in stops]
        self._held = ""

    def push(self, text: str) -> StopResult:
        """Takes the next piece."""
        if not self._automata:
            return StopResult(text, False)
        buffer = self._held + text
        for i, char in enumerate(text, start=len(self._held) + 1):
            complete = [automaton.state for automaton in self._automata if automaton.step(char)]
            if complete:
                self._held = ""
                return StopResult(buffer[: i - max(complete)], True)
        shown = len(buffer) - max(automaton.state for automaton in self._automata)
        self._held = buffer[shown:]
        return StopResult(buffer[:shown], False)

    def flush(self) -> str:
        """The text ended: what was held back was no stop string."""
        held, self._held = self._held, ""
        return held
