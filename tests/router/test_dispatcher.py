"""The dispatcher against fake workers: numbered life cycles, then a state machine in which workers die,
dawdle and answer late. A fake worker draws tokens by a hash of everything before them, so any lost, doubled
or reordered token changes what the client sees.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

from memserve.config import Role
from memserve.errors import EngineError, Overloaded, RequestError
from memserve.messages import (
    BlockRefs,
    CachedTokens,
    Cancel,
    Decode,
    Failed,
    FinishReason,
    Load,
    Offer,
    Output,
    Prefill,
    Prefilled,
    PullAhead,
    PullBack,
    Pulled,
    Release,
    Removed,
    Reserve,
    SamplingParams,
    StepOutputs,
    Stored,
    Tier,
    TokenLogprobs,
    ToRouter,
    ToWorker,
    pack_tokens,
    unpack_tokens,
)
from memserve.router.dispatcher import Dispatcher, DispatcherLimits
from memserve.router.events import Abandon, Emit, FromWorker, Refuse, Send, Submit, Tick, WorkerDown, WorkerUp
from memserve.router.request_state import Phase
from memserve.router.scheduling.global_scheduler import GlobalScheduler
from memserve.router.scheduling.policies.policies import POLICIES


def next_token(tokens: list[int]) -> int:
    return hash((len(tokens), *tokens[-5:])) % 1000


def expected_stream(prompt: list[int], max_tokens: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(max_tokens):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


BLOCK_SIZE = 4
# What lies in the blocks of all workers, by (instance, block); it outlives them.
Memory = dict[tuple[str, int], tuple[int, ...]]


class FakeWorker:
    """Plays one incarnation of a worker: keeps what it was told, answers one step at a time when asked."""

    def __init__(self, instance: str, incarnation: int, memory: Memory) -> None:
        self.memory = memory
        self.instance = instance
        self.incarnation = incarnation
        self.prefills: dict[tuple[str, int], Prefill] = {}
        self.offers: dict[tuple[str, int], list[int]] = {}
        self.ahead: dict[tuple[str, int], int] = {}
        self.pulls: dict[tuple[str, int], Decode] = {}
        self.running: dict[tuple[str, int], tuple[list[int], Decode]] = {}
        self.cancelled: set[tuple[str, int]] = set()
        self.num_stored: dict[tuple[str, int], int] = {}
        self.num_told: dict[tuple[str, int], int] = {}
        self.pull_backs: list[PullBack] = []

    def tell(self, message: ToWorker) -> None:
        match message:
            case Prefill(request_id=rid, attempt=attempt):
                assert (rid, attempt) not in self.prefills
                self.check(message.offer, unpack_tokens(message.token_ids).tolist())
                self.prefills[rid, attempt] = message
            case Reserve(request_id=rid, attempt=attempt):
                assert (rid, attempt) not in self.cancelled
                self.ahead[rid, attempt] = 0
            case PullBack():
                tokens = unpack_tokens(message.token_ids).tolist()
                assert len(tokens) == BLOCK_SIZE * (message.first_block + len(message.refs.blocks))
                self.check(Offer(message.refs, len(tokens), message.first_block), tokens)
                assert message.refs.instance != self.instance and message.refs.blocks
                self.pull_backs.append(message)
            case PullAhead(request_id=rid, attempt=attempt, first_block=first_block):
                assert first_block == self.ahead[rid, attempt], "chunks come in order, after the Reserve"
                self.ahead[rid, attempt] = first_block + len(message.refs.blocks)
            case Decode(request_id=rid, attempt=attempt, offer=offer):
                self.ahead.pop((rid, attempt), None)
                self.check(offer, unpack_tokens(message.token_ids).tolist())
                if offer is None:
                    self.running[rid, attempt] = (unpack_tokens(message.token_ids).tolist(), message)
                else:
                    self.pulls[rid, attempt] = message
            case Cancel(request_id=rid, attempt=attempt):
                for table in (self.prefills, self.offers, self.ahead, self.pulls, self.running):
                    table.pop((rid, attempt), None)  # type: ignore[attr-defined]
                self.cancelled.add((rid, attempt))
            case Release(request_id=rid, attempt=attempt):
                known = (rid, attempt) in self.offers or (rid, attempt) in self.cancelled
                assert known, "an offer is released once"
                self.offers.pop((rid, attempt), None)

    @property
    def idle(self) -> bool:
        return not (self.prefills or self.offers or self.ahead or self.pulls or self.running)

    def store(self, key: tuple[str, int]) -> Stored:
        """A chunk of one block was computed."""
        message = self.prefills[key]
        assert message.tell_blocks
        first_block = self.num_stored.get(key, 0)
        self.num_stored[key] = first_block + 1
        tokens = unpack_tokens(message.token_ids).tolist()
        return Stored(key[0], key[1], first_block, self.refs(tokens, first_block, first_block + 1))

    def refs(self, tokens: list[int], start: int, end: int) -> BlockRefs:
        """Blocks `start` to `end` of a sequence, in this worker's memory from now on."""
        blocks = []
        for index in range(start, end):
            blocks.append(len(self.memory))
            content = tuple(tokens[index * BLOCK_SIZE : (index + 1) * BLOCK_SIZE])
            self.memory[self.instance, blocks[-1]] = content
        return BlockRefs(self.instance, self.incarnation, Tier.DEVICE, tuple(blocks), (1,) * len(blocks))

    def check(self, offer: Offer | None, tokens: list[int]) -> None:
        """What is offered of a sequence is what lies at those addresses, in whatever worker's memory."""
        if offer is None:
            return
        assert 0 < offer.num_tokens <= len(tokens)
        assert len(offer.refs.blocks) == -(-offer.num_tokens // BLOCK_SIZE) - offer.first_block
        for index, block in enumerate(offer.refs.blocks, start=offer.first_block):
            expected = tokens[index * BLOCK_SIZE : min((index + 1) * BLOCK_SIZE, offer.num_tokens)]
            assert list(self.memory[offer.refs.instance, block])[: len(expected)] == expected

    def tell_stored(self) -> list[Stored]:
        """Blocks that decoding has completed and that were not told of."""
        said = []
        for key, (tokens, message) in self.running.items():
            first, end = self.num_told.get(key, 0), (len(tokens) - 1) // BLOCK_SIZE
            if message.tell_blocks and end > first:
                self.num_told[key] = end
                said.append(Stored(key[0], key[1], first, self.refs(tokens, first, end)))
        return said

    def finish_prefill(self, key: tuple[str, int]) -> Prefilled:
        message = self.prefills.pop(key)
        tokens = unpack_tokens(message.token_ids).tolist()
        token = next_token(tokens)
        drawn = len(tokens) + 1 - message.num_prompt_tokens
        ends = drawn >= message.sampling.max_tokens
        offer = None
        if not ends:
            self.offers[key] = tokens
            offer = Offer(self.refs(tokens, 0, -(-len(tokens) // BLOCK_SIZE)), len(tokens))
        wanted = message.sampling.prompt_logprobs
        return Prefilled(
            request_id=key[0],
            attempt=key[1],
            token_id=token,
            logprobs=None,
            prompt_logprobs=None if wanted is None else (None, TokenLogprobs(-1.0, 1)),
            cached=CachedTokens(),
            finish_reason=FinishReason.LENGTH if ends else None,
            offer=offer,
            load=Load(),
        )

    def finish_pull(self, key: tuple[str, int], failure: str | None = None) -> Pulled:
        message = self.pulls.pop(key)
        self.running[key] = (unpack_tokens(message.token_ids).tolist(), message)
        return Pulled(key[0], key[1], 0 if failure else 1, 0, 8, 0.1, failure)

    def step(self) -> StepOutputs:
        outputs = []
        for key, (tokens, message) in list(self.running.items()):
            first = len(tokens) == message.num_prompt_tokens
            wanted = first and message.sampling.prompt_logprobs is not None
            tokens.append(next_token(tokens))
            ends = len(tokens) - message.num_prompt_tokens >= message.sampling.max_tokens
            if ends:
                del self.running[key]
            outputs.append(
                Output(
                    key[0],
                    key[1],
                    (tokens[-1],),
                    prompt_logprobs=(None,) if wanted else None,
                    finish_reason=FinishReason.LENGTH if ends else None,
                )
            )
        return StepOutputs(tuple(outputs), Load())


class World:
    """A dispatcher, its fake workers, and what the clients saw."""

    def __init__(
        self, limits: DispatcherLimits | None = None, num_blocks: int = 64, policy: str = "least-load"
    ) -> None:
        self.dispatcher = Dispatcher(limits or DispatcherLimits(), GlobalScheduler(policy))
        self.workers: dict[str, FakeWorker] = {}
        self.incarnations: dict[str, int] = {}
        self.roles: dict[str, Role] = {}
        self.num_blocks = num_blocks
        self.streams: dict[str, list[int]] = {}
        self.ended: dict[str, FinishReason | Exception] = {}
        self.prompts: dict[str, tuple[list[int], int]] = {}
        self.abandoned: set[str] = set()
        self.prompt_logprobs: dict[str, int] = {}
        self.now = 0.0
        self.memory: Memory = {}

    def feed(self, event: object) -> None:
        self.now += 0.01
        for action in self.dispatcher.on_event(event, self.now):  # type: ignore[arg-type]
            match action:
                case Send(instance=instance, incarnation=incarnation, message=message):
                    worker = self.workers.get(instance)
                    if worker is not None and worker.incarnation == incarnation:
                        worker.tell(message)
                case Emit(request_id=rid, output=output):
                    assert rid not in self.ended and rid not in self.abandoned
                    self.streams[rid].extend(output.token_ids)
                    if output.prompt_logprobs is not None:
                        self.prompt_logprobs[rid] = self.prompt_logprobs.get(rid, 0) + 1
                    if output.finish_reason is not None:
                        self.ended[rid] = output.finish_reason
                case Refuse(request_id=rid, error=error):
                    assert rid not in self.ended and rid not in self.abandoned
                    self.ended[rid] = error

    def up(self, instance: str, role: Role) -> FakeWorker:
        incarnation = self.incarnations.get(instance, 0) + 1
        self.incarnations[instance], self.roles[instance] = incarnation, role
        self.workers[instance] = FakeWorker(instance, incarnation, self.memory)
        up = WorkerUp(instance, role, incarnation, self.num_blocks, BLOCK_SIZE, 8, caches=True)
        self.feed(replace(up, max_host_blocks=1 << 20))  # fake workers use no block twice
        return self.workers[instance]

    def down(self, instance: str) -> FakeWorker:
        worker = self.workers.pop(instance)
        self.feed(WorkerDown(instance, worker.incarnation, "killed"))
        return worker

    def submit(self, rid: str, prompt: list[int], max_tokens: int, **sampling: int) -> None:
        self.streams[rid], self.prompts[rid] = [], (prompt, max_tokens)
        params = SamplingParams(max_tokens=max_tokens, seed=0, **sampling)
        self.feed(Submit(rid, np.array(prompt, dtype=np.int32), params))

    def abandon(self, rid: str) -> None:
        self.abandoned.add(rid)
        self.feed(Abandon(rid))

    def hear(self, worker: FakeWorker, message: ToRouter) -> None:
        self.feed(FromWorker(worker.instance, worker.incarnation, message))

    def work(self, worker: FakeWorker) -> None:
        """One step of a worker's decodes."""
        for stored in worker.tell_stored():
            self.hear(worker, stored)
        self.hear(worker, worker.step())

    def run_out(self) -> None:
        """Let every worker work until nothing is left to do."""
        for _ in range(2000):
            busy = False
            for worker in list(self.workers.values()):
                for key in list(worker.prefills):
                    self.hear(worker, worker.finish_prefill(key))
                    busy = True
                for key in list(worker.pulls):
                    self.hear(worker, worker.finish_pull(key))
                    busy = True
                if worker.running:
                    self.work(worker)
                    busy = True
            if not busy:
                return
        raise AssertionError("no end")

    def assert_idle(self) -> None:
        assert not self.dispatcher.requests
        assert self.dispatcher.num_waiting == 0
        for view in self.dispatcher.fleet:
            assert (view.reserved_blocks, view.num_placed, view.outstanding_tokens) == (0, 0, 0)
        for worker in self.workers.values():
            assert worker.idle

    def assert_complete(self) -> None:
        for rid, (prompt, max_tokens) in self.prompts.items():
            expected = expected_stream(prompt, max_tokens)
            if rid in self.abandoned:
                assert self.streams[rid] == expected[: len(self.streams[rid])]
            else:
                assert self.ended[rid] is FinishReason.LENGTH, self.ended[rid]
                assert self.streams[rid] == expected


@pytest.fixture
def world() -> World:
    world = World()
    world.up("prefill-0", Role.PREFILL)
    world.up("decode-0", Role.DECODE)
    return world


@pytest.mark.parametrize("num_tokens", [7, 8, 9])
def test_a_prompt_given_up_is_still_believed_where_it_was(world: World, num_tokens: int) -> None:
    """What a worker was known to have of it, and of what goes on from it, it has as before."""
    prompt = list(range(16))
    world.submit("first", prompt, 2)
    world.run_out()

    def num_known() -> int:
        tree = world.dispatcher.scheduler._trees[Role.PREFILL]
        return tree.match("", pack_tokens(prompt), world.now).live["prefill-0"].num_tokens

    assert num_known() == 16
    world.submit("second", prompt[:num_tokens], 2)
    assert ("second", 0) in world.workers["prefill-0"].prefills
    world.abandon("second")
    assert num_known() == 16
    world.assert_idle()


def test_one_request_through_both_workers(world: World) -> None:
    p, d = world.workers["prefill-0"], world.workers["decode-0"]
    # 1. dispatched: P computes, D's room is reserved but D knows nothing yet
    world.submit("r", [1, 2, 3], 3)
    assert ("r", 0) in p.prefills and d.idle
    assert world.dispatcher.fleet.views["decode-0"].reserved_blocks == 2
    # 2. the first token is streamed before the KV moves
    world.hear(p, p.finish_prefill(("r", 0)))
    assert len(world.streams["r"]) == 1 and ("r", 0) in p.offers
    # 3. D has pulled: the offer is released, P's room is free
    world.hear(d, d.finish_pull(("r", 0)))
    assert p.idle and world.dispatcher.fleet.views["prefill-0"].num_placed == 0
    # 4. the rest comes from D
    world.run_out()
    world.assert_complete()
    world.assert_idle()


def test_finished_chunks_are_pulled_ahead() -> None:
    world = World(DispatcherLimits(transfer="chunk"))
    p, d = world.up("prefill-0", Role.PREFILL), world.up("decode-0", Role.DECODE)
    # 1. chunks go to D as they come
    world.submit("r", list(range(12)), 3)
    for _ in range(2):
        world.hear(p, p.store(("r", 0)))
    assert d.ahead == {("r", 0): 2}
    # 2. the Decode takes them over
    world.hear(p, p.finish_prefill(("r", 0)))
    assert not d.ahead and ("r", 0) in d.pulls
    world.run_out()
    world.assert_complete()
    world.assert_idle()
    # 3. nobody is told where no Decode will follow
    world.submit("one", [1, 2, 3], 1)
    assert not p.prefills["one", 0].tell_blocks and not d.ahead
    world.run_out()


@pytest.mark.parametrize("end", ["abandon", "prefill-0", "decode-0", "stop"])
def test_what_was_pulled_ahead_is_dropped_when_no_decode_comes(end: str) -> None:
    world = World(DispatcherLimits(transfer="chunk"))
    p = world.up("prefill-0", Role.PREFILL)
    for i in range(2):
        world.up(f"decode-{i}", Role.DECODE)
    world.submit("r", list(range(12)), 3)
    world.hear(p, p.store(("r", 0)))
    if end == "abandon":
        world.abandon("r")
    elif end == "stop":  # the first token ends it
        done = msgspec.structs.replace(
            p.finish_prefill(("r", 0)), finish_reason=FinishReason.STOP, offer=None
        )
        p.offers.clear()
        world.hear(p, done)
    else:
        world.down(end)
        world.run_out()
        world.assert_complete()
    world.assert_idle()


def test_what_was_generated_goes_back_to_the_prefill_side() -> None:
    world = World(DispatcherLimits(pull_back=True))
    p, d = world.up("prefill-0", Role.PREFILL), world.up("decode-0", Role.DECODE)
    # 1. 10 tokens of prompt fill two blocks at P, 15 tokens with KV three at D
    world.submit("r", list(range(10)), 6)
    world.run_out()
    (message,) = p.pull_backs
    assert (message.first_block, len(message.refs.blocks)) == (2, 1)
    assert unpack_tokens(message.token_ids).tolist() == [*range(10), *world.streams["r"]][:12]
    # 2. also of one whose client has had enough
    world.submit("left", list(range(8)), 50)
    world.hear(p, p.finish_prefill(("left", 0)))
    world.hear(d, d.finish_pull(("left", 0)))
    for _ in range(9):
        world.work(d)
    world.abandon("left")
    assert len(p.pull_backs) == 2 and p.pull_backs[1].first_block == 2
    # 3. not to another life of P, nor where there is nothing new
    world.submit("dead", list(range(10)), 6)
    world.hear(p, p.finish_prefill(("dead", 0)))
    world.hear(d, d.finish_pull(("dead", 0)))
    world.down("prefill-0")
    p = world.up("prefill-0", Role.PREFILL)
    world.run_out()
    world.submit("short", [1, 2], 2)
    world.run_out()
    assert not p.pull_backs
    world.assert_complete()
    world.assert_idle()


def test_what_a_dead_worker_held_is_offered_to_the_replay(world: World) -> None:
    p, d = world.workers["prefill-0"], world.workers["decode-0"]
    world.submit("r", list(range(10)), 12)
    world.hear(p, p.finish_prefill(("r", 0)))
    world.hear(d, d.finish_pull(("r", 0)))
    for _ in range(5):
        world.work(d)
    world.down("decode-0")
    # the decode worker alone is left of its role: P does both
    decode = p.running.get(("r", 1)) or p.pulls[("r", 1)]
    offer = decode.offer if isinstance(decode, Decode) else decode[1].offer
    assert offer is not None and offer.refs.instance == "decode-0"
    assert (offer.num_tokens, offer.first_block) == (12, 0)
    world.hear(p, p.finish_pull(("r", 1)))
    world.run_out()
    world.assert_complete()
    world.assert_idle()


def test_first_token_may_be_the_last(world: World) -> None:
    world.submit("r", [1, 2, 3], 1)
    p = world.workers["prefill-0"]
    world.hear(p, p.finish_prefill(("r", 0)))
    assert world.ended["r"] is FinishReason.LENGTH
    world.assert_idle()


def test_colocated_worker_does_both() -> None:
    world = World()
    world.up("colocated-0", Role.COLOCATED)
    world.submit("r", [5, 6], 4)
    assert world.workers["colocated-0"].running
    world.run_out()
    world.assert_complete()
    world.assert_idle()


@pytest.mark.parametrize("point", ["queued", "prefilling", "handoff", "decoding"])
def test_abandoned_at_each_point(point: str) -> None:
    world = World()
    if point != "queued":
        world.up("prefill-0", Role.PREFILL)
        world.up("decode-0", Role.DECODE)
    world.submit("r", [1, 2, 3], 5)
    if point in ("handoff", "decoding"):
        p = world.workers["prefill-0"]
        world.hear(p, p.finish_prefill(("r", 0)))
    if point == "decoding":
        d = world.workers["decode-0"]
        world.hear(d, d.finish_pull(("r", 0)))
        world.hear(d, d.step())
    world.abandon("r")
    world.assert_idle()
    world.abandon("r")  # a second time changes nothing
    world.assert_idle()


@pytest.mark.parametrize("dead", ["prefill-0", "decode-0"])
@pytest.mark.parametrize("point", ["prefilling", "handoff", "decoding"])
def test_worker_dies_at_each_point(
    world: World, point: str, dead: str, caplog: pytest.LogCaptureFixture
) -> None:
    # 1. bring the request to the point
    world.submit("r", [1, 2, 3], 6, prompt_logprobs=0)
    p, d = world.workers["prefill-0"], world.workers["decode-0"]
    if point in ("handoff", "decoding"):
        world.hear(p, p.finish_prefill(("r", 0)))
    if point == "decoding":
        world.hear(d, d.finish_pull(("r", 0)))
        world.hear(d, d.step())
    # 2. the worker dies; what it says late is dropped
    corpse = world.down(dead)
    for key in list(corpse.prefills):
        world.hear(corpse, corpse.finish_prefill(key))
    # 3. without it, the other does everything
    world.run_out()
    world.assert_complete()
    world.assert_idle()
    assert world.prompt_logprobs == {"r": 1}
    assert ("replayed" in caplog.text) == (world.dispatcher.counters.replayed > 0)
    for record in caplog.records:
        if "replayed" in record.message:
            num_drawn = 1 + (point == "decoding") if point in ("handoff", "decoding") else 0
            assert f"from token {num_drawn} of the answer, {3 + num_drawn} with" in record.message
    # 4. a replacement takes new requests
    world.up(dead, Role.PREFILL if dead == "prefill-0" else Role.DECODE)
    world.submit("s", [9, 8, 7], 4)
    world.run_out()
    world.assert_complete()
    world.assert_idle()


def test_pulls_of_prefixes_are_told_from_handoffs(world: World) -> None:
    world.submit("r", [1, 2, 3], 3)
    p, d = world.workers["prefill-0"], world.workers["decode-0"]
    world.hear(p, Pulled("r", 0, 3, 1, 64, 0.1, "generation changed"))
    world.hear(p, p.finish_prefill(("r", 0)))
    world.hear(d, d.finish_pull(("r", 0)))
    counters = world.dispatcher.counters
    assert (counters.pulls, counters.failed_pulls, counters.pulled_tokens, counters.pulled_bytes) == (
        2,
        1,
        3,
        72,
    )
    assert (counters.prefill_pulls, counters.failed_prefill_pulls) == (1, 1)
    assert (counters.prefill_pulled_tokens, counters.prefill_pulled_bytes) == (2, 64)
    world.run_out()
    world.assert_complete()


def test_failed_pull_goes_on(world: World, caplog: pytest.LogCaptureFixture) -> None:
    world.submit("r", [1, 2, 3], 3)
    p, d = world.workers["prefill-0"], world.workers["decode-0"]
    world.hear(p, p.finish_prefill(("r", 0)))
    world.hear(d, d.finish_pull(("r", 0), failure="generation changed"))
    assert world.dispatcher.counters.failed_pulls == 1
    assert world.dispatcher.counters.prefill_pulls == 0
    assert "generation changed" in caplog.text and p.idle
    world.run_out()
    world.assert_complete()
    world.assert_idle()


def test_worker_reports_failure(world: World) -> None:
    world.submit("r", [1, 2, 3], 3)
    p = world.workers["prefill-0"]
    p.prefills.clear()
    world.hear(p, Failed("r", 0, "NaN in the logits"))
    assert isinstance(world.ended["r"], EngineError)
    world.assert_idle()


@pytest.mark.parametrize("num_steps", [0, 1])
def test_a_killer_is_given_up(num_steps: int) -> None:
    """At once when it never gets on; in the end when it gets on by a token a life."""
    world = World(DispatcherLimits(max_deaths=4, max_deaths_in_vain=2))
    worker = world.up("colocated-0", Role.COLOCATED)
    world.submit("r", [1], 50)
    for deaths in range(1, 6):
        for _ in range(num_steps):
            world.hear(worker, worker.step())
        world.down("colocated-0")
        worker = world.up("colocated-0", Role.COLOCATED)
        assert ("r" in world.ended) == (deaths > (4 if num_steps else 2))
        if "r" in world.ended:
            break
    assert isinstance(world.ended["r"], EngineError)
    world.assert_idle()


def test_queue_is_bounded_and_in_order() -> None:
    world = World(DispatcherLimits(max_waiting=2))
    for rid in "abc":
        world.submit(rid, [1, 2], 2)
    assert isinstance(world.ended["c"], Overloaded)
    assert world.ended["c"].retry_after_s >= 1
    worker = world.up("colocated-0", Role.COLOCATED)
    assert [rid for rid, _ in worker.running] == ["a", "b"]


def test_full_pool_makes_requests_wait(world: World) -> None:
    # 64 blocks of 4 tokens: each of these wants 41 blocks on D
    for rid in "abc":
        world.submit(rid, list(range(36)), 128)
    assert len(world.workers["prefill-0"].prefills) == 1
    assert world.dispatcher.num_waiting == 2
    world.run_out()
    world.assert_complete()
    world.assert_idle()


def test_request_that_no_pool_holds_is_refused(world: World) -> None:
    world.submit("r", list(range(400)), 10)
    assert isinstance(world.ended["r"], EngineError)
    world.assert_idle()


@pytest.mark.parametrize(
    ("blocks", "generations", "new_blocks"),
    [((1, 2, 3), (1, 1), None), ((1,), (1, 1), None), ((1, 2), (1, 1), (8,)), ((1,), (1,), (8, 9))],
)
def test_addresses_that_make_no_sense_are_who_told_them_fault(
    world: World, blocks: tuple[int, ...], generations: tuple[int, ...], new_blocks: tuple[int, ...] | None
) -> None:
    # 1. a worker's blocks are known
    bad, _ = world.up("bad", Role.COLOCATED), world.up("good", Role.COLOCATED)
    world.submit("a", list(range(16)), 1)
    world.run_out()
    # 2. it tells of them what cannot be: an error at once, so that it is the one who is given up
    refs = BlockRefs("bad", bad.incarnation, Tier.DEVICE, blocks, generations)
    moved_to = None
    if new_blocks is not None:
        moved_to = BlockRefs("bad", bad.incarnation, Tier.HOST, new_blocks, (3,) * len(new_blocks))
    with pytest.raises(EngineError, match="bad told of"):
        world.hear(bad, Removed(refs, moved_to))
    world.down("bad")
    # 3. nobody else meets it later
    world.submit("b", list(range(16)), 2)
    world.run_out()
    assert world.streams["b"] == expected_stream(list(range(16)), 2)
    world.assert_idle()


def test_a_worker_does_not_tell_of_another_ones_blocks(world: World) -> None:
    one, other = world.up("one", Role.COLOCATED), world.up("other", Role.COLOCATED)
    world.submit("a", list(range(16)), 1)
    world.run_out()
    own = BlockRefs("one", one.incarnation, Tier.DEVICE, (0,), (1,))
    not_own = BlockRefs("other", other.incarnation, Tier.DEVICE, (0,), (1,))
    former = BlockRefs("one", one.incarnation - 1, Tier.DEVICE, (0,), (1,))
    for message in (
        Removed(not_own, None),
        Removed(former, None),
        Removed(own, moved_to=not_own),
        Stored("a", 0, 0, not_own),
    ):
        with pytest.raises(EngineError, match="one told of blocks of"):
            world.hear(one, message)


def test_growth_beyond_the_pool_is_not_a_deadlock(world: World) -> None:
    world.submit("r", list(range(200)), 100)  # 300 tokens of growth and prompt, a pool of 256
    world.run_out()
    world.assert_complete()
    world.assert_idle()


def test_without_decode_workers_the_owner_of_the_offer_decodes() -> None:
    world = World()
    p0, p1 = world.up("prefill-0", Role.PREFILL), world.up("prefill-1", Role.PREFILL)
    world.up("decode-0", Role.DECODE)
    # 1. one request on each prefill worker, then the only decode worker dies
    world.submit("a", [1, 2, 3], 3)
    world.submit("b", [4, 5, 6], 3)
    assert p0.prefills and p1.prefills
    world.down("decode-0")
    # 2. each decodes what it has prefilled: nobody waits for blocks that another one's offer holds
    for worker in (p0, p1):
        (key,) = worker.prefills
        world.hear(worker, worker.finish_prefill(key))
        assert key in worker.pulls and worker.pulls[key].offer is not None
        assert worker.pulls[key].offer.refs.instance == worker.instance
    world.run_out()
    world.assert_complete()
    world.assert_idle()


def test_retry_after_follows_the_rate_at_which_requests_leave() -> None:
    world = World(DispatcherLimits(max_waiting=1))
    world.up("colocated-0", Role.COLOCATED)
    for n in range(30):  # all are abandoned, as those that a stop string ends: that frees room as well
        world.submit(f"r{n}", [1], 9)
        world.abandon(f"r{n}")
    assert world.dispatcher._departures.per_s > 1


def test_timeout(world: World) -> None:
    world.submit("r", [1, 2, 3], 3)
    world.now += 4000
    world.feed(Tick())
    error = world.ended["r"]
    assert isinstance(error, RequestError) and error.status == 504
    world.assert_idle()


class DispatcherMachine(RuleBasedStateMachine):
    """Any interleaving of clients, steps, deaths, late and repeated answers."""

    requests = Bundle("requests")
    late = Bundle("late")

    def __init__(self) -> None:
        super().__init__()
        self.ids = itertools.count()

    @initialize(
        num_prefill=st.integers(0, 2), num_decode=st.integers(1, 2), policy=st.sampled_from(sorted(POLICIES))
    )
    def start(self, num_prefill: int, num_decode: int, policy: str) -> None:
        limits = DispatcherLimits(
            transfer="chunk",
            pull_back=True,
            max_waiting=10_000,
            max_deaths=10_000,
            max_deaths_in_vain=10_000,
        )
        self.world = World(limits, policy=policy)
        for i in range(num_prefill):
            self.world.up(f"prefill-{i}", Role.PREFILL)
        for i in range(num_decode):
            role = Role.DECODE if num_prefill else Role.COLOCATED
            self.world.up(f"{role.value}-{i}", role)

    @rule(target=requests, length=st.integers(1, 40), max_tokens=st.integers(1, 12))
    def submit(self, length: int, max_tokens: int) -> str:
        rid = f"r{next(self.ids)}"
        self.world.submit(rid, [(7 * i + length) % 91 for i in range(length)], max_tokens)
        return rid

    @rule(rid=consumes(requests))
    def abandon(self, rid: str) -> None:
        if rid not in self.world.ended:
            self.world.abandon(rid)

    @rule(pick=st.integers(0, 9), which=st.integers(0, 9))
    def prefill(self, pick: int, which: int) -> None:
        workers = [w for w in self.world.workers.values() if w.prefills]
        if workers:
            worker = workers[pick % len(workers)]
            keys = list(worker.prefills)
            self.world.hear(worker, worker.finish_prefill(keys[which % len(keys)]))

    @rule(pick=st.integers(0, 9), which=st.integers(0, 9))
    def store(self, pick: int, which: int) -> None:
        workers = [w for w in self.world.workers.values() if any(m.tell_blocks for m in w.prefills.values())]
        if workers:
            worker = workers[pick % len(workers)]
            keys = [key for key, message in worker.prefills.items() if message.tell_blocks]
            self.world.hear(worker, worker.store(keys[which % len(keys)]))

    @rule(pick=st.integers(0, 9), fails=st.booleans())
    def pull(self, pick: int, fails: bool) -> None:
        workers = [w for w in self.world.workers.values() if w.pulls]
        if workers:
            worker = workers[pick % len(workers)]
            key = next(iter(worker.pulls))
            self.world.hear(worker, worker.finish_pull(key, "torn" if fails else None))

    @rule(pick=st.integers(0, 9))
    def step(self, pick: int) -> None:
        workers = [w for w in self.world.workers.values() if w.running]
        if workers:
            self.world.work(workers[pick % len(workers)])

    @rule(target=late, pick=st.integers(0, 9))
    def die(self, pick: int) -> object:
        if not self.world.workers:
            return multiple()
        corpse = self.world.down(sorted(self.world.workers)[pick % len(self.world.workers)])
        messages: list[ToRouter] = [corpse.finish_prefill(key) for key in list(corpse.prefills)]
        messages += corpse.tell_stored()
        return multiple(*[(corpse, message) for message in [*messages, corpse.step()]])

    @rule(said=consumes(late))
    def answer_late(self, said: tuple[FakeWorker, ToRouter]) -> None:
        self.world.hear(*said)

    @rule()
    def replace(self) -> None:
        for instance, role in self.world.roles.items():
            if instance not in self.world.workers:
                self.world.up(instance, role)
                return

    @invariant()
    def promises_add_up(self) -> None:
        dispatcher = self.world.dispatcher
        for view in dispatcher.fleet:
            seats = [
                seat
                for request in dispatcher.requests.values()
                for seat in (request.prefill, request.decode)
                if seat is not None and seat.is_at(view)
            ]
            assert view.num_placed == len(seats)
            assert view.reserved_blocks == sum(seat.num_blocks for seat in seats)
            decoding = [
                request
                for request in dispatcher.requests.values()
                if request.num_decoding_tokens is not None and request.decode.is_at(view)
            ]
            assert view.num_decoding == len(decoding)
            assert view.num_context == sum(request.num_decoding_tokens for request in decoding)
        for request in dispatcher.requests.values():
            if request.phase is Phase.QUEUED:
                assert request.prefill is request.decode is None

    def teardown(self) -> None:
        for instance, role in self.world.roles.items():
            if instance not in self.world.workers:
                self.world.up(instance, role)
        self.world.run_out()
        self.world.assert_complete()
        self.world.assert_idle()


TestDispatcherMachine = DispatcherMachine.TestCase
TestDispatcherMachine.settings = settings(
    max_examples=150, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
