"""Prefixes on their way into the index (DESIGN "Moving KV"): their blocks are being pulled, and a second
request for the same waits for them rather than pull or compute them too.

    expect ──► expected ──► begun ──► over       by `begin`; by `end`, however the pull ended

Only what has begun is worth waiting for: a pull that is merely meant may stand behind another's long queue.
An entry promises nothing and holds nothing. Whoever waits for one looks into the index once it is over, and
takes over what is lacking there; how long it waits is its own affair.

What was brought is published before those who wait look: a transfer publishes before it ends its entry
(incoming.py); the worker publishes what its `Pulls` brought as soon as `Pulls.poll` has ended the entry,
before the same turn of its loop polls other transfers or schedules requests. Pure.
"""

from __future__ import annotations

from collections.abc import Callable

from memserve.radix_tree import TOKEN_BYTES, common_tokens


class Pending:
    """Whole blocks of `tokens`, under `salt`, that are expected. Ended by whoever expected them, always."""

    __slots__ = ("_book", "has_begun", "is_awaited", "salt", "tokens")

    def __init__(self, book: PendingBook, salt: str, tokens: bytes) -> None:
        self._book: PendingBook | None = book
        self.salt = salt
        self.tokens = tokens
        self.has_begun = False
        self.is_awaited = False

    @property
    def is_over(self) -> bool:
        """Nothing comes any more."""
        return self._book is None

    def num_common(self, tokens: bytes) -> int:
        """How many of `tokens`, from the first on, are expected."""
        return common_tokens(self.tokens, tokens)

    def begin(self) -> None:
        """Some of it is on its way from now on. Again is nothing."""
        self.has_begun = True

    def end(self) -> None:
        """The pull has ended, or will not count. Again is nothing."""
        book, self._book = self._book, None
        if book is not None:
            book.remove(self)


class PendingBook:
    """All that is expected at one pool, in the order of `expect`. `wake` is called when something ends
    that somebody has found.
    """

    def __init__(self, wake: Callable[[], None]) -> None:
        self._wake = wake
        self._entries: list[Pending] = []

    def __len__(self) -> int:
        return len(self._entries)

    def expect(self, tokens: bytes, salt: str) -> Pending:
        """An entry, the caller's, who begins and ends it."""
        entry = Pending(self, salt, tokens)
        self._entries.append(entry)
        return entry

    def best(self, tokens: bytes, salt: str, *, only_begun: bool = True) -> Pending | None:
        """The entry with most of `tokens`, the earliest of such; None if none has any."""
        best, size = None, 0
        token = tokens[:TOKEN_BYTES]  # the next, which one that has more than the best must have too
        for entry in self._entries:
            if size >= len(tokens):
                break
            if entry.salt != salt or (only_begun and not entry.has_begun):
                continue
            # Most differ in that token: full comparisons of hundreds would take milliseconds.
            if entry.tokens.startswith(token, size) and entry.tokens.startswith(tokens[:size]):
                best, size = entry, entry.num_common(tokens) * TOKEN_BYTES
                token = tokens[size : size + TOKEN_BYTES]
        if best is not None:
            best.is_awaited = True
        return best

    def remove(self, entry: Pending) -> None:
        """For `Pending.end`."""
        self._entries.remove(entry)
        if entry.is_awaited:
            self._wake()
