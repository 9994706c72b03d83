"""`memserve bench pool`: it runs from end to end, and says everything in its table and its JSON."""

from __future__ import annotations

import io
import json
import os
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from rich.console import Console

from memserve.bench.pool_calls import index_bytes
from memserve.bench.pool_report import CallRow, CopyRow, Report, plot, print_report, quantile

REPOSITORY = Path(__file__).resolve().parents[2]
CALL = CallRow(call="match", state="10 prompts", num_blocks=4, num_calls=9, p50_us=2.0, p99_us=3.0)
COPY = CopyRow(
    mode="pull",
    layout="scattered",
    num_blocks=2,
    num_bytes=4_000_000,
    median_ms=2.0,
    memcpy_ms=1.0,
    of_memcpy=0.5,
    send_recv_ms=1.6,
    of_send_recv=1.25,
)


def test_a_quick_run(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    run = subprocess.run(
        [sys.executable, "-m", "memserve", "bench", "pool", "--quick", f"--json={out}"],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert run.returncode == 0, run.stderr
    assert "swap_in" in run.stdout
    report = json.loads(out.read_text())["report"]
    # 1. each call, at each fill level and batch, or in both trees
    calls = Counter(row["call"] for row in report["calls"])
    assert calls.pop("alloc_mem") == calls.pop("free_mem") == 15
    assert set(calls) == {
        "insert",
        "insert, to fill",
        "match, all cached",
        "match of 512 tokens",
        "addresses",
        "acquire",
        "publish",
        "release",
        "delete",
        "alloc_mem that evicts",
        "swap_out",
        "swap_in",
        "resize, to half",
        "resize, to twice",
    }
    assert set(calls.values()) == {2}
    assert all(0 < row["p50_us"] <= row["p99_us"] for row in report["calls"])
    assert set(report["index_bytes"]) == {"40", "400"}
    # 2. each way to copy, at both sizes
    copies = Counter((row["mode"], row["layout"]) for row in report["copies"])
    pulls = [("pull", layout) for layout in ("contiguous", "scattered", "discrete")]
    by_gloo = [("pull, gloo", layout) for layout in ("contiguous", "scattered")]
    others = [(mode, "contiguous") for mode in ("pull by layer", "swap_out", "swap_in")]
    assert copies == dict.fromkeys(pulls + by_gloo + others, 2)
    for row in report["copies"]:  # 3. those over gloo beside what gloo does by itself
        beside = row["send_recv_ms"], row["of_send_recv"]
        assert all(beside) if row["mode"] == "pull, gloo" else beside == (None, None)
    assert all(row["num_bytes"] == row["num_blocks"] << 17 for row in report["copies"])


def test_report(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    report = Report(calls=[CALL], index_bytes={10: 15.5}, copies=[COPY])
    console = Console(width=110, record=True, file=io.StringIO())
    print_report(report, console)
    words = console.export_text().split()
    for word in ("500", "15.5", "2.0", "50%", "125%"):  # ns and bytes a block, GB/s, of memcpy, of send/recv
        assert word in words
    halves = [
        Report(calls=[CALL], index_bytes={}, copies=[]),
        Report(calls=[], index_bytes={}, copies=[COPY]),
    ]
    for each in (report, *halves):  # as with --only
        plot(tmp_path / "out.png", each)
        assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


def test_quantile() -> None:
    assert [quantile(range(10), share) for share in (0, 0.5, 0.99, 1)] == [0, 5, 9, 9]


def test_what_the_index_keeps_beside_token_ids_is_small() -> None:
    assert 8 < index_bytes(200) < 64  # 8 of them are the block's number


def test_the_other_process_ends_quietly_with_who_started_it() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        command = [sys.executable, "-m", "memserve.bench.pool_peer", str(theirs.fileno()), "4"]
        peer = subprocess.Popen(command, pass_fds=[theirs.fileno()], stderr=subprocess.PIPE)
    _, said = peer.communicate(timeout=60)  # it finds the other end closed when it first speaks
    assert (peer.returncode, said) == (0, b"")
