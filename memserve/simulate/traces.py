"""What is simulated: a workload of the benchmark's (bench/), when its sessions begin, and how conversations
go on; from a trace file, or from the report of a run that was measured, which repeats that run.

Nothing of a file's format is known here: the readers are the benchmark's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import click
import numpy as np
from numpy.typing import NDArray

from memserve.bench.arrivals import ThinkTime
from memserve.bench.files import at_line, read_json_rows
from memserve.bench.load import Answers, LoadOptions, arrival_times
from memserve.bench.report import read_command
from memserve.bench.shaping import Shape
from memserve.bench.text_tokens import TextTokens
from memserve.bench.tokens import Tokens
from memserve.bench.traces import MAX_TIMESTAMP_MS, MOONCAKE_BLOCK_TOKENS
from memserve.bench.workload import Piece, Workload, expand
from memserve.bench.workload_spec import Source, WorkloadSpec, load_workload
from memserve.errors import WorkloadError

SESSION_BLOCK_TOKENS = 16
_FORMATS = (
    "a Mooncake trace (a row has timestamp, input_length, output_length, hash_ids), sessions (id, turns), "
    "both one JSON object a line, plain or gzip, or the JSON report of bench serve"
)
Ids = NDArray[np.int32]


@dataclass(frozen=True)
class Trace:
    """A workload and how it is sent. Times in seconds.

    Args:
        dues: when each session begins; None = a closed loop of `concurrency` sessions.
        answers: "live": a conversation goes on with what was drawn, as logged where it is logged;
            "replayed": with the logged answer, while something else was drawn.
        block_size: tokens a block, on all workers.
        duration_s: nothing is sent later.
    """

    workload: Workload
    text: TextTokens
    dues: tuple[float, ...] | None
    concurrency: int | None
    think: ThinkTime
    answers: Answers
    seed: int
    block_size: int
    duration_s: float = math.inf

    @property
    def num_requests(self) -> int:
        """Turns of all sessions."""
        return self.workload.num_requests

    def ids(self, piece: Piece) -> Ids:
        """Token ids of a piece; of text without a tokenizer, a number for each four bytes."""
        if isinstance(piece, str):
            return np.array(self.text.ids(piece), dtype=np.int64).astype(np.int32)
        if isinstance(piece, Tokens):
            return piece.numbers().astype(np.int32)
        return np.array(expand(piece), dtype=np.int32)

    def lengths(self) -> list[tuple[int, int]]:
        """(prompt, answer) of every request, in tokens."""
        lengths = []
        for session in self.workload.sessions:
            context = 0
            for turn in session.turns:
                context += self._count(turn.input)
                lengths.append((context, turn.max_tokens))
                is_logged = self.answers == "replayed" and turn.output is not None
                context += self._count(turn.output) if is_logged else turn.max_tokens
        return lengths

    def at_load(self, load: float, num_workers: int, prefill_ms: Callable[[int], float]) -> Trace:
        """The same with its times stretched, so that computing every prompt whole would take a share `load`
        of so many workers' time: arrivals, and with them think times and the duration.

        Raises WorkloadError for a closed loop, and where all begins at once.
        """
        span_s = max(self.dues) if self.dues else 0.0
        if self.dues is None or span_s <= 0:
            raise WorkloadError("the trace has no arrivals to stretch")
        work_s = sum(prefill_ms(num_tokens) for num_tokens, _ in self.lengths()) / 1e3
        factor = work_s / (num_workers * load) / span_s
        return replace(
            self,
            dues=tuple(due * factor for due in self.dues),
            think=replace(self.think, mean_s=self.think.mean_s * factor),
            duration_s=self.duration_s * factor,
        )

    def _count(self, piece: Piece | None) -> int:
        if piece is None:
            return 0
        return self.text.count(piece) if isinstance(piece, str) else len(piece)


def read_trace(
    path: Path,
    *,
    rate: float | None = None,
    seed: int = 0,
    limit: int | None = None,
    tokenizer: Path | None = None,
    block_size: int | None = None,
) -> Trace:
    """A Mooncake trace, a file or folder of sessions, or the JSON report of `memserve bench serve`.

    Args:
        rate: requests a second, for a file without arrivals (default 1); Poisson.
        limit: at most so many sessions, or rows.
        tokenizer: to count text by.
        block_size: None = 512 for Mooncake's, whose prompts share whole blocks of 512, else 16.

    Raises WorkloadError, BenchError or ConfigError for what cannot be used.
    """
    command = read_command(path)
    if command is not None:
        return _repeat(command, limit, block_size)
    is_mooncake = not path.is_dir() and _has_hash_ids(path)
    text = TextTokens.load(tokenizer)
    spec = WorkloadSpec(
        source=Source.MOONCAKE if is_mooncake else Source.SESSIONS,
        path=path,
        seed=seed,
        tokenizer=tokenizer,
        shape=Shape(num_sessions=limit),
    )
    workload = load_workload(spec, text)
    load = LoadOptions(rate=None if workload.has_arrivals else rate or 1.0, answers="live", seed=seed)
    size = MOONCAKE_BLOCK_TOKENS if is_mooncake else SESSION_BLOCK_TOKENS
    return _trace(workload, text, load, block_size or size)


def _trace(workload: Workload, text: TextTokens, load: LoadOptions, block_size: int) -> Trace:
    dues = arrival_times(workload.sessions, load)
    if dues and max(dues) * 1e3 > MAX_TIMESTAMP_MS:
        raise WorkloadError(f"the last session would begin after {max(dues):.2g} s")
    return Trace(
        workload=workload,
        text=text,
        dues=None if dues is None else tuple(dues),
        concurrency=load.concurrency,
        think=load.think,
        answers=load.answers,
        seed=load.seed,
        block_size=block_size,
        duration_s=math.inf if load.duration_s is None else load.duration_s,
    )


def _repeat(command: Sequence[str], limit: int | None, block_size: int | None) -> Trace:
    """The workload and the arrivals of a run that was measured, by the options that it was given."""
    from memserve.bench.commands import serve
    from memserve.bench.options import run_options, workload_spec

    words = list(command)
    if "serve" not in words:
        raise WorkloadError(
            f"a report of `{' '.join(words[:3])}` cannot be repeated, only one of bench serve"
        )
    try:
        options = serve.make_context("serve", words[words.index("serve") + 1 :]).params
    except click.ClickException as error:
        raise WorkloadError(f"the report's command cannot be repeated: {error.format_message()}") from error
    spec = workload_spec(options)
    if limit is not None:
        spec = replace(spec, shape=replace(spec.shape, num_sessions=limit))
    text = TextTokens.load(spec.tokenizer)
    workload = load_workload(spec, text)
    load = run_options(options, workload).load
    if load.concurrency is not None and (load.rate is not None or load.ramp is not None):
        raise WorkloadError("a limit on concurrency beside a rate is not simulated")
    return _trace(workload, text, load, block_size or SESSION_BLOCK_TOKENS)


def _has_hash_ids(path: Path) -> bool:
    """Whether it is Mooncake's; raises WorkloadError if it is none of the formats."""
    try:
        for line, row in read_json_rows(path, dict[str, object]):
            if not row.keys() & {"hash_ids", "turns"}:
                raise at_line(path, line, "this is of another kind")
            return "hash_ids" in row
    except WorkloadError as error:
        raise WorkloadError(f"{error}; what is read is {_FORMATS}") from None
    return False
