"""A pull is stopped at each of its steps, something goes wrong there, and it goes on: over every transport
the request ends with the right tokens, recomputed where need be, and all pools are idle.

    1. to the step: the prefill worker has offered its KV, the decode worker's pull stands at the step
    2. the fault
    3. all goes on
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from memserve.config import Role
from memserve.messages import Accept, Connect, LinkMessage, RevokeGrant
from memserve.router.dispatcher import DispatcherLimits
from memserve.workers.channel import ReceivedGrant
from tests.workers.cluster import Cluster, Gate, Step

TRANSPORTS = ("shm", "torch_distributed")
ROLES = {"prefill-0": Role.PREFILL, "decode-0": Role.DECODE}
MAX_TOKENS = 8
# Several chunks of a link, and a partial block.
PROMPT = np.random.default_rng(0).integers(0, 997, 42).tolist()
STALL_S = 0.3


@pytest.fixture
def make_cluster() -> Iterator[Callable[..., Cluster]]:
    made: list[Cluster] = []

    def make(transport: str, caches: bool = True, **options: float) -> Cluster:
        cluster = Cluster(
            ROLES,
            limits=DispatcherLimits(transfer="request"),
            transport=transport,  # type: ignore[arg-type]
            options=options,
            caches=caches,
            max_batch_tokens=64,
        )
        made.append(cluster)
        return cluster

    yield make
    for cluster in made:
        cluster.close()


def gate_of(cluster: Cluster, step: Step) -> Gate:
    """Where a pull of the decode worker stands at this step."""
    is_at_source = cluster.transport == "torch_distributed" and step is not Step.BEGUN
    return cluster.lives["prefill-0" if is_at_source else "decode-0"].gate


def go_to(cluster: Cluster, step: Step) -> Gate:
    gate = gate_of(cluster, step)
    gate.shut(step)
    cluster.submit("r", PROMPT, MAX_TOKENS)
    deadline_s = time.monotonic() + 20
    while not gate.entered.is_set():
        assert time.monotonic() < deadline_s, "the pull never came to the step"
        if not cluster.turn():
            time.sleep(0.001)
    assert cluster.lives["decode-0"].is_copying
    return gate


def go_on(cluster: Cluster, gate: Gate, *, is_miss: bool) -> None:
    gate.open()
    cluster.run_out()
    cluster.assert_done()
    assert cluster.tokens["r"], "nothing was drawn"
    assert (cluster.dispatcher.counters.failed_pulls > 0) == is_miss
    # what comes after finds nothing wrong
    for life in cluster.lives.values():
        life.gate.is_torn = False
    cluster.lose = lambda message: False
    cluster.submit("next", [5, *PROMPT], MAX_TOKENS)
    num_failed = cluster.dispatcher.counters.failed_pulls
    cluster.run_out()
    cluster.assert_done()
    assert cluster.dispatcher.counters.failed_pulls == num_failed


# --- faults ------------------------------------------------------------------------------------------------


def source_frees(cluster: Cluster) -> None:
    """And uses the blocks for something else."""
    rig = cluster.lives["prefill-0"].rig
    for table in rig.worker._offers.take_all():
        rig.pool.release(table)
    rig.pool.flush()
    others = rig.pool.alloc_mem(rig.pool.num_blocks)
    assert others is not None
    rig.pool.kv[others] = 3.0
    rig.pool.free_mem(others)


def generations_change(cluster: Cluster) -> None:
    """As when the owner writes anew what it has offered."""
    allocator = cluster.lives["prefill-0"].rig.pool._allocator
    allocator.renew(allocator.held_blocks())


def source_dies(cluster: Cluster) -> None:
    cluster.kill("prefill-0")
    for _ in range(3):
        cluster.turn()
    cluster.up("prefill-0")


def source_restarts(cluster: Cluster) -> None:
    """So quickly that nobody sees a time without it."""
    cluster.kill("prefill-0")
    cluster.up("prefill-0")


def receiver_restarts(cluster: Cluster) -> None:
    cluster.kill("decode-0")
    cluster.up("decode-0")


def copy_is_cut_short(cluster: Cluster) -> None:
    for life in cluster.lives.values():
        life.gate.is_torn = True


FAULTS = (
    source_frees,
    generations_change,
    source_dies,
    source_restarts,
    receiver_restarts,
    copy_is_cut_short,
)


def is_a_miss(transport: str, step: Step, fault: Callable) -> bool:
    """Whether something must be lacking. Mapped memory outlives its owner; a new receiver asks anew."""
    if fault in (source_dies, source_restarts):
        return transport == "torch_distributed"
    if fault is copy_is_cut_short and transport == "shm":
        return step is not Step.COPIED
    return fault is not receiver_restarts


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
@pytest.mark.parametrize("step", Step, ids=lambda step: step.name)
@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("caches", [False, True], ids=["no_cache", "caching"])
def test_a_fault_at_a_step(make_cluster, caches: bool, transport: str, step: Step, fault: Callable) -> None:
    cluster = make_cluster(transport, caches)
    gate = go_to(cluster, step)
    fault(cluster)
    go_on(cluster, gate, is_miss=is_a_miss(transport, step, fault))


@pytest.mark.parametrize("step", Step, ids=lambda step: step.name)
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_copy_that_stands_still(make_cluster, transport: str, step: Step) -> None:
    """Over gloo a deadline ends it, where the source does not send; mapped memory comes however late."""
    cluster = make_cluster(transport, **({} if transport == "shm" else {"stall_s": STALL_S}))
    gate = go_to(cluster, step)
    is_sent_late = transport == "torch_distributed" and step is not Step.BEGUN
    deadline_s = time.monotonic() + 20
    while is_sent_late and cluster.lives["decode-0"].is_copying:
        assert time.monotonic() < deadline_s, "no deadline ends it"
        time.sleep(0.01)
    go_on(cluster, gate, is_miss=is_sent_late)


# --- a connection that does not come about -----------------------------------------------------------------


def router_loses(kind: type) -> Callable[[Cluster], None]:
    def fault(cluster: Cluster) -> None:
        cluster.lose = lambda message: isinstance(message, kind)

    return fault


def peer_is_revoked(cluster: Cluster) -> None:
    cluster.lives["decode-0"].rig.grants.inbox.append(ReceivedGrant(RevokeGrant("prefill-0"), ()))


def source_refuses(cluster: Cluster) -> None:
    transfer = cluster.lives["prefill-0"].rig.pool.peers._transfer._sending()
    transfer._why_not = lambda request: "not today"


REFUSALS = {
    "shm": (peer_is_revoked,),
    "torch_distributed": (peer_is_revoked, source_refuses, router_loses(Connect), router_loses(Accept)),
}


@pytest.mark.parametrize(
    ("transport", "fault"), [(transport, fault) for transport in TRANSPORTS for fault in REFUSALS[transport]]
)
def test_no_way_to_the_source(make_cluster, transport: str, fault: Callable) -> None:
    # only where nobody answers does a deadline end it; of the others none is near
    is_lost = fault not in (peer_is_revoked, source_refuses)
    cluster = make_cluster(transport, **({"connect_s": STALL_S} if is_lost else {"connect_s": 60.0}))
    fault(cluster)
    cluster.submit("r", PROMPT, MAX_TOKENS)
    cluster.run_out()
    cluster.assert_done()
    assert cluster.dispatcher.counters.failed_pulls == 1


@pytest.mark.parametrize("who", ["prefill-0", "decode-0"])
def test_either_end_goes_while_a_link_is_being_formed(make_cluster, who: str) -> None:
    # gloo takes up to five times as long to give up an end that was told where the other was, and is closed
    cluster = make_cluster("torch_distributed", connect_s=1.0)
    sent: list[LinkMessage] = []
    cluster.lose = lambda message: sent.append(message) is not None
    # 1. the receiver has asked for a link, and the source has not read it
    cluster.submit("r", PROMPT, MAX_TOKENS)
    deadline_s = time.monotonic() + 20
    while not sent:
        assert time.monotonic() < deadline_s
        cluster.turn()
    assert isinstance(sent[-1], Connect)
    # 2. one of them goes, and another comes in its place: nobody waits for a deadline
    cluster.kill(who)
    cluster.up(who)
    cluster.run_out(max_idle_turns=2000)
    cluster.assert_done()


def test_a_link_is_formed_once_for_all_pulls_one_way(make_cluster) -> None:
    cluster = make_cluster("torch_distributed")
    sent: list[LinkMessage] = []
    cluster.lose = lambda message: sent.append(message) is not None
    for number in range(4):
        cluster.submit(f"r{number}", [number, *PROMPT], MAX_TOKENS)
        cluster.run_out()
    cluster.assert_done()
    assert [type(message) for message in sent] == [Connect, Accept]
    assert cluster.dispatcher.counters.pulls == 4 and cluster.dispatcher.counters.failed_pulls == 0
