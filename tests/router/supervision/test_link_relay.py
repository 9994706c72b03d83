"""Messages between workers: they go on only between those who are alive and are who they say."""

from __future__ import annotations

import pytest

from memserve.messages import Accept, Connect, LinkMessage, Refuse
from memserve.router.events import FromWorker, Send
from memserve.router.supervision.link_relay import LinkRelay

RECEIVER, SOURCE = ("decode-0", 3), ("prefill-0", 5)
ALIVE = dict([RECEIVER, SOURCE])


def connect(
    attempt: int = 1, receiver: tuple[str, int] = RECEIVER, source: tuple[str, int] = SOURCE
) -> Connect:
    return Connect(*receiver, *source, attempt, b"there", bytes(32), "float32", 64, "model")


ANSWERS = [Accept(*RECEIVER, *SOURCE, 1, b"here"), Refuse(*RECEIVER, *SOURCE, 1, "no")]


@pytest.fixture
def links() -> LinkRelay:
    return LinkRelay()


def test_a_question_and_its_answers_go_on_as_they_are(links: LinkRelay) -> None:
    assert links.relay(FromWorker(*RECEIVER, connect()), connect(), ALIVE) == Send(*SOURCE, connect())
    for answer in ANSWERS:
        assert links.relay(FromWorker(*SOURCE, answer), answer, ALIVE) == Send(*RECEIVER, answer)


@pytest.mark.parametrize(
    ("alive", "reason"),
    [
        ({"decode-0": 3}, "prefill-0 is down"),
        ({"decode-0": 3, "prefill-0": 6}, "prefill-0 is of incarnation 6, not 5"),
    ],
)
def test_who_asks_somebody_who_is_not_there_is_told_at_once(links: LinkRelay, alive, reason: str) -> None:
    refusal = Refuse(*RECEIVER, *SOURCE, 7, reason)
    answer = links.relay(FromWorker(*RECEIVER, connect(7)), connect(7), alive)
    assert answer == Send(*RECEIVER, refusal)
    assert links.on_worker_down("prefill-0") == []


@pytest.mark.parametrize("message", [connect(), *ANSWERS], ids=lambda message: type(message).__name__)
def test_nobody_speaks_in_anothers_name(links: LinkRelay, message: LinkMessage, caplog) -> None:
    alive = {**ALIVE, "decode-1": 1}
    assert links.relay(FromWorker("decode-1", 1, message), message, alive) is None
    assert f"decode-1 sent a {type(message).__name__} in another's name" in caplog.text


@pytest.mark.parametrize("message", [connect(), *ANSWERS], ids=lambda message: type(message).__name__)
def test_what_the_dead_had_said_is_dropped(links: LinkRelay, message: LinkMessage) -> None:
    sender = RECEIVER if isinstance(message, Connect) else SOURCE
    for alive in ({**ALIVE, sender[0]: 9}, {k: v for k, v in ALIVE.items() if k != sender[0]}):
        assert links.relay(FromWorker(*sender, message), message, alive) is None


@pytest.mark.parametrize("answer", ANSWERS, ids=lambda message: type(message).__name__)
def test_answers_to_a_receiver_of_another_life_are_dropped(links: LinkRelay, answer: LinkMessage) -> None:
    assert links.relay(FromWorker(*SOURCE, answer), answer, {**ALIVE, "decode-0": 4}) is None


def test_a_source_that_dies_before_it_has_answered_is_answered_for(links: LinkRelay) -> None:
    # 1. of two attempts the later waits
    for attempt in (1, 2):
        links.relay(FromWorker(*RECEIVER, connect(attempt)), connect(attempt), ALIVE)
    assert links.on_worker_down("decode-9") == []
    (answer,) = links.on_worker_down("prefill-0")
    assert answer == Send(*RECEIVER, Refuse(*RECEIVER, *SOURCE, 2, "prefill-0 has died"))
    # 2. once
    assert links.on_worker_down("prefill-0") == []
    # 3. who has answered, or was asked by somebody who is gone, owes nothing
    for answer in ANSWERS:
        links.relay(FromWorker(*RECEIVER, connect()), connect(), ALIVE)
        links.relay(FromWorker(*SOURCE, answer), answer, ALIVE)
        assert links.on_worker_down("prefill-0") == []
    links.relay(FromWorker(*RECEIVER, connect()), connect(), ALIVE)
    assert links.on_worker_down("decode-0") == []
    assert links.on_worker_down("prefill-0") == []
