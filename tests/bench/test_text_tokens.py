"""Counting and cutting text, with the bundled model's tokenizer and without one."""

from __future__ import annotations

from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

import memserve
from memserve.bench.text_tokens import TextTokens
from memserve.bench.tokens import Tokens
from memserve.errors import ConfigError, WorkloadError

TINY_MODEL = Path(memserve.__file__).parent / "tiny_model"
EXACT = TextTokens.load(TINY_MODEL)
ESTIMATE = TextTokens()

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


@pytest.mark.parametrize("text", [EXACT, ESTIMATE], ids=["tokenizer", "estimate"])
@given(content=TEXTS, num_tokens=st.integers(0, 30))
def test_a_cut_is_a_beginning_that_fits(text: TextTokens, content: str, num_tokens: int) -> None:
    cut = text.cut(content, num_tokens)
    assert content.startswith(cut) and text.count(cut) <= num_tokens
    if text.count(content) <= num_tokens:
        assert cut == content


@given(st.lists(st.sampled_from([" the", " and", " was"]), min_size=20, max_size=40))
def test_a_cut_of_plain_words_has_the_tokens_asked_for(parts: list[str]) -> None:
    assert EXACT.cut("".join(parts), 10) == "".join(parts[:10])
    assert ESTIMATE.cut("".join(parts), 5) == "".join(parts)[:20]


def test_a_character_of_several_tokens_is_not_split() -> None:
    assert EXACT.count("🦆") > 1
    assert EXACT.cut("🦆🦆", 1) == "" and ESTIMATE.cut("é" * 4, 1) == "éé" and ESTIMATE.cut("a€€", 1) == "a€"


def test_the_estimate_is_four_bytes_a_token() -> None:
    assert [ESTIMATE.count(text) for text in ("", "a", "abcd", "abcde", "éééé")] == [0, 1, 1, 2, 2]
    assert ESTIMATE.ids("abcdx") == [int.from_bytes(b"abcd", "little"), ord("x")]


def test_ids_are_those_of_the_tokenizer_without_special_tokens() -> None:
    backend = tokenizers.Tokenizer.from_file(str(TINY_MODEL / "tokenizer.json"))
    assert EXACT.ids("The cat sat.") == backend.encode("The cat sat.", add_special_tokens=False).ids
    assert EXACT.exact and not ESTIMATE.exact


def test_made_up_ids_avoid_special_tokens_and_stay_below_the_limit() -> None:
    backend = tokenizers.Tokenizer.from_file(str(TINY_MODEL / "tokenizer.json"))
    added = set(backend.get_added_tokens_decoder())
    whole = EXACT.vocabulary(0, vocab_size=None, as_text=False)
    ids = set(range(whole.first_id, whole.first_id + whole.size))
    assert not ids & added and max(ids) < backend.get_vocab_size() and len(ids) > 4000
    small = EXACT.vocabulary(0, vocab_size=300, as_text=False)
    assert small.first_id + small.size == 300
    default = ESTIMATE.vocabulary(0, vocab_size=None, as_text=False)
    assert (default.first_id, default.first_id + default.size) == (10, 500)
    assert ESTIMATE.vocabulary(0, vocab_size=32000, as_text=False).size == 31990
    # Ids that the tokenizer does not have are not made up, whatever the option says.
    assert EXACT.vocabulary(0, vocab_size=10**6, as_text=False) == whole
    with pytest.raises(ConfigError, match="a vocabulary of 70 ids is too small: at least 74"):
        ESTIMATE.vocabulary(0, vocab_size=70, as_text=False)


def test_made_up_text_has_one_token_a_word() -> None:
    vocabulary = EXACT.vocabulary(0, vocab_size=None, as_text=True)
    text = Tokens(vocabulary, list(range(20)), [10] * 20).expand()
    assert isinstance(text, str) and EXACT.count(text) == 200
    plain = Tokens(ESTIMATE.vocabulary(0, vocab_size=None, as_text=True), [1], [50]).expand()
    assert isinstance(plain, str) and len(plain.split()) == 50


def test_a_tokenizer_without_words_makes_no_text(tmp_path: Path) -> None:
    letters = {letter: number for number, letter in enumerate("abcdefgh")}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(letters, unk_token="a"))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ConfigError, match="only 0 words of one token"):
        TextTokens.load(tmp_path).vocabulary(0, vocab_size=None, as_text=True)


def test_words_that_the_tokenizer_does_not_give_back_are_left_out() -> None:
    words = {f"▁{a}{b}": 8 * n + m for n, a in enumerate("abcdefghij") for m, b in enumerate("abcdefgh")}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({**words, "?": 99}, unk_token="?"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    assert TextTokens(tokenizer).vocabulary(0, vocab_size=None, as_text=True).size == 80
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    with pytest.raises(ConfigError, match="only 0 words of one token"):
        TextTokens(tokenizer).vocabulary(0, vocab_size=None, as_text=True)


def test_a_file_that_is_no_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(WorkloadError, match=r"tokenizer\.json: the tokenizer cannot be read: No such file"):
        TextTokens.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(WorkloadError, match=r"tokenizer\.json: not a tokenizer: "):
        TextTokens.load(tmp_path)
