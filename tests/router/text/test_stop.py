"""Stop strings in a stream, against a search in the whole text."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from memserve.router.text.stop import StopMatcher


def feed(stops: list[str], pieces: list[str]) -> tuple[str, bool]:
    matcher = StopMatcher(stops)
    shown = ""
    for piece in pieces:
        text, matched = matcher.push(piece)
        shown += text
        if matched:
            return shown, True
    return shown + matcher.flush(), False


def naive(stops: list[str], text: str) -> tuple[str, bool]:
    """The match that ends first wins, the longest of those that end together."""
    for end in range(1, len(text) + 1):
        lengths = [len(stop) for stop in stops if text[:end].endswith(stop)]
        if lengths:
            return text[: end - max(lengths)], True
    return text, False


def test_across_pieces() -> None:
    assert feed(["END"], ["abcE", "N", "D and more"]) == ("abc", True)


def test_a_false_start_is_shown_as_soon_as_it_is_one() -> None:
    matcher = StopMatcher(["END"])
    assert matcher.push("aEN") == ("a", False)
    assert matcher.push("x") == ("ENx", False)
    assert matcher.push("E") == ("", False)
    assert matcher.flush() == "E"


def test_a_start_inside_a_false_start() -> None:
    assert feed(["aab"], ["a", "a", "a", "b"]) == ("a", True)


def test_without_stops_nothing_is_held() -> None:
    assert StopMatcher([]).push("anything") == ("anything", False)


@given(
    stops=st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3),
    pieces=st.lists(st.text("abc", max_size=5), max_size=8),
)
def test_like_a_search_in_the_whole_however_it_is_cut(stops: list[str], pieces: list[str]) -> None:
    assert feed(stops, pieces) == naive(stops, "".join(pieces))


@given(
    stops=st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3),
    pieces=st.lists(st.text("abc", max_size=5), max_size=8),
)
def test_no_part_of_a_stop_string_is_shown_and_no_more_is_held_than_needed(
    stops: list[str], pieces: list[str]
) -> None:
    matcher = StopMatcher(stops)
    sent = shown = ""
    for piece in pieces:
        text, matched = matcher.push(piece)
        sent, shown = sent + piece, shown + text
        if matched:
            return
        held = sent[len(shown) :]
        assert any(stop.startswith(held) for stop in stops)
