"""The step budget against machines of known speed."""

from __future__ import annotations

import pytest

from memserve.workers.budget import MIN_CHUNK_TOKENS, StepBudget


def test_without_a_time_limit_only_tokens_count():
    tally = StepBudget(100, None).open()
    for _ in range(30):
        tally.add_decode(1000)
    assert tally.room(0) == 70
    tally.add_chunk(60, 0)
    assert tally.room(0) == 0, "a sliver is not worth a chunk"


def test_decodes_leave_room_for_one_small_chunk():
    tally = StepBudget(32, None).open()
    for _ in range(64):
        tally.add_decode(10)
    assert tally.room(0) == MIN_CHUNK_TOKENS
    tally.add_chunk(MIN_CHUNK_TOKENS, 0)
    assert tally.room(0) == 0


def test_the_first_step_is_small():
    assert StepBudget(2048, 200.0).open().room(0) == MIN_CHUNK_TOKENS


@pytest.mark.parametrize("per_token_ms", [0.05, 0.5, 5.0])
@pytest.mark.parametrize("per_pair_ms", [0.0, 1e-5, 1e-3])
@pytest.mark.parametrize("overhead_ms", [0.0, 10.0])
def test_steps_of_a_long_prefill_come_close_to_the_limit(per_token_ms, per_pair_ms, overhead_ms):
    budget = StepBudget(4096, 200.0)
    computed, times = 0, []
    while computed < 32768:
        tally = budget.open()
        num_new = tally.room(computed)
        tally.add_chunk(num_new, computed)
        step_ms = overhead_ms + per_token_ms * num_new + per_pair_ms * tally.num_pairs
        budget.observe(tally, step_ms)
        times.append((num_new, step_ms))
        computed += num_new
    settled = [t for t in times[6:] if MIN_CHUNK_TOKENS < t[0] < 4096]
    assert all(140 < step_ms < 250 for _, step_ms in settled)
    assert all(step_ms <= 250 or num_new == MIN_CHUNK_TOKENS for num_new, step_ms in times[6:])


def test_a_change_of_speed_is_learned_in_a_few_steps():
    budget = StepBudget(4096, 200.0)
    for per_token_ms in (0.1, 1.0, 0.1):
        for _ in range(12):
            tally = budget.open()
            tally.add_chunk(tally.room(0), 0)
            budget.observe(tally, per_token_ms * tally.num_tokens)
        assert 150 < per_token_ms * budget.open().room(0) < 250


def test_decode_steps_teach_nothing():
    budget = StepBudget(4096, 200.0)
    for _ in range(10):
        tally = budget.open()
        tally.add_decode(500)
        budget.observe(tally, 50.0)
    assert budget.open().room(0) == MIN_CHUNK_TOKENS


def test_decodes_take_from_the_time_of_chunks():
    budget = StepBudget(4096, 200.0)
    tally = budget.open()
    tally.add_chunk(100, 0)
    budget.observe(tally, 100.0)
    tally = budget.open()
    for _ in range(50):
        tally.add_decode(0)
    assert 140 <= tally.room(0) <= 150
