"""What was believed against what came, over the life of a request in the log."""

from __future__ import annotations

import pytest

from memserve.messages import CachedTokens
from memserve.router.request_log import Happening, RequestLog
from memserve.router.scheduling.hindsight import ERROR_BOUNDS, Hindsight, available_tokens
from memserve.router.scheduling.policies.decision import Decision, DecodeRow, PrefillRow
from memserve.router.scheduling.policy import Placement


def make_decision(
    expected: int = 16, best: int = 32, moved: int = 48, predicted_ms: float = 10.0
) -> Decision:
    chosen = PrefillRow("prefill-0", predicted_ms, 0.0, predicted_ms, 0.0, 0.0, expected, 0, 0, None)
    other = chosen._replace(instance="prefill-1", num_device_tokens=0, num_pulled_tokens=best)
    decode = DecodeRow("decode-0", 1.0, 1.0, 1.0, moved, 0, 9)
    return Decision("session", Placement("prefill-0", "decode-0"), chosen, decode, [chosen, other], [decode])


def test_what_becomes_of_cached_tokens() -> None:
    log = RequestLog()
    for name, cached in (("a", CachedTokens(8, 4, 2)), ("b", CachedTokens()), ("c", None)):
        log.submitted(name, 64, now=1.0)
        log.placed(name, make_decision(), now=2.0)
        log.first_token(name, cached, now=2.01)
        log.first_token(name, CachedTokens(64), now=3.0)  # after a replay: counts no more
    sums = log.hindsight
    assert (sums.prompt_tokens, sums.available_tokens, sums.expected_tokens, sums.captured_tokens) == (
        128,
        64,
        32,
        14,
    )


@pytest.mark.parametrize(
    ("best", "moved", "available"), [(32, 64, 32), (32, 10, 54), (0, 64, 0), (64, 64, 63), (0, 0, 63)]
)
def test_the_best_of_all_workers_is_available(best: int, moved: int, available: int) -> None:
    assert available_tokens(make_decision(0, best, moved), 64) == available


def test_predictions_against_measured_times() -> None:
    log = RequestLog()
    for number, measured_ms in enumerate((10.0, 8.5, 18.0, 1.0)):  # off by 0, 18, 44 and 900 %
        log.submitted(str(number), 64, now=0.0)
        log.placed(str(number), make_decision(predicted_ms=10.0), now=1.0)
        log.first_token(str(number), CachedTokens(), now=1.0 + measured_ms / 1e3)
    sums = log.hindsight
    assert (sums.predicted_ms, sums.measured_ms) == (40.0, pytest.approx(37.5))
    counts = dict(zip((*ERROR_BOUNDS, None), sums.error_counts, strict=True))
    assert {bound: count for bound, count in counts.items() if count} == {0.02: 1, 0.25: 1, 0.5: 1, None: 1}
    assert sums.error_sum == pytest.approx(1.5 / 8.5 + 8 / 18 + 9.0)


def test_what_nobody_could_predict_does_not_count() -> None:
    log = RequestLog()
    # 1. its worker dies before the first token
    log.submitted("replayed", 64, now=0.0)
    log.placed("replayed", make_decision(expected=48), now=1.0)
    log.note("replayed", 2.0, Happening.REPLAYED)
    log.placed("replayed", make_decision(expected=16), now=2.0)
    log.first_token("replayed", CachedTokens(16), now=3.0)
    # 2. nothing was decided; nothing is known
    log.submitted("odd", 64, now=0.0)
    log.first_token("odd", CachedTokens(16), now=3.0)
    log.first_token("unknown", CachedTokens(16), now=3.0)
    sums = log.hindsight
    assert sums.measured_ms == 0.0 and not any(sums.error_counts)
    assert (sums.prompt_tokens, sums.expected_tokens, sums.captured_tokens) == (64, 16, 16)


def test_a_copy_stays_as_it_is() -> None:
    sums = Hindsight()
    before = sums.copy()
    sums.predicted(1.0, 1.0)
    sums.predicted(1.0, 0.0)  # a clock that stood still
    assert before == Hindsight() and sum(sums.error_counts) == 1
