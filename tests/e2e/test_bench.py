"""`memserve bench` against our own server and the bundled model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from memserve.cli import cli
from tests.e2e.server_process import REPOSITORY, SHARED_DATA, Server

TOKENIZER = REPOSITORY / "memserve" / "tiny_model"


@pytest.fixture(scope="module")
def server(start: Callable[..., Server]) -> Server:
    return start("--max-model-len", "1024")


def bench(server: Server, out: Path, *args: object) -> dict[str, object]:
    """The report of a run whose requests all complete, with as many tokens as were asked for."""
    words = ["bench", "serve", *args, "--url", server.url, "--json", out, "--seed", 1]
    result = CliRunner().invoke(cli, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    report = json.loads(out.read_text())["report"]
    summary = report["summary"]
    assert summary["num_completed"] == summary["num_requests"] > 0
    assert summary["num_short"] == 0
    assert report["notes"] == []  # the cache was flushed, usage and cached tokens are told
    assert min(record["cached_tokens"] for record in report["requests"]) == 0, "somebody came first"
    assert summary["num_with_usage"] == summary["num_completed"]
    for record in report["requests"]:
        assert len(record["chunk_times"]) <= record["output_tokens"] == record["max_tokens"]
    return report  # type: ignore[no-any-return]


# one prefix for all, conversations of some turns
REACT = ("react-like", "--sessions", 4, "--length-scale", 0.15, "--concurrency", 2)


def test_token_ids_replayed_and_live(server: Server, tmp_path: Path) -> None:
    replayed = bench(server, tmp_path / "a.json", *REACT)
    live = bench(server, tmp_path / "b.json", *REACT, "--answers", "live")
    for report in (replayed, live):
        summary = report["summary"]
        assert isinstance(summary, dict)
        assert summary["cached_ratio"] > 0.5
        # prompts of both runs are equally long, and what the model drew is in the live ones
        assert summary["prompt_tokens"] == replayed["summary"]["prompt_tokens"]  # type: ignore[index]


def test_chats(server: Server, tmp_path: Path) -> None:
    args = ("--as-text", "--tokenizer", TOKENIZER, "--endpoint", "chat", "--max-output-tokens", 8)
    report = bench(server, tmp_path / "c.json", *REACT, *args)
    assert report["target"]["endpoint"] == "chat"  # type: ignore[index]


def test_logged_sessions(server: Server, tmp_path: Path) -> None:
    folder = SHARED_DATA / "react_hotpotqa"
    if not folder.exists():
        pytest.skip(f"{folder} is not there")
    args = ("--sessions", 3, "--tokenizer", TOKENIZER, "--max-prompt-tokens", 600, "--max-output-tokens", 8)
    report = bench(server, tmp_path / "d.json", "sessions", folder, *args, "--rate", 20)
    summary = report["summary"]
    assert isinstance(summary, dict)
    assert 0 < summary["cached_ratio"] <= 1 and summary["available_ratio"] > 0.5
