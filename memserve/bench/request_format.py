"""What is sent: the bodies of requests, from the pieces of a conversation.

A load asks for answers of given lengths (`ignore_eos`), streamed, with the usage in the last event
(`stream_options`). Servers that refuse those fields get none (`server_check.py` finds out). Pure.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import msgspec

from memserve.bench.workload import Piece, expand, join_prompt

Endpoint = Literal["completions", "chat"]
PATHS: Mapping[Endpoint, str] = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}

_encoder = msgspec.json.Encoder()


@dataclass(frozen=True, slots=True)
class RequestFormat:
    """How every request of a run is written.

    `extra` is merged into the body last. `token_ids`: ask for the ids of the answer (vLLM's
    `return_token_ids`), which a live conversation over token ids needs.
    """

    model: str
    endpoint: Endpoint = "completions"
    temperature: float = 0.0
    ignore_eos: bool = True
    include_usage: bool = True
    token_ids: bool = False
    extra: Mapping[str, object] = field(default_factory=dict)

    @property
    def path(self) -> str:
        """Where the requests go."""
        return PATHS[self.endpoint]

    def body(self, pieces: Sequence[Piece], max_tokens: int) -> bytes:
        """JSON of the request for a conversation input, answer, input, …, that ends in an input. A chat's
        pieces are text.
        """
        body: dict[str, object] = {"model": self.model, "stream": True, "max_tokens": max_tokens}
        body["temperature"] = self.temperature
        if self.endpoint == "chat":
            body["messages"] = _messages(pieces)
        else:
            body["prompt"] = join_prompt(pieces)
        if self.ignore_eos:
            body["ignore_eos"] = True
        if self.include_usage:
            body["stream_options"] = {"include_usage": True}
        if self.token_ids:
            body["return_token_ids"] = True
        return _encoder.encode(body | dict(self.extra))

    def plainer(self) -> list[RequestFormat]:
        """This format without the fields that some servers refuse, from the fullest to the plainest."""
        wishes = [(True, True), (False, True), (True, False), (False, False)]
        allowed = [
            (eos, usage)
            for eos, usage in wishes
            if (self.ignore_eos or not eos) and (self.include_usage or not usage)
        ]
        return [dataclasses.replace(self, ignore_eos=eos, include_usage=usage) for eos, usage in allowed]


def _messages(pieces: Sequence[Piece]) -> list[dict[str, str]]:
    messages = []
    for index, piece in enumerate(pieces):
        content = expand(piece)
        assert isinstance(content, str), "token ids in a chat"
        messages.append({"role": "assistant" if index % 2 else "user", "content": content})
    return messages
