"""What /metrics says."""

from __future__ import annotations

from collections.abc import Callable

from memserve.config import Role
from memserve.messages import CachedTokens, Load
from memserve.router.engine_api import (
    EngineStatus,
    GenerateRequest,
    InstanceState,
    InstanceStatus,
    Listener,
)
from memserve.router.http.openai import PromptTokensDetails, Usage
from memserve.router.metrics import Metrics
from memserve.router.scheduling.hindsight import Hindsight


class IdleEngine:
    """Only has a status."""

    def __init__(self) -> None:
        load = Load(num_waiting=1, num_running=2, num_free_blocks=3, num_active_blocks=4, oldest_offer_s=1.5)
        row = InstanceStatus("prefill-0", Role.PREFILL, 1, InstanceState.READY, load)
        down = InstanceStatus("decode-0", Role.DECODE, 1, InstanceState.DOWN, Load())
        self._status = EngineStatus(
            (row, down),
            num_waiting=5,
            pulls_total=7,
            pull_failures_total=1,
            pulled_tokens_total=8,
            pull_ms_total=1500.0,
            prefill_pulls_total=2,
            prefill_pulled_bytes_total=512,
            hindsight=Hindsight(40, 30, 20, 10, 250.0, 500.0, 0.5, [0, 0, 0, 0, 0, 1, 0, 0, 0, 0]),
        )

    def submit(self, request: GenerateRequest, listener: Listener) -> None:
        raise AssertionError

    def cancel(self, request_id: str) -> None:
        raise AssertionError

    def check_room(self, num_sequences: int) -> None:
        pass

    def ready(self) -> bool:
        return True

    def status(self) -> EngineStatus:
        return self._status


def make_clock(times: list[float]) -> Callable[[], float]:
    return iter(times).__next__


def test_status_of_the_engine() -> None:
    lines = Metrics(IdleEngine(), started_at=1.5).render().decode().splitlines()
    for line in (
        'memserve_requests{state="waiting"} 5.0',
        "memserve_pulls_total 7.0",
        "memserve_pull_failures_total 1.0",
        "memserve_pulled_tokens_total 8.0",
        "memserve_pull_seconds_total 1.5",
        "memserve_refused_total 0.0",
        "memserve_abandoned_total 0.0",
        "memserve_stale_answers_total 0.0",
        'memserve_instance_up{instance="prefill-0",role="prefill"} 1.0',
        'memserve_instance_up{instance="decode-0",role="decode"} 0.0',
        'memserve_blocks{instance="prefill-0",state="free"} 3.0',
        'memserve_blocks{instance="prefill-0",state="active"} 4.0',
        'memserve_instance_requests{instance="prefill-0",state="running"} 2.0',
        'memserve_oldest_offer_seconds{instance="prefill-0"} 1.5',
        "memserve_start_time_seconds 1.5",
        "memserve_prefill_pulls_total 2.0",
        "memserve_prefill_pulled_bytes_total 512.0",
        "memserve_prefilled_prompt_tokens_total 40.0",
        'memserve_cache_tokens_total{stage="available"} 30.0',
        'memserve_cache_tokens_total{stage="expected"} 20.0',
        'memserve_cache_tokens_total{stage="captured"} 10.0',
        "memserve_predicted_ttft_seconds_total 0.25",
        "memserve_measured_ttft_seconds_total 0.5",
        'memserve_ttft_prediction_error_ratio_bucket{le="0.25"} 0.0',
        'memserve_ttft_prediction_error_ratio_bucket{le="0.5"} 1.0',
        "memserve_ttft_prediction_error_ratio_sum 0.5",
    ):
        assert line in lines


def test_times_and_tokens_of_a_job() -> None:
    metrics = Metrics(IdleEngine(), make_clock([10.0, 10.5, 10.7, 11.0, 12.0]))
    timer = metrics.start_request()
    timer.on_tokens(0, 1)  # 0.5 s after the start
    timer.on_tokens(0, 2)  # two tokens 0.2 s later: 0.1 s each
    timer.on_tokens(0, 0)  # the end alone is no token
    timer.on_tokens(1, 1)  # another choice: 1.0 s after the start
    metrics.on_finished(timer, Usage(9, 4, 13, PromptTokensDetails(8)), [CachedTokens(5, 2, 1, "p")])
    metrics.on_prompt(0, False)
    metrics.on_prompt(7, True)
    metrics.on_prompt(5, False)
    metrics.on_response("/v1/completions", 200)
    lines = metrics.render().decode().splitlines()
    for line in (
        "memserve_time_to_first_token_seconds_count 2.0",
        "memserve_time_to_first_token_seconds_sum 1.5",
        "memserve_inter_token_latency_seconds_count 2.0",
        "# TYPE memserve_time_to_first_token_seconds histogram",
        'memserve_time_to_first_token_seconds_bucket{le="0.25"} 0.0',
        'memserve_time_to_first_token_seconds_bucket{le="0.5"} 1.0',  # the bound itself is in
        'memserve_time_to_first_token_seconds_bucket{le="1.0"} 2.0',
        'memserve_time_to_first_token_seconds_bucket{le="+Inf"} 2.0',
        "memserve_request_duration_seconds_sum 2.0",
        "memserve_prompt_tokens_total 9.0",
        'memserve_cached_prompt_tokens_total{source="device"} 5.0',
        'memserve_cached_prompt_tokens_total{source="host"} 2.0',
        'memserve_cached_prompt_tokens_total{source="pulled"} 1.0',
        "memserve_completion_tokens_total 4.0",
        "memserve_reused_histories_total 2.0",
        "memserve_reused_history_tokens_total 12.0",
        "memserve_diverged_prompts_total 1.0",
        'memserve_http_requests_total{endpoint="/v1/completions",status="200"} 1.0',
    ):
        assert line in lines
