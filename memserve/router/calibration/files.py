"""Cost models on disk, so that a worker is measured once on a machine and not at every start.

One file a kind of worker, found by what its times depend on: machine, model and layout (the workers'
fingerprint), kind, the versions of torch and of this format. Files are only a cache: one that is missing,
cut off, foreign or from another version is ignored, with a line in the log. Written to a new file that then
takes the old one's place, readable by the owner alone.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import logging
import os
import platform
import tempfile
from collections.abc import Mapping
from pathlib import Path

import msgspec

from memserve.router.calibration.plan import Kind
from memserve.router.scheduling.cost_fit import Errors
from memserve.router.scheduling.cost_model import CostModel, Ramp

logger = logging.getLogger(__name__)

FORMAT = 2
_MAX_FILE_BYTES = 1 << 20


class Key(msgspec.Struct, frozen=True):
    """What the times depend on."""

    machine: str
    fingerprint: str
    kind: Kind
    torch: str
    format: int = FORMAT


class Calibration(msgspec.Struct, frozen=True):
    """Content of a file: a cost model, and how far it was off at steps that it was not fitted to."""

    key: Key
    model: CostModel
    held_out: Errors | None


def default_folder(environ: Mapping[str, str]) -> Path:
    """Where caches go by the XDG convention."""
    base = environ.get("XDG_CACHE_HOME", "")
    root = Path(base) if base.startswith("/") else Path.home() / ".cache"
    return root / "memserve" / "calibration"


def machine_name(num_cpus: int, gpu: str | None, root: Path = Path("/")) -> str:
    """This machine, as far as it tells times: the model of its CPU, its cores, its GPU."""
    name = platform.machine()
    with contextlib.suppress(OSError):
        for line in (root / "proc/cpuinfo").read_text().splitlines():
            label, _, value = line.partition(":")
            if label.strip() in ("model name", "CPU part"):
                name = value.strip()
                break
    return ", ".join((name, f"{num_cpus} cores", *(() if gpu is None else (gpu,))))


def torch_version() -> str:
    """Of the kernels, without importing them."""
    try:
        return importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def path_of(folder: Path, key: Key) -> Path:
    """Where a calibration is kept."""
    digest = hashlib.sha256(msgspec.json.encode(key)).hexdigest()[:20]
    return folder / f"{key.kind.name}-{digest}.json"


def load(folder: Path, key: Key) -> Calibration | None:
    """The calibration of `key`, None if there is none that is good."""
    path = path_of(folder, key)
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_FILE_BYTES + 1)
        calibration = msgspec.json.decode(data, type=Calibration)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        logger.warning("%s is ignored: %s", path, error)
        return None
    if not _is_sound(calibration.model):
        logger.warning("%s is ignored: its numbers mean nothing", path)
        return None
    if calibration.key != key:
        logger.warning("%s is ignored: it belongs to another machine or model", path)
        return None
    return calibration


def _is_sound(model: CostModel) -> bool:
    """Whether it can be used for predictions: no time is negative, every link gets on."""
    operators, links = model.operators, model.links
    rows = operators.rows
    times = [getattr(operators, name) for name in operators.__struct_fields__ if name != "rows"]
    if isinstance(rows, Ramp):
        knots_rise = rows.knots[:1] == (0,) and list(rows.knots) == sorted(set(rows.knots))
        well_formed = knots_rise and len(rows.knots) == len(rows.slopes)
        times += rows.slopes
    else:
        well_formed = rows.wave_rows > 0
        times += (rows.full_ms, rows.last_ms, rows.last_row_ms)
    for link in (links.from_device, links.from_host, links.swap_in):
        times.append(link.latency_ms)
        well_formed = well_formed and link.bytes_per_ms > 0
    return well_formed and min(times) >= 0 and model.request_ms >= 0


def save(folder: Path, calibration: Calibration) -> None:
    """Keep a calibration; where that is not possible, the log says so."""
    path = path_of(folder, calibration.key)
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=folder, prefix=".new-")  # 0600
        try:
            with open(descriptor, "wb") as file:
                file.write(msgspec.json.format(msgspec.json.encode(calibration), indent=2))
            os.replace(name, path)
        except BaseException:
            os.unlink(name)
            raise
    except OSError as error:
        logger.warning("the calibration cannot be kept in %s: %s", folder, error)
