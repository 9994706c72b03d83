"""Every point of a request's life, and what can end or disturb it there, over a cluster of real workers.

A test brings a request to a point, lets an event happen, goes on with replacements for the dead, and wants
the right tokens for whoever was not cancelled and idle pools everywhere: each block free, or cached and
unlocked. At the end a state machine does all of it in any order.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from memserve.config import Role, Transport
from memserve.messages import Decode, Prefilled
from memserve.router.dispatcher import DispatcherLimits
from memserve.router.request_state import Phase, RequestState
from memserve.workers.request import RequestState as WorkerState
from tests.workers.cluster import Cluster, Life

TRANSFERS = ("request", "chunk", "layer")
APART = {"prefill-0": Role.PREFILL, "decode-0": Role.DECODE, "decode-1": Role.DECODE}
TOGETHER = {"colocated-0": Role.COLOCATED}
# Two steps of a prefill and a bit, whatever the block size.
PROMPT_LENGTH = 52
MAX_TOKENS = 12
MAX_BATCH_TOKENS = 20
LEADER_LENGTH = 100


def make_limits(transfer: str, caching: bool) -> DispatcherLimits:
    return DispatcherLimits(
        max_waiting=10_000,
        max_deaths=10_000,
        max_deaths_in_vain=10_000,
        transfer=transfer,  # type: ignore[arg-type]
        pull_back=caching,
    )


@pytest.fixture
def make_cluster() -> Iterator[Callable[..., Cluster]]:
    made: list[Cluster] = []

    def make(
        setting: str, caching: bool, block_size: int = 4, transport: Transport = "shm", **worker
    ) -> Cluster:
        is_apart = setting != "colocated"
        cluster = Cluster(
            APART if is_apart else TOGETHER,
            limits=make_limits(setting if is_apart else "request", caching),
            transport=transport,
            **{
                "block_size": block_size,
                "num_blocks": 512 // block_size,
                "max_batch_tokens": MAX_BATCH_TOKENS,
                "caches": caching,
                **worker,
            },
        )
        made.append(cluster)
        return cluster

    yield make
    for cluster in made:
        cluster.close()


def make_prompt(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, 997, length).tolist()


# --- points ------------------------------------------------------------------------------------------------


def state(cluster: Cluster) -> RequestState:
    return cluster.dispatcher.requests["r"]


def first(cluster: Cluster) -> Life:
    """Who prefills."""
    return next(iter(cluster.lives.values()))


def second(cluster: Cluster) -> Life:
    """Who decodes it, or will."""
    seat = state(cluster).decode
    assert seat is not None
    return cluster.lives[seat.instance]


def on(life: Life, request_id: str = "r"):
    return life.rig.worker._register.get(request_id)


def wait_until(condition: Callable[[], bool]) -> None:
    for _ in range(5000):
        if condition():
            return
        time.sleep(0.001)
    raise AssertionError("never came true")


def queued(cluster: Cluster, prompt: list[int]) -> None:
    cluster.submit("b", make_prompt(40, seed=9), MAX_TOKENS)
    cluster.submit("r", prompt, MAX_TOKENS)
    assert state(cluster).phase is Phase.QUEUED


def reserved(cluster: Cluster, prompt: list[int]) -> None:
    cluster.submit("r", prompt, MAX_TOKENS)
    cluster.step(second(cluster).instance)
    assert not second(cluster).rig.worker._pulls._ahead["r"].parts
    assert not first(cluster).rig.runner.batches


def prefilling(cluster: Cluster, prompt: list[int]) -> None:
    cluster.submit("r", prompt, MAX_TOKENS)
    cluster.step(first(cluster).instance)
    assert on(first(cluster)).state is WorkerState.RUNNING
    assert on(first(cluster)).num_computed_tokens == MAX_BATCH_TOKENS


def between_chunks(cluster: Cluster, prompt: list[int]) -> None:
    cluster.submit("r", prompt, MAX_TOKENS)
    d = second(cluster)
    d.gate.shut()
    for _ in range(2):
        cluster.step("prefill-0")
        cluster.hear(cluster.lives["prefill-0"])
        cluster.step(d.instance)
    assert len(d.rig.worker._pulls._ahead["r"].parts) == 2 and d.gate.entered.wait(10)


def offered(cluster: Cluster, prompt: list[int]) -> None:
    cluster.submit("r", prompt, MAX_TOKENS)
    p, d = first(cluster), second(cluster)
    d.gate.shut()
    while not any(isinstance(message, Prefilled) for message in p.said):
        cluster.hear(p)
        cluster.step(d.instance)
        cluster.step(p.instance)
    assert state(cluster).phase is Phase.PREFILLING and p.rig.worker.gauges.load().num_offers == 1


def handed_over(cluster: Cluster, prompt: list[int]) -> None:
    offered(cluster, prompt)
    cluster.hear(first(cluster))
    assert state(cluster).phase is Phase.HANDOFF
    assert isinstance(second(cluster).mail[-1], Decode)


def pulling(cluster: Cluster, prompt: list[int]) -> None:
    handed_over(cluster, prompt)
    d = second(cluster)
    cluster.step(d.instance)
    assert on(d).state is WorkerState.PULLING and d.gate.entered.wait(10)
    assert d.is_copying


def decoding(cluster: Cluster, prompt: list[int]) -> None:
    cluster.submit("r", prompt, MAX_TOKENS)
    while len(cluster.tokens["r"]) < 5:
        cluster.turn()
    assert state(cluster).phase is Phase.DECODING


def replaying(cluster: Cluster, prompt: list[int]) -> None:
    decoding(cluster, prompt)
    dead = second(cluster).instance
    cluster.kill(dead)
    cluster.up(dead)
    worker = first(cluster)
    worker.gate.shut()  # where a dead worker's memory is pulled from, the copy is under way
    cluster.step(worker.instance)
    assert state(cluster).attempt == 1 and on(worker).attempt == 1
    assert not worker.is_copying or worker.gate.entered.wait(10)


def following(cluster: Cluster, prompt: list[int]) -> None:
    """Behind one that computes the same prefix."""
    common = make_prompt(LEADER_LENGTH, seed=3)
    cluster.submit("l", common, MAX_TOKENS)
    cluster.submit("r", [*common[:-8], *prompt[:20]], MAX_TOKENS)
    cluster.step(first(cluster).instance)
    request = on(first(cluster))
    assert request.state is WorkerState.WAITING and request.leader.request_id == "l"


def following_a_pull(cluster: Cluster, prompt: list[int]) -> None:
    """Behind one that pulls the same prefix."""
    cluster.kill("decode-1")
    d = cluster.lives["decode-0"]
    d.gate.shut()
    common = make_prompt(LEADER_LENGTH, seed=3)
    cluster.submit("l", common, MAX_TOKENS)
    cluster.submit("r", [*common[:-8], *prompt[:20]], MAX_TOKENS)
    while on(d) is None:
        cluster.turn()
    cluster.up("decode-1")
    assert on(d).state is WorkerState.WAITING and on(d).leader is on(d, "l")
    assert on(d, "l").state is WorkerState.PULLING and d.gate.entered.wait(10)


# --- events ------------------------------------------------------------------------------------------------


def client_cancels(cluster: Cluster) -> Life | None:
    cluster.cancel("r")
    return None


def leader_is_cancelled(cluster: Cluster) -> Life | None:
    cluster.cancel("l")
    return None


def first_dies(cluster: Cluster) -> Life | None:
    return cluster.kill(first(cluster).instance)


def first_dies_in_a_step(cluster: Cluster) -> Life | None:
    return cluster.kill(first(cluster).instance, in_step=True)


def second_dies(cluster: Cluster) -> Life | None:
    return cluster.kill("decode-0" if state(cluster).decode is None else second(cluster).instance)


def copies_are_cut_short(cluster: Cluster) -> Life | None:
    for life in cluster.lives.values():
        life.gate.is_torn = True
    return None


def source_changes(cluster: Cluster) -> Life | None:
    """As when the owner wrote anew what it had offered."""
    pool = cluster.lives["prefill-0"].rig.pool
    pool._allocator.renew(pool._allocator.held_blocks())
    return None


ENDS = (client_cancels, first_dies, first_dies_in_a_step)
FAILURES = (copies_are_cut_short, source_changes)


def cases() -> Iterator[tuple]:
    """(setting, caching, point, event): everything that can be."""
    for caching in (False, True):
        for transfer in TRANSFERS:
            is_ahead = transfer != "request"
            points = [queued, prefilling, offered, handed_over, pulling, decoding, replaying]
            points += [reserved, between_chunks] if is_ahead else []
            points += [following] if caching else []
            points += [following_a_pull] if caching and not is_ahead else []
            for point, event in itertools.product(points, (*ENDS, second_dies)):
                yield transfer, caching, point, event
            torn = [offered, handed_over, pulling, *([between_chunks] if is_ahead else [])]
            for point, event in itertools.product(torn, FAILURES):
                # what is told after the change is good: nothing need be lacking before the offer is made
                if not (point is between_chunks and event is source_changes):
                    yield transfer, caching, point, event
            if caching:
                for point in points[points.index(following) :]:
                    yield transfer, caching, point, leader_is_cancelled
        points = [queued, prefilling, decoding, replaying, *([following] if caching else [])]
        for point, event in itertools.product(points, ENDS):
            yield "colocated", caching, point, event


def name(value: object) -> str | None:
    if isinstance(value, bool):
        return "caching" if value else "no_cache"
    return getattr(value, "__name__", None)


def check_life(cluster: Cluster, point: Callable, event: Callable, prompt: list[int]) -> None:
    # 1. to the point
    point(cluster, prompt)
    # 2. what happens there; what is being copied into is held until the copy has stopped
    dead = event(cluster)
    for life in tuple(cluster.lives.values()):
        if not life.gate.is_open:
            is_held = life.gate.entered.is_set()
            cluster.step(life.instance)
            cluster.hear(life)
            assert not is_held or life.rig.pool.stats().active > 0
    for life in cluster.lives.values():
        life.gate.open()
    # 3. the others go on; what a dead worker said is heard before its replacement is there, and after
    for _ in range(3):
        cluster.turn()
    if dead is not None:
        cluster.hear(dead, 1)
        cluster.up(dead.instance)
        cluster.hear(dead)
    cluster.run_out()
    # 4. all is as if nothing had happened
    cluster.assert_done()
    if event in FAILURES:
        assert cluster.dispatcher.counters.failed_pulls > 0
    # 5. and the next one of the same prompt finds nothing wrong
    for life in cluster.lives.values():
        life.gate.is_torn = False
    cluster.submit("next", prompt, MAX_TOKENS)
    cluster.run_out()
    cluster.assert_done()


SPECIAL = {queued: {"max_running": 1}, following: {"max_batch_tokens": 2 * LEADER_LENGTH}}


@pytest.mark.parametrize(("setting", "caching", "point", "event"), list(cases()), ids=name)
def test_life(make_cluster, setting, caching, point, event):
    cluster = make_cluster(setting, caching, **SPECIAL.get(point, {}))
    check_life(cluster, point, event, make_prompt(PROMPT_LENGTH))


@pytest.mark.parametrize(
    ("setting", "caching", "point", "event"),
    [case for case in cases() if case[0] in ("request", "chunk") and case[2] not in (queued, following)],
    ids=name,
)
def test_life_over_gloo(make_cluster, setting, caching, point, event):
    cluster = make_cluster(setting, caching, transport="torch_distributed", **SPECIAL.get(point, {}))
    check_life(cluster, point, event, make_prompt(PROMPT_LENGTH))


@pytest.mark.parametrize("block_size", [1, 4, 16])
@pytest.mark.parametrize("length", [15, 16, 17, 31, 32, 33, 48])
@pytest.mark.parametrize(
    ("point", "event"),
    [
        *itertools.product((pulling, decoding), (client_cancels, first_dies, second_dies)),
        (pulling, copies_are_cut_short),
    ],
    ids=name,
)
@pytest.mark.parametrize("setting", ["request", "layer"])
def test_life_at_block_boundaries(make_cluster, setting, point, event, length, block_size):
    check_life(make_cluster(setting, True, block_size), point, event, make_prompt(length))


def test_layers_of_a_life_that_is_over_are_not_waited_for(make_cluster):
    cluster = make_cluster("layer", False)
    # 1. the copy of the first chunk is held, those of the others wait behind it
    handed_over(cluster, make_prompt(PROMPT_LENGTH))
    # 2. the source dies, and its replacement counts layers anew before they are looked at
    cluster.kill("prefill-0")
    cluster.up("prefill-0")
    for life in cluster.lives.values():
        life.gate.open()
    # 3. what cannot come any more is a miss at once
    cluster.run_out(max_idle_turns=500)
    cluster.assert_done()


# --- any order ---------------------------------------------------------------------------------------------


class ClusterMachine(RuleBasedStateMachine):
    """Any interleaving of clients, workers' steps, messages that are slow, copies that are held or cut short,
    deaths, replacements and what the dead had said.
    """

    transport: Transport = "shm"

    def __init__(self) -> None:
        super().__init__()
        self.ids = itertools.count()
        self.cluster: Cluster | None = None
        self.corpses: list[Life] = []

    @initialize(
        transfer=st.sampled_from(TRANSFERS),
        num_prefill=st.integers(0, 2),
        num_decode=st.integers(1, 2),
        block_size=st.sampled_from([1, 4, 16]),
        pool_tokens=st.sampled_from([144, 320]),
        host_tokens=st.sampled_from([None, 0, 48, 640]),
        max_batch_tokens=st.sampled_from([24, 128]),
        policy=st.sampled_from(["least-load", "prompt-tree", "prompt-tree"]),
    )
    def start(
        self,
        transfer,
        num_prefill,
        num_decode,
        block_size,
        pool_tokens,
        host_tokens,
        max_batch_tokens,
        policy,
    ) -> None:
        roles = {f"prefill-{i}": Role.PREFILL for i in range(num_prefill)}
        role = Role.DECODE if num_prefill else Role.COLOCATED
        roles |= {f"{role.value}-{i}": role for i in range(num_decode)}
        self.cluster = Cluster(
            roles,
            limits=make_limits(transfer, True),
            policy=policy,
            transport=self.transport,
            block_size=block_size,
            num_blocks=pool_tokens // block_size,
            max_batch_tokens=max_batch_tokens,
            max_running=4,
            caches=True,
            host_blocks=None if host_tokens is None else host_tokens // block_size,
            max_host_blocks=640 // block_size,
        )

    def pick(self, number: int) -> Life | None:
        lives = list(self.cluster.lives.values())
        return lives[number % len(lives)] if lives else None

    @rule(
        wishes=st.lists(
            st.tuples(
                st.integers(0, 1),
                st.sampled_from([0, 3, 15, 16, 17, 31, 32, 33, 64, 90]),
                st.integers(1, 20),
                st.integers(1, 24),
                st.sampled_from(["", "", "", "a"]),
            ),
            min_size=1,
            max_size=4,
        ),
    )
    def submit(self, wishes: list[tuple[int, int, int, int, str]]) -> None:
        for family, num_common, num_own, max_tokens, salt in wishes:
            prompt = make_prompt(90, seed=family)[:num_common] + make_prompt(num_own, seed=num_own)
            self.cluster.submit(f"r{next(self.ids)}", prompt, max_tokens, salt)

    @rule(number=st.integers(0, 9), num_own=st.integers(1, 20), max_tokens=st.integers(1, 24))
    def next_turn(self, number: int, num_own: int, max_tokens: int) -> None:
        """A prompt that goes on from an answer, which may be cached where it began, or coming back."""
        ended = list(self.cluster.ended)
        if ended:
            request_id = ended[-1 - number % len(ended)]
            history = self.cluster.prompts[request_id] + self.cluster.tokens[request_id]
            prompt = history[:100] + make_prompt(num_own, seed=num_own)
            self.cluster.submit(f"r{next(self.ids)}", prompt, max_tokens)

    @rule(number=st.integers(0, 9))
    def cancel(self, number: int) -> None:
        alive = list(self.cluster.dispatcher.requests)
        if alive:
            self.cluster.cancel(alive[number % len(alive)])

    @rule(
        moves=st.lists(
            st.tuples(st.integers(0, 3), st.booleans(), st.sampled_from([None, None, 0, 1])),
            min_size=1,
            max_size=12,
        )
    )
    def work(self, moves: list[tuple[int, bool, int | None]]) -> None:
        """Workers take turns or are heard, in any order, with all of their messages or not."""
        for number, is_heard, num_messages in moves:
            life = self.pick(number)
            if life is not None and is_heard:
                self.cluster.hear(life, num_messages)
            elif life is not None:
                self.cluster.step(life.instance, num_messages)
                self.cluster.settle(life.instance)

    @rule(num_turns=st.integers(1, 8))
    def turns(self, num_turns: int) -> None:
        for _ in range(num_turns):
            self.cluster.turn()
            for instance in self.cluster.lives:
                self.cluster.settle(instance)

    @rule(number=st.integers(0, 3), how=st.sampled_from(["held", "whole", "torn"]))
    def copies(self, number: int, how: str) -> None:
        life = self.pick(number)
        if life is not None:
            life.gate.is_torn = how == "torn"
            (life.gate.shut if how == "held" else life.gate.open)()

    @rule(number=st.integers(0, 3))
    def forget_what_is_cached(self, number: int) -> None:
        life = self.pick(number)
        if life is not None:
            life.rig.pool.flush()

    @rule(number=st.integers(0, 3), in_step=st.booleans(), is_replaced=st.booleans())
    def die(self, number: int, in_step: bool, is_replaced: bool) -> None:
        life = self.pick(number)
        if life is not None:
            self.corpses.append(self.cluster.kill(life.instance, in_step=in_step))
            if is_replaced:
                self.cluster.up(life.instance)

    @rule(num_messages=st.integers(1, 3))
    def hear_the_dead(self, num_messages: int) -> None:
        for corpse in self.corpses:
            self.cluster.hear(corpse, num_messages)

    @rule()
    def replace(self) -> None:
        for instance in self.cluster.roles:
            if instance not in self.cluster.lives:
                self.cluster.up(instance)
                return

    def teardown(self) -> None:
        if self.cluster is None:
            return
        try:
            for life in self.cluster.lives.values():
                life.gate.open()
            for instance in self.cluster.roles:
                if instance not in self.cluster.lives:
                    self.cluster.up(instance)
            self.cluster.run_out()
            self.cluster.assert_done()
        finally:
            self.cluster.close()


TestClusterMachine = ClusterMachine.TestCase
TestClusterMachine.settings = settings(
    max_examples=100, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


class GlooClusterMachine(ClusterMachine):
    """The same where blocks are sent; what would be pulled by layer is a miss, and comes with the offer."""

    transport = "torch_distributed"


TestGlooClusterMachine = GlooClusterMachine.TestCase
TestGlooClusterMachine.settings = settings(
    max_examples=12, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
