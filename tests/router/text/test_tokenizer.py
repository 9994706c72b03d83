"""Tokenizer and incremental decoding, on the bundled vocabulary and on shared ones where present."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, processors

import memserve
from memserve.errors import ModelError
from memserve.router.text.detokenizer import DecoderSpec, Start, TokenRule, WindowDecoder, read_rule
from memserve.router.text.tokenizer import Tokenizer

TINY_MODEL = Path(memserve.__file__).parent / "tiny_model"
SHARED = Path(__file__).parents[3].parent / "shared" / "data" / "tokenizers"
TINY = Tokenizer.load(TINY_MODEL)
FOLDERS = [TINY_MODEL, SHARED / "gpt_neox_20b", SHARED / "minimind_6400"]

TEXTS = [
    "Hello, world!",
    "  two  spaces\n\n\ttabs\r\n",
    "👩‍👩‍👧‍👦 family, 🏳️‍🌈 flag, 👍🏽 thumb, 🇩🇪",
    "日本語のテキスト — Ελληνικά, עברית, العربية",
    "e\u0301 combining, \u200d joiner alone, \ufffd replacement, \x00 nul",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𐍈",
]


@pytest.fixture(params=FOLDERS, ids=lambda folder: folder.name, scope="module")
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    if not request.param.exists():
        pytest.skip(f"{request.param} is not here")
    return Tokenizer.load(request.param)


def stream(tokenizer: Tokenizer, token_ids: Sequence[int], *, skip: bool = True) -> list[str]:
    decoder = tokenizer.decoder(skip_special_tokens=skip)
    return [*(decoder.push(token_id) for token_id in token_ids), decoder.flush()]


# --- decoding ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_join_to_the_whole_and_are_never_broken(tokenizer: Tokenizer, text: str) -> None:
    token_ids = tokenizer.encode(text).tolist()
    pieces = stream(tokenizer, token_ids)
    assert "".join(pieces) == tokenizer.decode(token_ids)
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


def test_random_unicode(tokenizer: Tokenizer) -> None:
    random_ = random.Random(1)
    blocks = [
        (0x20, 0x7F),
        (0xA0, 0x24F),
        (0x4E00, 0x4F00),
        (0x1F300, 0x1F6FF),
        (0x200D, 0x200E),
        (0xFE0F, 0xFE10),
    ]
    for _ in range(100):
        text = "".join(chr(random_.randrange(*random_.choice(blocks))) for _ in range(30))
        token_ids = tokenizer.encode(text).tolist()
        pieces = stream(tokenizer, token_ids)
        assert "".join(pieces) == tokenizer.decode(token_ids)
        assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("skip", [True, False])
def test_random_token_ids(tokenizer: Tokenizer, skip: bool) -> None:
    random_ = random.Random(2)
    for _ in range(100):
        token_ids = [random_.randrange(tokenizer.vocab_size + 50) for _ in range(40)]  # some unknown
        whole = tokenizer.decode(token_ids, skip_special_tokens=skip)
        assert "".join(stream(tokenizer, token_ids, skip=skip)) == whole


def test_every_token_has_its_bytes(tokenizer: Tokenizer) -> None:
    for token_id in range(tokenizer.vocab_size):
        text = tokenizer.token_bytes(token_id).decode("utf-8", errors="replace")
        assert text == tokenizer.decode([token_id], skip_special_tokens=False)


def test_special_tokens_are_skipped_or_shown(tiny_tokenizer: Tokenizer) -> None:
    token_ids = tiny_tokenizer.encode("a<|im_end|>b").tolist()
    assert "".join(stream(tiny_tokenizer, token_ids)) == "ab"
    assert "".join(stream(tiny_tokenizer, token_ids, skip=False)) == "a<|im_end|>b"


def test_a_character_that_never_ends_comes_with_flush(tiny_tokenizer: Tokenizer) -> None:
    token_ids = tiny_tokenizer.encode("👍").tolist()
    assert len(token_ids) > 1
    pieces = stream(tiny_tokenizer, token_ids[:-1])
    assert pieces[:-1] == [""] * (len(token_ids) - 1)
    assert pieces[-1] == "\ufffd"


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=40))
def test_window_decoder_joins_to_the_whole(text: str) -> None:
    tokenizer = TINY
    token_ids = tokenizer.encode(text).tolist()
    decoder = WindowDecoder(tokenizer.decode)
    pieces = [*map(decoder.push, token_ids), decoder.flush()]
    assert "".join(pieces) == tokenizer.decode(token_ids)


def test_window_decoder_looks_at_few_tokens_however_long_the_garbage() -> None:
    lengths = []

    def decode(token_ids: Sequence[int]) -> str:
        lengths.append(len(token_ids))
        return "\ufffd" * len(token_ids)

    decoder = WindowDecoder(decode, context=range(100))
    pieces = [decoder.push(7) for _ in range(500)] + [decoder.flush()]
    assert "".join(pieces) == "\ufffd" * 500
    assert max(lengths) <= 20


# --- sentencepiece vocabularies ----------------------------------------------------------------------------


def make_sentencepiece(*, strip: bool = True) -> tokenizers.Tokenizer:
    """A vocabulary as Llama 2 has it: ▁ for blanks, <0xNN> for bytes without a token."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += ["▁", "▁Hello", "Hello", "▁world", "é", "▁▁", "!"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, [], byte_fallback=True, unk_token="<unk>"))
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if strip else steps)
    return backend


def load(
    backend: tokenizers.Tokenizer, folder: Path, config: Mapping[str, object] | None = None
) -> Tokenizer:
    backend.save(str(folder / "tokenizer.json"))
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return Tokenizer.load(folder)


def ids_of(tokenizer: Tokenizer, spelled: Sequence[str]) -> list[int]:
    """Ids of tokens as the vocabulary writes them."""
    ids = {tokenizer._backend.id_to_token(i): i for i in range(tokenizer.vocab_size)}
    return [ids[token] for token in spelled]


@pytest.mark.parametrize("strip", [True, False])
def test_sentencepiece_text(tmp_path: Path, strip: bool) -> None:
    tokenizer = load(make_sentencepiece(strip=strip), tmp_path)
    spelled = ["▁Hello", "▁world", "<0xF0>", "<0x9F>", "<0x91>", "<0x8D>", "▁▁", "é", "!"]
    token_ids = ids_of(tokenizer, spelled)
    pieces = stream(tokenizer, token_ids)
    assert "".join(pieces) == tokenizer.decode(token_ids) == ("" if strip else " ") + "Hello world👍  é!"
    assert pieces[2:6] == ["", "", "", "👍"]
    # after a prompt the first blank is one between words
    decoder = tokenizer.decoder(context=token_ids)
    assert decoder.push(token_ids[1]) == " world"


def test_rules_of_decoders() -> None:
    byte_level = DecoderSpec("ByteLevel")
    assert read_rule(byte_level) == TokenRule(byte_level=True)
    assert read_rule(DecoderSpec("Sequence", decoders=(byte_level,))) == TokenRule(byte_level=True)
    metaspace = DecoderSpec("Metaspace", replacement="▁")
    assert read_rule(metaspace) == TokenRule(byte_level=False, space="▁", start=Start.STRIP_ALL)
    assert read_rule(None) is None
    assert read_rule(DecoderSpec("WordPiece")) is None
    assert read_rule(DecoderSpec("Replace", pattern={"Regex": "x+"}, content=" ")) is None
    assert read_rule(DecoderSpec("Strip", content="x", start=1)) is None
    wrong_order = (DecoderSpec("ByteFallback"), DecoderSpec("Replace", pattern={"String": "▁"}, content=" "))
    assert read_rule(DecoderSpec("Sequence", decoders=wrong_order)) is None


def test_metaspace(tmp_path: Path) -> None:
    backend = make_sentencepiece()
    backend.decoder = decoders.Metaspace()
    tokenizer = load(backend, tmp_path)
    token_ids = ids_of(tokenizer, ["▁▁", "▁Hello", "▁world"])
    assert "".join(stream(tokenizer, token_ids)) == tokenizer.decode(token_ids)


def test_a_vocabulary_of_unknown_spelling(tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer(
        models.WordPiece({"[UNK]": 0, "hel": 1, "##lo": 2, "world": 3}, unk_token="[UNK]")
    )
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.WordPiece()
    tokenizer = load(backend, tmp_path)
    token_ids = tokenizer.encode("hello world hello").tolist()
    pieces = stream(tokenizer, token_ids)
    assert "".join(pieces) == tokenizer.decode(token_ids) == "hello world hello"
    assert tokenizer.token_bytes(3) == b"world"


# --- encoding ---------------------------------------------------------------------------------------------


def test_bos_as_the_config_says(tmp_path: Path) -> None:
    named = {"bos_token": {"content": "<s>"}, "eos_token": "</s>", "pad_token": None}
    plain = load(make_sentencepiece(), tmp_path, named)
    assert plain.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}
    assert plain.encode("Hello").tolist()[0] != 1
    both = load(make_sentencepiece(), tmp_path, named | {"add_bos_token": True, "add_eos_token": True})
    assert both.encode("!").tolist() == [1, *plain.encode("!").tolist(), 2]
    assert both.encode("!", add_special_tokens=False).tolist() == plain.encode("!").tolist()
    # tokenizer.json adds it, the config says not to
    backend = make_sentencepiece()
    backend.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    (tmp_path / "tokenizer_config.json").unlink()
    assert load(backend, tmp_path).encode("!").tolist()[0] == 1
    assert load(backend, tmp_path, named | {"add_bos_token": False}).encode("!").tolist()[0] != 1


def test_same_ids_as_transformers(tokenizer: Tokenizer) -> None:
    transformers = pytest.importorskip("transformers")
    folder = next(f for f in FOLDERS if f.exists() and Tokenizer.load(f).vocab_size == tokenizer.vocab_size)
    if not (folder / "tokenizer_config.json").exists():
        pytest.skip("transformers needs a tokenizer_config.json")
    oracle = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    for text in TEXTS:
        assert tokenizer.encode(text).tolist() == oracle(text)["input_ids"]


def test_truncation_and_padding_of_the_file_are_off(tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer.from_file(str(TINY_MODEL / "tokenizer.json"))
    backend.enable_truncation(4)
    backend.enable_padding(length=64)
    tokenizer = load(backend, tmp_path)
    text = "one two three four five six seven"
    assert tokenizer.encode(text).tolist() == Tokenizer.load(TINY_MODEL).encode(text).tolist()


def test_max_chars_is_a_bound(tokenizer: Tokenizer) -> None:
    for text in TEXTS:
        assert len(text) <= tokenizer.max_chars(len(tokenizer.encode(text)))


# --- broken folders ---------------------------------------------------------------------------------------


def test_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no tokenizer"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{}", b"[", b"\xff\xfe", b'{"decoder": 3}', b"[" * 100_000])
def test_broken_tokenizer(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(ModelError, match="broken") as caught:
        Tokenizer.load(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content", ["[]", "{", '{"bos_token": 3}', '{"add_bos_token": 1}', '{"added_tokens_decoder": {"0": 1}}']
)
def test_broken_tokenizer_config(tmp_path: Path, content: str) -> None:
    make_sentencepiece().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(content)
    with pytest.raises(ModelError):
        Tokenizer.load(tmp_path)


def test_bos_without_an_id(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="<begin>"):
        load(make_sentencepiece(), tmp_path, {"add_bos_token": True, "bos_token": "<begin>"})
