"""A trained model from elsewhere: stories260K must tell the story that llama2.c tells."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer

from memserve.models.step import LogitRows
from tests.models import stories260k


@pytest.fixture(scope="module")
def source() -> Path:
    folder = stories260k.find()
    if folder is None:
        pytest.skip("stories260K is not beside the repository (../shared/data/stories260K)")
    return folder


@pytest.fixture(scope="module")
def folder(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stories260K")
    stories260k.convert(source, folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def llama2c_encode(pieces: list[tuple[bytes, float]], text: str) -> list[int]:
    """run.c's encode, step by step."""
    ids = {piece: token_id for token_id, (piece, _) in enumerate(pieces)}
    tokens = [1, *([ids[b" "]] if text else [])]
    for character in text:
        encoded = character.encode()
        tokens += [ids[encoded]] if encoded in ids else [byte + 3 for byte in encoded]
    while True:
        best = (-1e10, -1, -1)
        for index in range(len(tokens) - 1):
            merged = ids.get(pieces[tokens[index]][0] + pieces[tokens[index + 1]][0])
            if merged is not None and pieces[merged][1] > best[0]:
                best = (pieces[merged][1], index, merged)
        if best[1] < 0:
            return tokens
        tokens[best[1] : best[1] + 2] = [best[2]]


@pytest.mark.parametrize(
    "text",
    [
        "Once upon a time, there was a little girl named Lily.",
        "",
        " ",
        "  two  spaces ",
        "line\nbreak\n\n\ttab",
        "Ünïcödé ☃ 日本 🙂",
        "aaaaaaa hmmmm thethethe",
        '"What?!" said 123 & {x}',
    ],
)
def test_encodes_as_llama2c(source: Path, tokenizer: Tokenizer, text: str) -> None:
    pieces = stories260k.read_vocabulary(source / "tok512.bin", 512)
    ids = tokenizer.encode(text).ids
    assert ids == llama2c_encode(pieces, text)
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_greedy_story(source: Path, folder: Path, tokenizer: Tokenizer, make_model, dtype: str) -> None:
    model = make_model(folder, dtype, 16)
    run, token, drawn = model.start(), 1, []
    for _ in range(256):
        token = int(model.step((run, [token], LogitRows.LAST)).argmax())
        drawn.append(token)
    story, expected = tokenizer.decode(drawn), stories260k.greedy_text(source)
    if dtype == "float32":
        assert story == expected
    else:  # rounding may turn a close call, but not at once
        assert story[:60] == expected[:60]
