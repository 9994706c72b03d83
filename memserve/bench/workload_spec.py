"""From a frozen description of a workload to the workload: the one entry of the bench's workload side.

`load_workload(spec)` reads or generates a draft, shapes it, and says in a line what it did. Sources:

    sessions FILE           conversations as text (`session_files.py`)
    mooncake FILE           arrivals, lengths and shared blocks (`traces.py`)
    azure FILE              arrivals and lengths (`traces.py`)
    sharegpt-like, loogle-like, react-like, prefix-repetition, random
                            made up (`generators.py`)

The seed settles everything: tokens, lengths, the choice of sessions and their order.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from pathlib import Path

from memserve.bench import generators, session_files, traces
from memserve.bench.generators import Synthetic
from memserve.bench.shaping import Draft, Shape, shape
from memserve.bench.text_tokens import TextTokens
from memserve.bench.workload import Workload
from memserve.errors import ConfigError

DEFAULT_NUM_SESSIONS = 100


class Source(enum.Enum):
    """Where a workload comes from; the value is its name on the command line."""

    SESSIONS = "sessions"
    MOONCAKE = "mooncake"
    AZURE = "azure"
    SHAREGPT_LIKE = "sharegpt-like"
    LOOGLE_LIKE = "loogle-like"
    REACT_LIKE = "react-like"
    PREFIX_REPETITION = "prefix-repetition"
    RANDOM = "random"

    @property
    def reads_file(self) -> bool:
        """Whether it needs a path."""
        return self in (Source.SESSIONS, Source.MOONCAKE, Source.AZURE)


@dataclass(frozen=True, slots=True)
class WorkloadSpec:
    """What workload to load.

    Args:
        source: kind of file, or generator.
        path: the file (sessions: or its folder); None for generators.
        seed: of everything random.
        tokenizer: tokenizer.json or its folder, for exact counts; None: an estimate for text, and ids below
            500 (or `vocab_size`) for made-up prompts.
        vocab_size: made-up token ids stay below.
        as_text: made-up prompts are text, for servers that take no token ids.
        default_output_tokens: how long an answer is to be where the log of a session has none.
        shape: selection, scaling, truncation.
        synthetic: lengths of `random` and `prefix-repetition`; of no other source.
    """

    source: Source
    path: Path | None = None
    seed: int = 0
    tokenizer: Path | None = None
    vocab_size: int | None = None
    as_text: bool = False
    default_output_tokens: int = session_files.DEFAULT_OUTPUT_TOKENS
    shape: Shape = field(default_factory=Shape)
    synthetic: Synthetic | None = None

    def __post_init__(self) -> None:
        """Raises ConfigError."""
        name = self.source.value
        if self.source.reads_file and self.path is None:
            raise ConfigError(f"the workload {name} needs a file")
        if not self.source.reads_file and self.path is not None:
            raise ConfigError(f"the workload {name} is made up and reads no file")
        if self.seed < 0:
            raise ConfigError(f"seed must not be negative: {self.seed}")
        if self.default_output_tokens < 1:
            raise ConfigError(f"default_output_tokens must be at least 1, not {self.default_output_tokens}")
        if self.synthetic is not None and self.source not in (Source.PREFIX_REPETITION, Source.RANDOM):
            raise ConfigError(f"the workload {name} has lengths of its own: length_scale changes them")


def load_workload(spec: WorkloadSpec, text: TextTokens | None = None) -> Workload:
    """Reads or generates, and shapes.

    Args:
        spec: what to load.
        text: the tokenizer of `spec`, where the caller has it already.

    Raises WorkloadError for a file that cannot be used, ConfigError for options that make no sense together.
    """
    text = TextTokens.load(spec.tokenizer) if text is None else text
    draft = _draft(spec, text)
    if spec.shape.sessions_per_prefix is not None and not draft.prefixes:
        raise ConfigError("sessions_per_prefix: no two sessions of this workload have a prefix in common")
    sessions = shape(draft, spec.shape, text, spec.seed)
    is_text = spec.source is Source.SESSIONS or spec.as_text
    workload = Workload(_name(spec), sessions, is_text)
    counted = "exact" if text.exact or not is_text else "estimated"
    description = (
        f"{len(sessions)} of {len(draft.sessions)} sessions, {workload.num_requests} requests, seed "
        f"{spec.seed}, {'text' if is_text else 'token ids'}, lengths {counted}{_changes(spec.shape)}"
    )
    return Workload(workload.name, sessions, is_text, description)


def _draft(spec: WorkloadSpec, text: TextTokens) -> Draft:
    if spec.source is Source.SESSIONS:
        assert spec.path is not None
        return session_files.read_sessions(spec.path, text, spec.default_output_tokens)
    vocabulary = text.vocabulary(spec.seed, vocab_size=spec.vocab_size, as_text=spec.as_text)
    if spec.path is not None:
        read = traces.read_mooncake if spec.source is Source.MOONCAKE else traces.read_azure
        return read(spec.path, vocabulary)
    count = spec.shape.num_sessions or spec.shape.num_requests or DEFAULT_NUM_SESSIONS
    ratio = spec.shape.sessions_per_prefix
    match spec.source:
        case Source.SHAREGPT_LIKE:
            return generators.sharegpt_like(vocabulary, count, spec.seed)
        case Source.LOOGLE_LIKE:
            return generators.loogle_like(vocabulary, count, spec.seed, ratio)
        case Source.REACT_LIKE:
            return generators.react_like(vocabulary, count, spec.seed, ratio)
        case Source.PREFIX_REPETITION:
            lengths = spec.synthetic or Synthetic()
            return generators.prefix_repetition(vocabulary, count, spec.seed, lengths, ratio)
        case _:
            return generators.random_tokens(vocabulary, count, spec.seed, spec.synthetic or Synthetic())


def _name(spec: WorkloadSpec) -> str:
    """A generator's name, or the file's without endings (its folder's, where the file is just `sessions`)."""
    if spec.path is None:
        return spec.source.value
    stem = spec.path.name.split(".")[0]
    return spec.path.resolve().parent.name if stem == "sessions" and not spec.path.is_dir() else stem


def _changes(options: Shape) -> str:
    """What of the shape is not as it came."""
    changes = [
        f"{label} {value:g}"
        for label, value, default in (
            ("length x", options.length_scale, 1.0),
            ("time x", options.time_scale, 1.0),
            ("prompts at most", options.max_prompt_tokens, None),
            ("answers at most", options.max_output_tokens, None),
            ("sessions a prefix", options.sessions_per_prefix, None),
        )
        if value is not None and value != default
    ]
    return "".join(", " + change for change in changes)
