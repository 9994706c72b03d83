"""The asyncio shell: streams, errors, and that leaving early reaches the worker."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from memserve.errors import EngineError, MemserveError, Overloaded, Unavailable
from memserve.messages import (
    BlockRefs,
    CacheCommand,
    CachedTokens,
    CacheReport,
    CacheVerb,
    Cancel,
    Connect,
    Decode,
    Failed,
    FinishReason,
    Load,
    Output,
    Ready,
    Refuse,
    SamplingParams,
    StepOutputs,
    Stored,
    Tier,
    ToWorker,
)
from memserve.router.dispatcher import Dispatcher, DispatcherLimits
from memserve.router.engine import ServingEngine
from memserve.router.engine_api import Delta, GenerateRequest, InstanceState
from memserve.router.events import Send
from tests.router.worker_configs import make_worker


class Rig:
    """A serving engine whose workers (one, colocated, unless said otherwise) are this object."""

    def __init__(self, *instances: str, max_waiting: int = 8) -> None:
        self.sent: list[ToWorker] = []
        self.dispatcher = Dispatcher(limits=DispatcherLimits(max_waiting=max_waiting))
        self.configs = {name: make_worker(name) for name in instances or ("colocated-0",)}
        self.engine = ServingEngine(self.dispatcher, tuple(self.configs.values()))
        self.engine.connect(lambda instance, message: self.sent.append(message))

    def up(self, instance: str = "colocated-0", incarnation: int = 0) -> None:
        ready = Ready(64, 16, 128, "fingerprint", "cpu", "float32", 0.0)
        self.engine.on_worker_up(self.configs[instance], incarnation, ready)

    def down(self, instance: str = "colocated-0", incarnation: int = 0) -> None:
        self.engine.on_worker_down(instance, incarnation, "killed")

    def say(self, *outputs: Output) -> None:
        self.engine.on_worker_message("colocated-0", 0, StepOutputs(outputs, Load()))


def request(rid: str = "r", max_tokens: int = 8, num_tokens: int = 2) -> GenerateRequest:
    return GenerateRequest(rid, np.arange(num_tokens, dtype=np.int32), SamplingParams(max_tokens, 0))


async def collect(engine: ServingEngine, what: GenerateRequest) -> list[Delta]:
    """What the listener hears until the end; cancels as the server does."""
    heard: asyncio.Queue[Delta | MemserveError] = asyncio.Queue()
    engine.submit(what, heard.put_nowait)
    deltas: list[Delta] = []
    try:
        while not deltas or deltas[-1].finish_reason is None:
            news = await heard.get()
            if isinstance(news, MemserveError):
                raise news
            deltas.append(news)
    finally:
        engine.cancel(what.request_id)
    return deltas


async def test_tokens_come_through() -> None:
    rig = Rig()
    rig.up()
    task = asyncio.create_task(collect(rig.engine, request()))
    await asyncio.sleep(0)
    assert isinstance(rig.sent[0], Decode)
    rig.say(Output("r", 0, (5,), cached=CachedTokens(1)))
    rig.say(Output("r", 0, (6,)))
    await asyncio.sleep(0)
    rig.say(Output("r", 0, (7,), finish_reason=FinishReason.STOP))
    deltas = await task
    assert [d.token_ids for d in deltas] == [(5,), (6,), (7,)]
    assert deltas[0].cached.total == 1
    assert deltas[-1].finish_reason is FinishReason.STOP
    assert not rig.engine._listeners
    assert not any(isinstance(message, Cancel) for message in rig.sent)


async def test_what_a_worker_tells_of_its_cache_is_entered_when_the_answer_is_out() -> None:
    rig = Rig()
    rig.up()
    dispatcher, told = rig.dispatcher, list[Delta | MemserveError]()
    # 1. the prompt goes to the worker before it is entered that it will be there
    rig.engine.submit(request(num_tokens=40), told.append)
    assert isinstance(rig.sent[-1], Decode) and not dispatcher.is_settled
    await asyncio.sleep(0.01)
    assert dispatcher.is_settled
    # 2. the answer goes to the client, and what the client's task does then, before where its KV is
    refs = BlockRefs("colocated-0", 0, Tier.DEVICE, (1, 2), (1, 1))
    rig.engine.on_worker_message("colocated-0", 0, Stored("r", 0, 0, refs))
    rig.say(Output("r", 0, (5,), finish_reason=FinishReason.LENGTH))
    assert len(told) == 1 and not dispatcher.is_settled
    await asyncio.sleep(0)
    assert not dispatcher.is_settled
    await asyncio.sleep(0.01)
    assert dispatcher.is_settled


async def test_leaving_cancels_at_the_worker() -> None:
    rig = Rig()
    rig.up()
    task = asyncio.create_task(collect(rig.engine, request()))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert rig.sent[-1] == Cancel("r", 0)
    rig.engine.cancel("r")  # again: it is long gone
    rig.say(Output("r", 0, (5,)))  # late: nobody is there
    assert len(rig.sent) == 2
    assert rig.engine.status().num_running == 0


async def test_errors_reach_the_client() -> None:
    rig = Rig(max_waiting=0)
    rig.up()
    with pytest.raises(Overloaded) as refused:
        await collect(rig.engine, request())
    assert refused.value.status == 429
    rig = Rig()
    rig.up()
    task = asyncio.create_task(collect(rig.engine, request()))
    await asyncio.sleep(0)
    rig.engine.on_worker_message("colocated-0", 0, Failed("r", 0, "NaN"))
    with pytest.raises(EngineError, match="NaN"):
        await task


async def test_refused_until_every_role_has_a_worker_then_waiting_for_one() -> None:
    rig = Rig("prefill-0", "prefill-1", "decode-0")
    # 1. Starting: nobody waits for what may never come.
    rig.up("prefill-0")
    with pytest.raises(Unavailable, match="starting"):
        rig.engine.check_room(1)
    with pytest.raises(Unavailable, match="starting") as refused:
        await collect(rig.engine, request())
    assert refused.value.status == 503 and refused.value.retry_after_s >= 1
    # 2. One of each role is enough.
    assert not rig.engine.ready()
    rig.up("decode-0")
    assert rig.engine.ready()
    # 3. When all have died a request waits for a replacement.
    rig.down("prefill-0")
    rig.down("decode-0")
    assert not rig.engine.ready()
    task = asyncio.create_task(collect(rig.engine, request()))
    await asyncio.sleep(0)
    assert rig.engine.status().num_waiting == 1
    rig.up("prefill-1")
    rig.up("decode-0", 1)
    assert rig.sent and rig.engine.status().restarts_total == 1
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_with_the_last_instance_everything_ends() -> None:
    rig = Rig("prefill-0", "decode-0")
    rig.up("prefill-0")
    rig.up("decode-0")
    # 1. A role without instances: the others do its work, and that is ready too.
    rig.down("prefill-0")
    rig.engine.on_instance_lost("prefill-0")
    assert rig.engine.ready() and not rig.engine.all_lost.is_set()
    # 2. The last dies for good: who waits is told so, at once.
    task = asyncio.create_task(collect(rig.engine, request()))
    await asyncio.sleep(0)
    rig.down("decode-0")
    assert not task.done() and rig.engine.status().num_waiting == 1
    rig.engine.on_instance_lost("decode-0")
    assert rig.engine.all_lost.is_set() and not rig.engine.ready()
    with pytest.raises(Unavailable, match="lost its workers"):
        await task
    assert rig.engine.status().num_waiting == 0 and not rig.engine._listeners
    # 3. Nobody is taken in any more.
    with pytest.raises(Unavailable, match="lost its workers"):
        await collect(rig.engine, request())


async def test_messages_for_a_life_that_is_over_are_dropped() -> None:
    rig = Rig()
    rig.up()
    rig.down()
    rig.up(incarnation=1)
    rig.engine._carry_out([Send("colocated-0", 0, Cancel("r", 0)), Send("colocated-0", 1, Cancel("r", 1))])
    assert rig.sent == [Cancel("r", 1)]


async def test_workers_speak_to_each_other_by_way_of_the_router() -> None:
    rig = Rig("prefill-0", "decode-0")
    rig.up("prefill-0", 4)
    rig.up("decode-0")
    # 1. what one says to the other goes on, and is none of the dispatcher's business
    asked = Connect("decode-0", 0, "prefill-0", 4, 1, b"there", bytes(32), "float32", 64, "model")
    rig.engine.on_worker_message("decode-0", 0, asked)
    assert rig.sent == [asked] and rig.engine.status().stale_total == 0
    # 2. for who dies without an answer the router answers
    rig.down("prefill-0", 4)
    assert rig.sent[1] == Refuse("decode-0", 0, "prefill-0", 4, 1, "prefill-0 has died")
    # 3. the status tells how they reach each other
    assert [row.pulls_from for row in rig.engine.status().instances] == [
        (("decode-0", "shm"),),
        (("prefill-0", "shm"),),
    ]


async def test_ready_states_and_drain(caplog: pytest.LogCaptureFixture) -> None:
    rig = Rig()
    assert not rig.engine.ready()
    assert rig.engine.status().instances[0].state is InstanceState.STARTING
    rig.up()
    assert rig.engine.ready()
    assert rig.engine.status().instances[0].num_blocks == 64
    task = asyncio.create_task(collect(rig.engine, request()))
    await asyncio.sleep(0)
    assert await rig.engine.drain(0.01) == 1
    assert "1 requests were not done" in caplog.text
    with pytest.raises(Unavailable, match="shutting down"):
        await collect(rig.engine, request("another"))
    assert not rig.engine.ready()
    rig.say(Output("r", 0, (1,), finish_reason=FinishReason.LENGTH))
    await task
    assert await rig.engine.drain(5) == 0
    # The incarnation of one that is down is its last, as it was while it lived.
    for incarnation in (0, 1):
        rig.down(incarnation=incarnation)
        row = rig.engine.status().instances[0]
        assert (row.state, row.incarnation) == (InstanceState.DOWN, incarnation)
        rig.up(incarnation=incarnation + 1)
        row = rig.engine.status().instances[0]
        assert (row.state, row.incarnation) == (InstanceState.READY, incarnation + 1)
        assert row.num_restarts == incarnation + 1


async def test_commands_on_caches_go_to_those_alive_and_answers_of_older_lives_do_not_count() -> None:
    rig = Rig("colocated-0", "colocated-1")
    rig.up()
    flush = CacheCommand(0, CacheVerb.FLUSH)
    asking = asyncio.create_task(rig.engine.command_caches({"colocated-0": flush, "colocated-1": flush}))
    await asyncio.sleep(0)
    (command,) = rig.sent
    rig.down()
    rig.up(incarnation=1)
    rig.engine.on_worker_message("colocated-0", 0, CacheReport(command.command_id, num_blocks=5))
    assert await asking == {"colocated-0": None}


async def test_a_replacement_gets_the_size_that_was_asked_for() -> None:
    rig = Rig()
    rig.up()
    resize = CacheCommand(0, CacheVerb.RESIZE, num_host_blocks=7)
    asking = asyncio.create_task(rig.engine.command_caches({"colocated-0": resize}))
    await asyncio.sleep(0)
    rig.down()
    await asking
    rig.sent.clear()
    rig.up(incarnation=1)
    assert rig.sent == [resize]
