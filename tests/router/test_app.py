"""The run around the server: the port, signals, and the end of the workers."""

from __future__ import annotations

import asyncio
import os
import signal

import pytest

from memserve.errors import ConfigError
from memserve.router.app import StopSignals, _every, bind, stop_workers
from memserve.router.supervision.supervisor import Supervisor


def test_the_port_is_taken_from_the_moment_it_is_bound() -> None:
    with bind("127.0.0.1", 0) as sock:
        port = sock.getsockname()[1]
        with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1:{port}: Address already in use"):
            bind("127.0.0.1", port)
    with bind("127.0.0.1", port):
        pass


@pytest.mark.parametrize("host", ["not\udcff", "a" * 80 + ".b"])
def test_what_is_no_host_name(host: str) -> None:
    with pytest.raises(ConfigError, match="this is no host name"):
        bind(host, 80)


@pytest.mark.parametrize("host", ["192.0.2.1", "no.such.host.invalid"])
def test_an_address_that_is_not_ours(host: str) -> None:
    with pytest.raises(ConfigError, match=f"cannot listen on {host}:80"):
        bind(host, 80)


class Stubborn(Supervisor):
    """Without workers, but does not end unless forced."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self.forced = asyncio.Event()

    async def shutdown(self, force: bool = False) -> None:
        self.asked.set()
        if force:
            self.forced.set()
        await self.forced.wait()


async def test_a_second_signal_hastens_the_last_stage() -> None:
    stop = StopSignals()
    os.kill(os.getpid(), signal.SIGTERM)
    await stop.first.wait()
    supervisor = Stubborn()
    stopping = asyncio.create_task(stop_workers(supervisor, stop))
    await supervisor.asked.wait()
    assert not supervisor.forced.is_set()
    os.kill(os.getpid(), signal.SIGINT)
    await stopping
    assert supervisor.forced.is_set()


async def test_a_periodic_task_survives_its_errors(caplog: pytest.LogCaptureFixture) -> None:
    calls: list[int] = []
    done = asyncio.Event()

    def work() -> None:
        calls.append(1)
        if len(calls) == 3:
            done.set()
        raise ValueError("broken")

    task = asyncio.create_task(_every(0.0, work))
    await done.wait()
    task.cancel()
    assert "ValueError: broken" in caplog.text
