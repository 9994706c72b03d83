"""The step budget against machines of known speed."""

from __future__ import annotations

import numpy as np
import pytest

from memserve.model_config import parse_model_config
from memserve.workers.budget import MIN_CHUNK_TOKENS, StepBudget, pair_cost


def test_without_a_time_limit_only_tokens_count():
    tally = StepBudget(100, None).open()
    for _ in range(30):
        tally.add_decode(1000)
    assert tally.room(0) == 66, "96 rows need no filler, 100 would"
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
    budget = StepBudget(4096, 220.0, pair_cost=1e-9)
    tally = budget.open()
    tally.add_chunk(100, 0)
    budget.observe(tally, 100.0)
    whole = budget.open().room(0)
    assert whole == 192, "193.6 fit"
    tally = budget.open()
    for _ in range(50):
        tally.add_decode(0)
    assert tally.room(0) == whole - 50


def test_the_first_guess_of_a_pair_is_the_models_arithmetic():
    """One query head's products with one key are 4 * head_dim multiplications and additions."""
    model = parse_model_config(
        {
            "architectures": ["LlamaForCausalLM"],
            "vocab_size": 32000,
            "hidden_size": 512,
            "intermediate_size": 1536,
            "num_hidden_layers": 8,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "max_position_embeddings": 4096,
        }
    )
    # Measured for this model: 0.13 ms a token, 5.5e-5 ms a pair.
    assert pair_cost(model) == pytest.approx(5.5e-5 / 0.13, rel=0.1)


# --- a whole machine: what was measured of a small model, with the scatter of a shared one ---


class Machine:
    """Takes 0.13 ms a token, 5.5e-5 ms a pair and 3 ms a step, give or take 15 %; at times twice as long."""

    def __init__(self, seed: int, guess: float) -> None:
        self.random = np.random.default_rng(seed)
        self.budget = StepBudget(2048, 200.0, guess)
        self.slowness = 1.0
        for length in (16, 256, 256):  # warm-up
            self.run(length, 0)

    def run(self, wanted: int, context: int) -> tuple[int, float]:
        """One chunk: its tokens, and the time it takes on an average day."""
        tally = self.budget.open()
        num_tokens = min(wanted, tally.room(context))
        tally.add_chunk(num_tokens, context)
        true_ms = self.slowness * (3.0 + 0.13 * num_tokens + 5.5e-5 * tally.num_pairs)
        hiccup = 2.0 if self.random.random() < 0.05 else 1.0
        self.budget.observe(tally, true_ms * hiccup * self.random.uniform(0.85, 1.15))
        return num_tokens, true_ms

    def prefill(self, length: int) -> list[float]:
        """The times of a prompt's chunks, without the last, which is what is left."""
        times, computed = [], 0
        while computed < length:
            num_tokens, true_ms = self.run(length - computed, computed)
            computed += num_tokens
            times.append(true_ms)
        return times[:-1]


@pytest.mark.parametrize("guess", [4.2e-4, 4e-5, 4e-3], ids=["right", "far too low", "far too high"])
@pytest.mark.parametrize("lengths", [(4000, 4001), (200, 9000)])
def test_steps_of_prompts_are_near_the_limit_from_the_first_chunk_on(guess, lengths):
    first, later = [], []
    for seed in range(8):
        machine = Machine(seed, guess)
        machine.prefill(4000)
        for _ in range(15):
            times = machine.prefill(int(machine.random.integers(*lengths)))
            first += times[:1]
            later += times[1:]
    for times in (first, later):
        low, median, high = np.percentile(times, (5, 50, 95))
        assert low > 135 and 160 < median < 190 and high < 210


def test_the_very_first_prompt_is_cut_well():
    """With what arithmetic says of the model, and a warm-up."""
    times = [time for seed in range(40) for time in Machine(seed, 4.2e-4).prefill(4000)]
    low, median, high = np.percentile(times, (5, 50, 95))
    assert low > 100 and 160 < median < 190 and high < 210


def test_one_slow_step_changes_little():
    machine = Machine(0, 4.2e-4)
    for _ in range(3):
        machine.prefill(4000)
    before = machine.budget.open().room(0)
    tally = machine.budget.open()
    tally.add_chunk(before, 0)
    machine.budget.observe(tally, 1500.0)
    assert machine.budget.open().room(0) == pytest.approx(before, rel=0.2)


@pytest.mark.parametrize("slowness", [0.5, 2.0])
def test_a_machine_that_changes_its_speed_is_followed_within_five_steps(slowness):
    followed = []
    for seed in range(20):
        machine = Machine(seed, 4.2e-4)
        for _ in range(6):
            machine.prefill(4000)
        machine.slowness = slowness
        for _ in range(5):
            machine.run(2048, 500)
        followed += [machine.run(2048, 500)[1] for _ in range(4)]
    low, high = np.percentile(followed, (10, 90))
    assert low > 140 and high < 230
