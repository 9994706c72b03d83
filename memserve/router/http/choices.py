"""One choice of an answer while it grows: token ids come in, text that may be shown goes out.

    engine ─ Delta ─► push: decoder ─► stop strings ─► pending ─► take: ChoiceUpdate ─► openai.py: its JSON

Text is held back while it may be half a character or half a stop string, and a token's log-probabilities
until the text at which it begins is shown. Pushes pile up until they are taken, so that a slow client gets
fewer, larger updates. Pure: no I/O, no clock.
"""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from memserve.messages import NO_CACHED_TOKENS, FinishReason, TokenLogprobs
from memserve.router.engine_api import Delta
from memserve.router.http.validation import ChoicePlan
from memserve.router.text.stop import StopMatcher
from memserve.router.text.tokenizer import Tokenizer

# More than any decoder looks at.
_CONTEXT_TOKENS = 8


class TokenEntry(NamedTuple):
    """A token with what the client asked to know of it. `logprobs` is None for the first token of a prompt.

    `text_offset`: characters of the choice's text before the text of this token.
    """

    token_id: int
    logprobs: TokenLogprobs | None
    text_offset: int


class ChoiceUpdate(msgspec.Struct, frozen=True):
    """What is new of choice `index`. `token_ids` and `entries` are None unless they were asked for.

    `num_tokens` were drawn since the last update, the stop token included; `text` may lag behind them, or be
    empty: half a character, or what may become a stop string, is held back.
    """

    index: int
    text: str
    num_tokens: int
    token_ids: tuple[int, ...] | None
    entries: tuple[TokenEntry, ...] | None
    finish_reason: FinishReason | None


class Choice:
    """State of one choice. Once `finish_reason` is set its sequence is of no more use: it is to be closed."""

    def __init__(self, plan: ChoicePlan, tokenizer: Tokenizer) -> None:
        self.plan = plan
        self.finish_reason: FinishReason | None = None
        self.num_completion_tokens = 0
        self.cached = NO_CACHED_TOKENS
        self._began = False
        self._tokenizer = tokenizer
        self._decoder = tokenizer.decoder(
            skip_special_tokens=plan.skip_special_tokens, context=_context(plan, tokenizer)
        )
        self._stops = StopMatcher(plan.stops) if plan.stops else None
        self._stop_ids = frozenset(plan.request.sampling.stop_token_ids)
        self._min_tokens = plan.request.sampling.min_tokens
        self._entries: list[TokenEntry] = []
        self._token_ids: list[int] = []
        self._text = ""
        # For `answer`: all that was drawn and shown, whatever was taken of it.
        self._keeps = plan.prompt.reading is not None
        self._drawn: list[int] = []
        self._said: list[str] = []
        self._num_shown = 0  # characters already taken
        self._num_decoded = 0  # characters the decoder has given, shown or held
        if plan.echo:
            self._echo_prompt()

    def push(self, delta: Delta) -> None:
        """Takes what the engine says. Ignored after the end."""
        if self.finish_reason is not None:
            return
        if not self._began:
            self._began = True
            self.cached = delta.cached or NO_CACHED_TOKENS
        if delta.prompt_logprobs is not None:
            self._entries[:0] = self._prompt_entries(delta.prompt_logprobs)
        if self.plan.hide_output:
            self.finish_reason = FinishReason.LENGTH
            return
        reason, last = delta.finish_reason, len(delta.token_ids) - 1
        for i, token_id in enumerate(delta.token_ids):
            logprobs = delta.logprobs[i] if delta.logprobs is not None else None
            ends_here = reason is not None and i == last and self._is_hidden(token_id, reason)
            if self._push_token(token_id, logprobs, hidden=ends_here):
                return
        if reason is not None:
            self._end(reason)

    def take(self) -> ChoiceUpdate | None:
        """What may be shown and was not taken yet; None if there is nothing. The end is told once."""
        finished = self.finish_reason is not None
        text, self._text = self._text, ""
        token_ids, self._token_ids = self._token_ids, []
        self._num_shown += len(text)
        entries: tuple[TokenEntry, ...] | None = None
        if self.plan.num_logprobs is not None:
            num_ready = len(self._entries)
            if not finished:
                num_ready = sum(entry.text_offset < self._num_shown for entry in self._entries)
            entries = tuple(self._entries[:num_ready])
            del self._entries[:num_ready]
        if not text and not token_ids and not entries and not finished:
            return None
        return ChoiceUpdate(
            index=self.plan.index,
            text=text,
            num_tokens=len(token_ids),
            token_ids=tuple(token_ids) if self.plan.return_token_ids else None,
            entries=entries,
            finish_reason=self.finish_reason,
        )

    def answer(self) -> tuple[list[int], str]:
        """All that was drawn, and the text that it became, echo apart; only for a prompt with a `reading`."""
        assert self._keeps
        return self._drawn, "".join(self._said)

    def _is_hidden(self, last_id: int, reason: FinishReason) -> bool:
        """Whether the last token is a stop token, which is counted but not shown."""
        return reason is FinishReason.STOP and last_id in self._stop_ids

    def _push_token(self, token_id: int, logprobs: TokenLogprobs | None, *, hidden: bool) -> bool:
        """One token; True if a stop string ended the choice with it."""
        self.num_completion_tokens += 1
        self._token_ids.append(token_id)
        if self._keeps:
            self._drawn.append(token_id)
        if self.plan.num_logprobs is not None:
            self._entries.append(TokenEntry(token_id, logprobs, self._num_decoded))
        if hidden:
            return False
        return self._push_text(self._decoder.push(token_id))

    def _push_text(self, text: str) -> bool:
        self._num_decoded += len(text)
        if self._stops is None or self.num_completion_tokens <= self._min_tokens:  # none may begin in these
            self._show(text)
            return False
        shown, matched = self._stops.push(text)
        self._show(shown)
        if matched:
            self.finish_reason = FinishReason.STOP
            num_kept = self._num_shown + len(self._text)
            self._entries = [entry for entry in self._entries if entry.text_offset < num_kept]
        return matched

    def _end(self, reason: FinishReason) -> None:
        """The sequence ended by itself: what was held back is shown, unless it completes a stop string."""
        if not self._push_text(self._decoder.flush()):
            if self._stops is not None:
                self._show(self._stops.flush())
            self.finish_reason = reason

    def _show(self, text: str) -> None:
        self._text += text
        if self._keeps and text:
            self._said.append(text)

    def _echo_prompt(self) -> None:
        prompt = self.plan.prompt
        if prompt.text is not None:
            self._text = prompt.text
        else:
            decoder = self._tokenizer.decoder(skip_special_tokens=False)
            self._text = "".join(map(decoder.push, prompt.token_ids.tolist())) + decoder.flush()
        self._num_decoded = len(self._text)

    def _prompt_entries(self, logprobs: tuple[TokenLogprobs | None, ...]) -> list[TokenEntry]:
        """Entries of the echoed prompt, with the offsets of its tokens in the echoed text."""
        prompt = self.plan.prompt
        token_ids = prompt.token_ids.tolist()
        decoder = self._tokenizer.decoder(skip_special_tokens=False)
        special_ids = self._tokenizer.special_ids
        num_chars = len(prompt.text) if prompt.text is not None else None
        entries = []
        offset = 0
        for i, (token_id, entry) in enumerate(zip(token_ids, logprobs, strict=True)):
            entries.append(TokenEntry(token_id, entry, offset))
            # A text that was sent without bos is echoed without it.
            if i == 0 and prompt.text is not None and token_id in special_ids:
                spelled = self._tokenizer.token_bytes(token_id).decode()
                if not prompt.text.startswith(spelled):
                    continue
            offset += len(decoder.push(token_id))
            if num_chars is not None:
                offset = min(offset, num_chars)
        return entries


def _context(plan: ChoicePlan, tokenizer: Tokenizer) -> list[int] | None:
    """What the output's text follows; None where it begins the text, the prompt being bos or so alone."""
    token_ids = plan.prompt.token_ids
    end: list[int] = token_ids[-_CONTEXT_TOKENS:].tolist()
    is_special = plan.skip_special_tokens and tokenizer.special_ids.issuperset(end)
    return None if is_special and tokenizer.special_ids.issuperset(token_ids.tolist()) else end
