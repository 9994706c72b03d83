"""A choice while it grows: held text, stop strings, log-probabilities, echo."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest

from memserve.messages import CachedTokens, FinishReason, SamplingParams, TokenLogprobs
from memserve.router.engine_api import Delta, GenerateRequest
from memserve.router.http.choices import Choice, ChoiceUpdate, TokenEntry
from memserve.router.http.prompts import Prompt
from memserve.router.http.validation import ChoicePlan
from memserve.router.text.tokenizer import Tokenizer

EOS = 2
MakeChoice = Callable[..., Choice]


@pytest.fixture
def make_choice(tiny_tokenizer: Tokenizer) -> MakeChoice:
    def make(
        *,
        prompt: str | list[int] = "Once",
        stops: tuple[str, ...] = (),
        echo: bool = False,
        logprobs: int | None = None,
        min_tokens: int = 0,
        hide_output: bool = False,
        skip_special_tokens: bool = True,
    ) -> Choice:
        if isinstance(prompt, str):
            source = Prompt(tiny_tokenizer.encode(prompt), prompt)
        else:
            source = Prompt(np.asarray(prompt, dtype=np.int32))
        sampling = SamplingParams(max_tokens=99, seed=0, stop_token_ids=(EOS, 400), min_tokens=min_tokens)
        request = GenerateRequest("r", source.token_ids, sampling)
        plan = ChoicePlan(0, 0, source, request, stops, echo, skip_special_tokens, logprobs, hide_output)
        return Choice(plan, tiny_tokenizer)

    return make


def drain(
    choice: Choice, token_ids: list[int], reason: FinishReason = FinishReason.STOP
) -> list[ChoiceUpdate]:
    """Pushes one token a delta and takes after each."""
    updates = []
    for i, token_id in enumerate(token_ids):
        wants = choice.plan.num_logprobs is not None
        delta = Delta(
            (token_id,),
            logprobs=(TokenLogprobs(-float(i), 1),) if wants else None,
            finish_reason=reason if i == len(token_ids) - 1 else None,
        )
        choice.push(delta)
        update = choice.take()
        if update is not None:
            updates.append(update)
        if choice.finish_reason is not None:
            break
    return updates


def joined(updates: list[ChoiceUpdate]) -> str:
    return "".join(update.text for update in updates)


@pytest.mark.parametrize("text", ["Hello there", "👩‍👩‍👧‍👦 and é"])
def test_text_and_end(make_choice: MakeChoice, tiny_tokenizer: Tokenizer, text: str) -> None:
    choice = make_choice()
    token_ids = tiny_tokenizer.encode(text).tolist()
    updates = drain(choice, [*token_ids, EOS])
    assert joined(updates) == text
    assert not any("\ufffd" in update.text for update in updates)
    assert [update.finish_reason for update in updates[:-1]] == [None] * (len(updates) - 1)
    assert updates[-1].finish_reason is FinishReason.STOP
    assert choice.num_completion_tokens == len(token_ids) + 1
    assert all(update.entries is None for update in updates)


def test_an_ordinary_stop_token_is_hidden_only_where_it_ended_the_sequence(
    make_choice: MakeChoice, tiny_tokenizer: Tokenizer
) -> None:
    text = tiny_tokenizer.decode([400])
    assert text
    assert joined(drain(make_choice(), [400, 401, 400])) == text + tiny_tokenizer.decode([401])
    assert joined(drain(make_choice(), [400], FinishReason.LENGTH)) == text
    assert joined(drain(make_choice(skip_special_tokens=False), [0, EOS])) == "<|endoftext|>"


def test_half_a_character_at_the_end_is_shown_as_such(
    make_choice: MakeChoice, tiny_tokenizer: Tokenizer
) -> None:
    token_ids = tiny_tokenizer.encode("👍").tolist()[:-1]
    updates = drain(make_choice(), token_ids, FinishReason.LENGTH)
    # Tokens are told as they come, text once it is known.
    assert [update.num_tokens for update in updates] == [1] * len(token_ids)
    assert [update.text for update in updates if update.text] == ["\ufffd"]


def test_stop_string_across_tokens(make_choice: MakeChoice, tiny_tokenizer: Tokenizer) -> None:
    token_ids = tiny_tokenizer.encode("one two three four").tolist()
    choice = make_choice(stops=("o thr",))
    updates = drain(choice, token_ids, FinishReason.LENGTH)
    assert joined(updates) == "one tw"
    assert updates[-1].finish_reason is FinishReason.STOP
    assert choice.num_completion_tokens < len(token_ids)
    # more comes from the engine before it hears of it
    choice.push(Delta((7,)))
    assert choice.finish_reason is FinishReason.STOP


def test_stop_string_complete_only_at_the_end(make_choice: MakeChoice, tiny_tokenizer: Tokenizer) -> None:
    token_ids = tiny_tokenizer.encode("say EN").tolist()
    updates = drain(make_choice(stops=("END",)), token_ids, FinishReason.LENGTH)
    assert joined(updates) == "say EN"
    assert updates[-1].finish_reason is FinishReason.LENGTH


def test_stop_string_not_before_min_tokens(make_choice: MakeChoice, tiny_tokenizer: Tokenizer) -> None:
    token_ids = tiny_tokenizer.encode("a b a b a b").tolist()
    assert joined(drain(make_choice(stops=("b",)), token_ids, FinishReason.LENGTH)) == "a "
    assert joined(drain(make_choice(stops=("b",), min_tokens=3), token_ids, FinishReason.LENGTH)) == "a b a "


def test_pushes_pile_up_until_taken(make_choice: MakeChoice, tiny_tokenizer: Tokenizer) -> None:
    choice = make_choice()
    token_ids = tiny_tokenizer.encode("piling up a few words").tolist()
    for token_id in token_ids:
        choice.push(Delta((token_id,)))
    update = choice.take()
    assert update is not None
    assert update.text == "piling up a few words"
    assert choice.take() is None


def test_entries_come_with_the_text_they_begin_in(make_choice: MakeChoice, tiny_tokenizer: Tokenizer) -> None:
    token_ids = tiny_tokenizer.encode("ab 👍 cd").tolist()
    updates = drain(make_choice(logprobs=0), [*token_ids, EOS])
    num_chars = 0
    entries: list[TokenEntry] = []
    for update in updates:
        num_chars += len(update.text)
        assert update.entries is not None
        if update.finish_reason is None:
            assert all(entry.text_offset < num_chars for entry in update.entries)
        entries += update.entries
    assert [entry.token_id for entry in entries] == [*token_ids, EOS]
    assert [entry.logprobs and entry.logprobs.logprob for entry in entries] == [
        -float(i) for i in range(len(entries))
    ]
    text = joined(updates)
    for entry in entries[:-1]:
        piece = tiny_tokenizer.token_bytes(entry.token_id)
        assert (
            text.encode()[len(text[: entry.text_offset].encode()) :].startswith(piece)
            or b"\xf0" > piece >= b"\x80"
        )
    assert entries[-1].text_offset == len(text)


def test_entries_after_a_stop_string_are_dropped(make_choice: MakeChoice, tiny_tokenizer: Tokenizer) -> None:
    token_ids = tiny_tokenizer.encode("one two three four").tolist()
    updates = drain(make_choice(stops=("two",), logprobs=0), token_ids, FinishReason.LENGTH)
    entries = [entry for update in updates for entry in update.entries or ()]
    assert all(entry.text_offset < len("one ") for entry in entries)


# --- echo --------------------------------------------------------------------------------------------------


def prompt_logprobs(num_tokens: int) -> tuple[TokenLogprobs | None, ...]:
    return (None, *(TokenLogprobs(-1.0, 1) for _ in range(num_tokens - 1)))


@pytest.mark.parametrize("prompt", ["Once upon a 👍", "Once <|im_end|> more"])
def test_echo_of_text_and_of_its_ids(make_choice: MakeChoice, tiny_tokenizer: Tokenizer, prompt: str) -> None:
    token_ids = tiny_tokenizer.encode(prompt).tolist()
    for source in (prompt, token_ids):
        choice = make_choice(prompt=source, echo=True, logprobs=0)
        choice.push(
            Delta((300,), (TokenLogprobs(-2.0, 1),), prompt_logprobs(len(token_ids)), FinishReason.LENGTH)
        )
        update = choice.take()
        assert update is not None
        assert update.text == prompt + tiny_tokenizer.decode([300])
        assert update.entries is not None
        assert [entry.token_id for entry in update.entries] == [*token_ids, 300]
        assert update.entries[0].logprobs is None
        assert update.entries[-1].text_offset == len(prompt)
        offsets = [entry.text_offset for entry in update.entries]
        assert offsets == sorted(offsets)


def test_echo_alone_as_evaluations_ask_for_it(make_choice: MakeChoice) -> None:
    choice = make_choice(prompt=[300, 301, 302], echo=True, logprobs=1, hide_output=True)
    choice.push(Delta((400,), (TokenLogprobs(-2.0, 1),), prompt_logprobs(3), FinishReason.LENGTH))
    update = choice.take()
    assert update is not None
    assert update.entries is not None
    assert len(update.entries) == 3
    assert (update.finish_reason, choice.num_completion_tokens) == (FinishReason.LENGTH, 0)


def test_any_cut_of_random_tokens_gives_the_same(make_choice: MakeChoice, tiny_tokenizer: Tokenizer) -> None:
    random_ = random.Random(3)
    for _ in range(50):
        token_ids = [random_.randrange(3, tiny_tokenizer.vocab_size) for _ in range(30)]
        whole = tiny_tokenizer.decode(token_ids)
        stops = (whole[40:43],) if random_.random() < 0.5 else ()
        results = []
        for max_cut in (1, 7, 30):
            choice = make_choice(stops=stops, logprobs=0)
            entries: list[TokenEntry] = []
            text, i = "", 0
            while i < len(token_ids):
                cut = token_ids[i : i + random_.randint(1, max_cut)]
                i += len(cut)
                end = FinishReason.LENGTH if i == len(token_ids) else None
                choice.push(Delta(tuple(cut), tuple(TokenLogprobs(-1.0, 1) for _ in cut), finish_reason=end))
                update = choice.take()
                if update is not None:
                    text += update.text
                    entries += update.entries or ()
            results.append((text, entries, choice.finish_reason, choice.num_completion_tokens))
        assert results[0] == results[1] == results[2]
        if not stops or choice.finish_reason is FinishReason.LENGTH:
            assert results[0][0] == whole


def test_what_was_cached_is_what_the_first_delta_says(make_choice: MakeChoice) -> None:
    choice = make_choice()
    for token_id, num_cached in ((300, 3), (301, 0), (302, 9)):  # a replay may find more
        choice.push(Delta((token_id,), cached=CachedTokens(num_cached)))
        assert choice.cached.total == 3
