"""The clients of a simulated run: sessions that begin when they are due and go on turn by turn, as the
load generator's do (bench/load.py). They know no server: who drives them submits what they ask and tells what
came.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from memserve.bench.workload import Session
from memserve.simulate.traces import Ids, Trace


class Question(NamedTuple):
    """One request. `answer`: what is drawn for it, to the last token."""

    number: int
    session: str
    prompt: Ids
    answer: Ids


@dataclass(slots=True)
class _Client:
    """A session that goes on: `context` is the conversation so far, `turn` the number of the next request."""

    session: Session
    rng: random.Random
    context: list[Ids]
    turn: int = 0


class Clients:
    """All sessions of a trace. Equal traces ask the same, whatever the answers' times."""

    def __init__(self, trace: Trace) -> None:
        self._trace = trace
        self._number = 0
        self._clients: dict[int, _Client] = {}
        self._left: Iterator[Session] = iter(())

    def arrivals(self) -> Iterator[tuple[float, Session]]:
        """The sessions that begin by themselves, and when, in order of time."""
        trace = self._trace
        sessions = trace.workload.sessions
        if trace.dues is not None:
            yield from sorted(zip(trace.dues, sessions, strict=True), key=lambda pair: pair[0])
            return
        assert trace.concurrency is not None
        self._left = iter(sessions)
        for _, session in zip(range(trace.concurrency), self._left, strict=False):
            yield 0.0, session

    def begin(self, session: Session) -> Question:
        """A session's first request."""
        rng = random.Random(f"{self._trace.seed} {session.id}")
        return self._ask(_Client(session, rng, []))

    def answered(self, question: Question) -> tuple[float, Question | Session] | None:
        """What comes after an answer, in how many seconds: the session's next request or, in a closed loop,
        the next session.
        """
        client = self._clients.pop(question.number)
        if client.turn < len(client.session.turns):
            think_s = self._trace.think.draw(client.rng)
            return think_s, self._ask(client)
        session = next(self._left, None) if self._trace.dues is None else None
        return None if session is None else (0.0, session)

    def _ask(self, client: _Client) -> Question:
        trace, turn = self._trace, client.session.turns[client.turn]
        client.turn += 1
        client.context.append(trace.ids(turn.input))
        prompt = np.concatenate(client.context)
        number, self._number = self._number, self._number + 1
        # of what is not logged only the length is known: a token that nobody else ever has
        answer = np.full(turn.max_tokens, -1 - number, dtype=np.int32)
        logged = None if turn.output is None else trace.ids(turn.output)
        if trace.answers == "live" and logged is not None:
            answer[: len(logged)] = logged[: len(answer)]
        client.context = [prompt, answer if trace.answers == "live" or logged is None else logged]
        self._clients[number] = client
        name = client.session.conversation or client.session.id
        return Question(number, name, prompt, answer)
