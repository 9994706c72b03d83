"""A trained model from elsewhere, served: stories260K tells over HTTP the story that its own page shows."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.server_process import Server
from tests.models import stories260k


@pytest.fixture(scope="module")
def source() -> Path:
    folder = stories260k.find()
    if folder is None:
        pytest.skip("stories260K is not beside the repository (../shared/data/stories260K)")
    return folder


@pytest.fixture(scope="module")
def server(source: Path, start: Callable[..., Server], tmp_path_factory: pytest.TempPathFactory) -> Server:
    folder = tmp_path_factory.mktemp("stories260K")
    stories260k.convert(source, folder)
    return start("--model", str(folder), "--dtype", "float32", "--prefill", "1", "--decode", "1")


def test_whole(server: Server, source: Path) -> None:
    story = server.complete("", 256)  # an empty text is the token bos alone
    assert story["text"] == stories260k.greedy_text(source)
    assert server.gauges()["memserve_pulls_total"] == 1


def test_streamed(server: Server, source: Path) -> None:
    body = {"prompt": "", "max_tokens": 256, "temperature": 0, "stream": True}
    request = urllib.request.Request(
        f"{server.url}/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        *events, done = [line[6:] for line in answer if line.startswith(b"data: ")]
    assert done == b"[DONE]\n"
    pieces = [choice["text"] for event in events for choice in json.loads(event)["choices"]]
    assert "".join(pieces) == stories260k.greedy_text(source)
    assert len(pieces) > 128


def test_cut_and_continued(server: Server, source: Path) -> None:
    """The same story from its own beginning: what is prefilled now was drawn before."""
    expected = stories260k.greedy_text(source)
    first = server.complete("", 100, return_token_ids=True)
    rest = server.complete([1, *first["token_ids"]], 156)  # type: ignore[misc]
    assert f"{first['text']}{rest['text']}" == expected
