"""The cache without bounds against a plain set of prefixes, and by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memserve.bench.reuse import InfiniteCache, RequestReuse, measure_reuse
from memserve.bench.text_tokens import TextTokens
from memserve.bench.tokens import Tokens, Vocabulary
from memserve.bench.workload import Piece, Session, Turn, Workload

ESTIMATE = TextTokens()
IDS = Vocabulary(seed=0, size=490, first_id=10)


def make_workload(*sessions: list[tuple[Piece, Piece | None]], is_text: bool = False) -> Workload:
    return Workload(
        "made up",
        tuple(
            Session(str(at), tuple(Turn(given, answer, 1) for given, answer in turns))
            for at, turns in enumerate(sessions)
        ),
        is_text,
    )


class NaiveCache:
    """Every prefix of whole blocks, in a set."""

    def __init__(self, block_size: int) -> None:
        self.block_size, self.prefixes = block_size, {()}

    def match(self, ids: list[int]) -> int:
        whole = range(0, len(ids), self.block_size)
        return max((n for n in whole if tuple(ids[:n]) in self.prefixes), default=0)

    def insert(self, ids: list[int]) -> None:
        for end in range(self.block_size, len(ids) + 1, self.block_size):
            self.prefixes.add(tuple(ids[:end]))


@pytest.mark.parametrize("block_size", [1, 4, 16])
@given(st.lists(st.tuples(st.booleans(), st.lists(st.integers(0, 1), max_size=70)), max_size=12))
def test_it_finds_what_a_set_of_prefixes_finds(block_size: int, steps: list[tuple[bool, list[int]]]) -> None:
    cache, naive = InfiniteCache(block_size), NaiveCache(block_size)
    for is_insert, ids in steps:
        assert cache.match(ids) == naive.match(ids)
        if is_insert:
            cache.insert(ids)
            naive.insert(ids)


def test_the_order_of_tokens_in_a_block_counts() -> None:
    cache = InfiniteCache(4)
    cache.insert([1, 2, 3, 4])
    assert cache.match([1, 2, 3, 4, 5]) == 4
    assert cache.match([2, 1, 3, 4, 5]) == cache.match([4, 3, 2, 1, 5]) == cache.match([0, 3, 3, 4, 5]) == 0


def test_the_last_token_of_a_prompt_is_never_cached() -> None:
    cache = InfiniteCache(4)
    cache.insert(list(range(8)))
    assert [cache.match(list(range(n))) for n in (0, 1, 4, 5, 8, 9)] == [0, 0, 0, 4, 4, 8]


@pytest.mark.parametrize("lazy", [False, True])
def test_answers_count_in_one_of_two_caches(lazy: bool) -> None:
    def piece(key: int, length: int) -> Piece:
        tokens = Tokens(IDS, [key], [length])
        return tokens if lazy else tuple(tokens.numbers().tolist())

    document, question, answer, other = piece(1, 8), piece(2, 2), piece(3, 8), piece(4, 6)
    workload = make_workload(
        [(document, answer), (question, None)], [(document, None)], [(other, None)], [(other, None)]
    )
    reuse = measure_reuse(workload, ESTIMATE, block_size=4)
    assert reuse.requests == (
        RequestReuse("0", 0, 8, 0, 0),
        # Both caches have the document's 8; of document and answer, 16 whose last has no KV, one has 12.
        RequestReuse("0", 1, 18, 8, 12),
        RequestReuse("1", 0, 8, 4, 4),
        RequestReuse("2", 0, 6, 0, 0),
        RequestReuse("3", 0, 6, 4, 4),
    )
    assert reuse.num_prompt_tokens == 46
    assert reuse.ratio == pytest.approx(16 / 46) and reuse.ratio_with_answers == pytest.approx(20 / 46)


def test_prompts_alone_give_the_same_in_any_order() -> None:
    sessions = [
        [(Tokens(IDS, [1, 10 + n], [40, 30]), Tokens(IDS, [50 + n], [9])), (Tokens(IDS, [70 + n], [5]), None)]
        for n in range(5)
    ]
    one = measure_reuse(make_workload(*sessions), ESTIMATE)
    other = measure_reuse(make_workload(*reversed(sessions)), ESTIMATE)
    assert one.ratio == other.ratio > 0.4


def test_text_is_counted_in_estimated_tokens() -> None:
    text = "All work and no play makes Jack a dull boy. " * 4
    reuse = measure_reuse(
        make_workload([(text + "One?", None)], [(text + "Two?", None)], is_text=True), ESTIMATE
    )
    assert [request.num_prompt_tokens for request in reuse.requests] == [45, 45]
    assert [request.cached for request in reuse.requests] == [0, 32]


def test_a_workload_without_prompts_divides_by_nothing() -> None:
    assert measure_reuse(make_workload(), ESTIMATE).ratio == 0.0
