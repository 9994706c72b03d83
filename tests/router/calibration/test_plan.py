"""What is measured, and what is made of the times."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import msgspec
import pytest

from memserve.messages import Repeat, StepSpec
from memserve.router.calibration.plan import (
    Kind,
    fit_link,
    fit_steps,
    is_hopeless,
    is_quiet,
    make_model,
    plan_copies,
    plan_steps,
    shape_of,
    too_long,
    typical_ms,
)
from memserve.router.scheduling.cost_model import Operators, Ramp, StepShape
from tests.router.worker_configs import make_worker

TRUTH = Operators(
    rows=Ramp((0, 1, 16, 64, 256), (0.0, 0.1, 0.05, 0.06, 0.08)),
    fixed_ms=3.0,
    pair_ms=5e-5,
    square_ms=2e-5,
    context_ms=6e-4,
    logit_row_ms=0.05,
    gather_ms=8e-4,
    mixed_ms=1.0,
    draw_ms=0.9,
    far_pair_ms=1e-5,
    chunk_ms=2.0,
)


def config(**changes: object):
    large = {"max_model_len": 8192, "max_batch_tokens": 2048, "max_running": 64, "num_blocks": 4096}
    return msgspec.structs.replace(make_worker("prefill-0"), **{**large, **changes})


def measured(specs: Iterable[StepSpec]) -> dict[StepSpec, list[Repeat]]:
    return {spec: [Repeat(TRUTH.step_ms(shape_of(spec)))] * 2 for spec in specs}


# --- kinds ---


def test_workers_that_differ_in_name_alone_are_of_a_kind() -> None:
    kind = Kind.of(config())
    assert kind == Kind.of(config(instance="decode-3", cpus=(1,), num_blocks=77, max_running=2))
    assert kind.name == "cpu-float32-1"
    others = [{"threads": 2}, {"dtype": "bfloat16"}, {"max_batch_tokens": 99}, {"max_step_ms": None}]
    assert len({kind, *(Kind.of(config(**other)) for other in others)}) == 5


def test_gpus_of_one_machine_are_of_a_kind() -> None:
    assert Kind.of(config(device="cuda:0", threads=1)) == Kind.of(config(device="cuda:3", threads=2))


# --- the plan ---


@pytest.mark.parametrize(
    ("block_size", "num_blocks", "max_model_len", "max_running", "max_batch_tokens"),
    list(itertools.product((1, 4, 16), (40, 300, 20_000), (64, 1024, 8192), (1, 8, 64), (64, 2048))),
)
def test_every_step_fits_the_worker(
    block_size: int, num_blocks: int, max_model_len: int, max_running: int, max_batch_tokens: int
) -> None:
    worker = config(
        block_size=block_size,
        max_model_len=max_model_len,
        max_running=max_running,
        max_batch_tokens=max_batch_tokens,
    )
    plan = plan_steps(worker, num_blocks)
    specs = [*plan.rows, *plan.others, *plan.held_out]
    assert StepSpec(1) in plan.rows
    for spec in specs:
        tokens = spec.context_len + spec.num_new
        blocks = -(-tokens // block_size) + spec.num_decodes * -(-(spec.decode_context + 1) // block_size)
        assert 0 < spec.num_new + spec.num_decodes <= max_batch_tokens
        assert spec.num_decodes <= max_running and max(tokens, spec.decode_context) < max_model_len
        assert blocks <= num_blocks


def test_what_is_held_out_is_not_fitted_to() -> None:
    plan = plan_steps(config(), 4096)
    assert len(plan.held_out) >= 6
    assert not set(plan.held_out) & {*plan.rows, *plan.others}


def test_far_contexts_are_measured_where_there_are_any() -> None:
    assert max(spec.context_len for spec in plan_steps(config(), 4096).others) > 6000
    assert max(spec.context_len for spec in plan_steps(config(max_model_len=700), 4096).others) > 300


def test_too_long_is_by_the_bound_on_a_step() -> None:
    assert not too_long(Kind.of(config()), 230.0) and too_long(Kind.of(config()), 250.0)


def test_what_measured_steps_rule_out_is_not_tried() -> None:
    kind = Kind.of(config())
    times = {StepSpec(16, 1024): [Repeat(30.0)], StepSpec(0, 0, True, 4, 16): [Repeat(400.0)]}
    assert is_hopeless(kind, times, StepSpec(256, 2048))
    assert not is_hopeless(kind, times, StepSpec(256, 512))
    assert not is_hopeless(kind, times, StepSpec(64, 1024))
    assert not is_hopeless(kind, times, StepSpec(0, 0, True, 16, 128))


# --- times ---


def test_quiet_repeats_count_alone_where_there_are_many() -> None:
    repeats = [Repeat(10.0), Repeat(11.0), Repeat(12.0), Repeat(40.0, 20.0)]
    assert [is_quiet(repeat) for repeat in repeats] == [True, True, True, False]
    assert typical_ms(repeats) == 11.0


def test_waits_are_taken_off_where_few_are_quiet() -> None:
    assert typical_ms([Repeat(30.0, 20.0), Repeat(15.0, 4.0), Repeat(90.0, 60.0)]) == 10.5
    assert typical_ms([Repeat(30.0, 20.0)]) == 10.0


# --- fits ---


def test_operators_are_found_again() -> None:
    plan = plan_steps(config(), 4096)
    fitted = fit_steps(measured([*plan.rows, *plan.others]), measured(plan.held_out))
    assert fitted.held_out is not None and fitted.held_out.p95 < 0.02
    for shape in (
        StepShape(300, 300 * 5000, 300**2, num_gathered=5000, num_far_pairs=300 * 2952, has_chunk=True),
    ):
        assert fitted.operators.step_ms(shape) == pytest.approx(TRUTH.step_ms(shape), rel=0.03)


@pytest.mark.parametrize("most", [1, 2, 16, 17, 64, 128, 300])
def test_no_piece_of_the_curve_is_without_points(most: int) -> None:
    rows = [StepSpec(n) for n in (1, 2, 16, 17, 64, 128, 300) if n <= most]
    operators = fit_steps(measured(rows), {}).operators
    assert isinstance(operators.rows, Ramp)
    assert operators.rows.knots[0] == 0 and all(knot < most for knot in operators.rows.knots)
    more, most_ms = operators.step_ms(StepShape(4 * most)), operators.step_ms(StepShape(most))
    assert most == 1 or more > most_ms


def test_nothing_held_out_is_no_check() -> None:
    assert fit_steps(measured([StepSpec(1), StepSpec(9)]), {}).held_out is None


def test_a_link_from_copies() -> None:
    link = fit_link({size: [Repeat(0.5 + size / 2e6)] for size in (10_000, 1_000_000, 8_000_000)})
    assert link is not None
    assert link.latency_ms == pytest.approx(0.5) and link.bytes_per_ms == pytest.approx(2e6)
    assert fit_link({10_000: [Repeat(1.0)]}) is None and fit_link({}) is None


@pytest.mark.parametrize("num_blocks", [0, 1, 2, 3, 40, 100_000])
@pytest.mark.parametrize("block_bytes", [1, 1 << 18, 1 << 30])
def test_copies_leave_room_and_have_an_end(num_blocks: int, block_bytes: int) -> None:
    counts = plan_copies(num_blocks, block_bytes)
    assert list(counts) == sorted(set(counts))
    assert all(0 < count <= num_blocks // 2 and count * block_bytes <= 64 << 20 for count in counts)


def test_a_link_that_was_not_measured_is_like_its_next_of_kin() -> None:
    link = fit_link({size: [Repeat(size / 1e6)] for size in (10_000, 1_000_000)})
    assert link is not None
    model = make_model(config(), TRUTH, pull=link)
    assert model.links.from_host == model.links.from_device == link
    assert model.links.swap_in.bytes_per_ms > 0
    assert model.budget.max_tokens == 2048 and model.budget.max_step_ms == 200.0
