"""Runs a job's sequences and merges what they give into one stream of updates.

    engine ─ deltas, as they come ─► news ─ `next` ─► the choices ─► updates of all that has gathered

The engine's deltas only pile up here (bounded by max_tokens) and wake whoever waits in `next`; choices are
worked on when the reader asks. So a slow client gets fewer, larger updates, and n sequences need no task of
their own. If one fails, or the reader leaves, `close` cancels all.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from functools import partial

from memserve.errors import MemserveError
from memserve.messages import FinishReason
from memserve.router.engine_api import Delta, Engine
from memserve.router.http.choices import Choice, ChoiceUpdate
from memserve.router.http.validation import Job
from memserve.router.metrics import RequestTimer
from memserve.router.text.token_history import TokenHistory
from memserve.router.text.tokenizer import Tokenizer

# Tokens of a prompt that are decoded on the event loop in about the time that a thread takes to start.
_INLINE_TOKENS = 1024


async def make_choices(job: Job, tokenizer: Tokenizer) -> list[Choice]:
    """The job's choices, before their first token. Prompts that are echoed are decoded here."""

    def make() -> list[Choice]:
        return [Choice(plan, tokenizer) for plan in job.choices]

    num_echoed = sum(len(plan.prompt.token_ids) for plan in job.choices if plan.echo)
    return make() if num_echoed <= _INLINE_TOKENS else await asyncio.to_thread(make)


class Generation:
    """One job while it runs: `start`, `next` until it has nothing more, `close` in any case.

    A choice that ended is remembered in `history` before anything is read that comes after its end was told:
    the next turn may follow at once.
    """

    def __init__(
        self,
        engine: Engine,
        choices: Sequence[Choice],
        timer: RequestTimer,
        history: TokenHistory | None = None,
    ) -> None:
        self.choices = choices
        self._history = history
        self._engine = engine
        self._timer = timer
        self._open = {choice.plan.index: choice for choice in choices}  # those whose end was not told yet
        self._news: deque[tuple[Choice, Delta | MemserveError]] = deque()
        self._waiter: asyncio.Future[None] | None = None

    def start(self) -> None:
        """Submit all sequences. Raises `Overloaded` before any was begun if there is no room for all."""
        if len(self._open) > 1:
            self._engine.check_room(len(self._open))
        for choice in self._open.values():
            self._engine.submit(choice.plan.request, partial(self._on_news, choice))

    async def next(self) -> list[ChoiceUpdate]:
        """What is new, each choice's updates in order; empty once every choice has told its finish_reason.

        Raises what the engine tells of a sequence, after the updates that came before it.
        """
        while self._open:
            if not self._news:
                self._waiter = asyncio.get_running_loop().create_future()
                await self._waiter
            if updates := await self._take():
                return updates
        return []

    def abort(self) -> None:
        """Ends what has not ended, with what there is and finish_reason ABORT; or instead of `start`."""
        for choice in self._open.values():
            self._engine.cancel(choice.plan.request.request_id)
            self._on_news(choice, Delta((), finish_reason=FinishReason.ABORT))

    def close(self) -> None:
        """Cancels what has not ended. Idempotent."""
        for choice in self._open.values():
            self._engine.cancel(choice.plan.request.request_id)
        self._open.clear()

    def _on_news(self, choice: Choice, news: Delta | MemserveError) -> None:
        if isinstance(news, Delta):
            self._timer.on_tokens(choice.plan.index, len(news.token_ids))
        self._news.append((choice, news))
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def _take(self) -> list[ChoiceUpdate]:
        """Works off the news, up to an error."""
        pushed: dict[int, Choice] = {}
        while self._news:
            choice, news = self._news[0]
            if isinstance(news, MemserveError) and pushed:
                break  # what came before it is told first, and may have ended the choice
            self._news.popleft()
            if choice.plan.index not in self._open:
                continue
            if isinstance(news, MemserveError):
                raise news
            if news.prompt_logprobs is None or len(news.prompt_logprobs) <= _INLINE_TOKENS:
                choice.push(news)
            else:
                await asyncio.to_thread(choice.push, news)
            pushed[choice.plan.index] = choice
        updates = []
        for index, choice in pushed.items():
            if (update := choice.take()) is not None:
                updates.append(update)
            if choice.finish_reason is not None:
                del self._open[index]
                self._engine.cancel(choice.plan.request.request_id)  # of use where a stop string ended it
                await self._remember(choice)
        return updates

    async def _remember(self, choice: Choice) -> None:
        reading = choice.plan.prompt.reading
        if self._history is None or reading is None:
            return
        token_ids, text = choice.answer()
        if len(token_ids) <= _INLINE_TOKENS:
            # after the end is written, and before all that the loop hears of from then on
            asyncio.get_running_loop().call_soon(self._history.remember, reading, token_ids, text)
        else:
            await asyncio.to_thread(self._history.remember, reading, token_ids, text)
