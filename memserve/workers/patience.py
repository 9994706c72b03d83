"""How long a request waits for KV that another is pulling: as long as it would take to get it by itself. So
who waits for a pull that goes well has it sooner, and who waits for one that stalls loses at most as much
again.

By itself means to pull it, where it came with an offer, and else to compute it: the one is taken from the
pulls that ended, the other from the steps that were run. Pure.
"""

from __future__ import annotations

from collections import deque
from statistics import median

from memserve.workers.budget import StepBudget
from memserve.workers.request import Request

# At least, as the loop looks at pulls only between two steps; and where nothing was measured.
_LEAST_S = 0.05
_UNKNOWN_S = 1.0
_NUM_PULLS = 9


class Patience:
    """See the module."""

    def __init__(self, budget: StepBudget) -> None:
        self._budget = budget
        self._pulls_ms: deque[float] = deque(maxlen=_NUM_PULLS)  # a token

    def observe(self, num_tokens: int, elapsed_ms: float) -> None:
        """A pull of so many tokens has ended well, all of it begun at once and so long ago."""
        if num_tokens > 0:
            self._pulls_ms.append(elapsed_ms / num_tokens)

    def pull_s(self, num_tokens: int) -> float:
        """What a pull of so many tokens takes by those that ended; 0 where none did."""
        return num_tokens * median(self._pulls_ms) / 1e3 if self._pulls_ms else 0.0

    def seconds(self, request: Request, num_cached: int, num_tokens: int) -> float:
        """Of a request that could use the first `num_tokens` tokens, of which `num_cached` are here."""
        num_new = num_tokens - num_cached
        if request.offer is not None and self._pulls_ms:
            alone_ms = 1e3 * self.pull_s(num_new)
        else:
            alone_ms = self._budget.cost_ms(num_new, num_new * (num_cached + num_new / 2))
        return max(_LEAST_S, alone_ms / 1e3) if alone_ms > 0 else _UNKNOWN_S
