"""Notes: in their order, bounded, and none is lost to another's failure."""

from __future__ import annotations

from functools import partial

import pytest

from memserve.router.notes import MAX_NOTES, Notes


def test_notes_are_settled_in_their_order() -> None:
    notes, done = Notes(), list[int]()
    for number in range(3):
        notes.add(partial(done.append, number))
    assert len(notes) == 3 and not done
    notes.settle()
    assert done == [0, 1, 2] and not notes


def test_notes_are_bounded() -> None:
    notes, done = Notes(), list[int]()
    for number in range(1000):
        notes.add(partial(done.append, number))
        assert len(notes) <= MAX_NOTES
    notes.settle()
    assert done == list(range(1000))


def test_a_note_that_fails_takes_no_other_along() -> None:
    notes, done = Notes(), list[int]()
    notes.add(partial(done.append, 1))
    notes.add(partial(done.remove, 7))
    notes.add(partial(done.append, 2))
    with pytest.raises(ValueError, match="not in list"):
        notes.settle()
    notes.settle()
    assert done == [1, 2]
