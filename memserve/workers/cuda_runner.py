"""Steps on a GPU that the host only enqueues: it lays a step out while the one before still runs.

    begin      pieces ─► pinned memory ─► one copy ─► [graph | kernels] ─► draw ─► pinned memory, mark
    result     wait for the mark: token ids, -1 where a row was not one of numbers

A token that the step before draws is not known to the host when a step begins: it is copied from where that
step leaves it on the device (`_feed`). All work goes to one stream, so a step finds what those before it have
written, and the buffers that steps share are never written too early. Those on the host come in twos, as at
most two steps are under way.

Nothing in `begin` waits for the device, but for steps that are to report log-probabilities: their logits are
sampled by `runner.draw`, which does. What a step writes and draws is the same either way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from memserve.model_config import blocks_for
from memserve.models.paged_step import Staging, build_paged_step
from memserve.models.sampling_step import SamplingStep, build_sampling_step, sample_step
from memserve.models.triton_transformer import TritonTransformer
from memserve.workers import runner as plain
from memserve.workers.cuda_graphs import DecodeGraph, DecodeGraphs, Device, Mark
from memserve.workers.request import Request
from memserve.workers.runner import NOT_A_NUMBER, NOT_DRAWN, draws, lay_out, sampling_row
from memserve.workers.steps import Chunk, Computed, Drawn, Step

# From the host to the device, in each step: its tensors, what its rows ask for, where pending tokens are.
_COPIES = 3


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
        self._staging = Staging(transformer.device, 2 * _COPIES)
        self._graphs: DecodeGraphs | None = None
        # What the last step drew, for the next: row `_row_of[request]`.
        self._drawn_ids = torch.zeros(max_rows, dtype=torch.int64, device=transformer.device)
        self._row_of: dict[Request, int] = {}
        self._results = [device.host_buffer(max_rows) for _ in range(2)]

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
        reports = any(request.reports_prompt for request, _ in chunks) or any(
            request.sampling.logprobs is not None for request in requests
        )
        model = self._transformer.model
        graph = self._graph(chunks, drawing)
        if graph is not None:
            graph.step.fill(pieces)
            step = graph.step.step
        else:
            step = build_paged_step(pieces, self._block_size, self._staging)
        last_rows = [
            first + num_new - 1 for first, (_, num_new) in zip(step.first_rows, chunks, strict=False)
        ]
        self._feed(chunks, last_rows, step.token_ids)
        sampling = None
        if requests and not reports:
            rows = [sampling_row(request) for request in requests]
            sampling = build_sampling_step(rows, model.vocab_size, self._staging)

        if graph is not None:
            graph.replay()
            logits = graph.logits[: len(chunks)]
            for _ in range(model.num_layers):
                self._on_layer()
        else:
            logits = self._transformer.forward(step, self._kv, self._on_layer)
        self._row_of = {request: row for row, request in enumerate(requests)}
        if reports:
            return self._draw_and_report(chunks, num_rows, logits, drawing)
        return self._draw(len(chunks), drawing, logits, sampling)

    def _graph(self, chunks: Sequence[Chunk], drawing: Sequence[int]) -> DecodeGraph | None:
        """The graph for a step of decodes alone."""
        if self._graphs is None or len(drawing) < len(chunks):
            return None
        if any(num_new != 1 for _, num_new in chunks):
            return None
        return self._graphs.find(len(chunks))

    def _feed(self, chunks: Sequence[Chunk], last_rows: Sequence[int], token_ids: Tensor) -> None:
        """Write pending tokens, each the last of its chunk, into `token_ids`."""
        pending = [index for index, chunk in enumerate(chunks) if chunk.request.is_drawing and draws(chunk)]
        if pending:
            sources = [self._row_of[chunks[index].request] for index in pending]
            targets = [last_rows[index] for index in pending]
            rows, sources_there = self._send(np.array((targets, sources), dtype=np.int64))
            token_ids.index_copy_(0, rows, self._drawn_ids.index_select(0, sources_there))

    def _draw(
        self, num_chunks: int, drawing: Sequence[int], logits: Tensor, sampling: SamplingStep | None
    ) -> Step:
        """Enqueue the draws and the copy of what they give."""
        results = self._results[0][: len(drawing)]
        self._results.reverse()
        if sampling is not None:
            token_ids = sample_step(logits, sampling).token_ids
            # Of a row that is not one of numbers the next step makes something, and nobody hears of it.
            self._drawn_ids[: len(drawing)].copy_(token_ids.clamp(min=0))
            results.copy_(token_ids, non_blocking=True)
        return _Enqueued(num_chunks, drawing, results, self._device.mark())

    def _draw_and_report(
        self, chunks: Sequence[Chunk], num_rows: Sequence[int], logits: Tensor, drawing: Sequence[int]
    ) -> Step:
        """Draw with the host's help, which waits for the device; the next step still finds the tokens."""
        drawn = plain.draw(chunks, num_rows, logits)
        if drawing:
            token_ids = np.array([drawn[index].token_id or 0 for index in drawing], dtype=np.int64)
            self._drawn_ids[: len(drawing)].copy_(self._send(token_ids))
        return Computed(drawn)

    def _send(self, array: NDArray[np.int64]) -> Tensor:
        """The array on the device."""
        self._staging.write(array.nbytes)[:] = array.reshape(-1).view(np.uint8)
        return self._staging.send(array.nbytes).view(torch.int64).view(array.shape)


@dataclass(frozen=True, slots=True)
class _Enqueued:
    """A step under way. `results`, good after `mark`: the token ids of the `drawing` chunks."""

    num_chunks: int
    drawing: Sequence[int]
    results: Tensor
    mark: Mark

    def result(self) -> list[Drawn]:
        """See `Step`."""
        self.mark.wait()
        drawn = [NOT_DRAWN] * self.num_chunks
        for index, token_id in zip(self.drawing, self.results.tolist(), strict=True):
            drawn[index] = Drawn(token_id) if token_id >= 0 else NOT_A_NUMBER
        return drawn
