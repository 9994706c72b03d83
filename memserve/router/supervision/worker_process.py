"""One worker process: spawned, watched by its pidfd, killed and waited for.

Life cycle: constructed running → `exited` set, with `returncode` → `close`. The child gets one end of the
control socketpair (frames) and one of the grants socketpair (descriptors); both ends of this side belong to
the caller. Only the event loop's thread may spawn: a worker asks the kernel to die with its parent, and to
the kernel the parent is the *thread* that spawned it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

# -P keeps the current folder out of sys.path: a model folder with a torch.py in it must not run code. The
# package itself is found where this one was, installed or not.
WORKER_COMMAND = (
    sys.executable,
    "-P",
    "-c",
    "import runpy, sys; root = sys.argv.pop(1); root in sys.path or sys.path.insert(0, root); "
    "runpy.run_module('memserve.workers.process', run_name='__main__', alter_sys=True)",
    str(Path(__file__).resolve().parents[3]),
)


class WorkerProcess:
    """The child and its two sockets. `control` and `grants` are this side's ends, non-blocking."""

    def __init__(
        self, command: Sequence[str], title: str, cpus: Sequence[int], stderr: int | None = None
    ) -> None:
        """Spawn `command --control-fd N --grants-fd M --title TITLE`, pinned to `cpus` if there are any.

        `stderr`: a descriptor for it, the caller's; None is this process's own. Raises OSError if the process
        cannot be made.
        """
        self._loop = asyncio.get_running_loop()
        self.exited = asyncio.Event()
        self.returncode: int | None = None
        self.control, control_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self.grants, grants_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            with control_end, grants_end:
                fds = (control_end.fileno(), grants_end.fileno())
                # A session of its own, so that Ctrl-C in the terminal reaches the router alone.
                self._popen = subprocess.Popen(
                    [*command, "--control-fd", str(fds[0]), "--grants-fd", str(fds[1]), "--title", title],
                    stdin=subprocess.DEVNULL,
                    stderr=stderr,
                    pass_fds=fds,
                    start_new_session=True,
                )
            self._pidfd = self._watch(self._popen)
        except BaseException:
            self.control.close()
            self.grants.close()
            raise
        self.control.setblocking(False)
        self.grants.setblocking(False)
        if cpus:
            # Before it has threads to inherit the old set. It does the same again, and tells if it cannot.
            with contextlib.suppress(OSError):
                os.sched_setaffinity(self._popen.pid, cpus)

    def terminate(self) -> None:
        """Ask it to end (SIGTERM). Does nothing once it has exited."""
        if self.returncode is None:
            signal.pidfd_send_signal(self._pidfd, signal.SIGTERM)

    async def kill(self) -> None:
        """SIGKILL, and wait until it is gone and reaped."""
        if self.returncode is None:
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        await self.exited.wait()

    def describe_exit(self) -> str:
        """`returncode` in words, such as "was killed by signal 9 (Killed)"."""
        assert self.returncode is not None
        if self.returncode < 0:
            return f"was killed by signal {-self.returncode} ({signal.strsignal(-self.returncode)})"
        return f"exited with status {self.returncode}"

    def close(self) -> None:
        """Give the descriptors back. Only after it has exited; `control` has an owner of its own by then."""
        assert self.returncode is not None
        self.grants.close()

    def _watch(self, popen: subprocess.Popen[bytes]) -> int:
        try:
            pidfd = os.pidfd_open(popen.pid)
        except OSError:
            popen.kill()
            popen.wait()
            raise
        self._loop.add_reader(pidfd, self._reap)
        return pidfd

    def _reap(self) -> None:
        # What it started goes with it. It leads its own group, whose number is safe until it is waited for.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._popen.pid, signal.SIGKILL)
        self.returncode = self._popen.wait()
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        self.exited.set()
