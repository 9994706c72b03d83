"""Prefixes on their way into the index (DESIGN "Moving KV"): their blocks are being pulled, and a second
request for the same waits for them rather than pull or compute them too.

    expect ──► pending ──► over       by `end`, however the pull ended

An entry promises nothing and holds nothing. Whoever waits for one looks into the index once it is over, and
takes over what is lacking there; how long it waits is its own affair. What was brought is published before
the loop comes to those who wait. Pure.
"""

from __future__ import annotations

from collections.abc import Callable

from memserve.radix_tree import common_tokens


class Pending:
    """Whole blocks of `tokens`, under `salt`, that are expected. Ended by whoever expected them, always."""

    __slots__ = ("_book", "is_awaited", "salt", "tokens")

    def __init__(self, book: PendingBook, salt: str, tokens: bytes) -> None:
        self._book: PendingBook | None = book
        self.salt = salt
        self.tokens = tokens
        self.is_awaited = False

    @property
    def is_over(self) -> bool:
        """Nothing comes any more."""
        return self._book is None

    def num_common(self, tokens: bytes) -> int:
        """How many of `tokens`, from the first on, are expected."""
        return common_tokens(self.tokens, tokens)

    def end(self) -> None:
        """The pull has ended, or will not count. Again is nothing."""
        book, self._book = self._book, None
        if book is not None:
            book.remove(self)


class PendingBook:
    """All that is expected at one pool, in the order in which it began. `wake` is called when something ends
    that somebody has found.
    """

    def __init__(self, wake: Callable[[], None]) -> None:
        self._wake = wake
        self._entries: list[Pending] = []

    def __len__(self) -> int:
        return len(self._entries)

    def expect(self, tokens: bytes, salt: str) -> Pending:
        """An entry, the caller's, who ends it."""
        entry = Pending(self, salt, tokens)
        self._entries.append(entry)
        return entry

    def best(self, tokens: bytes, salt: str) -> Pending | None:
        """The entry with most of `tokens`, the earliest of such; None if none has any."""
        best, most = None, 0
        for entry in self._entries:
            if entry.salt == salt and (num_common := entry.num_common(tokens)) > most:
                best, most = entry, num_common
        if best is not None:
            best.is_awaited = True
        return best

    def remove(self, entry: Pending) -> None:
        """For `Pending.end`."""
        self._entries.remove(entry)
        if entry.is_awaited:
            self._wake()
