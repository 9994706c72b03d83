"""Pulls that the global scheduler plans: what is only announced is no source, and addresses stay right."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from memserve.config import Role, Transport
from memserve.messages import Prefill, Tier, pack_tokens
from memserve.router.dispatcher import DispatcherLimits
from tests.workers.cluster import Cluster, Killed

ROLES = {"prefill-0": Role.PREFILL, "prefill-1": Role.PREFILL, "decode-0": Role.DECODE}
PROMPT = [(i * 7) % 500 + 3 for i in range(120)]
OTHER = PROMPT[:100] + [(i * 11) % 400 + 500 for i in range(80)]


def make(transfer: str, transport: Transport = "shm", **worker: object) -> Cluster:
    limits = DispatcherLimits(transfer=transfer, pull_back=True)
    fields = {"caches": True, "num_blocks": 256, "max_batch_tokens": 32, **worker}
    return Cluster(ROLES, limits=limits, policy="prompt-tree", transport=transport, **fields)


def home_of(cluster: Cluster) -> tuple[str, str]:
    """The prefill worker that was chosen, and the other."""
    (home,) = [name for name in ("prefill-0", "prefill-1") if cluster.lives[name].mail]
    return home, "prefill-1" if home == "prefill-0" else "prefill-0"


def end(cluster: Cluster) -> None:
    cluster.run_out()
    cluster.assert_done()
    cluster.close()


@pytest.mark.parametrize("transfer", ["layer", "chunk", "request"])
def test_a_prefix_that_is_being_computed_is_no_source(transfer: str) -> None:
    cluster = make(transfer)
    cluster.submit("a", PROMPT)
    home, other = home_of(cluster)
    # 1. a first chunk is computed, the second is announced
    cluster.step(home)
    cluster.hear(cluster.lives[home])
    life = cluster.lives[home]
    compute = life.rig.runner.execute

    def execute(chunks: Sequence) -> object:
        life.rig.runner.execute = compute
        life.said.extend(life.rig.take())
        cluster.hear(life)
        # 2. a prompt that shares it is placed, and pulls whatever it was told of
        cluster.submit("b", OTHER)
        for _ in range(5):
            cluster.step(other)
            cluster.settle(other)
        return compute(chunks)

    life.rig.runner.execute = execute
    cluster.step(home)
    end(cluster)


@pytest.mark.parametrize("transfer", ["layer", "chunk", "request"])
def test_what_the_dead_had_only_announced_is_no_source(transfer: str) -> None:
    cluster = make(transfer)
    cluster.dispatcher.fleet.views["decode-0"].caches = False
    cluster.submit("a", PROMPT)
    home, _ = home_of(cluster)
    life = cluster.lives[home]
    for _ in range(2):
        cluster.step(home)
        cluster.hear(life)

    def execute(chunks: Sequence) -> object:
        raise Killed

    life.rig.runner.execute = execute
    with pytest.raises(Killed):
        cluster.step(home)
    life.said.extend(life.rig.take())
    cluster.hear(life)
    cluster.kill(home)
    end(cluster)


def test_a_prefix_elsewhere_is_pulled_rather_than_computed() -> None:
    cluster = make("request")
    cluster.submit("a", PROMPT)
    home, other = home_of(cluster)
    cluster.run_out()
    # its home is busy with something long, and so is the decode worker, which has it too
    workers = cluster.dispatcher.scheduler._workers
    for name in (home, "decode-0"):
        workers[name].backlog.add("busy", 1e6, 0.0)
    cluster.submit("b", OTHER)
    (message,) = [each for each in cluster.lives[other].mail if isinstance(each, Prefill)]
    assert message.offer is not None and message.offer.num_tokens == 100
    cluster.run_out()
    batches = cluster.lives[other].rig.runner.batches
    assert sum(n for batch in batches for name, n in batch if name == "b") == len(OTHER) - 100
    end(cluster)


@pytest.mark.parametrize("transport", ["shm", "torch_distributed"])
def test_a_prefix_in_both_tiers_elsewhere_is_pulled_whole(transport: Transport) -> None:
    cluster = make("request", transport, host_blocks=64, max_host_blocks=64)
    cluster.submit("a", PROMPT)
    home, other = home_of(cluster)
    cluster.run_out()
    # 1. its home has the first blocks in the device tier, and has told that the others are in the host tier
    pool = cluster.lives[home].rig.pool
    assert pool.swap_out(20) == 20
    cluster.turn()
    workers = cluster.dispatcher.scheduler._workers
    for name in (home, "decode-0"):
        workers[name].backlog.add("busy", 1e6, 0.0)
    cluster.lives["decode-0"].rig.pool.flush()
    cluster.turn()
    # 2. the offer names both
    cluster.submit("b", OTHER)
    (message,) = [each for each in cluster.lives[other].mail if isinstance(each, Prefill)]
    assert message.offer is not None and message.offer.num_tokens == 100
    (more,) = message.offer.more
    assert (message.offer.refs.tier, more.tier) == (Tier.DEVICE, Tier.HOST)
    assert message.offer.refs.instance == home and message.offer.num_blocks == 25
    # 3. and both arrive
    cluster.run_out()
    batches = cluster.lives[other].rig.runner.batches
    assert sum(n for batch in batches for name, n in batch if name == "b") == len(OTHER) - 100
    end(cluster)


def test_blocks_swapped_in_are_known_where_they_are_now() -> None:
    limits = DispatcherLimits(transfer="request")
    roles = {"prefill-0": Role.PREFILL, "decode-0": Role.DECODE}
    cluster = Cluster(
        roles,
        limits=limits,
        caches=True,
        num_blocks=128,
        max_batch_tokens=64,
        host_blocks=64,
        max_host_blocks=64,
    )
    cluster.submit("a", PROMPT[:60])
    cluster.run_out()
    decode = cluster.lives["decode-0"].rig
    assert decode.pool.swap_out(100) > 0
    cluster.turn()
    following = PROMPT[:60] + cluster.tokens["a"] + list(range(40))
    cluster.submit("b", following)
    cluster.run_out()
    tokens = pack_tokens(following + cluster.tokens["b"])
    tree = cluster.dispatcher.scheduler._trees[Role.DECODE]
    found = tree.match("", tokens, 1e3)
    num_cached = decode.pool.match(tokens).num_tokens
    assert num_cached > 100
    assert tree.num_known_tokens(found, found.live["decode-0"].life) == num_cached
    end(cluster)
