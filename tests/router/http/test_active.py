"""Requests by id: nothing is remembered of one that was answered."""

from __future__ import annotations

import pytest

from memserve.errors import Overloaded
from memserve.router.http.active import ActiveRequests
from memserve.router.http.limits import HttpLimits


def test_ids_and_allowances_come_back() -> None:
    requests = ActiveRequests(HttpLimits(max_requests=2, max_held_bytes=100))
    with requests.admit(("a", "cmpl-a"), 60), requests.admit(("a", "cmpl-a"), 40) as second:
        for bad in (0, 1):
            with pytest.raises(Overloaded, match="too many requests"), requests.admit(("b",), bad):
                pass
        assert requests.cancel("a") and requests.cancel("cmpl-a") and not requests.cancel("b")
        second.num_bytes = 10
    with requests.admit(("c",), 60), pytest.raises(Overloaded, match="bytes"), requests.admit(("b",), 41):
        pass
    assert not any(requests.cancel(name) for name in ("a", "cmpl-a", "b", "c"))
    assert not requests._by_id and not requests._requests
