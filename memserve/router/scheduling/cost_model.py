"""What a step costs on one kind of instance, operator by operator (MemServe §Cost model).

Data and arithmetic: stepping a prompt's chunks is predictor.py's, fitting cost_fit.py's, built-in figures are
hardware.py's.

    step_ms = fixed
            + projections, MLP, norms     by rows (tokens of the step): waves, or a ramp with bends
            + attention of prefill        pairs with the context before the chunk, and within it; the context
                                          that is gathered for it; more in a step that has decodes too
            + attention of decode         tokens of context read, and rows
            + head                        rows that draw a token, and that there are any

All times are in ms. Coefficients are not negative, so no prediction falls when work is added.
"""

from __future__ import annotations

import contextlib
import math
from typing import NamedTuple

import msgspec

from memserve.messages import Tier
from memserve.step_shapes import padded_rows, whole_rows

# The scheduler's rule for chunks (workers/budget.py): a step with less room takes no chunk, and the share of
# the bound on time that is aimed at.
MIN_CHUNK_TOKENS = 16
AIM = 0.88
# Keys and values of so many tokens leave the caches of a CPU: pairs with what is before them cost more.
FAR_CONTEXT = 2048


class StepShape(NamedTuple):
    """What a step holds. `num_rows` counts chunks and decodes; `num_pairs` is the sum over chunks of tokens
    times context before them, `num_far_pairs` that of tokens times the context beyond FAR_CONTEXT,
    `num_squares` of tokens squared, `num_gathered` of the context; `num_context` the tokens that decodes
    attend to. `is_mixed`: it has chunks and decodes; `has_chunk`: it has chunks.
    """

    num_rows: int
    num_pairs: float = 0.0
    num_squares: float = 0.0
    num_decodes: int = 0
    num_context: float = 0.0
    num_logit_rows: int = 0
    num_gathered: float = 0.0
    is_mixed: bool = False
    num_far_pairs: float = 0.0
    has_chunk: bool = False


class Ramp(msgspec.Struct, frozen=True, tag=True):
    """A curve by rows that bends at `knots` (ascending, the first is 0); `slopes[i]`: ms a row from there.
    Rows are those that are computed, filler included.
    """

    knots: tuple[int, ...]
    slopes: tuple[float, ...]

    def columns(self, num_rows: int) -> list[float]:
        """Rows in each piece of the curve."""
        num_rows = padded_rows(num_rows)
        ends = (*self.knots[1:], math.inf)
        return [max(0.0, min(num_rows, end) - start) for start, end in zip(self.knots, ends, strict=True)]

    def ms(self, num_rows: int) -> float:
        """Time of so many rows."""
        return sum(map(float.__mul__, self.slopes, self.columns(num_rows)))


class Waves(msgspec.Struct, frozen=True, tag=True):
    """Thread blocks run in waves of `wave_rows` rows: all but the last are full, and the last has a fixed
    part (the paper's form).
    """

    wave_rows: int
    full_ms: float
    last_ms: float
    last_row_ms: float = 0.0

    def columns(self, num_rows: int) -> list[float]:
        """Full waves before the last; whether there is a last one; its rows."""
        if num_rows <= 0:
            return [0.0, 0.0, 0.0]
        num_full = (num_rows - 1) // self.wave_rows
        return [float(num_full), 1.0, float(num_rows - num_full * self.wave_rows)]

    def ms(self, num_rows: int) -> float:
        """Time of so many rows."""
        return sum(map(float.__mul__, (self.full_ms, self.last_ms, self.last_row_ms), self.columns(num_rows)))


class Operators(msgspec.Struct, frozen=True, kw_only=True):
    """Coefficients of the operators; see the module and `StepShape` for what each multiplies. `draw_ms` is
    for a step that draws at all, `mixed_ms` for one that is mixed, which needs two kinds of attention,
    `chunk_ms` for one with a chunk, whose attention is planned and called by itself.
    """

    rows: Ramp | Waves
    fixed_ms: float = 0.0
    pair_ms: float = 0.0
    square_ms: float = 0.0
    decode_row_ms: float = 0.0
    context_ms: float = 0.0
    logit_row_ms: float = 0.0
    gather_ms: float = 0.0
    mixed_ms: float = 0.0
    draw_ms: float = 0.0
    far_pair_ms: float = 0.0
    chunk_ms: float = 0.0

    def step_ms(self, shape: StepShape) -> float:
        """Time of one step."""
        return (
            self.fixed_ms
            + self.rows.ms(shape.num_rows)
            + self.pair_ms * shape.num_pairs
            + self.square_ms * shape.num_squares
            + self.decode_row_ms * shape.num_decodes
            + self.context_ms * shape.num_context
            + self.logit_row_ms * shape.num_logit_rows
            + self.gather_ms * shape.num_gathered
            + self.mixed_ms * shape.is_mixed
            + self.chunk_ms * shape.has_chunk
            + self.far_pair_ms * shape.num_far_pairs
            + self.draw_ms * (shape.num_logit_rows > 0)
        )


class Link(msgspec.Struct, frozen=True):
    """A way for KV: what a copy costs before the first byte, and how fast the bytes then go."""

    latency_ms: float
    bytes_per_ms: float

    def ms(self, num_bytes: float, queue_ms: float = 0.0) -> float:
        """Time until a copy is there, the link being free in `queue_ms`. No bytes cost none."""
        return queue_ms + self.latency_ms + num_bytes / self.bytes_per_ms if num_bytes else 0.0


class Links(msgspec.Struct, frozen=True, kw_only=True):
    """From another instance's device or host tier into the own device tier, and from the own host tier."""

    from_device: Link
    from_host: Link
    swap_in: Link

    def pull(self, tier: Tier) -> Link:
        """The link from a tier of another instance."""
        return self.from_device if tier is Tier.DEVICE else self.from_host


class Budget(msgspec.Struct, frozen=True):
    """The worker's bounds on a step; `max_step_ms` None: only tokens count (GPU)."""

    max_tokens: int
    max_step_ms: float | None = None


class CostModel(msgspec.Struct, frozen=True, kw_only=True):
    """One kind of instance with one model. `kv_token_bytes`: K and V of one token over all layers.
    `request_ms`: what a request takes beside its steps, until the router has its first token.
    """

    name: str
    operators: Operators
    budget: Budget
    kv_token_bytes: int
    links: Links
    request_ms: float = 0.0

    def transfer_ms(self, num_tokens: int, tier: Tier, queue_ms: float = 0.0) -> float:
        """Time to pull the KV of so many tokens from another instance's tier."""
        return self.links.pull(tier).ms(num_tokens * self.kv_token_bytes, queue_ms)

    def swap_in_ms(self, num_tokens: int) -> float:
        """Time to bring the KV of so many tokens from the own host tier."""
        return self.links.swap_in.ms(num_tokens * self.kv_token_bytes)


class Speed(NamedTuple):
    """How a worker's own budget sees a step: row_ms * (tokens + pair_rows * pairs attended)."""

    row_ms: float
    pair_rows: float


def speed_of(model: CostModel) -> Speed:
    """What a worker's budget learns from steps near its bound, where overhead is part of a row's cost."""
    operators, max_step_ms = model.operators, model.budget.max_step_ms
    assert max_step_ms is not None
    low, high = MIN_CHUNK_TOKENS, max(MIN_CHUNK_TOKENS, model.budget.max_tokens)
    while high - low > 1:
        middle = (low + high) // 2
        if (
            operators.step_ms(StepShape(middle, num_squares=middle * middle, has_chunk=True))
            <= AIM * max_step_ms
        ):
            low = middle
        else:
            high = middle
    base_ms = operators.step_ms(StepShape(low, has_chunk=True))
    row_ms = max(base_ms / low, 1e-9)
    return Speed(row_ms, operators.pair_ms / row_ms)


def room(
    budget: Budget,
    speed: Speed | None,
    num_tokens: int,
    num_pairs: float,
    context_len: int,
    *,
    is_first: bool,
) -> int:
    """Tokens that a chunk after `context_len` tokens may have in a step that holds so many tokens and pairs
    already; 0 = the step is full. `is_first`: no other chunk is in it. `speed` only where time is bounded.
    """
    left = budget.max_tokens - num_tokens
    if budget.max_step_ms is not None:
        assert speed is not None
        spent_ms = speed.row_ms * (num_tokens + speed.pair_rows * num_pairs)
        left = min(left, _fitting(budget.max_tokens, speed, context_len, AIM * budget.max_step_ms - spent_ms))
    left = whole_rows(num_tokens + left) - num_tokens
    if left >= MIN_CHUNK_TOKENS:
        return left
    return MIN_CHUNK_TOKENS if is_first else 0


def _fitting(max_tokens: int, speed: Speed, context_len: int, left_ms: float) -> int:
    """n tokens attend to n * context_len + n^2 / 2 pairs: solve half * n^2 + linear * n = left_ms."""
    if left_ms <= 0:
        return 0
    half = speed.row_ms * speed.pair_rows / 2
    linear = speed.row_ms * (1 + speed.pair_rows * context_len)
    root = linear + math.sqrt(linear * linear + 4 * half * left_ms)
    return max_tokens if root == 0 else int(min(max_tokens, 2 * left_ms / root))


def to_json(model: CostModel) -> bytes:
    """For a file; see `from_json`."""
    return msgspec.json.format(msgspec.json.encode(model), indent=2)


class _Kept(msgspec.Struct):
    """A file of calibration/files.py, as far as it matters here."""

    model: CostModel


def from_json(data: bytes) -> CostModel:
    """Inverse of `to_json`; also the model in a file that a calibration has kept. Raises msgspec.DecodeError
    or ValidationError on anything else.
    """
    try:
        return msgspec.json.decode(data, type=CostModel)
    except msgspec.ValidationError:
        with contextlib.suppress(msgspec.ValidationError):
            return msgspec.json.decode(data, type=_Kept).model
        raise
