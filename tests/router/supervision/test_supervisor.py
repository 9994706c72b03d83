"""Lives of workers, with real processes and a fake worker in them (fake_worker.py)."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import psutil
import pytest
import uvloop

from memserve.config import ServeConfig, Transport, WorkerConfig
from memserve.errors import ModelError, StartupError
from memserve.messages import Cancel, Failed, Heartbeat, Ready, Tier, ToRouter
from memserve.router.supervision.liveness import Timing
from memserve.router.supervision.supervisor import Supervisor
from memserve.router.supervision.worker_process import WORKER_COMMAND
from tests.router.worker_configs import make_worker

FAKE_WORKER = Path(__file__).parents[1] / "fake_worker.py"
TIMING = Timing(first_restart_s=0.01, shutdown_s=5.0, terminate_s=0.2)


class Recorder:
    """WorkerEvents that keeps what it hears, and lets a test wait for it."""

    def __init__(self) -> None:
        self.heard: list[tuple[object, ...]] = []
        self._changed = asyncio.Event()

    def _add(self, *event: object) -> None:
        self.heard.append(event)
        self._changed.set()

    def on_progress(self, instance: str, stage: str, fraction: float) -> None:
        self._add("progress", instance, stage, fraction)

    def on_worker_up(self, config: WorkerConfig, incarnation: int, ready: Ready) -> None:
        self._add("up", config.instance, incarnation)

    def on_worker_message(self, instance: str, incarnation: int, message: ToRouter) -> None:
        if not isinstance(message, Heartbeat):
            assert isinstance(message, Failed)
            self._add("message", instance, incarnation, message.request_id, message.message)

    def on_worker_down(self, instance: str, incarnation: int, reason: str) -> None:
        self._add("down", instance, incarnation, reason)

    def on_instance_lost(self, instance: str) -> None:
        self._add("lost", instance)

    async def wait_for(self, *start: object) -> tuple[object, ...]:
        """The first event that begins with `start`, once it is there."""
        while True:
            for event in self.heard:
                if event[: len(start)] == start:
                    return event
            self._changed.clear()
            await self._changed.wait()

    def of(self, instance: str) -> list[tuple[object, ...]]:
        return [event for event in self.heard if event[1] == instance]


def count_fds() -> int:
    """Open descriptors of this process, but for /dev/null, which uvloop opens when it first needs it."""
    num_fds = 0
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the one that listed them
            num_fds += os.readlink(f"/proc/self/fd/{fd}") != "/dev/null"
    return num_fds


def workers() -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if str(FAKE_WORKER) in " ".join(child.cmdline())]


def pid_of(instance: str) -> int:
    return next(child.pid for child in workers() if f"memserve: {instance}" in child.cmdline())


def make_supervisor(
    events: Recorder,
    mode: str = "ok",
    *,
    instances: tuple[str, ...] = ("prefill-0", "decode-0"),
    ping_deadline_s: float = 60.0,
    timing: Timing = TIMING,
    transports: tuple[Transport, ...] = ("shm",),
    **changes: object,
) -> Supervisor:
    plan = (make_worker(instance) for instance in instances)
    return Supervisor(
        tuple(msgspec.structs.replace(config, transports=transports, **changes) for config in plan),
        ServeConfig(ping_deadline_s=ping_deadline_s),
        events,
        command=(sys.executable, str(FAKE_WORKER), "--mode", mode),
        timing=timing,
    )


@asynccontextmanager
async def running(supervisor: Supervisor) -> AsyncIterator[None]:
    """A started supervisor; afterwards nothing of it may be left."""
    num_fds = count_fds()
    try:
        await supervisor.start()
        yield
    finally:
        await supervisor.shutdown()
        assert workers() == []
        assert count_fds() == num_fds


async def test_life_of_a_server() -> None:
    events = Recorder()
    supervisor = make_supervisor(events)
    async with running(supervisor):
        # 1. The first worker loads; the other is introduced when the weights are there; then all are up.
        assert events.heard[:2] == [
            ("progress", "prefill-0", "weights", 0.5),
            ("progress", "prefill-0", "weights", 1.0),
        ]
        assert sorted(events.heard[2:]) == [("up", "decode-0", 0), ("up", "prefill-0", 0)]

        # 2. Each holds its own arena to write and its peer's to read; only the loader may write the weights.
        for instance, peer, loads in (("prefill-0", "decode-0", True), ("decode-0", "prefill-0", False)):
            assert supervisor.send(instance, Cancel("report", 0))
            report = json.loads(str((await events.wait_for("message", instance, 0, "report"))[4]))
            assert report["arenas"] == [[instance, 0, True, True], [peer, 0, False, False]]
            assert report["weights"] == [loads]

        # 3. Each leads a session of its own, out of reach of the terminal's Ctrl-C.
        assert all(os.getsid(child.pid) == child.pid for child in workers())
    # 4. Shut down: nobody was announced as down, and nothing takes messages any more.
    assert not any(event[0] == "down" for event in events.heard)
    assert not supervisor.send("decode-0", Cancel("report", 0))


async def test_peers_that_are_not_to_be_mapped_are_named_without_descriptors() -> None:
    events = Recorder()
    supervisor = make_supervisor(events, transports=("torch_distributed",))
    async with running(supervisor):
        supervisor.send("prefill-0", Cancel("report", 0))
        report = json.loads(str((await events.wait_for("message", "prefill-0", 0, "report"))[4]))
        assert report["arenas"] == [["prefill-0", 0, True, True], ["decode-0", 0]]
        # and so is the next life
        supervisor.send("prefill-0", Cancel("exit", 0))
        await events.wait_for("up", "prefill-0", 1)
        supervisor.send("decode-0", Cancel("report", 0))
        report = json.loads(str((await events.wait_for("message", "decode-0", 0, "report"))[4]))
        assert report["arenas"] == [["decode-0", 0, True, True], ["prefill-0", 0], ["prefill-0", 1]]


ON_GPU = {"device": "cuda:0", "num_blocks": None, "max_blocks": 100, "transports": ("cuda_ipc",)}


async def report_of(supervisor: Supervisor, events: Recorder, instance: str, incarnation: int = 0) -> object:
    """What a worker was granted since it was last asked."""
    events.heard[:] = [event for event in events.heard if event[0] != "message"]
    assert supervisor.send(instance, Cancel("report", 0))
    report = await events.wait_for("message", instance, incarnation, "report")
    return json.loads(str(report[4]))["arenas"]


async def test_memory_of_gpus_is_granted_as_long_as_its_owner_lives() -> None:
    events = Recorder()
    supervisor = make_supervisor(events, "gpu", **ON_GPU)
    async with running(supervisor):
        # 1. Each has its own table to write, its peer's to read, and its peer's memory by its descriptor.
        for instance, peer in (("prefill-0", "decode-0"), ("decode-0", "prefill-0")):
            assert await report_of(supervisor, events, instance) == [
                [instance, 0, True, []],
                [peer, 0, False, [4096]],
            ]
        # 2. One dies: its memory is revoked, its host tier would not be; then its new life's is granted.
        supervisor.send("prefill-0", Cancel("exit", 0))
        await events.wait_for("up", "prefill-0", 1)
        assert await report_of(supervisor, events, "decode-0") == [
            ["prefill-0", "revoked", int(Tier.DEVICE)],
            ["prefill-0", 1, False, [8192]],
        ]
        # 3. The new life gets the table of the old one, and what its peer has exported already.
        assert await report_of(supervisor, events, "prefill-0", 1) == [
            ["prefill-0", 1, True, []],
            ["decode-0", 0, False, [4096]],
        ]


@pytest.mark.parametrize("mode", ["gpu", "no-weights"])
async def test_workers_on_one_gpu_get_the_weights_of_the_first(mode: str) -> None:
    events = Recorder()
    names = ("prefill-0", "decode-0", "decode-1")
    supervisor = make_supervisor(events, mode, instances=names, shares_weights=True, **ON_GPU)
    async with running(supervisor):
        # 1. The first loads them; the others are introduced when it has, and may have to load their own.
        given = [True] if mode == "gpu" else []
        for name, expected in zip(names, ([], given, given), strict=True):
            assert supervisor.send(name, Cancel("report", 0))
            report = await events.wait_for("message", name, 0, "report")
            assert json.loads(str(report[4]))["weights"] == expected
        # 2. They outlive the worker that loaded them.
        supervisor.send("prefill-0", Cancel("exit", 0))
        await events.wait_for("up", "prefill-0", 1)
        assert supervisor.send("prefill-0", Cancel("report", 0))
        report = await events.wait_for("message", "prefill-0", 1, "report")
        assert json.loads(str(report[4]))["weights"] == given


async def test_workers_on_other_gpus_wait_for_nobody() -> None:
    events = Recorder()
    supervisor = make_supervisor(events, "gpu", **ON_GPU)
    async with running(supervisor):
        assert supervisor.send("decode-0", Cancel("report", 0))
        report = await events.wait_for("message", "decode-0", 0, "report")
        assert json.loads(str(report[4]))["weights"] == []


async def test_an_export_without_its_descriptor_ends_the_worker() -> None:
    supervisor = make_supervisor(Recorder(), "no-export", **ON_GPU)
    with pytest.raises(StartupError, match="exported no memory of its GPU: .* with 0 descriptors"):
        await supervisor.start()
    assert workers() == []


async def test_killed_worker_is_reaped_then_replaced() -> None:
    events = Recorder()
    supervisor = make_supervisor(events)
    async with running(supervisor):
        # 1. The loader dies (the weights outlive it).
        pid = pid_of("prefill-0")
        os.kill(pid, signal.SIGKILL)
        down = await events.wait_for("down", "prefill-0", 0)
        assert down[3] == "was killed by signal 9 (Killed)"
        assert not psutil.pid_exists(pid)

        # 2. Its successor is another incarnation, which reads the weights like everybody else.
        await events.wait_for("up", "prefill-0", 1)
        assert pid_of("prefill-0") != pid
        supervisor.send("prefill-0", Cancel("report", 0))
        report = json.loads(str((await events.wait_for("message", "prefill-0", 1, "report"))[4]))
        assert report["arenas"] == [["prefill-0", 1, True, True], ["decode-0", 0, False, False]]
        assert report["weights"] == [False]

        # 3. The peer was told of the new incarnation.
        supervisor.send("decode-0", Cancel("report", 0))
        report = json.loads(str((await events.wait_for("message", "decode-0", 0, "report"))[4]))
        assert report["arenas"][-1] == ["prefill-0", 1, False, False]
        assert [event[:3] for event in events.of("prefill-0") if event[0] in ("up", "down")] == [
            ("up", "prefill-0", 0),
            ("down", "prefill-0", 0),
            ("up", "prefill-0", 1),
        ]


async def test_last_words_come_before_the_end() -> None:
    events = Recorder()
    supervisor = make_supervisor(events)
    async with running(supervisor):
        supervisor.send("decode-0", Cancel("exit", 7))
        await events.wait_for("up", "decode-0", 1)
        assert [event[2:] for event in events.of("decode-0")] == [
            (0,),
            (0, "exit", "last word"),
            (0, "exited with status 7"),
            (1,),
        ]


async def test_stopped_worker_is_killed_at_the_ping_deadline() -> None:
    events = Recorder()
    supervisor = make_supervisor(events, ping_deadline_s=1.0)
    async with running(supervisor):
        pid = pid_of("decode-0")
        os.kill(pid, signal.SIGSTOP)
        down = await events.wait_for("down", "decode-0", 0)
        assert down[3] == "was silent for more than 1 s"
        assert not psutil.pid_exists(pid)
        await events.wait_for("up", "decode-0", 1)


async def test_nonsense_ends_the_worker_that_sent_it() -> None:
    events = Recorder()
    supervisor = make_supervisor(events)
    async with running(supervisor):
        supervisor.send("decode-0", Cancel("garbage", 0))
        down = await events.wait_for("down", "decode-0", 0)
        assert str(down[3]).startswith("sent a malformed message")
        await events.wait_for("up", "decode-0", 1)


async def test_given_up_after_restarts_that_come_to_nothing(caplog: pytest.LogCaptureFixture) -> None:
    events = Recorder()
    supervisor = make_supervisor(events, "never-ready-again")
    async with running(supervisor):
        supervisor.send("decode-0", Cancel("exit", 0))
        await events.wait_for("lost", "decode-0")
        assert "it is not started any more" in caplog.text
        assert [event[0] for event in events.of("decode-0")] == ["up", "message", "down", "lost"]
        assert len(workers()) == 1
        assert not supervisor.send("decode-0", Cancel("report", 0))


async def test_replacement_with_another_model_is_not_let_in(caplog: pytest.LogCaptureFixture) -> None:
    events = Recorder()
    supervisor = make_supervisor(events, "other-model-again")
    async with running(supervisor):
        supervisor.send("decode-0", Cancel("exit", 0))
        await events.wait_for("lost", "decode-0")
        assert "decode-0 does not have the model or the KV layout that" in caplog.text
        assert re.search(r"\(\w+, \d+ tokens a block, fingerprint \S+, not \w+, \d+ tokens", caplog.text)
        assert [event[0] for event in events.of("decode-0")] == ["up", "message", "down", "lost"]


@pytest.mark.parametrize(
    ("mode", "error", "message"),
    [
        ("other-model", ModelError, "(prefill|decode)-0 does not have .* (prefill|decode)-0 started with"),
        ("fatal", ModelError, "model.safetensors is truncated"),
        ("exit", StartupError, "exited with status 3 while starting"),
        ("boasts", StartupError, "told of a pool of 536870912 blocks, and was given 8"),
    ],
)
async def test_failed_start_leaves_nothing(mode: str, error: type[StartupError], message: str) -> None:
    num_fds = count_fds()
    supervisor = make_supervisor(Recorder(), mode)
    with pytest.raises(error, match=message):
        await supervisor.start()
    assert workers() == []
    assert count_fds() == num_fds


async def test_command_that_does_not_exist() -> None:
    supervisor = Supervisor(
        (make_worker("colocated-0"),), ServeConfig(), Recorder(), command=("/nonexistent/python",)
    )
    with pytest.raises(StartupError, match="worker colocated-0 cannot be started: .*No such file"):
        await supervisor.start()


async def _cancel(supervisor: Supervisor, start: asyncio.Task[None]) -> None:
    start.cancel()
    with pytest.raises(asyncio.CancelledError):
        await start


async def _shut_down(supervisor: Supervisor, start: asyncio.Task[None]) -> None:
    await supervisor.shutdown(force=True)
    with pytest.raises(StartupError, match="stopped while starting"):
        await start


@pytest.mark.parametrize("interrupt", [_cancel, _shut_down])
async def test_interrupted_start_leaves_nothing(
    interrupt: Callable[[Supervisor, asyncio.Task[None]], Awaitable[None]],
) -> None:
    num_fds = count_fds()
    events = Recorder()
    supervisor = make_supervisor(events, "stuck-loading")
    start = asyncio.create_task(supervisor.start())
    await events.wait_for("progress", "prefill-0", "weights", 1.0)
    await interrupt(supervisor, start)
    assert workers() == []
    assert count_fds() == num_fds


async def test_stubborn_worker_is_killed_in_the_end() -> None:
    timing = Timing(shutdown_s=0.1, terminate_s=0.1)
    async with running(make_supervisor(Recorder(), "stubborn", timing=timing)):
        pass


async def test_second_shutdown_hastens_the_first() -> None:
    supervisor = make_supervisor(Recorder(), "stubborn", timing=Timing(shutdown_s=3600, terminate_s=3600))
    async with running(supervisor):
        asking = asyncio.create_task(supervisor.shutdown())
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.shield(asking), 0.1)
        assert not asking.done()
        await supervisor.shutdown(force=True)
        await asking


def test_cores_are_set_and_uvloop_will_do() -> None:
    async def run() -> None:
        events = Recorder()
        cpu = min(os.sched_getaffinity(0))
        supervisor = Supervisor(
            (make_worker("colocated-0", (cpu,)),),
            ServeConfig(),
            events,
            command=(sys.executable, str(FAKE_WORKER)),
            timing=TIMING,
        )
        async with running(supervisor):
            supervisor.send("colocated-0", Cancel("report", 0))
            report = json.loads(str((await events.wait_for("message", "colocated-0", 0, "report"))[4]))
            assert report["cpus"] == [cpu]
            os.kill(pid_of("colocated-0"), signal.SIGKILL)
            await events.wait_for("up", "colocated-0", 1)

    uvloop.run(run())


def test_workers_end_with_the_router() -> None:
    script = textwrap.dedent(
        """
        import asyncio, os, signal, sys
        sys.path[:0] = sys.argv[1:]
        import test_supervisor as t
        async def main():
            supervisor = t.make_supervisor(t.Recorder())
            await supervisor.start()
            print(*(child.pid for child in t.workers()), flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        asyncio.run(main())
        """
    )
    paths = [str(Path(__file__).parent), str(FAKE_WORKER.parents[2])]
    router = subprocess.run([sys.executable, "-c", script, *paths], capture_output=True, check=False)
    assert router.returncode == -signal.SIGKILL, router.stderr.decode()
    pids = [int(pid) for pid in router.stdout.split()]
    assert len(pids) == 2
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            psutil.Process(pid).wait(timeout=30)


def test_current_folder_is_no_place_for_code(tmp_path: Path) -> None:
    for name in ("msgspec", "numpy", "memserve", "runpy"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('code of the current folder was run')")
    answer = subprocess.run([*WORKER_COMMAND, "--help"], cwd=tmp_path, capture_output=True, check=False)
    assert answer.returncode == 0, answer.stderr.decode()
    assert b"--grants-fd" in answer.stdout
