"""Steps on a GPU that the host only enqueues: it lays a step out while the one before still runs.

    begin      pieces ─► pinned memory ─► one copy ─► [graph | kernels] ─► draw ─► pinned memory, mark
    result     wait for the mark: token ids, and whether each row was one of numbers

A token that the step before draws is not known to the host when a step begins: it is copied from where that
step leaves it on the device (`_feed`). All work goes to one stream, so a step finds what those before it have
written, and the buffers that steps share are never written too early. Those on the host come in twos, as at
most two steps are under way.

Nothing in `begin` waits for the device, but for steps with rows that ask for more than a plain draw
(`device_sampling`): log-probabilities, penalties, biases. Their logits are sampled by `runner.draw`, which
does. What a step writes and draws is the same either way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from memserve.kernels.device_sampling import Draws, RowTensors, draw, is_plain
from memserve.model_config import blocks_for
from memserve.models.paged_step import Staging, build_paged_step
from memserve.models.triton_transformer import TritonTransformer
from memserve.workers import runner as plain
from memserve.workers.cuda_graphs import DecodeGraph, DecodeGraphs, Device, Mark
from memserve.workers.request import Request
from memserve.workers.runner import NOT_A_NUMBER, NOT_DRAWN, draws, lay_out
from memserve.workers.steps import Chunk, Computed, Drawn, Step

# Views of a packed buffer start at multiples of this.
_ALIGNMENT = 16


class CudaRunner:
    """See the module, and `Runner`.

    Args:
        transformer: the model.
        kv: the arena, whose blocks hold `block_size` tokens.
        block_size: see `kv`.
        max_rows: how many chunks a step has at most.
        device: that of the transformer.
        on_layer: told after each layer's K and V of a step are enqueued.
    """

    def __init__(
        self,
        transformer: TritonTransformer,
        kv: Tensor,
        block_size: int,
        max_rows: int,
        device: Device,
        on_layer: Callable[[], None] = lambda: None,
    ) -> None:
        self._transformer = transformer
        self._kv = kv
        self._block_size = block_size
        self._device = device
        self._on_layer = on_layer
        self._staging = Staging(transformer.device)
        self._packed = Staging(transformer.device)
        self._graphs: DecodeGraphs | None = None
        # What the last step drew, for the next: row `_row_of[request]`.
        self._drawn_ids = torch.zeros(max_rows, dtype=torch.int64, device=transformer.device)
        self._row_of: dict[Request, int] = {}
        self._results = [device.host_buffer(2 * max_rows) for _ in range(2)]

    @property
    def overlaps(self) -> bool:
        """Yes: beginning a step only enqueues it."""
        return True

    def capture(self, max_running: int, max_model_len: int) -> None:
        """Have decodes replayed from graphs, from now on. The arena must hold nothing that matters."""
        width = blocks_for(max_model_len, self._block_size)
        self._graphs = DecodeGraphs(
            self._transformer, self._kv, self._block_size, max_running, width, self._staging, self._device
        )

    def execute(self, chunks: Sequence[Chunk]) -> list[Drawn]:
        """See `Runner`."""
        return self.begin(chunks).result()

    @torch.inference_mode()
    def begin(self, chunks: Sequence[Chunk]) -> Step:
        """See `Runner`."""
        pieces, num_rows = lay_out(chunks, self._block_size)
        drawing = [index for index, chunk in enumerate(chunks) if draws(chunk)]
        requests = [chunks[index].request for index in drawing]
        is_simple = all(not request.reports_prompt for request, _ in chunks) and all(
            is_plain(request.sampling) and not request.is_kept_going for request in requests
        )
        model = self._transformer.model
        planned = Draws.of(
            [(request.sampling, request.num_tokens) for request in requests] if is_simple else (),
            model.vocab_size,
        )
        last_rows = np.array(list(accumulate(num_new for _, num_new in chunks)), dtype=np.int64) - 1
        graph = self._graph(chunks, drawing)
        if graph is not None:
            graph.step.fill(pieces)
            step = graph.step.step
        else:
            step = build_paged_step(pieces, self._block_size, self._staging)
            last_rows = np.array(
                [first + num_new - 1 for first, (_, num_new) in zip(step.first_rows, chunks, strict=True)],
                dtype=np.int64,
            )
        row_tensors = self._feed(chunks, last_rows, step.token_ids, planned)

        if graph is not None:
            graph.replay()
            logits = graph.logits[: len(chunks)]
            for _ in range(model.num_layers):
                self._on_layer()
        else:
            logits = self._transformer.forward(step, self._kv, self._on_layer)
        self._row_of = {request: row for row, request in enumerate(requests)}
        if not is_simple:
            return self._draw_plainly(chunks, num_rows, logits, drawing)
        return self._draw(len(chunks), drawing, logits, planned, row_tensors)

    def _graph(self, chunks: Sequence[Chunk], drawing: Sequence[int]) -> DecodeGraph | None:
        """The graph for a step of decodes alone."""
        if self._graphs is None or len(drawing) < len(chunks):
            return None
        if any(num_new != 1 for _, num_new in chunks):
            return None
        return self._graphs.find(len(chunks))

    def _feed(
        self, chunks: Sequence[Chunk], last_rows: NDArray[np.int64], token_ids: Tensor, planned: Draws
    ) -> RowTensors | None:
        """Bring what a step needs beside its tensors to the device, and write pending tokens into
        `token_ids`.
        """
        pending = [index for index, chunk in enumerate(chunks) if chunk.request.is_pending and draws(chunk)]
        arrays: list[NDArray[np.generic]] = []
        if pending:
            arrays.append(last_rows[pending])
            arrays.append(np.array([self._row_of[chunks[index].request] for index in pending], np.int64))
        arrays += planned.arrays or ()
        tensors = _send(arrays, self._packed) if arrays else []
        if pending:
            rows, sources, *tensors = tensors
            token_ids.index_copy_(0, rows, self._drawn_ids.index_select(0, sources))
        return RowTensors(*tensors) if tensors else None

    def _draw(
        self,
        num_chunks: int,
        drawing: Sequence[int],
        logits: Tensor,
        planned: Draws,
        row_tensors: RowTensors | None,
    ) -> Step:
        """Enqueue the draws and the copy of what they give."""
        results = self._results[0]
        self._results.reverse()
        if drawing:
            token_ids, is_finite = draw(logits, planned, row_tensors)
            self._drawn_ids[: len(drawing)].copy_(token_ids)
            results[: 2 * len(drawing)].copy_(torch.cat((token_ids, is_finite)), non_blocking=True)
        return _Enqueued(num_chunks, drawing, results[: 2 * len(drawing)], self._device.mark())

    def _draw_plainly(
        self, chunks: Sequence[Chunk], num_rows: Sequence[int], logits: Tensor, drawing: Sequence[int]
    ) -> Step:
        """Draw with the host's help, which waits for the device; the next step still finds the tokens."""
        drawn = plain.draw(chunks, num_rows, logits)
        if drawing:
            token_ids = np.array([drawn[index].token_id or 0 for index in drawing], dtype=np.int64)
            (tensor,) = _send([token_ids], self._packed)
            self._drawn_ids[: len(drawing)].copy_(tensor)
        return Computed(drawn)


@dataclass(frozen=True, slots=True)
class _Enqueued:
    """A step under way. `results`, good after `mark`: the token ids of the `drawing` chunks, then whether
    their rows are of numbers.
    """

    num_chunks: int
    drawing: Sequence[int]
    results: Tensor
    mark: Mark

    def result(self) -> list[Drawn]:
        """See `Step`."""
        self.mark.wait()
        found = self.results.tolist()
        count = len(self.drawing)
        drawn = [NOT_DRAWN] * self.num_chunks
        for index, token_id, is_finite in zip(self.drawing, found[:count], found[count:], strict=True):
            drawn[index] = Drawn(token_id) if is_finite else NOT_A_NUMBER
        return drawn


def _send(arrays: Sequence[NDArray[np.generic]], staging: Staging) -> list[Tensor]:
    """Bring arrays of one dimension to the device, in one copy."""
    starts = [0, *accumulate(-(-array.nbytes // _ALIGNMENT) * _ALIGNMENT for array in arrays)]
    buffer = staging.write(starts[-1])
    for array, start in zip(arrays, starts, strict=False):
        buffer[start : start + array.nbytes] = array.view(np.uint8)
    sent = staging.send(starts[-1])
    return [
        sent[start : start + array.nbytes].view(torch.from_numpy(array[:0]).dtype)
        for array, start in zip(arrays, starts, strict=False)
    ]
