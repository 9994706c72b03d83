"""Calibrations on disk: found again, and whatever else may lie there ignored."""

from __future__ import annotations

import logging
import os
import stat
from pathlib import Path

import msgspec
import pytest

from memserve.router.calibration.files import (
    Calibration,
    Key,
    default_folder,
    load,
    machine_name,
    path_of,
    save,
)
from memserve.router.calibration.plan import Kind, make_model
from memserve.router.scheduling.cost_fit import Errors
from memserve.router.scheduling.cost_model import Link, Operators, Ramp, from_json
from tests.router.worker_configs import make_worker

CONFIG = make_worker("prefill-0")
KEY = Key("a machine", "fingerprint", Kind.of(CONFIG), "2.13")
MODEL = make_model(CONFIG, Operators(rows=Ramp((0, 16), (0.5, 0.25)), fixed_ms=1.0))
CALIBRATION = Calibration(KEY, MODEL, Errors(0.01, 0.02))


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    assert load(folder, KEY) is None
    save(folder, CALIBRATION)
    assert load(folder, KEY) == CALIBRATION
    (file,) = folder.iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_a_newer_one_takes_its_place(tmp_path: Path) -> None:
    save(tmp_path, CALIBRATION)
    newer = msgspec.structs.replace(CALIBRATION, held_out=None)
    save(tmp_path, newer)
    assert load(tmp_path, KEY) == newer and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"machine": "another"},
        {"fingerprint": "another"},
        {"kind": msgspec.structs.replace(KEY.kind, threads=9)},
        {"torch": "2.14"},
        {"format": 99},
    ],
)
def test_other_circumstances_have_other_files(tmp_path: Path, change: dict[str, object]) -> None:
    save(tmp_path, CALIBRATION)
    other = msgspec.structs.replace(KEY, **change)
    assert load(tmp_path, other) is None
    os.replace(path_of(tmp_path, KEY), path_of(tmp_path, other))
    assert load(tmp_path, other) is None, "a file is judged by its content, not by its name"


GOOD = msgspec.json.encode(CALIBRATION)
NEGATIVE = msgspec.structs.replace(MODEL, operators=msgspec.structs.replace(MODEL.operators, fixed_ms=-1.0))
UNEVEN = msgspec.structs.replace(MODEL, operators=Operators(rows=Ramp((0, 16), (0.5,))))
FALLING = msgspec.structs.replace(MODEL, operators=Operators(rows=Ramp((0, 16, 8), (0.5, 0.1, 0.1))))
STUCK = msgspec.structs.replace(MODEL, links=msgspec.structs.replace(MODEL.links, from_device=Link(1.0, 0.0)))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff\xfe",
        b"[]",
        b"{}",
        GOOD[:-30],
        GOOD.replace(b'"fixed_ms":1.0', b'"fixed_ms":"x"'),
        *(
            msgspec.json.encode(msgspec.structs.replace(CALIBRATION, model=model))
            for model in (NEGATIVE, UNEVEN, FALLING, STUCK)
        ),
        b" " * (2 << 20),
    ],
)
def test_a_corrupt_file_is_ignored(tmp_path: Path, data: bytes, caplog: pytest.LogCaptureFixture) -> None:
    path_of(tmp_path, KEY).write_bytes(data)
    with caplog.at_level(logging.WARNING):
        assert load(tmp_path, KEY) is None
    assert "is ignored" in caplog.text


def test_a_folder_that_cannot_be_is_only_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    with caplog.at_level(logging.WARNING):
        save(tmp_path / "file" / "folder", CALIBRATION)
        assert load(tmp_path / "file" / "folder", KEY) is None
    assert "cannot be kept" in caplog.text


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, CALIBRATION)

    def fail(*paths: object) -> None:
        raise OSError("no space")

    monkeypatch.setattr(os, "replace", fail)
    save(tmp_path, msgspec.structs.replace(CALIBRATION, held_out=None))
    assert load(tmp_path, KEY) == CALIBRATION and len(list(tmp_path.iterdir())) == 1


def test_the_simulator_reads_the_model_of_a_file(tmp_path: Path) -> None:
    save(tmp_path, CALIBRATION)
    assert from_json(path_of(tmp_path, KEY).read_bytes()) == MODEL


def test_the_default_folder_is_where_caches_go() -> None:
    assert default_folder({"XDG_CACHE_HOME": "/c"}) == Path("/c/memserve/calibration")
    home = Path.home() / ".cache" / "memserve" / "calibration"
    assert default_folder({}) == default_folder({"XDG_CACHE_HOME": "relative"}) == home


def test_a_machine_is_its_processor_its_cores_and_its_gpu(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc" / "cpuinfo").write_text("processor\t: 0\nmodel name\t: Quick 9000\nflags\t: fpu\n")
    assert machine_name(4, None, tmp_path) == "Quick 9000, 4 cores"
    assert machine_name(4, "H200", tmp_path) == "Quick 9000, 4 cores, H200"
    assert machine_name(4, None, tmp_path / "absent").endswith(", 4 cores")
