"""Command line and TOML file to a ServeConfig; mistakes to one line and the right status."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import ModuleType

import click
import msgspec
import pytest
from click.testing import CliRunner, Result

from memserve import __version__
from memserve.cli import cli, serve
from memserve.config import ServeConfig, WorkerOptions
from memserve.errors import ConfigError, MemoryError_
from memserve.router.calibration.command import CalibrateOptions


class Command:
    """`memserve serve` with a server that only remembers its config."""

    def __init__(self) -> None:
        self.configs: list[ServeConfig] = []
        self.error: BaseException | None = None

    def run(self, config: ServeConfig) -> int:
        self.configs.append(config)
        if self.error is not None:
            raise self.error
        return 0

    def invoke(self, *args: str) -> Result:
        return CliRunner().invoke(cli, ["serve", *args], prog_name="memserve")

    def config(self, *args: str) -> ServeConfig:
        result = self.invoke(*args)
        assert result.exit_code == 0, result.output
        return self.configs.pop()


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Command:
    command = Command()
    app = ModuleType("memserve.router.app")
    monkeypatch.setattr(app, "run", command.run, raising=False)
    monkeypatch.setitem(sys.modules, app.__name__, app)
    return command


# --- the command line --------------------------------------------------------------------------------------


def test_nothing_asked_for(command: Command) -> None:
    assert command.config() == ServeConfig()


def test_every_field_has_an_option_of_its_name() -> None:
    worker = set(WorkerOptions.__struct_fields__)
    fields = set(ServeConfig.__struct_fields__) - {"worker", "prefill_worker", "decode_worker"}
    by_role = {f"{role}_{name}" for role in ("prefill", "decode") for name in worker}
    assert {option.name for option in serve.params} == fields | worker | by_role | {"config"}
    for option in serve.params:
        assert isinstance(option, click.Option) and option.help
        assert f"--{option.name}".replace("_", "-") in option.opts


def test_everything_asked_for(command: Command) -> None:
    line = """
        --model org/name --revision main --tokenizer other --chat-template t.jinja --load-format dummy
        --served-model-name mine --prefill 2 --decode 3 --device cpu --dtype float32 --block-size 4
        --transport torch_distributed
        --max-model-len 512 --seed 5 --devices 0,1 --device-memory 2GiB --max-batch-tokens 64 --max-running 9
        --threads 2 --prefill-device-memory 0.25 --prefill-threads 4 --decode-devices 3 --decode-max-running 8
        --host 0.0.0.0 --port 9000 --max-waiting 7 --drain-timeout-s 1.5 --request-timeout-s 60
        --ping-deadline-s 5 --log-level debug --no-reuse-history-tokens
    """
    worker = WorkerOptions(
        devices=(0, 1), device_memory="2GiB", max_batch_tokens=64, max_running=9, threads=2
    )
    assert command.config(*line.split()) == ServeConfig(
        model="org/name",
        revision="main",
        tokenizer="other",
        chat_template="t.jinja",
        load_format="dummy",
        served_model_name="mine",
        prefill=2,
        decode=3,
        device="cpu",
        dtype="float32",
        block_size=4,
        max_model_len=512,
        transport="torch_distributed",
        seed=5,
        worker=worker,
        prefill_worker=msgspec.structs.replace(worker, device_memory="0.25", threads=4),
        decode_worker=msgspec.structs.replace(worker, devices=(3,), max_running=8),
        host="0.0.0.0",
        port=9000,
        max_waiting=7,
        drain_timeout_s=1.5,
        request_timeout_s=60.0,
        ping_deadline_s=5.0,
        log_level="debug",
        reuse_history_tokens=False,
    )
    assert command.config("--colocated", "2") == ServeConfig(colocated=2)


@pytest.mark.parametrize(
    "line",
    [
        "--prefill 0",
        "--prefill 65",
        "--port 65536",
        "--port x",
        "--device tpu",
        "--dtype int8",
        "--block-size 0",
        "--max-model-len 1",
        "--device-memory 2",
        "--prefill-device-memory much",
        "--devices 0,x",
        "--devices -1",
        "--decode-devices 1,",
        "--drain-timeout-s nan",
        "--ping-deadline-s 2.9",
        "--ping-deadline-s nan",
        "--request-timeout-s inf",
        "--max-running 16385",
        "--decode-max-batch-tokens 1048577",
        "--served-model-name a\x1bb",
        "--served-model-name " + "x" * 513,
        "--served-model-name=",
        "--calibration /dev/null",
        "--calibration /dev/null/below",
        "--calibration=",
        "--calibration " + "x" * 5000,
        "--no-such-option",
        "stray",
    ],
)
def test_bad_values_are_usage_errors(command: Command, line: str) -> None:
    result = command.invoke(*line.split())
    assert result.exit_code == 2
    assert "Usage: memserve serve" in result.stderr
    assert command.configs == []


# --- the file ----------------------------------------------------------------------------------------------


def test_file_under_the_command_line(command: Command, tmp_path: Path) -> None:
    file = tmp_path / "memserve.toml"
    file.write_text(
        'model = "m"\nport = 1234\nmax-running = 5\n'
        "device_memory = 0.5\ndevices = [0, 1]\nprefill-threads = 3\nreuse-history-tokens = false\n"
    )
    worker = WorkerOptions(devices=(0, 1), device_memory="0.5", max_running=5)
    expected = ServeConfig(
        model="m",
        port=1234,
        reuse_history_tokens=False,
        worker=worker,
        prefill_worker=msgspec.structs.replace(worker, threads=3),
    )
    assert command.config("--config", str(file)) == expected
    assert command.config("--port", "1", "--config", str(file)) == msgspec.structs.replace(expected, port=1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prot = 1", "there is no option prot; is port meant?"),
        ("zzz = 1", "there is no option zzz"),
        ('config = "other.toml"', "there is no option config"),
        ("port = 70000", "70000 is not in the range"),
        ("prefill = true", "'True' is not a valid integer"),
        ('device = "tpu"', "'tpu' is not one of"),
        ("[worker]\nthreads = 1", "there is no option worker"),
        ("port =", "Invalid value"),
        ("port = 1\nport = 2", "Cannot overwrite"),
    ],
)
def test_bad_files(command: Command, tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "memserve.toml"
    file.write_text(text)
    result = command.invoke("--config", str(file))
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())


def test_file_that_is_not_there(command: Command, tmp_path: Path) -> None:
    result = command.invoke("--config", str(tmp_path / "no.toml"))
    assert result.exit_code == 2
    assert "No such file" in result.stderr


# --- the end -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [MemoryError_("3 GiB are\nmissing"), ConfigError("3 GiB are missing")])
def test_failed_start_is_one_line(command: Command, error: Exception) -> None:
    command.error = error
    result = command.invoke()
    assert (result.exit_code, result.stdout, result.stderr) == (1, "", "memserve: 3 GiB are missing\n")


@pytest.mark.parametrize("line", ["--colocated 1 --prefill 1", "--decode-threads 1 --colocated 1"])
def test_options_that_contradict_each_other(command: Command, line: str) -> None:
    result = command.invoke(*line.split())
    assert result.exit_code == 1
    assert result.stderr.startswith("memserve: --colocated excludes")
    assert result.stderr.count("\n") == 1
    assert command.configs == []


def test_version_and_the_module_as_command() -> None:
    command = [sys.executable, "-m", "memserve", "--version"]
    answer = subprocess.run(
        command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1]
    )
    assert answer.stdout == f"memserve {__version__}\n"


def test_ctrl_c_before_the_server_starts_is_no_failure(command: Command) -> None:
    command.error = KeyboardInterrupt()
    result = command.invoke()
    assert (result.exit_code, result.output) == (130, "memserve: stopped\n")


def test_help_imports_nothing_heavy() -> None:
    code = """
import sys
from memserve.cli import cli
cli(["serve", "--help"], standalone_mode=False)
heavy = {"torch", "numpy", "aiohttp", "uvloop", "rich", "huggingface_hub", "tokenizers"}
assert heavy.isdisjoint(sys.modules), heavy & set(sys.modules)
"""
    subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, cwd=Path(__file__).parents[1]
    )


# --- memserve calibrate ------------------------------------------------------------------------------------


@pytest.fixture
def calibrated(monkeypatch: pytest.MonkeyPatch) -> list[tuple[ServeConfig, CalibrateOptions]]:
    """What `memserve calibrate` was to do."""
    asked: list[tuple[ServeConfig, CalibrateOptions]] = []

    def run(config: ServeConfig, options: CalibrateOptions) -> int:
        asked.append((config, options))
        return 0

    monkeypatch.setattr("memserve.router.calibration.command.run", run)
    return asked


def test_calibrate_takes_the_options_of_serve(
    calibrated: list[tuple[ServeConfig, CalibrateOptions]], tmp_path: Path
) -> None:
    (tmp_path / "c.toml").write_text("port = 9\nthreads = 3\n")
    given = ("--quick", "--json", "--plot", "a.png", "--prefill", "2", "--config", str(tmp_path / "c.toml"))
    result = CliRunner().invoke(cli, ["calibrate", *given, "--calibration", "off"])
    assert result.exit_code == 0, result.output
    ((config, options),) = calibrated
    assert (config.prefill, config.worker.threads, config.calibration) == (2, 3, "off")
    assert options == CalibrateOptions(quick=True, reuse=False, as_json=True, plot=Path("a.png"))


def test_help_of_calibrate_has_no_options_of_requests() -> None:
    text = CliRunner().invoke(cli, ["calibrate", "--help"]).output
    assert "--reuse" in text and "--threads" in text and "--calibration" in text
    assert "--port" not in text and "--max-waiting" not in text
