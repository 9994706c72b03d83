"""The arithmetic of `gap_report.py`, on times made up."""

from __future__ import annotations

import math

import pytest

from tests.e2e.gap_report import (
    Event,
    Replay,
    Stream,
    gap_at,
    gaps_by_kind,
    owner_of,
    percentile,
    read_replays,
)

LOG = """\
2026-11-22 14:55:41,838 WARNING memserve.router.engine: decode-0 (incarnation 0) is down: exited
2026-11-22 14:55:41,840 WARNING memserve.router.dispatcher: c3-17.204-0: replayed \
from token 21 of the answer, 121 with the prompt
2026-11-22 14:55:41,841 WARNING memserve.router.dispatcher: c4-9.205-0: decode-0 got 16 tokens of KV
2026-11-22 14:55:42,841 WARNING memserve.router.dispatcher: c4-9.205-0: replayed \
from token 0 of the answer, 7 with the prompt
"""


def test_replays_are_read_from_a_log() -> None:
    first, second = read_replays(LOG)
    assert (first.request_id, first.num_tokens) == ("c3-17", 121)
    assert (second.request_id, second.num_tokens) == ("c4-9", 7)
    assert second.at - first.at == pytest.approx(1.001)


def test_percentiles_are_values_that_were_there() -> None:
    values = [float(i) for i in range(100, 0, -1)]
    assert [percentile(values, share) for share in (0.5, 0.99, 1.0)] == [50, 99, 100]
    assert percentile([7.0], 0.99) == 7
    assert math.isnan(percentile([], 0.99))


def test_a_moment_lies_in_one_gap() -> None:
    times = [10.0, 11.0, 15.0]
    assert [gap_at(times, at) for at in (9.9, 10.0, 10.9, 11.0, 14.9, 15.0)] == [None, 0, 0, 1, 1, None]


def test_a_gap_is_put_down_to_one_event() -> None:
    starts = [10.0, 20.0]
    assert owner_of(starts, 5.0, 6.0) is None
    assert owner_of(starts, 9.0, 25.0) == 0, "the first within it"
    assert owner_of(starts, 10.0, 19.0) == 0
    assert owner_of(starts, 19.0, 21.0) == 1
    assert owner_of(starts, 30.0, 31.0) == 1


def test_a_gap_belongs_to_the_event_before_its_replay() -> None:
    events = [Event("SIGKILL", 100.0), Event("SIGSTOP", 110.0), Event("SIGKILL", 120.0)]
    streams = [
        Stream("a", 0, [99.0, 99.5, 101.5, 101.6]),
        Stream("b", 1, [108.0, 109.0, 115.0, 115.1]),
        Stream("c", 1, [120.5, 121.5]),  # sent after the event, to a worker not yet known to be dead
        Stream("d", 2, [99.0, 99.9]),  # over before anything happened
    ]
    replays = [
        Replay("a", 100.25, 40),
        Replay("a", 100.75, 40),  # its second worker died as well: the same gap
        Replay("b", 113.5, 100),
        Replay("c", 120.75, 10),
        Replay("d", 100.5, 1),
        Replay("unknown", 100.5, 1),
    ]
    kill, stop = gaps_by_kind(events, streams, replays, prefill_s_per_token=0.01)
    # 1. what was hit
    assert (kill.kind, kill.num_events, kill.gaps) == ("SIGKILL", 2, [2.0, 1.0])
    assert kill.noticed == [0.25, 0.75] and kill.taken_over == [1.25, 0.75]
    assert kill.recompute == pytest.approx([0.4, 0.1])
    assert (stop.kind, stop.num_events, stop.gaps) == ("SIGSTOP", 1, [6.0])
    assert stop.noticed == [3.5] and stop.taken_over == [1.5]
    # 2. each client's longest, hit or not
    assert kill.around == [2.0, 1.0, 0.0, 0.0, 1.0, 0.0] and stop.around == [0.0, 6.0, 0.0]
    # 3. for people
    assert "SIGSTOP: 1 events, 1 requests hit" in stop.lines()[0]
    assert stop.lines()[1].split()[-3:] == ["6.000"] * 3
