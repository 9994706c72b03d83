"""The layout of a step: slots, positions, rows with logits."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
import torch

from memserve.model_config import ModelConfig, parse_model_config
from memserve.models.step import LogitRows, SequenceSlice, StepTensors, build_step

NONE, LAST, ALL = LogitRows.NONE, LogitRows.LAST, LogitRows.ALL
MODEL: ModelConfig = parse_model_config(
    {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 100,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
    }
)


def build(block_size: int, *pieces: tuple[int, int, LogitRows], model: ModelConfig = MODEL) -> StepTensors:
    """Pieces of (context_len, num_new, wanted); the block ids are those of a fixed permutation."""
    ids, start, laid_out = np.random.default_rng(0).permutation(4000), 0, []
    for context, new, wanted in pieces:
        count = -(-(context + new) // block_size)
        piece = SequenceSlice(start, new, context, ids[:count])
        laid_out.append((np.arange(start, start + new), piece, wanted))
        ids, start = ids[count:], start + new
    return build_step(laid_out, model, block_size, torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("block_size", [1, 4, 16])
def test_slots_and_positions(block_size: int) -> None:
    pieces = ((0, 5, ALL), (17, 1, LAST), (16, 16, NONE), (3, 30, LAST))
    step = build(block_size, *pieces)
    # The arena's rows of head_dim elements at layer 0: K of each head, then V, `block_size` slots each.
    heads = 2 * MODEL.num_kv_heads
    rows = step.store.rows.numpy().reshape(52, heads)
    assert (np.diff(rows, axis=1) == block_size).all()
    blocks, offsets = np.divmod(rows[:, 0], MODEL.num_layers * heads * block_size)
    assert step.token_ids.tolist() == list(range(52))
    ids, start = np.random.default_rng(0).permutation(4000), 0
    for context, new, _ in pieces:
        expected = np.arange(context, context + new)
        own = slice(start, start + new)
        assert np.array_equal(step.positions.numpy()[own], expected)
        assert np.array_equal(blocks[own], ids[expected // block_size])
        assert np.array_equal(offsets[own], expected % block_size)
        ids, start = ids[-(-(context + new) // block_size) :], start + new
    assert step.logit_rows.tolist() == [0, 1, 2, 3, 4, 5, 51]


def test_no_logits_at_all() -> None:
    step = build(4, (0, 5, NONE), (8, 1, NONE))
    assert step.final is None and len(step.logit_rows) == 0


def test_a_step_of_decodes_has_one_plan_for_all_layers() -> None:
    step = build(4, (7, 1, LAST), (9, 1, LAST))
    assert step.plans[None] is step.final


def test_windows_no_sequence_outgrows_share_the_plan_without() -> None:
    model = msgspec.structs.replace(MODEL, num_layers=3, sliding_window=(50, None, None))
    step = build(4, (7, 1, LAST), (20, 9, LAST), model=model)
    assert step.plans[50] is step.plans[None]
    longer = build(4, (70, 1, LAST), (20, 9, LAST), model=model)
    assert longer.plans[50] is not longer.plans[None]


def test_short_contexts_share_a_group_and_long_ones_do_not() -> None:
    step = build(16, (3, 1, LAST), (200, 1, LAST), (3000, 1, LAST), (10, 1, LAST), (2500, 1, LAST))
    assert step.final is not None
    assert [group.batch for group in step.final.decodes] == [3, 2]


def test_unused_slots_of_a_new_block_are_zeroed_once() -> None:
    def zeroed(*pieces: tuple[int, int, LogitRows]) -> int:
        rows = build(4, *pieces).store.zero_rows
        return 0 if rows is None else len(rows) // (2 * MODEL.num_kv_heads)

    assert zeroed((0, 1, LAST)) == 3  # enters a block
    assert zeroed((1, 1, LAST)) == 0  # goes on in it
    assert zeroed((3, 1, LAST)) == 0  # fills it
    assert zeroed((0, 8, LAST)) == 0  # fills two
    assert zeroed((2, 3, LAST), (4, 2, LAST)) == 3 + 2


def test_bugs_of_the_caller_are_asserted() -> None:
    token = np.array([1])
    gap = [(token, SequenceSlice(1, 1, 0, np.array([0])), LAST)]
    short = [(token, SequenceSlice(0, 1, 16, np.array([0])), LAST)]
    for pieces in (gap, short):
        with pytest.raises(AssertionError):
            build_step(pieces, MODEL, 16, torch.device("cpu"), torch.float32)
