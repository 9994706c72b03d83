"""What no router can do without: tokenise the prompt, pass it to a worker, answer when the token is there.

The measure of what a router adds (`router.py`): the same client, worker, sockets and tokenizer, and next to
nothing between them. Answers are fixed bytes; nothing is checked, chosen, remembered or counted.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from typing import cast

import msgspec
from raw_client import END_OF_HEAD, content_length

from memserve.config import WorkerConfig
from memserve.messages import Decode, Ready, SamplingParams, StepOutputs, ToRouter, ToWorker, pack_tokens
from memserve.router.text.tokenizer import Tokenizer

ANSWER = b"HTTP/1.1 200 OK\r\ncontent-length: 300\r\n\r\n" + b"x" * 300


class _Body(msgspec.Struct):
    prompt: str


class NothingConnection(asyncio.Protocol):
    """Reads a request, answers fixed bytes."""

    def __init__(self) -> None:
        self._received = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.WriteTransport, transport)

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, end, body = self._received.partition(END_OF_HEAD)
        if end and len(body) >= content_length(head):
            self._received = b""
            self.on_request(body)

    def on_request(self, body: bytes) -> None:
        """A whole request is here."""
        self.answer()

    def answer(self) -> None:
        """Send it."""
        self._transport.write(ANSWER)


class BareConnection(NothingConnection):
    """Tokenises the prompt and asks a worker for a token first."""

    def __init__(self, worker: BareWorker, tokenizer: Tokenizer) -> None:
        super().__init__()
        self._worker, self._tokenizer = worker, tokenizer

    def on_request(self, body: bytes) -> None:
        """See NothingConnection; what is no completion, such as a look at the health, is answered at once."""
        if not body:
            self.answer()
            return
        token_ids = self._tokenizer.encode(msgspec.json.decode(body, type=_Body).prompt)
        self._worker.draw(pack_tokens(token_ids), self.answer)


class BareWorker:
    """The worker's side of it, as a `WorkerEvents` of the supervisor."""

    def __init__(self) -> None:
        self.send: Callable[[str, ToWorker], object] | None = None
        self._name = ""
        self._waiting: dict[str, Callable[[], None]] = {}
        self._numbers = itertools.count()

    def draw(self, tokens: bytes, then: Callable[[], None]) -> None:
        """Ask for one token."""
        assert self.send is not None
        request_id = str(next(self._numbers))
        self._waiting[request_id] = then
        params = SamplingParams(max_tokens=1, seed=0)
        self.send(self._name, Decode(request_id, 0, tokens, len(tokens) // 4, params, tell_blocks=True))

    def on_progress(self, instance: str, stage: str, fraction: float) -> None: ...

    def on_worker_up(self, config: WorkerConfig, incarnation: int, ready: Ready) -> None:
        self._name = config.instance

    def on_worker_message(self, instance: str, incarnation: int, message: ToRouter) -> None:
        if isinstance(message, StepOutputs):
            for output in message.outputs:
                self._waiting.pop(output.request_id)()

    def on_worker_down(self, instance: str, incarnation: int, reason: str) -> None: ...

    def on_instance_lost(self, instance: str) -> None: ...
