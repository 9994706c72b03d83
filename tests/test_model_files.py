"""Where a model's files are found, and what is said when they are not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import errors

from memserve.errors import ModelError
from memserve.model_files import BUNDLED_MODEL, resolve_model, resolve_tokenizer, served_model_name


class FakeHub:
    """`download` that remembers what it was asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.asked: list[tuple[str, str | None, tuple[str, ...]]] = []

    def __call__(self, name: str, revision: str | None, patterns: tuple[str, ...]) -> Path:
        self.asked.append((name, revision, patterns))
        return self.folder


def test_no_model_is_the_bundled_one() -> None:
    assert resolve_model(None) == BUNDLED_MODEL
    assert (BUNDLED_MODEL / "config.json").exists()
    assert served_model_name(None) == "memserve-tiny"


def test_folder_goes_before_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "org" / "model"
    folder.mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    hub = FakeHub(tmp_path)
    assert resolve_model("org/model", download=hub) == Path("org/model")
    assert resolve_model(str(folder), download=hub) == folder
    assert hub.asked == []
    assert served_model_name("org/model") == "model"
    monkeypatch.chdir(folder)
    assert served_model_name(".") == "model"


def test_hub_is_asked_for_safe_files_only(tmp_path: Path) -> None:
    hub = FakeHub(tmp_path)
    assert resolve_model("Org/Some-Model_1.5", "main", download=hub) == tmp_path
    assert resolve_model("gpt", load_format="dummy", download=hub) == tmp_path
    assert resolve_tokenizer("Org/Tokenizer", download=hub) == tmp_path
    (name, revision, patterns), (_, _, dummy), (_, _, tokenizer) = hub.asked
    assert (name, revision) == ("Org/Some-Model_1.5", "main")
    assert "*.safetensors" in patterns
    assert "*.safetensors" not in (*dummy, *tokenizer)
    assert not any(pattern.endswith((".bin", ".py", ".pt", "*")) for pattern in patterns)
    assert served_model_name("Org/Some-Model_1.5") == "Org/Some-Model_1.5"


@pytest.mark.parametrize("name", ["/no/such", "./no-such", "../no-such", "~/no-such-folder", "a b", "a/b/c"])
def test_what_can_only_be_a_folder(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match="no such folder"):
        resolve_model(name, download=FakeHub(tmp_path))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("", "^an empty name is no model"),
        (" ", "^an empty name"),
        ("~no-such-user/model", "home directory"),
        ("/" + "x" * 300, "File name too long"),
    ],
)
def test_names_that_cannot_even_be_looked_up(name: str, reason: str, tmp_path: Path) -> None:
    for resolve in (resolve_model, resolve_tokenizer):
        with pytest.raises(ModelError, match=reason):
            resolve(name, download=FakeHub(tmp_path))


def test_folder_that_may_not_be_looked_into(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(path: Path) -> bool:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "exists", refuse)
    with pytest.raises(ModelError, match="^/root/model: Permission denied$"):
        resolve_model("/root/model", download=FakeHub(tmp_path))


def test_file_is_no_model_but_may_be_a_tokenizer(tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    file.write_text("{}")
    with pytest.raises(ModelError, match="is not a folder"):
        resolve_model(str(file))
    assert resolve_tokenizer(str(file)) == file


def _refusal(kind: type[Exception]) -> Exception:
    """An error of the hub without the response that its constructor wants, which differs between versions."""
    error = kind.__new__(kind)
    error.args = ("40x",)
    return error


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (_refusal(errors.GatedRepoError), "Org/Model is gated"),
        (_refusal(errors.RepositoryNotFoundError), "neither a folder here nor a public"),
        (_refusal(errors.RevisionNotFoundError), "Org/Model has no revision v2"),
        (errors.LocalEntryNotFoundError("no network"), "hub cannot be reached"),
        (RuntimeError("timed out\nat length"), "cannot be fetched .*: timed out$"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (RuntimeError(), "RuntimeError"),
    ],
)
def test_hub_errors_in_plain_words(error: Exception, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str, **options: Any) -> str:
        assert options["revision"] == "v2"
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(ModelError, match=message) as raised:
        resolve_model("Org/Model", "v2")
    assert "\n" not in str(raised.value)
