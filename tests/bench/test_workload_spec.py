"""From a description to a workload, and the published data against the statistics printed beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import memserve
from memserve.bench.generators import Synthetic
from memserve.bench.reuse import measure_reuse
from memserve.bench.shaping import Shape
from memserve.bench.text_tokens import TextTokens
from memserve.bench.workload import Workload, expand
from memserve.bench.workload_spec import Source, WorkloadSpec, load_workload
from memserve.errors import ConfigError, WorkloadError

TINY_MODEL = Path(memserve.__file__).parent / "tiny_model"
SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"
GENERATORS = [source for source in Source if not source.reads_file]


def write_trace(tmp_path: Path, num_rows: int) -> Path:
    file = tmp_path / "small_trace.jsonl"
    rows = [
        {"timestamp": 100 * n, "input_length": 600, "output_length": 50, "hash_ids": [0, 1 + n % 3]}
        for n in range(num_rows)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def lengths(workload: Workload) -> list[int]:
    return [len(turn.input) for session in workload.sessions for turn in session.turns]


@pytest.mark.parametrize("source", GENERATORS)
def test_every_generator_makes_what_is_asked_for(source: Source) -> None:
    spec = WorkloadSpec(source, seed=3, shape=Shape(num_requests=25, max_prompt_tokens=500))
    workload = load_workload(spec)
    assert workload.name == source.value and workload.num_requests == 25
    assert not workload.is_text and not workload.has_arrivals
    assert len({session.id for session in workload.sessions}) == len(workload.sessions)
    ids = [token for session in workload.sessions for token in expand(session.turns[0].input)]
    assert all(isinstance(token, int) and 10 <= token < 500 for token in ids)
    assert max(len(session.turns[0].input) for session in workload.sessions) <= 500
    assert load_workload(spec) == workload
    assert len(load_workload(WorkloadSpec(source)).sessions) == 100
    assert load_workload(WorkloadSpec(source, shape=Shape(num_requests=120))).num_requests == 120


@pytest.mark.parametrize("tokenizer", [None, TINY_MODEL], ids=["estimate", "tokenizer"])
def test_made_up_prompts_may_be_text(tokenizer: Path | None) -> None:
    shape = Shape(num_sessions=4, max_prompt_tokens=300)
    spec = WorkloadSpec(Source.LOOGLE_LIKE, tokenizer=tokenizer, as_text=True, shape=shape)
    workload = load_workload(spec)
    prompts = [expand(session.turns[0].input) for session in workload.sessions]
    assert workload.is_text and all(isinstance(prompt, str) for prompt in prompts)
    assert "text, lengths " + ("estimated" if tokenizer is None else "exact") in workload.description
    if tokenizer is not None:
        counter = TextTokens.load(tokenizer)
        assert [counter.count(str(prompt)) for prompt in prompts] == lengths(workload)


def test_a_trace_is_shaped_and_described(tmp_path: Path) -> None:
    file = write_trace(tmp_path, 20)
    shape = Shape(num_requests=10, length_scale=0.125, time_scale=2, max_output_tokens=5)
    workload = load_workload(WorkloadSpec(Source.MOONCAKE, file, shape=shape))
    assert workload.name == "small_trace" and workload.has_arrivals
    assert [session.at_s for session in workload.sessions] == pytest.approx([0.2 * n for n in range(10)])
    # 512 / 8 + 88 / 8, the first 64 shared by all.
    assert lengths(workload) == [75] * 10
    prompts = [expand(session.turns[0].input) for session in workload.sessions]
    assert len({tuple(prompt[:64]) for prompt in prompts}) == 1
    assert len({tuple(prompt) for prompt in prompts}) == 3
    assert all(session.turns[0].max_tokens == 5 for session in workload.sessions)
    assert workload.description == (
        "10 of 20 sessions, 10 requests, seed 0, token ids, lengths exact, length x 0.125, time x 2, "
        "answers at most 5"
    )


def test_sessions_are_text_whatever_else_is_said(tmp_path: Path) -> None:
    folder = tmp_path / "chats"
    folder.mkdir()
    row = {"id": "a", "turns": [{"in": "Hello there, cat", "out": ""}]}
    (folder / "sessions.jsonl").write_text(json.dumps(row))
    for path in (folder, folder / "sessions.jsonl"):
        workload = load_workload(WorkloadSpec(Source.SESSIONS, path, default_output_tokens=9))
        assert workload.name == "chats" and workload.is_text
        assert workload.sessions[0].turns[0].max_tokens == 9
        assert "lengths estimated" in workload.description
    ratio = WorkloadSpec(Source.SESSIONS, folder, shape=Shape(sessions_per_prefix=2))
    with pytest.raises(ConfigError, match="no two sessions of this workload have a prefix in common"):
        load_workload(ratio)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": Source.AZURE}, "the workload azure needs a file"),
        ({"source": Source.RANDOM, "path": Path("x")}, "the workload random is made up and reads no file"),
        ({"source": Source.RANDOM, "seed": -1}, "seed must not be negative"),
        ({"source": Source.RANDOM, "default_output_tokens": 0}, "default_output_tokens must be at least 1"),
        ({"source": Source.REACT_LIKE, "synthetic": Synthetic()}, "react-like has lengths of its own"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        WorkloadSpec(**options)


def test_a_missing_tokenizer_is_named() -> None:
    with pytest.raises(WorkloadError, match="the tokenizer cannot be read"):
        load_workload(WorkloadSpec(Source.RANDOM, tokenizer=Path("/nowhere")))


# Published data, where it stands beside the repository


def shared(name: str) -> Path:
    if not (SHARED / name).exists():
        pytest.skip(f"{name} is not beside the repository (../shared/data/{name})")
    return SHARED / name


@pytest.fixture(scope="module")
def gpt_neox() -> TextTokens:
    return TextTokens.load(shared("tokenizers/gpt_neox_20b"))


@pytest.mark.parametrize(
    ("name", "num_sessions", "num_requests", "num_tokens", "ratio", "ratio_with_answers"),
    [
        ("react_hotpotqa", 89, 309, 595_836, 0.918, 0.929),
        ("mt_bench", 37, 74, 8_027, 0.231, 0.628),
        ("oasst_trees", 321, 526, 60_725, 0.588, 0.876),
    ],
)
def test_session_files_have_the_statistics_printed_beside_them(
    gpt_neox: TextTokens,
    name: str,
    num_sessions: int,
    num_requests: int,
    num_tokens: int,
    ratio: float,
    ratio_with_answers: float,
) -> None:
    workload = load_workload(WorkloadSpec(Source.SESSIONS, shared(name)), gpt_neox)
    assert (len(workload.sessions), workload.num_requests) == (num_sessions, num_requests)
    reuse = measure_reuse(workload, gpt_neox)
    # One token of difference: how a text is put together before it is tokenised.
    assert reuse.num_prompt_tokens == pytest.approx(num_tokens, abs=1)
    # A little lower than printed: a prompt's last token and an answer's last count as cached there.
    assert ratio - 0.008 < reuse.ratio < ratio + 0.001
    assert ratio_with_answers - 0.009 < reuse.ratio_with_answers < ratio_with_answers + 0.001


def test_documents_cut_to_a_tenth_are_still_shared(gpt_neox: TextTokens) -> None:
    spec = WorkloadSpec(Source.SESSIONS, shared("loogle"), shape=Shape(max_prompt_tokens=2048))
    workload = load_workload(spec, gpt_neox)
    reuse = measure_reuse(workload, gpt_neox)
    assert workload.num_requests == 60
    assert max(request.num_prompt_tokens for request in reuse.requests) <= 2048
    # 0.917 at full length.
    assert reuse.ratio > 0.9


@pytest.mark.parametrize(
    ("name", "num_requests", "mean_input", "duration_s", "ratio"),
    [("conversation", 7304, 11477.7, 3536.999, 0.3555), ("synthetic", 2070, 15762.1, 1022.025, 0.6767)],
)
def test_mooncake_traces_have_the_statistics_printed_beside_them(
    name: str, num_requests: int, mean_input: float, duration_s: float, ratio: float
) -> None:
    file = shared(f"mooncake/{name}_trace.jsonl.gz")
    workload = load_workload(WorkloadSpec(Source.MOONCAKE, file))
    assert workload.num_requests == num_requests
    assert np.mean(lengths(workload)) == pytest.approx(mean_input, abs=0.1)
    assert workload.sessions[-1].at_s == pytest.approx(duration_s)
    # A sixteenth of the lengths: 32 tokens for what were 512, and the same share of them to be had.
    small = load_workload(WorkloadSpec(Source.MOONCAKE, file, shape=Shape(length_scale=1 / 16)))
    reuse = measure_reuse(small, TextTokens(), block_size=32)
    assert reuse.ratio == pytest.approx(ratio, abs=0.002)


@pytest.mark.parametrize(
    ("name", "num_requests", "duration_s", "mean_input", "mean_output"),
    [("code", 4409, 1422, 2041, 28), ("conv", 9683, 1743, 1237, 222)],
)
def test_azure_traces_have_the_statistics_printed_beside_them(
    name: str, num_requests: int, duration_s: float, mean_input: float, mean_output: float
) -> None:
    file = shared(f"azure_llm_2023/AzureLLMInferenceTrace_{name}.first_half.csv.gz")
    workload = load_workload(WorkloadSpec(Source.AZURE, file))
    assert workload.num_requests == num_requests
    assert workload.sessions[-1].at_s == pytest.approx(duration_s, abs=1)
    assert np.mean(lengths(workload)) == pytest.approx(mean_input, abs=1)
    answers = [session.turns[0].max_tokens for session in workload.sessions]
    assert np.mean(answers) == pytest.approx(mean_output, abs=1)


@pytest.mark.parametrize(
    ("made_up", "published", "tolerance"), [("react-like", 0.918, 0.02), ("loogle-like", 0.917, 0.01)]
)
def test_generators_share_as_much_as_what_they_are_fitted_to(
    made_up: str, published: float, tolerance: float
) -> None:
    spec = WorkloadSpec(Source(made_up), shape=Shape(num_sessions=96))
    assert measure_reuse(load_workload(spec), TextTokens()).ratio == pytest.approx(published, abs=tolerance)
