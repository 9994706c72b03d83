"""How long clients waited for a token around the death of a worker, from outside: pure arithmetic on times.

    token or sending ── event ── noticed ──► replay ── taken over ──► next token
          └──────────────────────── the gap ───────────────────────────┘

A request is *hit* if the server's log says that it was replayed; the rest of a client's waiting around an
event (for a seat, for cores that a replacement's start takes) shows in `around`. The recompute of a replay is
told apart only as an estimate: its tokens at the speed of an undisturbed prefill, alone on its worker.
All times are seconds of the wall clock, which the log shares.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import NamedTuple

_REPLAY = re.compile(
    r"^(\S+ \S+) WARNING memserve\.router\.dispatcher: ([^.\s]+)\.\S*: "
    r"replayed from token \d+ of the answer, (\d+) with the prompt$",
    re.M,
)


class Event(NamedTuple):
    """Something done to a worker: the signal's name, and when."""

    kind: str
    at: float


class Replay(NamedTuple):
    """A line of the server's log: the client's request id, and the tokens to compute again."""

    request_id: str
    at: float
    num_tokens: int


class Stream(NamedTuple):
    """A request of one client: when it was sent, and when each token came."""

    request_id: str
    client: int
    times: list[float]


@dataclass(frozen=True)
class Gaps:
    """What one kind of event did. Lists are in order of time, one entry a request hit, in seconds.

    `gaps`: between two tokens; `noticed`: event to replay; `taken_over`: replay to next token; `recompute`:
    the estimate. `around`: for each event and client the longest gap that is the event's (`owner_of`).
    """

    kind: str
    num_events: int
    gaps: list[float]
    noticed: list[float]
    taken_over: list[float]
    recompute: list[float]
    around: list[float]

    def lines(self) -> list[str]:
        """For people."""
        beside = [gap - own for gap, own in zip(self.gaps, self.recompute, strict=True)]
        rows = {
            "gap of a request hit": self.gaps,
            "  less its recompute alone": beside,
            "  event to replay": self.noticed,
            "  replay to next token": self.taken_over,
            "  its recompute alone": self.recompute,
            "longest gap of a client": self.around,
        }
        head = f"{self.kind}: {self.num_events} events, {len(self.gaps)} requests hit"
        return [
            f"{head:<44}{'P50':>8}{'P99':>8}{'max':>8}",
            *(
                f"  {name:<42}" + "".join(f"{percentile(values, share):>8.3f}" for share in (0.5, 0.99, 1.0))
                for name, values in rows.items()
            ),
        ]


def percentile(values: Sequence[float], share: float) -> float:
    """The least value that at least `share` of all do not exceed; NaN of nothing."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)] if values else math.nan


def read_replays(log: str) -> list[Replay]:
    """The replays that a server's log tells of."""
    return [
        Replay(request_id, datetime.strptime(at, "%Y-%m-%d %H:%M:%S,%f").timestamp(), int(num_tokens))
        for at, request_id, num_tokens in _REPLAY.findall(log)
    ]


def gap_at(times: Sequence[float], at: float) -> int | None:
    """The index of the gap, from `times[i]` to `times[i + 1]`, in which `at` lies."""
    i = bisect_right(times, at) - 1
    return i if 0 <= i < len(times) - 1 else None


def owner_of(starts: Sequence[float], gap_start: float, gap_end: float) -> int | None:
    """The event a gap is put down to: the first within it, else the last before it."""
    i = bisect_right(starts, gap_start)
    if i < len(starts) and starts[i] < gap_end:
        return i
    return i - 1 if i else None


def gaps_by_kind(
    events: Sequence[Event],
    streams: Sequence[Stream],
    replays: Sequence[Replay],
    prefill_s_per_token: float,
) -> list[Gaps]:
    """One `Gaps` a kind. A gap with several replays counts once, for the event before the first of them."""
    found = {kind: Gaps(kind, 0, [], [], [], [], []) for kind in sorted({event.kind for event in events})}
    times_of = {stream.request_id: stream.times for stream in streams}
    starts = [event.at for event in events]
    seen: set[tuple[str, int]] = set()
    for replay in replays:
        times = times_of.get(replay.request_id, [])
        number, i = bisect_right(starts, replay.at) - 1, gap_at(times, replay.at)
        if number < 0 or i is None or (replay.request_id, i) in seen:
            continue
        seen.add((replay.request_id, i))
        gaps = found[events[number].kind]
        gaps.gaps.append(times[i + 1] - times[i])
        gaps.noticed.append(replay.at - starts[number])
        gaps.taken_over.append(times[i + 1] - replay.at)
        gaps.recompute.append(replay.num_tokens * prefill_s_per_token)
    longest = [dict.fromkeys({stream.client for stream in streams}, 0.0) for _ in events]
    for stream in streams:
        for start, end in zip(stream.times, stream.times[1:], strict=False):
            if (owner := owner_of(starts, start, end)) is not None:
                longest[owner][stream.client] = max(longest[owner][stream.client], end - start)
    for event, by_client in zip(events, longest, strict=True):
        found[event.kind].around.extend(by_client.values())
    return [
        Gaps(**{**vars(gaps), "num_events": sum(event.kind == kind for event in events)})
        for kind, gaps in found.items()
    ]
