"""The seam: pieces of either kind become prompts."""

from __future__ import annotations

import pkgutil
import subprocess
import sys

import pytest

import memserve.bench
from memserve.bench.tokens import Tokens, Vocabulary
from memserve.bench.workload import Piece, Session, Turn, Workload, expand, join_prompt

IDS = Vocabulary(seed=1, size=100, first_id=10)
WORDS = Vocabulary(seed=1, size=16, words=tuple(f" w{number}" for number in range(16)))


def test_every_kind_of_piece_expands() -> None:
    assert expand("text") == "text"
    assert expand((1, 2)) == [1, 2]
    lazy = Tokens(IDS, [3], [5])
    assert expand(lazy) == lazy.expand() and len(expand(lazy)) == len(lazy) == 5
    assert isinstance(expand(Tokens(WORDS, [3], [5])), str)


@pytest.mark.parametrize(
    ("pieces", "prompt"),
    [(["ab", "", "c"], "abc"), ([(1,), (2, 3)], [1, 2, 3]), ([""], "")],
)
def test_pieces_of_one_kind_join(pieces: list[Piece], prompt: str | list[int]) -> None:
    assert join_prompt(pieces) == prompt


def test_lazy_pieces_join_as_they_expand() -> None:
    first, second = Tokens(IDS, [3], [5]), Tokens(IDS, [4], [2])
    assert join_prompt([first, second]) == [*first.expand(), *second.expand()]
    words = Tokens(WORDS, [3], [5])
    assert join_prompt([words, " end"]) == f"{words.expand()} end"


def test_a_workload_counts_turns_and_knows_whether_it_has_arrivals() -> None:
    turn = Turn("in", "out", 3)
    timed, free = Session("a", (turn, turn), 0.0), Session("b", (turn,))
    assert Workload("w", (timed, free), is_text=True).num_requests == 3
    assert not Workload("w", (timed, free), is_text=True).has_arrivals
    assert Workload("w", (timed,), is_text=True).has_arrivals


def test_the_bench_imports_neither_torch_nor_router_nor_workers() -> None:
    names = [f"memserve.bench.{module.name}" for module in pkgutil.iter_modules(memserve.bench.__path__)]
    assert "memserve.bench.workload_spec" in names
    script = "\n".join(
        [
            "import importlib, sys",
            f"for name in {names!r}:",
            "    importlib.import_module(name)",
            "    heavy = ('torch', 'memserve.router', 'memserve.workers')",
            "    assert not set(heavy) & set(sys.modules), name",
        ]
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
