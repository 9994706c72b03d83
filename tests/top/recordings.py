"""Snapshots of a busy server with two prefill and two decode workers, recorded 1.1 s apart."""

from __future__ import annotations

from pathlib import Path

from memserve.top.snapshot import Snapshot, Told, read_requests, read_samples, read_workers

FOLDER = Path(__file__).parent / "recorded"
URL = "http://127.0.0.1:8000"


def body(name: str) -> bytes:
    return (FOLDER / name).read_bytes()


def recorded(name: str, at: float) -> Snapshot:
    return Snapshot(
        Told(at, read_workers(body(f"{name}.workers.json"))),
        Told(at, read_samples(body(f"{name}.metrics.txt"))),
        Told(at, read_requests(body(f"{name}.requests.json"))),
    )
