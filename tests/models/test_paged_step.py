"""The layout of a step for the Triton path, and its buffers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from memserve.models.paged_step import PagedStep, Staging, StaticStep, StepShape, build_paged_step, num_bytes
from memserve.models.step import LogitRows, SequenceSlice

NONE, LAST, ALL = LogitRows.NONE, LogitRows.LAST, LogitRows.ALL
CPU = torch.device("cpu")
IDS = np.random.default_rng(0).permutation(4000)


def pieces_of(block_size: int, *pieces: tuple[int, int, LogitRows]):
    """Pieces of (context_len, num_new, wanted); token ids count up, block ids are a fixed permutation."""
    taken, start, laid_out = 0, 0, []
    for context, new, wanted in pieces:
        count = -(-(context + new) // block_size)
        slice_ = SequenceSlice(start, new, context, IDS[taken : taken + count])
        laid_out.append((np.arange(start, start + new, dtype=np.int32), slice_, wanted))
        taken, start = taken + count, start + new
    return laid_out


def build(block_size: int, *pieces: tuple[int, int, LogitRows]) -> PagedStep:
    return build_paged_step(pieces_of(block_size, *pieces), block_size, Staging(CPU))


@pytest.mark.parametrize("block_size", [1, 4, 16])
def test_rows(block_size: int) -> None:
    pieces = ((0, 5, ALL), (17, 1, LAST), (16, 16, NONE), (0, 1, NONE), (3, 30, LAST))
    step = build(block_size, *pieces)
    # Decodes first, then the others, each in the caller's order.
    order = [1, 3, 0, 2, 4]
    starts = np.cumsum([0] + [pieces[index][1] for index in order])
    assert step.num_decodes == 2 and not step.takes_all and step.max_key_len == 33
    assert step.query_starts.tolist() == starts.tolist()
    assert step.key_lens.tolist() == [18, 1, 5, 32, 33]
    assert step.first_rows == (2, 0, 7, 1, 23)
    assert step.logit_rows.tolist() == [2, 3, 4, 5, 6, 0, 52]
    assert step.logit_sequences.tolist() == [2, 2, 2, 2, 2, 0, 4]
    assert step.logit_lens.tolist() == [1, 2, 3, 4, 5, 18, 33]

    by_caller = pieces_of(block_size, *pieces)
    for row, index in enumerate(order):
        ids, piece, _ = by_caller[index]
        own = slice(starts[row], starts[row + 1])
        positions = np.arange(piece.context_len, piece.context_len + piece.num_new)
        assert step.token_ids[own].tolist() == ids.tolist()
        assert step.positions[own].tolist() == positions.tolist()
        blocks, offsets = np.divmod(step.slots[own].numpy(), block_size)
        assert np.array_equal(blocks, piece.block_ids[positions // block_size])
        assert np.array_equal(offsets, positions % block_size)
        count = len(piece.block_ids)
        assert step.block_tables[row, :count].tolist() == piece.block_ids.tolist()
        assert not step.block_tables[row, count:].any()
        # What lies behind the last token is zeroed by it, once: in the step that enters the block.
        end = piece.context_len + piece.num_new
        entered = (end - 1) // block_size * block_size >= piece.context_len
        assert step.tails[own][:-1].tolist() == [0] * (piece.num_new - 1)
        assert step.tails[own][-1] == (-end % block_size if entered else 0)


def test_all_rows_in_order_are_taken() -> None:
    assert build(4, (3, 1, LAST), (9, 1, LAST)).takes_all
    assert build(4, (3, 5, ALL)).takes_all
    assert not build(4, (3, 5, ALL), (9, 1, LAST)).takes_all  # the decode comes first, its logits last
    assert not build(4, (3, 1, NONE), (9, 1, LAST)).takes_all
    assert len(build(4, (3, 2, NONE)).logit_rows) == 0


def test_types_and_one_buffer() -> None:
    step = build(4, (3, 2, LAST), (9, 1, LAST))
    wide = {"token_ids", "positions", "slots", "logit_rows"}
    tensors = {name: getattr(step, name) for name in PagedStep.__slots__}
    tensors = {name: value for name, value in tensors.items() if isinstance(value, torch.Tensor)}
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors.values()}) == 1
    for name, tensor in tensors.items():
        assert tensor.dtype == (torch.int64 if name in wide else torch.int32), name
        assert tensor.data_ptr() % 16 == 0 or not tensor.numel(), name


def test_static_step_is_padded() -> None:
    staging = Staging(CPU)
    static = StaticStep(4, 8, 4, staging)
    assert static.step.slots.tolist() == [-1] * 4 and not static.step.key_lens.any()
    pieces = pieces_of(4, (5, 1, LAST), (31, 1, LAST), (0, 1, LAST))
    static.fill(pieces)
    step = static.step
    assert step.num_decodes == 4 and step.takes_all and step.max_key_len == 32
    assert step.token_ids.tolist() == [0, 1, 2, 0] and step.positions.tolist() == [5, 31, 0, 0]
    assert step.key_lens.tolist() == [6, 32, 1, 0] and step.query_starts.tolist() == [0, 1, 2, 3, 4]
    assert step.slots[3] == -1 and (step.slots[:3] >= 0).all() and step.tails.tolist() == [0, 0, 3, 0]
    assert step.logit_rows.tolist() == [0, 1, 2, 3]
    static.fill(pieces[:1])
    assert step.key_lens.tolist() == [6, 0, 0, 0] and step.slots[1:].tolist() == [-1] * 3
    assert not step.block_tables[1:].any()
    with pytest.raises(AssertionError):
        static.fill(pieces_of(4, *[(1, 1, LAST)] * 5))


def test_staging_takes_its_buffers_in_turn() -> None:
    staging = Staging(CPU, num_buffers=2)
    first = staging.write(100)
    first[:] = 1
    sent = staging.send(100)
    second = staging.write(100)
    second[:] = 2
    assert (first == 1).all() and (sent == 1).all()
    target = torch.zeros(200, dtype=torch.uint8)
    assert staging.send(100, target) is target
    assert (target[:100] == 2).all() and not target[100:].any()
    assert np.shares_memory(staging.write(50), first)


def test_bytes_cover_every_field() -> None:
    shape = StepShape(3, 2, 1, 5)
    fields = 3 * (8 + 8 + 8 + 4) + 3 * 4 + 2 * 4 + 8 + 4 + 4 + 2 * 5 * 4
    assert fields <= num_bytes(shape) <= fields + 10 * 64
