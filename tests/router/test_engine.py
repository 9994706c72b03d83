"""The asyncio shell: streams, errors, and that leaving early reaches the worker."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

import numpy as np
import pytest

from memserve.config import Role
from memserve.errors import EngineError, Overloaded
from memserve.messages import (
    Cancel,
    Decode,
    Failed,
    FinishReason,
    Load,
    Output,
    SamplingParams,
    StepOutputs,
    ToWorker,
)
from memserve.router.dispatcher import Dispatcher, DispatcherLimits
from memserve.router.engine import ServingEngine
from memserve.router.engine_api import Delta, GenerateRequest, InstanceState
from memserve.router.events import WorkerDown, WorkerUp


class Rig:
    """A serving engine whose one colocated worker is this object."""

    def __init__(self, max_waiting: int = 8) -> None:
        self.sent: list[ToWorker] = []
        dispatcher = Dispatcher(limits=DispatcherLimits(max_waiting=max_waiting))
        self.engine = ServingEngine(dispatcher, ())
        self.engine._roles = {"colocated-0": Role.COLOCATED}
        self.engine.connect(lambda instance, message: self.sent.append(message))

    def up(self) -> None:
        self.engine._feed(WorkerUp("colocated-0", Role.COLOCATED, 1, 64, 16, 8))

    def say(self, *outputs: Output) -> None:
        self.engine.on_worker_message("colocated-0", 1, StepOutputs(outputs, Load()))


def request(rid: str = "r", max_tokens: int = 8) -> GenerateRequest:
    return GenerateRequest(rid, np.array([1, 2], dtype=np.int32), SamplingParams(max_tokens, 0))


async def collect(engine: ServingEngine, what: GenerateRequest) -> list[Delta]:
    async with aclosing(engine.generate(what)) as stream:
        return [delta async for delta in stream]


async def test_tokens_come_through_and_are_merged_for_a_slow_reader() -> None:
    rig = Rig()
    rig.up()
    task = asyncio.create_task(collect(rig.engine, request()))
    await asyncio.sleep(0)
    assert isinstance(rig.sent[0], Decode)
    rig.say(Output("r", 0, (5,), num_cached_tokens=1))
    rig.say(Output("r", 0, (6,)))
    await asyncio.sleep(0)
    rig.say(Output("r", 0, (7,), finish_reason=FinishReason.STOP))
    deltas = await task
    assert [d.token_ids for d in deltas] == [(5, 6), (7,)]
    assert [d.num_cached_tokens for d in deltas] == [1, 1]
    assert deltas[-1].finish_reason is FinishReason.STOP
    assert not rig.engine._streams


async def test_leaving_cancels_at_the_worker() -> None:
    rig = Rig()
    rig.up()
    task = asyncio.create_task(collect(rig.engine, request()))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert rig.sent[-1] == Cancel("r", 0)
    rig.say(Output("r", 0, (5,)))  # late: nobody is there
    assert rig.engine.status().num_running == 0


async def test_errors_reach_the_client() -> None:
    rig = Rig(max_waiting=0)
    with pytest.raises(Overloaded):
        await collect(rig.engine, request())
    rig = Rig()
    rig.up()
    task = asyncio.create_task(collect(rig.engine, request()))
    await asyncio.sleep(0)
    rig.engine.on_worker_message("colocated-0", 1, Failed("r", 0, "NaN"))
    with pytest.raises(EngineError, match="NaN"):
        await task


async def test_a_repeated_request_id_is_two_requests() -> None:
    rig = Rig()
    rig.up()
    tasks = [asyncio.create_task(collect(rig.engine, request())) for _ in range(2)]
    await asyncio.sleep(0)
    ids = [message.request_id for message in rig.sent if isinstance(message, Decode)]
    assert len(set(ids)) == 2
    rig.say(*[Output(rid, 0, (n,), finish_reason=FinishReason.LENGTH) for n, rid in enumerate(ids)])
    first, second = await asyncio.gather(*tasks)
    assert {first[0].token_ids, second[0].token_ids} == {(0,), (1,)}


async def test_ready_states_and_drain() -> None:
    rig = Rig()
    assert not rig.engine.ready()
    assert rig.engine.status().instances[0].state is InstanceState.STARTING
    rig.up()
    assert rig.engine.ready()
    task = asyncio.create_task(collect(rig.engine, request()))
    await asyncio.sleep(0)
    assert await rig.engine.drain(0.01) == 1
    assert not rig.engine.ready()
    rig.say(Output("r", 0, (1,), finish_reason=FinishReason.LENGTH))
    await task
    assert await rig.engine.drain(5) == 0
    rig.engine._feed(WorkerDown("colocated-0", 1, "killed"))
    assert rig.engine.status().instances[0].incarnation == 0
