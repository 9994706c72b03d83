"""What the terminal shows: how the start-up goes, how to use the server, what it does every few seconds.

On a terminal the workers' start-up is drawn with progress bars and the ready server as a table (rich);
elsewhere everything is plain log lines. Log lines go through the same console (`ConsoleHandler`), so that
they do not tear the bars. The texts are made by pure functions of configs and snapshots.
"""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from memserve.config import LogLevel, ServeConfig, WorkerConfig
from memserve.model_config import KVGeometry
from memserve.router.engine_api import EngineStatus
from memserve.sizes import format_bytes

logger = logging.getLogger(__name__)

LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
# Progress is logged each time it has got on by this much.
LOGGED_FRACTION = 0.25


class ConsoleHandler(logging.Handler):
    """Writes log lines as they are through a console, above the progress bars that it may be showing."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        """See `logging.Handler`."""
        try:
            print_plain(self._console, self.format(record))
        except Exception:
            self.handleError(record)


def print_plain(console: Console, text: str) -> None:
    """Print `text` as it is."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def log_through(console: Console, level: LogLevel) -> None:
    """Send this process's log to `console`; where that is no terminal, straight to its file."""
    handler = ConsoleHandler(console) if console.is_terminal else logging.StreamHandler(console.file)
    logging.basicConfig(level=level.upper(), format=LOG_FORMAT, handlers=[handler])


class Display:
    """The terminal's view of one run: `starting` → `ready` → `status` now and then → `close`."""

    def __init__(
        self,
        serve: ServeConfig,
        plan: Sequence[WorkerConfig],
        model_name: str,
        console: Console,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._serve = serve
        self._plan = plan
        self._model_name = model_name
        self._console = console
        self._clock = clock
        self._progress: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        self._logged: dict[tuple[str, str], float] = {}
        self._meter = TokenMeter()

    @contextlib.contextmanager
    def starting(self) -> Iterator[None]:
        """Show the workers' start-up while the body runs."""
        for line in describe_plan(self._plan, self._model_name):
            logger.info("%s", line)
        if not self._console.is_terminal:
            yield
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
        )
        with Progress(*columns, console=self._console, transient=True) as progress:
            self._progress = progress
            self._tasks = {
                config.instance: progress.add_task(f"{config.instance} starting", total=None)
                for config in self._plan
            }
            try:
                yield
            finally:
                self._progress = None

    def on_progress(self, instance: str, stage: str, fraction: float) -> None:
        """An instance got on with its start-up (also of a replacement, later: that is logged)."""
        if self._progress is not None:
            description = f"{instance} {stage}"
            self._progress.update(
                self._tasks[instance], description=description, total=1.0, completed=fraction
            )
            return
        last = self._logged.get((instance, stage), -1.0)
        if fraction < last or fraction >= last + LOGGED_FRACTION or fraction >= 1.0 > last:
            self._logged[instance, stage] = fraction
            logger.info("%s: %s %.0f %%", instance, stage, 100 * fraction)

    def ready(self, port: int, status: EngineStatus) -> None:
        """The server takes requests on `port`; `status` has the sizes of the pools."""
        self._meter.rates(status, self._clock())  # the first report counts from here
        url = base_url(self._serve.host, port)
        rows = ready_rows(self._plan, status)
        example = curl_example(url, self._model_name)
        if not self._console.is_terminal:
            for row in rows:
                logger.info("%s: %s on %s, %s, %s tokens of KV", *row)
            logger.info("ready: %s on %s", self._model_name, url)
            logger.info("try: %s", example.replace("\\\n  ", ""))
            return
        table = Table(title=f"{self._model_name} on {url}", title_justify="left", title_style="bold green")
        for name in ("instance", "role", "device", "threads"):
            table.add_column(name)
        table.add_column("KV tokens", justify="right")
        for row in rows:
            table.add_row(*row)
        self._console.print(table)
        print_plain(self._console, f"{example}\n")

    def status(self, status: EngineStatus) -> None:
        """Log what the server does, if it does anything. Call it at even intervals."""
        rates = self._meter.rates(status, self._clock())
        if status.num_running or status.num_waiting:
            logger.info("%s", describe_status(status, rates))

    def close(self) -> None:
        """The last call. The cursor is shown again, whatever happened."""
        if self._console.is_terminal:
            self._console.show_cursor()


# --- texts -------------------------------------------------------------------------------------------------


def describe_plan(plan: Sequence[WorkerConfig], model_name: str) -> list[str]:
    """One line for the model, one for each worker."""
    first = plan[0]
    lines = [f"{model_name}: {first.dtype}, up to {first.max_model_len} tokens a request"]
    for config in plan:
        lines.append(f"{config.instance}: {config.device}, {_threads(config)}, {_capacity(config)}")
    return lines


def ready_rows(plan: Sequence[WorkerConfig], status: EngineStatus) -> list[tuple[str, str, str, str, str]]:
    """Instance, role, device, threads and tokens of KV of every worker."""
    num_blocks = {instance.instance: instance.num_blocks for instance in status.instances}
    return [
        (
            config.instance,
            config.role.value,
            config.device,
            _threads(config),
            str(num_blocks.get(config.instance, 0) * config.block_size),
        )
        for config in plan
    ]


def _threads(config: WorkerConfig) -> str:
    threads = f"{config.threads} thread{'s' * (config.threads > 1)}"
    if not config.cpus:
        return threads
    return f"{threads} on core{'s' * (len(config.cpus) > 1)} {_ranges(config.cpus)}"


def _ranges(cpus: Sequence[int]) -> str:
    """Sorted, with runs drawn together: (0, 1, 2, 5) is "0-2,5"."""
    runs: list[list[int]] = []
    for cpu in sorted(cpus):
        if runs and cpu == runs[-1][-1] + 1:
            runs[-1].append(cpu)
        else:
            runs.append([cpu])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _capacity(config: WorkerConfig) -> str:
    if config.num_blocks is None:
        return f"KV pool of {config.device_memory_fraction:.0%} of the memory that its weights leave"
    geometry = KVGeometry.of(config.model, config.block_size, config.dtype)
    size = format_bytes(config.num_blocks * geometry.block_bytes)
    return f"KV of {config.num_blocks * config.block_size} tokens ({size})"


def base_url(host: str, port: int) -> str:
    """Where this machine reaches the server; an address that means "all" is reached by the local one."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def curl_example(url: str, model_name: str) -> str:
    """A command to try the server with."""
    body = {"model": model_name, "prompt": "Once upon a time", "max_tokens": 32, "stream": True}
    quoted = json.dumps(body).replace("'", "'\\''")
    return f"curl -N {url}/v1/completions -H 'content-type: application/json' \\\n  -d '{quoted}'"


def describe_status(status: EngineStatus, rates: tuple[float, float]) -> str:
    """One line; `rates` are prompt and drawn tokens a second."""
    loads = [instance.load for instance in status.instances]
    free = sum(load.num_free_blocks for load in loads)
    all_blocks = free + sum(load.num_active_blocks + load.num_historical_blocks for load in loads)
    prompt, drawn = rates
    return (
        f"{status.num_running} running, {status.num_waiting} waiting; {prompt:.0f} prompt tokens/s, "
        f"{drawn:.0f} drawn tokens/s; {free} of {all_blocks} blocks free"
    )


class TokenMeter:
    """Tokens a second, from counters that start again with every life of a worker."""

    def __init__(self) -> None:
        self._counts: dict[tuple[str, int], tuple[int, int]] = {}
        self._at: float | None = None

    def rates(self, status: EngineStatus, now: float) -> tuple[float, float]:
        """Prompt and drawn tokens a second since the last call; zeros at the first. An instance that is down
        counts nothing.
        """
        counts = {
            (instance.instance, instance.incarnation): (
                instance.load.num_prefill_tokens,
                instance.load.num_decode_tokens,
            )
            for instance in status.instances
        }
        before, elapsed_s = self._counts, None if self._at is None else now - self._at
        self._counts, self._at = counts, now
        if not elapsed_s:
            return 0.0, 0.0
        prompt = sum(max(0, count[0] - before.get(life, (0, 0))[0]) for life, count in counts.items())
        drawn = sum(max(0, count[1] - before.get(life, (0, 0))[1]) for life, count in counts.items())
        return prompt / elapsed_s, drawn / elapsed_s
