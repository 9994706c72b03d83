"""What goes over a gloo link is checked by whoever reads it; pieces and staging against a plain copy."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memserve.messages import Tier
from memserve.pool.transports.gloo_wire import MAX_CHUNK_BLOCKS, MAX_PIECES, Ask, Proof, Staging, cut

NUM_BLOCKS = 100


def make_ids(ids: list[int]) -> np.ndarray:
    return np.array(ids, dtype=np.int64)


def test_an_ask_says_what_was_asked_last() -> None:
    ask = Ask()
    ask.set(make_ids(list(range(90, 10, -1))), [80], more=True)
    ask.set(make_ids([5, 6, 7, 2]), [3, 4], more=False)
    blocks = ask.blocks(NUM_BLOCKS)
    assert blocks is not None and blocks.tolist() == [5, 6, 7, 2]
    assert (ask.ends(), ask.more) == ([3, 4], False)
    ask.set(make_ids([]), [], more=False)
    none = ask.blocks(NUM_BLOCKS)
    assert none is not None and len(none) == 0 and ask.ends() == []


@pytest.mark.parametrize("blocks", [[100], [-1], [0, 2**62]])
def test_blocks_that_cannot_be_are_found(blocks: list[int]) -> None:
    ask = Ask()
    ask.set(make_ids(blocks), [len(blocks)], more=False)
    assert ask.blocks(NUM_BLOCKS) is None


@pytest.mark.parametrize("num_blocks", [-1, MAX_CHUNK_BLOCKS + 1, 2**62])
def test_numbers_of_blocks_that_cannot_be_are_found(num_blocks: int) -> None:
    ask = Ask()
    ask.set(make_ids([1]), [1], more=False)
    ask.tensor[0] = num_blocks
    assert ask.blocks(NUM_BLOCKS) is None


@pytest.mark.parametrize("ends", [[], [3], [5], [0, 4], [2, 2, 4], [3, 1, 4], [-1, 4], [4, 4]])
def test_pieces_that_cannot_be_are_found(ends: list[int]) -> None:
    ask = Ask()
    ask.set(make_ids([1, 2, 3, 4]), ends, more=False)
    assert ask.ends() is None


@pytest.mark.parametrize("num_pieces", [-1, MAX_PIECES + 1, 2**62])
def test_numbers_of_pieces_that_cannot_be_are_found(num_pieces: int) -> None:
    ask = Ask()
    ask.set(make_ids([1]), [1], more=False)
    ask.tensor[2] = num_pieces
    assert ask.ends() is None


def test_a_proof_counts_the_blocks_before_the_first_that_changed() -> None:
    proof, expected = Proof(), np.array([3, 5, 2**64 - 1, 9], dtype=np.uint64)
    # 1. nothing changed
    proof.set_before(expected)
    proof.set_after(expected)
    assert proof.num_verified(expected) == (4, False)
    # 2. one did while it was sent, later ones before
    proof.set_after(np.array([3, 5, 1, 9], dtype=np.uint64))
    proof.set_before(np.array([3, 5, 2**64 - 1, 7], dtype=np.uint64))
    assert proof.num_verified(expected) == (2, False)
    # 3. one was gone already
    proof.set_before(np.array([3, 7, 2**64 - 1, 7], dtype=np.uint64))
    assert proof.num_verified(expected) == (1, True)


@pytest.mark.parametrize("block_bytes", [8, 4096, 1 << 17])
@given(data=st.data())
def test_any_chunk_goes_through_its_places(block_bytes: int, data: st.DataObject) -> None:
    num_blocks = data.draw(st.integers(1, 30))
    shifts = st.sampled_from([0, 0, 0, 1, 5])  # mostly runs
    steps = st.lists(shifts, min_size=num_blocks, max_size=num_blocks)
    blocks, into = (np.arange(num_blocks) + np.minimum(np.cumsum(data.draw(steps)), 60) for _ in range(2))
    ends = cut(blocks, into, block_bytes)
    assert ends[-1] == num_blocks and len(ends) <= MAX_PIECES
    words = 2  # a block's size decides only how it is cut
    source = np.arange(NUM_BLOCKS, dtype=np.uint8)[:, None].repeat(words, axis=1)
    target = np.full_like(source, 255)
    sending, receiving = Staging(source), Staging(target)
    # 1. places of both ends have the same sizes
    from_places, to_places = sending.places(blocks, ends, 3), receiving.places(into, ends, 3)
    assert [place.shape for place in from_places] == [place.shape for place in to_places]
    assert all(place.flags.c_contiguous for place in (*from_places, *to_places))
    # 2. what is sent from one to the other is the copy that was asked for, and nothing else is written
    if sending.is_staged(from_places):
        sending.gather(blocks, 3)
    for from_place, to_place in zip(from_places, to_places, strict=True):
        to_place[:] = from_place
    if receiving.is_staged(to_places):
        receiving.scatter(into, 3)
    expected = np.full_like(source, 255)
    expected[into] = source[blocks]
    assert (target == expected).all() and (source[:, 0] == np.arange(NUM_BLOCKS)).all()
    # 3. long runs are never staged
    if len(ends) > 1:
        assert not sending.is_staged(from_places) and not receiving.is_staged(to_places)


def test_an_ask_names_a_tier() -> None:
    ask = Ask()
    for tier in Tier:
        ask.set(np.array([1]), [1], more=False, tier=tier)
        assert ask.tier is tier
    ask.tensor[3] = 9
    assert ask.tier is None
