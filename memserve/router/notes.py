"""Work that nobody waits for: noted at once, done before anybody asks for what comes of it.

Whoever keeps something that is told often and asked seldom, or only later, notes what it is told, and settles
its notes before each answer. Its owner settles them too, when what others do wait for is on its way.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

# That may wait: so many are done in about a millisecond.
MAX_NOTES = 32


class Notes:
    """Notes in their order. At most MAX_NOTES wait: one more, and all are settled."""

    def __init__(self) -> None:
        self._notes: deque[Callable[[], None]] = deque()

    def __len__(self) -> int:
        return len(self._notes)

    def add(self, note: Callable[[], None]) -> None:
        """To be done later. What it is given must not change meanwhile."""
        self._notes.append(note)
        if len(self._notes) > MAX_NOTES:
            self.settle()

    def settle(self) -> None:
        """Do what was noted. What one of them raises is raised here; those after it stay."""
        while self._notes:
            self._notes.popleft()()
