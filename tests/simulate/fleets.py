"""Traces made by hand, and a cost model whose sums can be done in the head."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from memserve.bench.arrivals import ThinkTime
from memserve.bench.text_tokens import TextTokens
from memserve.bench.workload import Session, Turn, Workload
from memserve.router.scheduling.cost_model import Budget, CostModel, Link, Links, Operators, Ramp
from memserve.simulate.traces import Trace

# The test data lie beside the repository, as ../shared/data.
DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"
LINK = Link(1.0, 1e6)
MODEL = CostModel(
    name="test",
    operators=Operators(rows=Ramp((0,), (0.1,)), fixed_ms=2.0, context_ms=1e-4),
    budget=Budget(1024),
    kv_token_bytes=1000,
    links=Links(from_device=LINK, from_host=LINK, swap_in=LINK),
)


def find_data(*parts: str) -> Path:
    path = DATA.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"{'/'.join(parts)} is not beside the repository (../shared/data)")
    return path


def blocks(*numbers: int, size: int = 16) -> tuple[int, ...]:
    """Tokens of whole blocks: equal numbers, equal blocks."""
    return tuple(number for number in numbers for _ in range(size))


def trace_of(sessions: Sequence[Session], block_size: int = 16, **changes: object) -> Trace:
    """Sessions that begin when they say."""
    given: dict[str, object] = {
        "workload": Workload("test", tuple(sessions), is_text=False),
        "text": TextTokens(),
        "dues": tuple(session.at_s or 0.0 for session in sessions),
        "concurrency": None,
        "think": ThinkTime(),
        "answers": "live",
        "seed": 0,
        "block_size": block_size,
    }
    return Trace(**(given | changes))  # type: ignore[arg-type]


def single(name: str, prompt: tuple[int, ...], num_new: int, at_s: float = 0.0) -> Session:
    """One request."""
    return Session(name, (Turn(prompt, None, num_new),), at_s)


def conversations(count: int, num_turns: int, gap_s: float, block_size: int = 16) -> Trace:
    """Every conversation begins with the same two blocks; each turn brings four, and answers of 70 tokens."""
    sessions = []
    for index in range(count):
        turns = []
        for turn in range(num_turns):
            own = range(1000 * (index + 1) + 10 * turn, 1000 * (index + 1) + 10 * turn + 4)
            answer = blocks(1000 * (index + 1) + 10 * turn + 5, size=70)
            turns.append(Turn(blocks(*(() if turn else (1, 2)), *own), answer, 70))
        sessions.append(Session(f"session-{index}", tuple(turns), at_s=gap_s * index))
    return trace_of(sessions, block_size)
