"""The latest requests and those that run, each with what was decided for it."""

from __future__ import annotations

from collections.abc import Sequence

from rich.cells import cell_len
from rich.table import Table
from rich.text import Text

from memserve.top.snapshot import Cached, Request
from memserve.top.text import NONE, age, amount, clean, duration
from memserve.top.workers import WIDE, table

_STATES = {
    "waiting": "yellow",
    "prefilling": "cyan",
    "decoding": "green",
    "abandoned": "yellow",
    "refused": "bold red",
}
_ENDED = ("finished", "abandoned", "refused")
_SHORT = {"prefilling": "prefill", "decoding": "decode", "finished": "done", "abandoned": "left"}


def request_table(requests: Sequence[Request], most: int, width: int) -> Table:
    """At most `most` rows. Those that run come first, but leave half of the rows to the others."""
    wide = width >= WIDE
    shown = chosen(requests, most)
    made = table(
        width,
        "request",
        max((cell_len(clean(request.id)) for request in shown), default=0),
        ("state", 10 if wide else 7),
        ("policy", 11),
        ("prefill → decode", 26 if wide else 20),
        *([("try", 3), ("prompt", 6)] if wide else []),
        ("cached", 18 if wide else 9),
        ("predict", 7),
        ("TTFT", 6),
        ("age", 4),
        left=("state", "policy", "prefill → decode"),
    )
    for request in shown:
        ended = request.state in _ENDED
        cells = [
            Text(clean(request.id), "" if ended else "bold"),
            Text(clean(request.state if wide else _SHORT.get(request.state, request.state))),
            Text(clean(request.policy or NONE)),
            Text(_where(request)),
        ]
        cells[1].stylize("dim" if ended else "")
        cells[1].stylize(_STATES.get(request.state, ""))
        if wide:
            cells += [Text(amount(request.attempts)), Text(amount(request.prompt_tokens))]
        cells += [
            Text(_cached(request.cached_tokens)),
            Text(duration(request.predicted_ttft_ms)),
            Text(duration(request.ttft_ms)),
            Text(age(request.age_ms / 1e3)),
        ]
        made.add_row(*cells)
    return made


def chosen(requests: Sequence[Request], most: int) -> list[Request]:
    """Running ones, then ended ones, each the newest first as they came."""
    running = [request for request in requests if request.state not in _ENDED]
    ended = [request for request in requests if request.state in _ENDED]
    room = max(most - len(ended), most - most // 2)
    running = running[: max(0, room)]
    return [*running, *ended[: max(0, most - len(running))]]


def _where(request: Request) -> str:
    if request.prefill is None:
        return NONE
    if request.decode is None or request.decode == request.prefill:
        return clean(request.prefill)
    return f"{clean(request.prefill)} → {clean(request.decode)}"


def _cached(cached: Cached | None) -> str:
    """By source, without those that had nothing: "512d 64h 32p"."""
    if cached is None:
        return NONE
    parts = ((cached.device, "d"), (cached.host, "h"), (cached.pulled, "p"))
    return " ".join(f"{amount(number)}{source}" for number, source in parts if number) or "0"
