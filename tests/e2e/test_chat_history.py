"""Chat history keeps its tokens, with real processes: what the second turn of a sampled conversation finds in
the cache, though the text of the first answer would be cut into other tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import memserve
from memserve.router.text.chat_template import ChatTemplate
from memserve.router.text.tokenizer import Tokenizer
from tests.e2e.server_process import Server
from tests.e2e.test_caching import counter, settled, whole

TINY_MODEL = Path(memserve.__file__).parent / "tiny_model"
SETTINGS = {
    "full": ("--caching", "full"),
    "colocated": ("--colocated", "1"),
    "switched off": ("--colocated", "1", "--no-reuse-history-tokens"),
}
# So many that some re-tokenise differently: one in three does.
QUESTIONS = [
    f"What does {name} do?" for name in ("os.getcwd", "re.sub", "math.fsum", "zip", "dict.get", "time.sleep")
] + [f"Please count to {number} and tell me a story" for number in range(3, 9)]


class Turn(NamedTuple):
    """`known`: the ids of the prompt and of the answer."""

    messages: list[dict[str, str]]
    text: str
    known: list[int]


def ask(server: Server, messages: list[dict[str, str]], **options: object) -> dict[str, Any]:
    body = {"messages": messages, "temperature": 1, "top_p": 1, "return_token_ids": True, **options}
    status, answer = server.post("/v1/chat/completions", body)
    assert status == 200, answer
    return answer


def num_shared(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_second_turn_finds_the_answer(setting: str, start: Callable[..., Server]) -> None:
    server = start("--max-model-len", "1024", "--threads", "1", *SETTINGS[setting])
    tokenizer, template = Tokenizer.load(TINY_MODEL), ChatTemplate.load(TINY_MODEL)
    assert template is not None

    def tokens_of(messages: list[dict[str, str]]) -> list[int]:
        text = template.render(messages, max_chars=10_000)
        return tokenizer.encode(text, add_special_tokens=False).tolist()

    # 1. first turns, drawn so that some answers are cut as no tokenizer would
    turns = []
    for seed, question in enumerate(QUESTIONS):
        messages = [{"role": "user", "content": question}]
        answer = ask(server, messages, seed=seed, max_tokens=60)
        choice = answer["choices"][0]
        turns.append(Turn(messages, choice["message"]["content"], tokens_of(messages) + choice["token_ids"]))
    settled(server)
    # 2. second turns: the answer's tokens are found too, but for its last one, which has no KV
    num_lost = 0
    for turn in turns:
        messages = [
            *turn.messages,
            {"role": "assistant", "content": turn.text},
            {"role": "user", "content": "And?"},
        ]
        plain = tokens_of(messages)
        lost = whole(num_shared(plain, turn.known)) < whole(len(turn.known) - 1)
        num_lost += lost
        usage = ask(server, messages, max_tokens=1)["usage"]
        num_found = len(turn.known) - 1
        if setting == "switched off":
            num_found = min(num_found, num_shared(plain, turn.known))
        assert usage["prompt_tokens_details"]["cached_tokens"] == whole(num_found), turn.text
    assert num_lost > 0
    num_reused = 0 if setting == "switched off" else len(turns)
    assert counter(server, "memserve_reused_histories_total") == num_reused
    server.wait_idle()
