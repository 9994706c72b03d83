"""The process in which chat templates are rendered, and this side of its pipe.

A template comes with a model and is not trusted, and Python cannot bound what Python code takes. The kernel
can: the process runs under an address-space limit, and an alarm that no template can put off ends it when a
job takes too long. It is started once and serves job after job; if it was ended, the next job starts it
again.

    TemplateProcess ── Setup, then Job, Job, … ──►  stdin │ child: compile, render
                    ◄── one Answer each ─────────  stdout │ ends at EOF, with its parent

Frames are `u32 length | msgpack`. The child knows the template's text and nothing else of the model.
"""

from __future__ import annotations

import contextlib
import logging
import resource
import signal
import struct
import subprocess
import sys
import threading
from enum import StrEnum
from pathlib import Path
from typing import IO

import jinja2
import msgspec
import setproctitle

from memserve.router.text.template_sandbox import Refusal, TooLong, compile_template, render_template
from memserve.router.text.tokenizer_files import one_line

logger = logging.getLogger(__name__)

_LENGTH = struct.Struct("<I")
# As for workers: no module may come from the current folder, and the package is the one that runs here.
_COMMAND = (
    sys.executable,
    "-P",
    "-c",
    "import runpy, sys; root = sys.argv.pop(1); root in sys.path or sys.path.insert(0, root); "
    "runpy.run_module('memserve.router.text.template_process', run_name='__main__', alter_sys=True)",
    str(Path(__file__).resolve().parents[3]),
)
# The longest text that a refusal, or the reason of a failure, may have.
_MAX_REASON_CHARS = 500


class Setup(msgspec.Struct, frozen=True):
    """First frame: the template, and the bounds of each job (compiling it is one)."""

    source: str
    timeout_s: float
    memory_bytes: int


class Job(msgspec.Struct, frozen=True):
    """Render for these names; no more than `max_chars`."""

    names: dict[str, object]
    max_chars: int


class Outcome(StrEnum):
    """How a job went. DIED is never sent: it is what this side makes of the end of the process."""

    DONE = "done"
    REFUSED = "refused"
    TOO_LONG = "too long"
    FAILED = "failed"
    TIMEOUT = "timeout"
    DIED = "died"


class Answer(msgspec.Struct, frozen=True):
    """`text`: the prompt if DONE, the template's own words if REFUSED, Python's if FAILED (for the log)."""

    outcome: Outcome
    text: str = ""


class TemplateProcess:
    """A child with one template. Use it from any thread; jobs take turns. Its owner closes it."""

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None

    def compile(self) -> Answer:
        """Start the child if there is none: how it took the template."""
        with self._lock:
            return self._start()

    def run(self, job: Job) -> Answer | None:
        """The answer to `job`; None if its turn did not come within the time that a job may take."""
        if not self._lock.acquire(timeout=self._setup.timeout_s):
            return None
        try:
            if self._child is None or self._child.poll() is not None:
                started = self._start()
                if started.outcome is not Outcome.DONE:
                    return started
            # A character is four bytes at most; the rest is the frame's own.
            return self._ask(msgspec.msgpack.encode(job), 4 * job.max_chars + 4096)
        finally:
            self._lock.release()

    def close(self) -> None:
        """End the child; another job would start it again."""
        with self._lock:
            self._end()

    def _start(self) -> Answer:
        self._end()
        # A session of its own, so that Ctrl-C in the terminal reaches the router alone.
        self._child = subprocess.Popen(
            _COMMAND,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        return self._ask(msgspec.msgpack.encode(self._setup), 4 * _MAX_REASON_CHARS + 4096)

    def _ask(self, request: bytes, max_answer_bytes: int) -> Answer:
        assert self._child is not None and self._child.stdin is not None and self._child.stdout is not None
        try:
            _write_frame(self._child.stdin, request)
            answer = _read_frame(self._child.stdout, max_answer_bytes)
            if answer is not None:
                return msgspec.msgpack.decode(answer, type=Answer)
        except (BrokenPipeError, msgspec.DecodeError):
            logger.debug("the pipe to the template process broke", exc_info=True)
        return Answer(Outcome.TIMEOUT if self._end() == -signal.SIGALRM else Outcome.DIED)

    def _end(self) -> int | None:
        """Ends the child if there is one; its exit status."""
        child, self._child = self._child, None
        if child is None:
            return None
        assert child.stdin is not None and child.stdout is not None
        # Its output first, so that one that still writes ends too; then EOF, and no more patience.
        child.stdout.close()
        with contextlib.suppress(BrokenPipeError):  # what it did not read is of no use to anybody
            child.stdin.close()
        try:
            return child.wait(timeout=0.2)
        except subprocess.TimeoutExpired:
            child.kill()
            return child.wait()


def main() -> None:
    """The child: answers jobs until its input ends."""
    setproctitle.setproctitle("memserve: chat template")
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    frames, answers = sys.stdin.buffer, sys.stdout.buffer
    first = _read_frame(frames)
    if first is None:
        return
    setup = msgspec.msgpack.decode(first, type=Setup)
    resource.setrlimit(resource.RLIMIT_AS, (setup.memory_bytes, setup.memory_bytes))
    template: jinja2.Template | None = None
    frame: bytes | None = b""  # the first job is to compile
    while frame is not None:
        signal.setitimer(signal.ITIMER_REAL, setup.timeout_s)
        try:
            if template is None:
                template, text = compile_template(setup.source), ""
            else:
                job = msgspec.msgpack.decode(frame, type=Job)
                text = render_template(template, job.names, job.max_chars)
            answer = Answer(Outcome.DONE, text)
        except Refusal as error:
            answer = Answer(Outcome.REFUSED, _reason(error))
        except TooLong:
            answer = Answer(Outcome.TOO_LONG)
        except Exception as error:  # a template can fail in every way that Python can
            answer = Answer(Outcome.FAILED, f"{type(error).__name__}: {_reason(error)}")
        encoded = msgspec.msgpack.encode(answer)
        signal.setitimer(signal.ITIMER_REAL, 0)
        _write_frame(answers, encoded)
        if template is None:
            return
        frame = _read_frame(frames)


def _reason(error: Exception) -> str:
    return one_line(error)[:_MAX_REASON_CHARS]


def _write_frame(file: IO[bytes], body: bytes) -> None:
    file.write(_LENGTH.pack(len(body)))
    file.write(body)
    file.flush()


def _read_frame(file: IO[bytes], max_bytes: int | None = None) -> bytes | None:
    """The next frame; None at the end of the file, in the middle of a frame, or if the frame is too large."""
    head = file.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        return None
    (length,) = _LENGTH.unpack(head)
    if max_bytes is not None and length > max_bytes:
        return None
    body = file.read(length)
    return body if len(body) == length else None


if __name__ == "__main__":
    main()
