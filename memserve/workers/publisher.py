"""Makes computed blocks known: to the pool's index, for requests to come, and to the router, for those who
pull them while the rest is computed, or after this worker's death.

    step begins ──► announce: its blocks can be pulled layer by layer      (`tell_layers`)
    step is done ─► publish: into the index, then tell: `Stored`           (`tell_blocks`)

Blocks are told under the ids that they have in the index, so publishing comes first.

On a GPU a step that drew no token is only launched when its blocks are published, and swaps are only put on
their lanes. Our own steps come after them on the GPU; others know nothing of its order, so what they are told
is held back until a mark says that it is true (`hold`), and all that follows it stays behind it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

from numpy.typing import ArrayLike

from memserve.messages import BlockRefs, Removed, Stored
from memserve.model_config import blocks_for
from memserve.pool.block_table import BlockTable
from memserve.pool.lanes import Mark
from memserve.workers.request import Request
from memserve.workers.steps import Chunk


class Progress(Protocol):
    """See `pool.arena.Progress`."""

    @property
    def count(self) -> int: ...


class Pool(Protocol):
    """What is needed of a `MemPool`."""

    @property
    def block_size(self) -> int: ...
    @property
    def progress(self) -> Progress: ...
    def publish(self, table: BlockTable, tokens: bytes, /) -> None: ...
    def addresses(self, ids: ArrayLike, /) -> BlockRefs: ...
    def take_removed(self) -> list[Removed]: ...


class Publisher:
    """See the module.

    Args:
        pool: whose blocks they are.
        send: takes messages for the router.
        by_layer: the pool's progress tells when a layer is written, as it does where computing is not only
            enqueued; if not, nothing is announced, and blocks are told when they are complete.
    """

    def __init__(
        self,
        pool: Pool,
        send: Callable[[Stored | Removed], None],
        *,
        by_layer: bool,
        swaps_mark: Callable[[], Mark | None] = lambda: None,
    ) -> None:
        self._by_layer = by_layer
        self._swaps_mark = swaps_mark
        self._pool = pool
        self._send = send
        self._held: deque[Stored | Removed | Mark] = deque()

    @property
    def is_holding(self) -> bool:
        """Whether anything waits for `flush`."""
        return bool(self._held)

    def hold(self, mark: Mark | None) -> None:
        """What is told from now on is true once `mark` is done; None = it is already."""
        if mark is not None:
            self._held.append(mark)

    def flush(self) -> None:
        """Tell what was held back and is true now, in order."""
        while self._held:
            first = self._held[0]
            if isinstance(first, Stored | Removed):
                self._send(first)
            elif not first.is_done():
                return
            self._held.popleft()

    def _post(self, message: Stored | Removed) -> None:
        self.flush()
        if self._held:
            self._held.append(message)
        else:
            self._send(message)

    def announce(self, chunks: Sequence[Chunk]) -> bool:
        """Tell of the blocks that the step about to run will complete, where that is asked for; whether
        anybody will follow it.

        The partial block of a prompt's end is among them: nothing more will be written to it here.
        """
        block_size = self._pool.block_size
        followed = [chunk for chunk in chunks if chunk.request.tell_layers] if self._by_layer else []
        for request, num_new in followed:
            stop = request.num_computed_tokens + num_new
            is_last = stop == request.num_tokens
            end = blocks_for(stop, block_size) if is_last else stop // block_size
            self._tell(request, end, self._pool.progress.count)
        return bool(followed)

    def publish(self, request: Request) -> None:
        """The blocks that are complete now are shared."""
        block_size, table = self._pool.block_size, request.table
        end = request.num_computed_tokens // block_size
        if end > table.num_shared and table.lock is not None:
            tokens = request.token_bytes(table.num_shared * block_size, end * block_size)
            self._pool.publish(table, tokens)

    def tell(self, request: Request) -> None:
        """Tell of the blocks that are complete now and were not told of, where that is asked for."""
        if request.tell_blocks:
            self._tell(request, request.num_computed_tokens // self._pool.block_size, None)

    def tell_removed(self) -> None:
        """Tell what is no longer cached where it was."""
        removed = self._pool.take_removed()
        if removed:
            self.hold(self._swaps_mark())
        for each in removed:
            self._post(each)

    def _tell(self, request: Request, end: int, layers_from: int | None) -> None:
        first = request.num_told_blocks
        if end > first:
            request.num_told_blocks = end
            refs = self._pool.addresses(request.table.ids(end)[first:])
            self._post(Stored(request.request_id, request.attempt, first, refs, layers_from))
