"""Remembered ids in the place of a text: always the same text, and the drawn ids wherever they may be."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tokenizers import normalizers, processors

import memserve
from memserve.router.text.token_history import Reading, Scope, TokenHistory
from memserve.router.text.tokenizer import Tokenizer
from tests.router.vocabularies import (
    END,
    THINK,
    TURN,
    byte_level,
    ids_of,
    load,
    said,
    sentencepiece,
    word_piece,
)

SHARED = Path(__file__).parents[3].parent / "shared" / "data" / "tokenizers"
TINY_MODEL = Path(memserve.__file__).parent / "tiny_model"
CHAT = Scope("", add_special_tokens=False)
TEXT = Scope("", add_special_tokens=True)


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load(byte_level(), tmp_path_factory.mktemp("small"))


def spelled(tokenizer: Tokenizer, token_ids: list[int]) -> str:
    return tokenizer.decode(token_ids, skip_special_tokens=False)


def answered(
    history: TokenHistory,
    tokenizer: Tokenizer,
    prompt: str,
    token_ids: list[int],
    *,
    scope: Scope = CHAT,
    text: str | None = None,
    skip: bool = True,
) -> tuple[Reading, str]:
    """One turn: the prompt is read, these ids are drawn, this text, or theirs, is delivered."""
    reading = history.read(prompt, scope)
    if text is None:
        text = said(tokenizer, reading.token_ids.tolist(), token_ids, skip=skip)
    history.remember(reading, token_ids, text)
    return reading, prompt + text


# --- what is reused ----------------------------------------------------------------------------------------


def test_a_conversation_keeps_its_tokens(small: Tokenizer) -> None:
    history = TokenHistory(small)
    # 1. "hello" was drawn as no tokenizer would cut it
    drawn = ids_of(small, "hel", "lo", " ", "wor", "ld", END)
    first, text = answered(history, small, f"hi{TURN}", drawn)
    assert first.num_reused == 0 and first.diverged_at is None
    assert text == f"hi{TURN}hello world"
    assert small.encode(text).tolist() != [*first.token_ids, *drawn[:-1]]
    # 2. the template sends it back with its end and the next turn
    prompt = f"{text}{END}\nhello{TURN}"
    second = history.read(prompt, CHAT)
    assert second.num_reused == len(first.token_ids) + 5
    assert second.token_ids.tolist() == [
        *first.token_ids,
        *drawn[:-1],
        *small.encode(f"{END}\nhello{TURN}").tolist(),
    ]
    assert spelled(small, second.token_ids.tolist()) == prompt
    assert second.diverged_at is None
    # 3. and so on; the conversation stays one sequence
    more = ids_of(small, "h", "e")
    history.remember(second, more, "he")
    assert len(history) == 1
    third = history.read(f"{prompt}he{END}", CHAT)
    assert third.token_ids.tolist() == [*second.token_ids, *more, *ids_of(small, END)]
    # 4. an earlier turn answered anew still knows what came before
    again = history.read(f"{text}{END}\nwell{TURN}", CHAT)
    assert again.num_reused == second.num_reused
    assert again.token_ids[: again.num_reused].tolist() == second.token_ids[: again.num_reused].tolist()


def test_salts_and_ways_of_tokenising_share_nothing(small: Tokenizer) -> None:
    history = TokenHistory(small)
    drawn = ids_of(small, "hel", "lo")
    _, text = answered(history, small, "hi", drawn, scope=Scope("mine", False))
    assert history.read(text, Scope("mine", False)).num_reused
    for scope in (Scope("", False), Scope("yours", False), Scope("mine", True)):
        reading = history.read(text, scope)
        assert (reading.num_reused, reading.diverged_at) == (0, None)
        assert reading.token_ids.tolist() == small.encode(text).tolist()


def test_nothing_is_reused_where_it_may_not(small: Tokenizer) -> None:
    history = TokenHistory(small)
    _, text = answered(history, small, "hi", ids_of(small, "hel", "lo"))
    reading = history.read(text, CHAT, may_reuse=False)
    assert reading.num_reused == 0
    assert reading.token_ids.tolist() == small.encode(text).tolist()


def test_a_prompt_that_two_threads_come_back_to(small: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever of them spells it last, its tokens end where they did."""
    history = TokenHistory(small)
    _, whole = answered(history, small, f"hello{TURN}", ids_of(small, "hel", "lo", " ", "wor", "ld"))
    spell = history._texts.ends_of_prompt
    inner: list[Reading] = []

    def meanwhile(*args: object, **kwargs: object) -> object:
        ends = spell(*args, **kwargs)
        monkeypatch.undo()
        inner.append(history.read(f"{whole}{END}", CHAT))
        return ends

    monkeypatch.setattr(history._texts, "ends_of_prompt", meanwhile)
    outer = history.read(f"{whole} h", CHAT)
    later = history.read(whole, CHAT)
    for reading, text in ((inner[0], f"{whole}{END}"), (outer, f"{whole} h"), (later, whole)):
        assert reading.num_reused == len(small.encode(f"hello{TURN}")) + 5
        assert spelled(small, reading.token_ids.tolist()) == text


def test_text_that_no_model_wrote_is_tokenised_as_ever(small: Tokenizer) -> None:
    history = TokenHistory(small)
    answered(history, small, "hello a", ids_of(small, " ", "w"))
    for prompt in ("hello", "hello and", "hellld", "hel", "h"):
        reading = history.read(prompt, CHAT)
        assert reading.num_reused == 0
        assert reading.token_ids.tolist() == small.encode(prompt).tolist()


def test_a_character_split_across_tokens(small: Tokenizer) -> None:
    history = TokenHistory(small)
    alphabet = {small.token_bytes(i): i for i in reversed(range(small.vocab_size))}
    e_acute = [alphabet[bytes([byte])] for byte in "é".encode()]
    n_tilde = [alphabet[bytes([byte])] for byte in "ñ".encode()]
    assert e_acute[0] == n_tilde[0]
    # 1. the answer ended within the second character
    reading, text = answered(history, small, "hi", [*e_acute, e_acute[0]])
    assert text == "hié\ufffd"
    prompt = history.read(text, CHAT)
    assert prompt.token_ids[: prompt.num_reused].tolist() == [*reading.token_ids, *e_acute]
    assert spelled(small, prompt.token_ids.tolist()) == text
    # 2. the prompt departs within the first one
    other = history.read("hiñ", CHAT)
    assert other.num_reused == 0 and spelled(small, other.token_ids.tolist()) == "hiñ"


def test_a_stop_string_or_a_blank_taken_away(small: Tokenizer) -> None:
    history = TokenHistory(small)
    drawn = ids_of(small, "hel", "lo", " a", " ", "wor")
    # 1. "a w" was a stop string: of " a" the blank was delivered
    reading, text = answered(history, small, "hi", drawn, text="hello ")
    continued = history.read(text + "hello", CHAT)
    assert continued.num_reused == len(reading.token_ids) + 2
    assert spelled(small, continued.token_ids.tolist()) == "hihello hello"
    # 2. the template trims what was delivered
    answered(history, small, "hey", ids_of(small, "hel", "lo", "  "))
    trimmed = history.read(f"heyhello{END}", CHAT)
    assert trimmed.num_reused == len(small.encode("hey")) + 2
    assert trimmed.diverged_at == trimmed.num_reused


def test_hidden_special_tokens_and_tokens_without_a_text(small: Tokenizer) -> None:
    history = TokenHistory(small)
    hidden = ids_of(small, "hel", THINK, TURN, "lo")
    # 1. TURN was not shown: what follows it cannot be reused; THINK is no special token
    reading, text = answered(history, small, "hi", hidden)
    assert text == f"hihel{THINK}lo"
    assert history.read(text, CHAT).num_reused == len(reading.token_ids) + 2
    # 2. shown, it is read as the token that it was, and could always be
    reading, text = answered(history, small, "hey", hidden, skip=False)
    again = history.read(text, CHAT)
    assert again.token_ids.tolist() == [*reading.token_ids, *hidden]
    assert text == f"heyhel{THINK}{TURN}lo"
    # 3. an id that the tokenizer does not know
    reading, text = answered(history, small, "h", [*ids_of(small, "hel"), small.vocab_size + 5, *hidden[-1:]])
    assert history.read(text, CHAT).num_reused == len(reading.token_ids) + 1


@pytest.mark.parametrize("added", [END, THINK])
def test_an_added_token_spelled_out_is_that_token(small: Tokenizer, added: str) -> None:
    """Drawn as plain tokens, wholly or in part, it comes back as a client's text always did."""
    name = added.strip("<|>")
    parts = (["<|", *name, "|>"]) if added == END else ["<", *name, ">"]
    plain = ids_of(small, *parts)
    (token_id,) = ids_of(small, added)
    # 1. all of it was drawn
    history = TokenHistory(small)
    first, text = answered(history, small, "hi", [*ids_of(small, "hel"), *plain, *ids_of(small, "lo")])
    reading = history.read(text, CHAT)
    assert reading.num_reused == len(first.token_ids) + 1
    assert reading.token_ids.tolist() == [
        *first.token_ids,
        *ids_of(small, "hel"),
        token_id,
        *ids_of(small, "lo"),
    ]
    # 2. the rest is the client's
    history = TokenHistory(small)
    first, text = answered(history, small, "hi", [*ids_of(small, "hel"), *plain[:-1]])
    reading = history.read(text + parts[-1], CHAT)
    assert reading.num_reused == len(first.token_ids) + 1
    assert reading.token_ids.tolist()[-1] == token_id
    assert history.read(text + "?", CHAT).num_reused == len(first.token_ids) + len(plain)
    # 3. its beginning was the prompt's
    history = TokenHistory(small)
    _, text = answered(history, small, "hi" + parts[0], plain[1:])
    reading = history.read(text, CHAT)
    assert reading.num_reused == 0 and reading.token_ids.tolist()[-1] == token_id


# --- divergence --------------------------------------------------------------------------------------------


def test_where_a_prompt_departs(small: Tokenizer) -> None:
    history = TokenHistory(small)
    drawn = ids_of(small, "hel", "lo", " a", "nd")
    first, text = answered(history, small, f"hi{TURN}", drawn)
    num_prompt = len(first.token_ids)
    for prompt, diverged_at in (
        (text + END, None),  # goes on
        (text, None),  # ends with it
        (f"hi{TURN}hello", None),  # ends within
        ("no", None),  # nothing in common
        (f"hi{TURN}hello w", num_prompt + 2),
        (f"hi{END}", 2),
        ("ha", 1),
        ("hel", None),  # a character, but no token
    ):
        assert history.read(prompt, CHAT).diverged_at == diverged_at, prompt


# --- vocabularies with habits ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["prepend", "always", "first", "never"])
@pytest.mark.parametrize("bos", [True, False])
def test_sentencepiece_blanks(tmp_path: Path, kind: str, bos: bool) -> None:
    tokenizer = load(sentencepiece(kind, bos=bos), tmp_path)
    vocabulary = {tokenizer._backend.id_to_token(i): i for i in range(tokenizer.vocab_size)}
    drawn = [vocabulary[token] for token in ("▁", "h", "e", "l", "l", "o")]
    history = TokenHistory(tokenizer)
    # 1. a text that is gone on with: at a blank, within a word, at the end
    first, text = answered(history, tokenizer, "hello [x]", drawn, scope=TEXT)
    assert text == "hello [x] hello"
    for more in (" we", "we", "", "\nlo", "\n\n", "é", "nd"):
        reading = history.read(text + more, TEXT)
        assert reading.num_reused == len(first.token_ids) + len(drawn), more
        assert reading.token_ids[: reading.num_reused].tolist() == [*first.token_ids, *drawn]
        plain = tokenizer.encode(text + more).tolist()
        assert tokenizer.decode(reading.token_ids.tolist()) == tokenizer.decode(plain) == text + more
    # 2. a template of Llama 2's kind, where the tokenizer puts blanks after special tokens
    first, text = answered(history, tokenizer, "<s>[he] hello [/he]", drawn)
    reading = history.read(f"{text}</s><s>[he] we [/he]", CHAT)
    assert reading.num_reused == len(first.token_ids) + len(drawn)
    plain = tokenizer.encode(f"{text}</s><s>[he] we [/he]", add_special_tokens=False).tolist()
    assert spelled(tokenizer, reading.token_ids.tolist()) == spelled(tokenizer, plain)
    num_rest = len(reading.token_ids) - reading.num_reused
    assert reading.token_ids[reading.num_reused :].tolist() == plain[-num_rest:]


def test_a_blank_in_front_of_a_byte_level_text(tmp_path: Path) -> None:
    tokenizer = load(byte_level(prefix_space=True), tmp_path)
    history = TokenHistory(tokenizer)
    first, text = answered(history, tokenizer, "hello", ids_of(tokenizer, " ", "w", "or"))
    for more in ("ld", " hello", "\nhello", "\n\n", END + "hello"):
        reading = history.read(text + more, CHAT)
        assert reading.num_reused == len(first.token_ids) + 3, more
        ours, plain = reading.token_ids.tolist(), tokenizer.encode(text + more).tolist()
        assert spelled(tokenizer, ours) == spelled(tokenizer, plain)


@pytest.mark.parametrize(
    ("normalizer", "changed"),
    [
        (normalizers.Lowercase(), "Hello"),
        (normalizers.NFC(), "he\u0301llo"),
        (normalizers.Strip(), " hello"),
        (normalizers.Strip(), "hello "),
    ],
)
def test_a_tokenizer_that_changes_the_text(tmp_path: Path, normalizer: object, changed: str) -> None:
    tokenizer = load(byte_level(normalizer=normalizer), tmp_path)
    history = TokenHistory(tokenizer)
    # 1. what it would change is left alone, in the prompt and in the rest
    assert spelled(tokenizer, tokenizer.encode(changed).tolist()) != changed
    _, text = answered(history, tokenizer, changed, ids_of(tokenizer, "hel", "lo"))
    assert history.read(text, CHAT).num_reused == 0 and len(history) == 0
    answered(history, tokenizer, "hi", ids_of(tokenizer, "hel", "lo"))
    reading = history.read(f"hihello{changed}", CHAT)
    assert reading.num_reused == 0
    assert reading.token_ids.tolist() == tokenizer.encode(f"hihello{changed}").tolist()
    # 2. what it leaves as it is, is reused
    assert history.read(f"hihello{END}we", CHAT).num_reused == 3 + (len(tokenizer.encode("hi")) - 1)


def test_a_tokenizer_that_ends_every_prompt(tmp_path: Path) -> None:
    """What it puts behind a prompt would stand within the next one."""
    backend = sentencepiece("first")
    special = [("<s>", 1), ("</s>", 2)]
    backend.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=special)
    tokenizer = load(backend, tmp_path)
    history = TokenHistory(tokenizer)
    drawn = tokenizer.encode("a", add_special_tokens=False).tolist()
    for prompt in ("hello", "</s>", ""):
        _, text = answered(history, tokenizer, prompt, drawn, scope=TEXT)
        assert history.read(text, TEXT).token_ids.tolist() == tokenizer.encode(text).tolist()
    assert len(history) == 0
    _, text = answered(history, tokenizer, "hello", drawn)
    assert history.read(text, CHAT).num_reused


def test_the_rest_of_a_template_is_tokenised_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = load(sentencepiece("always"), tmp_path)
    history = TokenHistory(tokenizer)
    _, text = answered(history, tokenizer, "<s>[he] hello [/he]", tokenizer.encode("we").tolist()[1:])
    encoded: list[str] = []
    encode = tokenizer.encode

    def counting(text: str, *, add_special_tokens: bool = True) -> NDArray[np.int32]:
        encoded.append(text)
        return encode(text, add_special_tokens=add_special_tokens)

    monkeypatch.setattr(tokenizer, "encode", counting)
    history.read(f"{text}</s><s>[he] we [/he]", CHAT)
    assert encoded == ["</s><s>[he] we [/he]"]


def test_a_decoder_of_unknown_kind(tmp_path: Path) -> None:
    tokenizer = load(word_piece(), tmp_path)
    history = TokenHistory(tokenizer)
    drawn = tokenizer.encode("hello world").tolist()
    _, text = answered(history, tokenizer, "world", drawn)
    assert history.read(text, CHAT).token_ids.tolist() == tokenizer.encode(text).tolist()
    assert len(history) == 0


# --- memory ------------------------------------------------------------------------------------------------


def test_the_bytes_are_bounded_and_the_oldest_goes(small: Tokenizer) -> None:
    drawn = ids_of(small, "hel", "lo")
    history = TokenHistory(small)
    answered(history, small, "a" * 100, drawn)
    each = history.num_bytes
    history = TokenHistory(small, max_bytes=4 * each)
    texts = [answered(history, small, letter * 100, drawn)[1] for letter in "abcd"]
    assert len(history) == 4 and history.num_bytes == 4 * each
    # 1. the first was used since
    assert history.read(texts[0], CHAT).num_reused
    texts.append(answered(history, small, "e" * 100, drawn)[1])
    assert [bool(history.read(text, CHAT).num_reused) for text in texts] == [True, False, True, True, True]
    assert history.num_bytes == 4 * each
    # 2. one that is too large pushes none out
    answered(history, small, "f" * 100_000, drawn)
    assert len(history) == 4
    # 3. the same again is no second one
    answered(history, small, "e" * 100, drawn)
    assert len(history) == 4 and history.num_bytes == 4 * each
    # 4. a scope that is empty takes nothing
    for number in range(50):
        answered(history, small, "a" * 90, drawn, scope=Scope(f"{number:010}", False))
    assert len(history) <= 4 and len(history._sorted) == len(history)
    assert {len(texts) for texts in history._sorted.values()} == {1}


def test_an_answer_that_was_read_otherwise_is_still_known(small: Tokenizer) -> None:
    """A longer sequence in which it is plain text takes nothing from it."""
    history = TokenHistory(small)
    first, text = answered(history, small, "hi", ids_of(small, "hel", "lo"))
    reading = history.read(text + END, CHAT, may_reuse=False)
    history.remember(reading, ids_of(small, "h"), "h")
    answered(history, small, "hey", ids_of(small, "he"))
    reading = history.read(f"heyhe{END}", CHAT, may_reuse=False)
    history.remember(reading, ids_of(small, "w"), "w")
    assert len(history) == 4
    assert history.read(text + TURN, CHAT).num_reused == len(first.token_ids) + 2
    assert history.read(f"heyhe{TURN}", CHAT).num_reused == len(small.encode("hey")) + 1


def test_other_answers_to_one_prompt(small: Tokenizer) -> None:
    """Each goes on with its own tokens, though one begins as another does."""
    history = TokenHistory(small)
    reading = history.read("hi", CHAT)
    answers = [["hel", "lo"], ["h", "e"], ["wor", "ld"], ["hel", "l"], ["he", "!"], ["he", "&"], ["he", "a"]]
    for answer in answers:
        history.remember(reading, ids_of(small, *answer), "".join(answer))
    for answer in answers:
        again = history.read("hi" + "".join(answer) + END, CHAT)
        assert again.token_ids.tolist() == [*reading.token_ids.tolist(), *ids_of(small, *answer, END)]
        assert again.diverged_at is None


# --- any ids, any cuts -------------------------------------------------------------------------------------

PIECES = [
    "hello",
    " world",
    "<|",
    "|>",
    "end",
    END,
    TURN,
    THINK,
    "\n",
    "é",
    "👍",
    "<",
    "think>",
    " ",
    "a",
    "turn|>",
]
FRAGMENTS = [
    "hel",
    "lo",
    "h",
    " ",
    "wor",
    "<|",
    "e",
    "nd",
    "|>",
    "<",
    "|",
    END,
    TURN,
    THINK,
    "é",
    "ld",
    "l",
    "\n",
]


def symbols(tokenizer: Tokenizer, token_ids: list[int]) -> list[object]:
    """What the model reads, a byte at a time; an added token is one symbol."""
    read: list[object] = []
    for token_id in token_ids:
        read += [token_id] if token_id in tokenizer.added_tokens else tokenizer.token_bytes(token_id)
    return read


def most_reusable(
    tokenizer: Tokenizer, ids: list[int], num_prompt: int, prompt: str, text: str, following: str
) -> int:
    """So many of `ids`, those of `prompt` and then drawn ones that were delivered as `text`, read as
    `following` does, up to a whole character. Tried out one by one; 0 if no drawn one does.
    """
    wanted = [symbols(tokenizer, tokenizer.encode(whole).tolist()) for whole in (prompt + text, following)]
    for num_tokens in range(len(ids), num_prompt, -1):
        pieces = [tokenizer.token_bytes(token_id) for token_id in ids[num_prompt:num_tokens]]
        read = symbols(tokenizer, ids[:num_tokens])
        if all(pieces) and all(read == plain[: len(read)] for plain in wanted):
            size = len(prompt.encode()) + len(b"".join(pieces))
            if (following.encode() + b" ")[size] & 0xC0 != 0x80:
                return num_tokens
    return 0


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_conversation_reads_the_same(small: Tokenizer, data: st.DataObject) -> None:
    history = TokenHistory(small)
    pieces = st.lists(st.sampled_from(PIECES), max_size=4).map("".join)
    by_bytes = {small.token_bytes(i): i for i in reversed(range(small.vocab_size))}
    alphabet = [by_bytes[bytes([byte])] for byte in "é👍".encode()]
    token = st.sampled_from([*(i for f in FRAGMENTS for i in small.encode(f).tolist()[:1]), *alphabet, 999])
    prompt = data.draw(pieces, "prompt") or "a"
    for _ in range(3):
        reading = history.read(prompt, CHAT)
        ours, plain = reading.token_ids.tolist(), small.encode(prompt).tolist()
        # 1. to the model it is the text that the tokenizer alone would have made of it
        assert symbols(small, ours) == symbols(small, plain)
        # 2. an answer, some of it delivered; a part of the conversation, and something more
        drawn = data.draw(st.lists(token, max_size=6), "drawn")
        text = said(small, ours, drawn, skip=data.draw(st.booleans(), "skip"))
        text = text[: data.draw(st.integers(0, len(text)), "shown")]
        history.remember(reading, drawn, text)
        kept = (prompt + text)[: len(prompt) + data.draw(st.integers(0, len(text)), "kept")]
        following = (kept + data.draw(pieces, "more")) or "a"
        # 3. the drawn ids are there as far as they can be
        again = history.read(following, CHAT)
        most = most_reusable(small, [*ours, *drawn], len(ours), prompt, text, following)
        if most:
            assert again.num_reused == most
            assert again.token_ids[:most].tolist() == [*ours, *drawn][:most]
        prompt = following


@pytest.mark.parametrize("folder", [TINY_MODEL, SHARED / "gpt_neox_20b", SHARED / "minimind_6400"])
def test_real_vocabularies(folder: Path) -> None:
    if not folder.exists():
        pytest.skip(f"{folder} is not here")
    tokenizer = Tokenizer.load(folder)
    history = TokenHistory(tokenizer)
    rng = random.Random(3)
    ordinary = [i for i in range(tokenizer.vocab_size) if tokenizer.token_bytes(i).isascii()]
    num_differ = 0
    for number in range(60):
        # 1. an answer of any tokens, cut anywhere
        prompt = f"{number}: Hello, world!\n"
        drawn = [rng.choice(ordinary) for _ in range(rng.randrange(1, 40))]
        if number % 3 == 0:
            drawn[rng.randrange(len(drawn))] = rng.randrange(tokenizer.vocab_size)
        reading = history.read(prompt, TEXT)
        text = said(tokenizer, reading.token_ids.tolist(), drawn, skip=bool(number % 2))
        text = text[: rng.randrange(len(text) + 1)]
        history.remember(reading, drawn, text)
        # 2. goes on
        following = prompt + text + rng.choice(["", " And then", "\n\n", "s", "é"])
        again = history.read(following, TEXT)
        plain = tokenizer.encode(following).tolist()
        ours = again.token_ids.tolist()
        assert symbols(tokenizer, ours) == symbols(tokenizer, plain)
        most = most_reusable(
            tokenizer, [*reading.token_ids, *drawn], len(reading.token_ids), prompt, text, following
        )
        assert again.num_reused == most
        num_differ += ours != plain
    assert num_differ > 10
