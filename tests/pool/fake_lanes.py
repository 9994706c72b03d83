"""Lanes without a GPU: what is put on them waits, as on a GPU, until the test lets it be done, or nobody
minds.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

import torch

from memserve.pool.allocator import BlockIds
from memserve.pool.lanes import Lanes, Mark


class FakeMark:
    def __init__(self, world: FakeGpu) -> None:
        self.world = world
        self.reached = False

    def is_done(self) -> bool:
        if self.world.is_free:
            self.world.run()
        return self.reached


class FakeLane:
    def __init__(self, world: FakeGpu, name: str) -> None:
        self.world = world
        self.name = name
        self.todo: deque[FakeMark | Callable[[], None]] = deque()

    def copy_blocks(
        self,
        to: torch.Tensor,
        to_ids: BlockIds,
        source: torch.Tensor,
        source_ids: BlockIds,
        columns: slice = slice(None),
    ) -> int:
        assert to.dtype == source.dtype and to.shape[1] == source.shape[1]
        to_rows, rows = torch.from_numpy(to_ids.copy()), torch.from_numpy(source_ids.copy())
        self.world.on_copy(self)

        def copy() -> None:
            to[to_rows, columns] = source[rows, columns]

        self.put(copy)
        return len(to_ids) * to[:0, columns].shape[1] * to.element_size()

    def put(self, work: Callable[[], None]) -> None:
        """Stands for a kernel."""
        with self.world.lock:
            self.todo.append(work)

    def mark(self) -> Mark:
        mark = FakeMark(self.world)

        def reach() -> None:
            mark.reached = True

        self.put(reach)
        self.world.on_mark(self)
        return mark

    def wait(self, mark: Mark) -> None:
        assert isinstance(mark, FakeMark)
        with self.world.lock:
            self.todo.append(mark)


class FakeGpu:
    """`is_free`: all that is put on a lane is done as soon as somebody asks; else only by `run`."""

    def __init__(self, *, is_free: bool = True) -> None:
        self.is_free = is_free
        self.lock = threading.RLock()
        self.on_copy: Callable[[FakeLane], None] = lambda lane: None  # before it is on the lane
        self.on_mark: Callable[[FakeLane], None] = lambda lane: None  # after it is
        self.compute, self.pull, self.swap_out, self.swap_in = (
            FakeLane(self, name) for name in ("compute", "pull", "swap_out", "swap_in")
        )
        self.lanes = Lanes(self.compute, self.pull, self.swap_out, self.swap_in)

    def run(self, *names: str, most: int | None = None) -> int:
        """Do what can be done of the lanes of these names (none = all), at most so many things of each; how
        many things that was.
        """
        lanes = [lane for lane in self.lanes if not names or lane.name in names]
        num_done = 0
        with self.lock:
            progressed = True
            left = {lane.name: most for lane in lanes}
            while progressed:
                progressed = False
                for lane in lanes:
                    while lane.todo and left[lane.name] != 0:
                        first = lane.todo[0]
                        if isinstance(first, FakeMark):
                            if not first.reached:
                                break
                        else:
                            first()
                        lane.todo.popleft()
                        if left[lane.name] is not None:
                            left[lane.name] -= 1
                        num_done += 1
                        progressed = True
        return num_done
