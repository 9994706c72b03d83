"""Waiting requests: in turns by session, in order within one."""

from __future__ import annotations

import random

from memserve.router.scheduling.fair_queue import FairQueue


def drain(queue: FairQueue) -> list[str]:
    return [queue.pop() for _ in range(len(queue))]


def test_without_sessions_it_is_first_come_first_served() -> None:
    queue = FairQueue()
    for n in range(5):
        queue.push(str(n), None)
    assert queue.peek() == "0" and drain(queue) == ["0", "1", "2", "3", "4"]


def test_sessions_take_turns() -> None:
    queue = FairQueue()
    for n in range(4):
        queue.push(f"a{n}", "a")
    queue.push("b0", "b")
    queue.push("alone", None)
    assert queue.pop() == "a0"
    queue.push("c0", "c")
    assert drain(queue) == ["b0", "alone", "a1", "c0", "a2", "a3"]


def test_a_session_that_was_away_has_no_credit() -> None:
    queue = FairQueue()
    for n in range(10):
        queue.push(f"a{n}", "a")
    for _ in range(8):
        queue.pop()
    for n in range(3):
        queue.push(f"b{n}", "b")
    assert drain(queue) == ["a8", "b0", "a9", "b1", "b2"]


def test_what_goes_back_comes_first_the_last_before_all() -> None:
    queue = FairQueue()
    queue.push("new", None)
    queue.push_front("second")
    queue.push_front("first")
    assert drain(queue) == ["first", "second", "new"]


def test_what_is_given_up_leaves_no_trace() -> None:
    queue = FairQueue()
    queue.push("a0", "a")
    queue.push("a1", "a")
    queue.push("b0", "b")
    queue.remove("a0")
    queue.push("a0", "a")  # the same id again
    assert drain(queue) == ["b0", "a1", "a0"]
    assert not queue._last_turn and not queue._num_waiting


def test_the_given_up_do_not_pile_up_behind_one_that_waits() -> None:
    queue = FairQueue()
    queue.push("stuck", None)
    for n in range(10_000):
        queue.push(str(n), "a")
        queue.remove(str(n))
    assert len(queue._heap) < 100 and drain(queue) == ["stuck"]


def test_against_an_oracle_of_turns() -> None:
    """Nobody is served twice while another session, waiting all along, is served not once."""
    rng = random.Random(0)
    queue, waiting, numbers = FairQueue(), {}, 0
    since: dict[str, list[str]] = {}  # sessions served since a waiting session was served
    for _ in range(5000):
        if rng.random() < 0.5 or not waiting:
            session = rng.choice("abcd")
            request_id = f"{session}{numbers}"
            numbers += 1
            queue.push(request_id, session)
            waiting.setdefault(session, []).append(request_id)
            since.setdefault(session, [])
        else:
            served = queue.pop()
            assert waiting[served[0]].pop(0) == served, "in order within a session"
            since[served[0]] = []
            if not waiting[served[0]]:
                del waiting[served[0]], since[served[0]]
            for session, others in since.items():
                if session != served[0]:
                    others.append(served[0])
                    assert others.count(served[0]) <= 2
    assert len(queue) == sum(map(len, waiting.values()))
