"""One step's input for the Triton path: flat tensors of fixed types, moved to the device in one copy.

Everything a step needs is written by NumPy into one buffer of bytes (pinned where there is a GPU) and copied
at once; the tensors of a `PagedStep` are views of the copy. So a step costs one transfer, and a step of fixed
shape can live in a device buffer of its own that a CUDA graph replays over (`StaticStep`).

    staging (host)  | token_ids | positions | slots | … | block_tables |     one copy     PagedStep (views)
                    └────────────────── bytes ─────────────────────────┘  ─────────────►

Sequences with one new token (decodes) come first among the rows, in the caller's order, then the others.
Padding, which only a `StaticStep` has, is rows that store nothing (slot -1) and see nothing (key_lens 0).
What is written here must not be rewritten while a copy may still read it: `Staging` keeps buffers in turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from memserve.kernels.attention_plan import SequenceSlice
from memserve.models.step import LogitRows

Piece = tuple[NDArray[np.int32] | NDArray[np.int64], SequenceSlice, LogitRows]

Arrays = dict[str, NDArray[np.signedinteger[Any]]]

# Views start at multiples of this, so that 16-byte loads stay possible.
_ALIGNMENT = 64


class StepShape(NamedTuple):
    """Sizes of a step's tensors: T rows, S sequences, R rows with logits, W blocks in a row of the tables."""

    num_rows: int
    num_sequences: int
    num_logits: int
    table_width: int


@dataclass(frozen=True, slots=True)
class PagedStep:
    """Input of `TritonTransformer.forward`, on its device.

    Attributes:
        token_ids: int64 [T].
        positions: int64 [T], counted from the start of each sequence.
        slots: int64 [T], block * block_size + offset; -1 = the row's K and V are not stored.
        tails: int32 [T], how many slots behind the row's own are set to zero: the rest of a block that the
            step enters, at its last token there (see `kernels.kv_cache`).
        block_tables: int32 [S, W]; entries past a sequence's last block are 0 and never followed.
        query_starts: int32 [S + 1], first row of each sequence, and the end.
        key_lens: int32 [S], tokens of each sequence with the new ones; 0 = padding.
        logit_rows: int64 [R], rows with logits, in the caller's order.
        logit_sequences: int32 [R], their sequences.
        logit_lens: int32 [R], how many keys each sees before a window is applied: its position + 1.
        num_decodes: sequences 0 to this (exclusive) have one row each, the rows of the same number.
        takes_all: logit_rows are all rows in order.
        first_rows: first row of each of the caller's sequences, in the caller's order (host).
        max_key_len: an upper bound of key_lens; of padded steps the most that fits the tables (host).
    """

    token_ids: Tensor
    positions: Tensor
    slots: Tensor
    tails: Tensor
    block_tables: Tensor
    query_starts: Tensor
    key_lens: Tensor
    logit_rows: Tensor
    logit_sequences: Tensor
    logit_lens: Tensor
    num_decodes: int
    takes_all: bool
    first_rows: tuple[int, ...]
    max_key_len: int


# The tensors in the order in which they lie in a buffer, and their types.
_FIELDS: tuple[tuple[str, type[np.int32] | type[np.int64]], ...] = (
    ("token_ids", np.int64),
    ("positions", np.int64),
    ("slots", np.int64),
    ("tails", np.int32),
    ("query_starts", np.int32),
    ("key_lens", np.int32),
    ("logit_rows", np.int64),
    ("logit_sequences", np.int32),
    ("logit_lens", np.int32),
    ("block_tables", np.int32),
)
_TORCH = {np.int32: torch.int32, np.int64: torch.int64}


def _shape_of(name: str, shape: StepShape) -> tuple[int, ...]:
    if name == "block_tables":
        return shape.num_sequences, shape.table_width
    if name == "query_starts":
        return (shape.num_sequences + 1,)
    if name == "key_lens":
        return (shape.num_sequences,)
    return (shape.num_logits,) if name.startswith("logit_") else (shape.num_rows,)


def num_bytes(shape: StepShape) -> int:
    """Bytes of a buffer that holds a step of `shape`."""
    total = 0
    for name, dtype in _FIELDS:
        size = int(np.prod(_shape_of(name, shape))) * np.dtype(dtype).itemsize
        total += -(-size // _ALIGNMENT) * _ALIGNMENT
    return total


def _arrays(buffer: NDArray[np.uint8], shape: StepShape) -> Arrays:
    """The fields as arrays over `buffer`."""
    arrays: Arrays = {}
    start = 0
    for name, dtype in _FIELDS:
        dims = _shape_of(name, shape)
        size = int(np.prod(dims)) * np.dtype(dtype).itemsize
        view: NDArray[np.signedinteger[Any]] = buffer[start : start + size].view(dtype)
        arrays[name] = view.reshape(dims)
        start += -(-size // _ALIGNMENT) * _ALIGNMENT
    return arrays


def _tensors(buffer: Tensor, shape: StepShape) -> dict[str, Tensor]:
    """The same over a uint8 tensor."""
    tensors, start = {}, 0
    for name, dtype in _FIELDS:
        dims = _shape_of(name, shape)
        size = int(np.prod(dims)) * np.dtype(dtype).itemsize
        tensors[name] = buffer[start : start + size].view(_TORCH[dtype]).view(dims)
        start += -(-size // _ALIGNMENT) * _ALIGNMENT
    return tensors


class Staging:
    """Host buffers in turn, each rewritten only once the copy that last read it is over.

    A step takes one for its tensors and one for its sampling, so with four of them a step is laid out while
    the copies of the one before may still wait in their stream.
    """

    def __init__(self, device: torch.device, num_buffers: int = 4) -> None:
        self._device = device
        self._is_cuda = device.type == "cuda"
        self._buffers: list[Tensor] = [torch.empty(0, dtype=torch.uint8)] * num_buffers
        self._copied: list[torch.cuda.Event | None] = [None] * num_buffers
        self._next = 0

    def write(self, size: int) -> NDArray[np.uint8]:
        """The next buffer's first `size` bytes, to be filled and then sent. May wait for an old copy."""
        copied = self._copied[self._next]
        if copied is not None:
            copied.synchronize()
        if self._buffers[self._next].numel() < size:
            grown = 1 << max(size - 1, 4095).bit_length()
            self._buffers[self._next] = torch.empty(grown, dtype=torch.uint8, pin_memory=self._is_cuda)
        array: NDArray[np.uint8] = self._buffers[self._next].numpy()[:size]
        return array

    def send(self, size: int, target: Tensor | None = None) -> Tensor:
        """Enqueue the copy of what `write` gave: into `target` uint8 [>= size], or a new tensor."""
        index = self._next
        self._next = (index + 1) % len(self._buffers)
        if target is None:
            target = torch.empty(size, dtype=torch.uint8, device=self._device)
        target[:size].copy_(self._buffers[index][:size], non_blocking=True)
        if self._is_cuda:
            event = self._copied[index] or torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(torch.cuda.current_stream(self._device))
            self._copied[index] = event
        return target


def build_paged_step(pieces: Sequence[Piece], block_size: int, staging: Staging) -> PagedStep:
    """Lay out one step of any sequences.

    Args:
        pieces: per sequence its new token ids [num_new >= 1], its slice and the logits wanted. The slices'
            `start`s are not looked at: rows are laid out here.
        block_size: tokens of a block of the arena.
        staging: where to write, and to which device to copy.
    """
    decodes, longer = _partition(pieces)
    order = decodes + longer
    width = max(_num_blocks(pieces[index][1], block_size) for index in order)
    num_logits = sum(_num_logits(piece) for piece in pieces)
    num_rows = sum(piece.num_new for _, piece, _ in pieces)
    shape = StepShape(num_rows, len(pieces), num_logits, width)
    size = num_bytes(shape)
    arrays = _arrays(staging.write(size), shape)
    first_rows = _fill(arrays, pieces, order, block_size)
    takes_all = num_logits == num_rows and np.array_equal(arrays["logit_rows"], np.arange(num_rows))
    max_key_len = int(arrays["key_lens"].max())
    tensors = _tensors(staging.send(size), shape)
    return PagedStep(
        **tensors,
        num_decodes=len(decodes),
        takes_all=takes_all,
        first_rows=first_rows,
        max_key_len=max_key_len,
    )


class StaticStep:
    """A decode-only step of fixed shape in one device buffer, for a CUDA graph to read again and again.

    `step` never changes; what it shows is what `fill` last enqueued. Before the first `fill` all is padding.

    Args:
        num_rows: sequences it has room for, one row each, all with logits.
        table_width: blocks of the longest sequence.
        block_size: tokens of a block of the arena.
        staging: shared with whatever else runs on the same stream.
    """

    def __init__(self, num_rows: int, table_width: int, block_size: int, staging: Staging) -> None:
        self._shape = StepShape(num_rows, num_rows, num_rows, table_width)
        self._block_size = block_size
        self._staging = staging
        self._size = num_bytes(self._shape)
        arrays = _arrays(staging.write(self._size), self._shape)
        _pad(arrays, 0)
        self._buffer = staging.send(self._size)
        self.step = PagedStep(
            **_tensors(self._buffer, self._shape),
            num_decodes=num_rows,
            takes_all=True,
            first_rows=tuple(range(num_rows)),
            max_key_len=table_width * block_size,
        )

    def fill(self, pieces: Sequence[Piece]) -> None:
        """Enqueue decodes: at most `num_rows` pieces of one token that want logits; the rest is padding.

        Row i is piece i. A token id that the device alone knows may be written over `step.token_ids` after
        this, on the same stream.
        """
        assert len(pieces) <= self._shape.num_rows
        assert all(piece.num_new == 1 and wanted is not LogitRows.NONE for _, piece, wanted in pieces)
        arrays = _arrays(self._staging.write(self._size), self._shape)
        if pieces:
            _fill(arrays, pieces, range(len(pieces)), self._block_size)
        _pad(arrays, len(pieces))
        self._staging.send(self._size, self._buffer)


def _partition(pieces: Sequence[Piece]) -> tuple[list[int], list[int]]:
    decodes: list[int] = []
    longer: list[int] = []
    for index, (_, piece, _) in enumerate(pieces):
        (decodes if piece.num_new == 1 else longer).append(index)
    return decodes, longer


def _num_blocks(piece: SequenceSlice, block_size: int) -> int:
    return -(-(piece.context_len + piece.num_new) // block_size)


def _num_logits(piece: Piece) -> int:
    _, tokens, wanted = piece
    return {LogitRows.NONE: 0, LogitRows.LAST: 1, LogitRows.ALL: tokens.num_new}[wanted]


def _fill(arrays: Arrays, pieces: Sequence[Piece], order: Sequence[int], block_size: int) -> tuple[int, ...]:
    """Write the sequences in `order`; the first row of each piece, in the order of `pieces`."""
    count = len(order)
    slices = [pieces[index][1] for index in order]
    lengths = np.array([piece.num_new for piece in slices], dtype=np.int64)
    contexts = np.array([piece.context_len for piece in slices], dtype=np.int64)
    ends = np.cumsum(lengths)
    starts, totals = ends - lengths, contexts + lengths
    num_rows = int(ends[-1])

    sequences = np.repeat(np.arange(count), lengths)
    positions = np.arange(num_rows) + np.repeat(contexts - starts, lengths)
    tables = arrays["block_tables"]
    for row, sequence in enumerate(slices):
        num_blocks = _num_blocks(sequence, block_size)
        assert len(sequence.block_ids) >= num_blocks, "a sequence has fewer blocks than its tokens need"
        tables[row, :num_blocks] = sequence.block_ids[:num_blocks]
        tables[row, num_blocks:] = 0
    blocks, offsets = np.divmod(positions, block_size)
    np.concatenate([pieces[index][0] for index in order], out=arrays["token_ids"][:num_rows])
    arrays["positions"][:num_rows] = positions
    arrays["slots"][:num_rows] = tables[sequences, blocks].astype(np.int64) * block_size + offsets
    # The block of the last token is entered in this step if its first slot is.
    used = (totals - 1) % block_size + 1
    arrays["tails"][:num_rows] = 0
    arrays["tails"][ends - 1] = np.where(totals - used >= contexts, block_size - used, 0)
    arrays["query_starts"][0] = 0
    arrays["query_starts"][1 : count + 1] = ends
    arrays["key_lens"][:count] = totals

    place = np.empty(count, dtype=np.int64)
    place[list(order)] = np.arange(count)
    done = 0
    for index, piece in enumerate(pieces):
        wanted, row = _num_logits(piece), int(place[index])
        rows = np.arange(ends[row] - wanted, ends[row])
        arrays["logit_rows"][done : done + wanted] = rows
        arrays["logit_sequences"][done : done + wanted] = row
        arrays["logit_lens"][done : done + wanted] = positions[rows] + 1
        done += wanted
    return tuple(starts[place].tolist())


def _pad(arrays: Arrays, first: int) -> None:
    """Make the rows from `first` on padding of a decode-only step."""
    num_rows = len(arrays["token_ids"])
    for name in ("token_ids", "positions", "tails", "key_lens", "logit_lens", "block_tables"):
        arrays[name][first:] = 0
    arrays["slots"][first:] = -1
    arrays["query_starts"][first:] = np.arange(first, num_rows + 1)
    arrays["logit_rows"][first:] = np.arange(first, num_rows)
    arrays["logit_sequences"][first:] = np.arange(first, num_rows)
