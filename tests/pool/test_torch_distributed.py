"""Pulls over gloo, both ends in this process: what arrives is what was asked for, whatever goes wrong."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest

from memserve.messages import Accept, BlockRefs, Connect, LinkMessage, Refuse, Tier
from memserve.pool.allocator import BlockIds
from memserve.pool.transports.base import Pull, PullResult
from memserve.pool.transports.torch_distributed import (
    Options,
    TorchPeer,
    TorchPool,
    TorchTransfer,
)

BLOCK_BYTES = 1024
NUM_BLOCKS = 64


class Fault:
    """What happens at the source to each chunk between the first look at its generations and the copy."""

    def __init__(self) -> None:
        self.act: Callable[[BlockIds], None] = lambda blocks: None
        self.chunks: list[list[int]] = []

    def __call__(self, blocks: BlockIds) -> None:
        self.chunks.append(blocks.tolist())
        self.act(blocks)


class Hold:
    """A fault that stands still until it is let go."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self.go_on = threading.Event()

    def __call__(self, blocks: BlockIds) -> None:
        self.reached.set()
        assert self.go_on.wait(30)


class Instance:
    """A transfer with its arena: block b of an instance holds b + 1 everywhere, with generation 2 b + 1."""

    def __init__(
        self, router: Router, name: str, block_bytes: int, layout: str, fingerprint: str, **options
    ) -> None:
        self.name = name
        self.fault = Fault()
        self.blocks = np.zeros((NUM_BLOCKS, block_bytes), dtype=np.uint8)
        self.generations = np.arange(1, 2 * NUM_BLOCKS, 2, dtype=np.uint64)
        self.woken = threading.Semaphore(0)
        pool = TorchPool(name, 1, layout, fingerprint, self.blocks, self.generations)
        chosen = Options(**{"connect_s": 10.0, "stall_s": 10.0, "on_chunk": self.fault, **options})
        self.transfer = TorchTransfer(pool, self.woken.release, router.send, chosen)

    def fill(self) -> None:
        self.blocks[:] = np.arange(1, NUM_BLOCKS + 1, dtype=np.uint8)[:, None]

    def addresses(self, blocks: list[int]) -> BlockRefs:
        generations = tuple(self.generations[blocks].tolist())
        return BlockRefs(self.name, 1, Tier.DEVICE, tuple(blocks), generations)

    def pull(self, refs: BlockRefs, into: list[int]) -> Pull:
        return self.transfer.begin(refs, np.array(into, dtype=np.int64))

    def finish(self, pull: Pull) -> PullResult:
        """Wait for the end of a pull as the loop does: by its wake-up."""
        deadline_s = time.monotonic() + 30
        while (result := pull.poll()) is None:
            assert self.woken.acquire(timeout=max(0.0, deadline_s - time.monotonic())), "pull never ended"
        return result

    def content(self, blocks: list[int]) -> list[int]:
        chosen = self.blocks[blocks]
        assert (chosen == chosen[:, :1]).all()
        return chosen[:, 0].tolist()


class Router:
    """Takes control messages from one instance to another; `lose` says which of them never arrive."""

    def __init__(self) -> None:
        self.instances: dict[str, Instance] = {}
        self.sent: list[LinkMessage] = []
        self.lose: Callable[[LinkMessage], bool] = lambda message: False

    def send(self, peer: str, message: LinkMessage) -> None:
        self.sent.append(message)
        if not self.lose(message):
            self.instances[peer].transfer.on_control(message)

    @property
    def attempts(self) -> list[int]:
        return [message.attempt for message in self.sent if isinstance(message, Connect)]


MakeInstance = Callable[..., Instance]


def threads_and_sockets() -> tuple[int, int]:
    """Threads of the process (gloo's too), and its sockets."""
    num_sockets = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            num_sockets += os.readlink(f"/proc/self/fd/{name}").startswith(("socket:", "anon_inode:[event"))
        except FileNotFoundError:  # the descriptor of the listing itself
            continue
    return len(os.listdir("/proc/self/task")), num_sockets


@pytest.fixture
def router() -> Router:
    return Router()


@pytest.fixture
def make_instance(router: Router) -> Iterator[MakeInstance]:
    """Makes instances that all know each other; at the end no thread or socket may be left of them."""
    before = threads_and_sockets()

    def make(
        name: str,
        *,
        block_bytes: int = BLOCK_BYTES,
        layout: str = "float32",
        fingerprint: str = "model",
        **options,
    ) -> Instance:
        instance = Instance(router, name, block_bytes, layout, fingerprint, **options)
        for other in router.instances.values():
            other.transfer.add_peer(TorchPeer(name, 1, NUM_BLOCKS))
            instance.transfer.add_peer(TorchPeer(other.name, 1, NUM_BLOCKS))
        router.instances[name] = instance
        return instance

    yield make
    for instance in router.instances.values():
        instance.transfer.close()
    router.instances.clear()
    deadline_s = time.monotonic() + 5  # gloo's own threads end a little after their pair
    while threads_and_sockets() != before and time.monotonic() < deadline_s:
        time.sleep(0.01)
    assert threads_and_sockets() == before


@pytest.fixture
def pair(make_instance: MakeInstance) -> tuple[Instance, Instance]:
    """A source that is filled, and a receiver that is empty, with chunks of four blocks."""
    source = make_instance("source", chunk_bytes=4 * BLOCK_BYTES)
    source.fill()
    return source, make_instance("receiver", chunk_bytes=4 * BLOCK_BYTES)


@pytest.mark.parametrize("block_bytes", [64, 1024, 262144])
@pytest.mark.parametrize(
    "order", [[0, 1, 2, 3, 4, 5], [5, 3, 9, 4, 63, 8, 8], [0, 1, 2, 7, 8, 4, 10, 11, 12, 13], [6], []]
)
def test_blocks_arrive_in_sequence_order(make_instance, block_bytes: int, order: list[int]) -> None:
    source = make_instance("source", block_bytes=block_bytes)
    receiver = make_instance("receiver", block_bytes=block_bytes, chunk_bytes=3 * block_bytes)
    source.fill()
    for into in (list(range(20, 20 + len(order))), list(range(50, 50 - 2 * len(order), -2))):
        receiver.blocks[:] = 0
        result = receiver.finish(receiver.pull(source.addresses(order), into))
        assert (result.num_blocks, result.failure) == (len(order), None)
        assert result.num_bytes == len(order) * block_bytes
        assert receiver.content(into) == [block + 1 for block in order]
        others = sorted(set(range(NUM_BLOCKS)) - set(into))
        assert set(receiver.content(others)) == {0}, "written beside the blocks of the pull"
    assert all(len(chunk) <= 3 for chunk in source.fault.chunks)


def test_pulls_both_ways_and_between_three(make_instance, router: Router) -> None:
    instances = [make_instance(name, chunk_bytes=4 * BLOCK_BYTES) for name in "abc"]
    # 1. each holds 0 … 19 and pulls them from both others, several at a time, into blocks of their own
    for number, instance in enumerate(instances):
        instance.blocks[:20] = 100 * (number == 1) + 50 * (number == 2) + np.arange(20)[:, None] + 1
    pulls = []
    for instance in instances:
        others = [other for other in instances if other is not instance]
        for k, other in enumerate(others):
            for half in range(2):
                blocks = list(range(10 * half, 10 * half + 10))
                into = list(range(20 + 20 * k + 10 * half, 30 + 20 * k + 10 * half))
                pulls.append((instance, other, blocks, into, instance.pull(other.addresses(blocks), into)))
    # 2. all come
    for instance, other, blocks, into, pull in pulls:
        assert instance.finish(pull).failure is None
        assert instance.content(into) == other.content(blocks)
    # 3. by one pair for each direction
    assert router.attempts == [1] * 6


def test_a_pair_is_kept_for_the_pulls_after(pair, router: Router) -> None:
    source, receiver = pair
    for num_blocks in (1, 4, 5, 9, 20):  # with chunks of four: whole ones, and a rest
        blocks = list(range(num_blocks))
        result = receiver.finish(receiver.pull(source.addresses(blocks), blocks))
        assert (result.num_blocks, result.failure) == (num_blocks, None)
    assert router.attempts == [1]


def test_a_block_reused_before_the_copy_ends_the_prefix(pair) -> None:
    source, receiver = pair
    blocks = list(range(20))
    refs = source.addresses(blocks)
    source.generations[6] += 2
    result = receiver.finish(receiver.pull(refs, blocks))
    assert (result.num_blocks, result.failure) == (6, "14 of 20 blocks were gone before the copy")
    assert receiver.content(blocks[:6]) == [1, 2, 3, 4, 5, 6]
    # what lay behind was asked for no further than it was under way, and the link goes on
    assert len(source.fault.chunks) <= 3
    assert receiver.finish(receiver.pull(source.addresses(blocks), blocks)).num_blocks == 20


@pytest.mark.parametrize("reused", [0, 3, 4, 9, 19])
@pytest.mark.parametrize("scattered", [False, True])
def test_a_block_reused_during_the_copy_is_not_verified(pair, reused: int, scattered: bool) -> None:
    source, receiver = pair
    blocks = list(range(0, 40, 2)) if scattered else list(range(20))
    changed = blocks[reused]

    def reuse(chunk: BlockIds) -> None:
        if changed in chunk:
            source.generations[changed] += 2
            source.blocks[changed] = 99

    source.fault.act = reuse
    result = receiver.finish(receiver.pull(source.addresses(blocks), blocks))
    assert result.num_blocks == reused
    assert result.failure == f"{20 - reused} of 20 blocks were gone after the copy"
    assert receiver.content(blocks[:reused]) == [block + 1 for block in blocks[:reused]]


@pytest.mark.parametrize(
    ("blocks", "generations"),
    [((64,), (1,)), ((-1,), (1,)), ((0,), (1, 1)), ((2**63,), (1,)), ((0,), (-1,)), ((0,), (2**64,))],
)
def test_addresses_that_cannot_be_are_a_miss(pair, blocks, generations) -> None:
    _, receiver = pair
    result = receiver.pull(BlockRefs("source", 1, Tier.DEVICE, blocks, generations), [0]).poll()
    assert result is not None and result.num_blocks == 0
    assert result.failure is not None and result.failure.startswith("bad addresses at source")


def test_blocks_that_are_being_computed_are_a_miss(pair) -> None:
    source, receiver = pair
    into = np.array([0], dtype=np.int64)
    result = receiver.transfer.begin(source.addresses([0]), into, layers_from=3).poll()
    assert result is not None
    assert result.failure == "over gloo, blocks are pulled once they are complete"


def test_an_ask_beyond_the_sources_arena_breaks_the_link(pair, caplog) -> None:
    source, receiver = pair
    # the receiver was told of a larger arena than there is
    receiver.transfer.add_peer(TorchPeer("source", 1, 1000))
    result = receiver.finish(receiver.pull(BlockRefs("source", 1, Tier.DEVICE, (64,), (1,)), [0]))
    assert (result.num_blocks, result.num_bytes) == (0, 0)
    assert result.failure is not None and result.failure.startswith("lost source: ")
    assert receiver.finish(receiver.pull(source.addresses([3]), [3])).num_blocks == 1


def test_cancel_ends_a_copy_and_its_blocks_are_safe_only_then(pair) -> None:
    source, receiver = pair
    source.fault.act = hold = Hold()
    blocks = list(range(20))
    pull = receiver.pull(source.addresses(blocks), blocks)
    # 1. the first chunk is held: cancelling does not end the pull yet
    assert hold.reached.wait(30)
    pull.cancel()
    assert pull.poll() is None
    # 2. what was asked for comes (a second chunk only if its ask was quicker), nothing more is asked for
    hold.go_on.set()
    result = receiver.finish(pull)
    assert result.failure == "cancelled" and result.num_blocks <= result.num_bytes // BLOCK_BYTES
    assert result.num_bytes // BLOCK_BYTES in (4, 8)
    # 3. from now on nothing writes there, and the link goes on with the next pull
    receiver.blocks[:] = 77
    assert receiver.finish(receiver.pull(source.addresses([40]), [40])).num_blocks == 1
    assert set(receiver.content(blocks)) == {77}
    pull.cancel()
    assert pull.poll() == result


def test_cancel_of_a_waiting_pull_ends_it_at_once(pair) -> None:
    source, receiver = pair
    source.fault.act = hold = Hold()
    first = receiver.pull(source.addresses([1]), [1])
    assert hold.reached.wait(30)
    second = receiver.pull(source.addresses([2]), [2])
    second.cancel()
    assert second.poll() is not None and second.poll().failure == "cancelled"
    hold.go_on.set()
    assert receiver.finish(first).num_blocks == 1
    assert receiver.content([2]) == [0]


def test_pulls_beyond_the_queue_fail_at_once(make_instance) -> None:
    source = make_instance("source")
    receiver = make_instance("receiver", max_queued=2)
    source.fault.act = hold = Hold()
    pulls = [receiver.pull(source.addresses([0]), [0])]
    assert hold.reached.wait(30)
    pulls += [receiver.pull(source.addresses([k]), [k]) for k in (1, 2)]
    refused = receiver.pull(source.addresses([3]), [3])
    assert refused.poll() == PullResult(0, 0, 0.0, "2 pulls are waiting already")
    hold.go_on.set()
    assert [receiver.finish(pull).num_blocks for pull in pulls] == [1, 1, 1]


def test_a_source_that_stalls_is_a_miss_and_then_a_new_attempt(make_instance, router: Router) -> None:
    source = make_instance("source", chunk_bytes=4 * BLOCK_BYTES)
    receiver = make_instance("receiver", chunk_bytes=4 * BLOCK_BYTES, stall_s=0.3)
    source.fill()
    source.fault.act = hold = Hold()
    blocks = list(range(8))
    # 1. nothing comes: the deadline ends the pull, and its blocks are not written any more
    result = receiver.finish(receiver.pull(source.addresses(blocks), blocks))
    assert (result.num_blocks, result.failure) == (0, "lost source: nothing came for 0.3 s")
    receiver.blocks[:] = 77
    hold.go_on.set()
    # 2. the next pull forms a new pair
    source.fault.act = lambda chunk: None
    assert receiver.finish(receiver.pull(source.addresses(blocks), [b + 20 for b in blocks])).num_blocks == 8
    assert router.attempts == [1, 2]
    assert set(receiver.content(blocks)) == {77}


def test_a_source_that_fails_is_a_miss_and_then_a_new_attempt(pair, router: Router, caplog) -> None:
    source, receiver = pair
    blocks = list(range(20))

    def fail(chunk: BlockIds) -> None:
        if 9 in chunk:
            raise OSError("no such block")

    source.fault.act = fail
    result = receiver.finish(receiver.pull(source.addresses(blocks), blocks))
    assert result.num_blocks in (0, 4), "what came before is verified only once its proof is here"
    assert result.failure is not None and result.failure.startswith("lost source: ")
    assert "sending to receiver failed" in caplog.text
    caplog.clear()  # its traceback holds what gloo is to give back
    source.fault.act = lambda chunk: None
    assert receiver.finish(receiver.pull(source.addresses(blocks), blocks)).num_blocks == 20
    assert router.attempts == [1, 2]


def test_a_pair_that_died_while_idle_costs_no_pull(pair, router: Router) -> None:
    source, receiver = pair
    assert receiver.finish(receiver.pull(source.addresses([1]), [1])).num_blocks == 1
    source.transfer.remove_peer("receiver")
    for link in source.transfer._leaving:
        link.join()
    result = receiver.finish(receiver.pull(source.addresses([2, 3]), [2, 3]))
    assert (result.num_blocks, result.failure) == (2, None)
    assert router.attempts == [1, 2]


def test_a_source_that_never_connects_costs_one_deadline(make_instance, router: Router) -> None:
    source = make_instance("source")
    receiver = make_instance("receiver", connect_s=0.5)
    source.fill()
    # 1. the messages get lost: those that wait fail together
    router.lose = lambda message: True
    pulls = [receiver.pull(source.addresses([k]), [k]) for k in range(5)]
    failures = {receiver.finish(pull).failure for pull in pulls}
    assert failures == {"no link to source: no connection within 0.5 s"}
    assert len(router.attempts) <= 2
    # 2. and when they do not get lost any more, pulls come
    router.lose = lambda message: False
    assert receiver.finish(receiver.pull(source.addresses([9]), [9])).num_blocks == 1


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"layout": "bfloat16"}, "source source has KV of float32, receiver receiver of bfloat16"),
        ({"block_bytes": 2048}, "source source has blocks of 1024 bytes, receiver receiver of 2048"),
        (
            {"fingerprint": "another"},
            "source source has a model or layout of fingerprint model, receiver receiver of another",
        ),
    ],
)
def test_other_blocks_or_another_model_are_refused(make_instance, router: Router, other, words) -> None:
    source = make_instance("source")
    receiver = make_instance("receiver", **other)
    result = receiver.finish(receiver.pull(source.addresses([0]), [0]))
    assert (result.num_blocks, result.failure) == (0, f"no link to source: {words}")
    refusals = [message for message in router.sent if isinstance(message, Refuse)]
    assert [refusal.reason for refusal in refusals] == [words]


def test_another_incarnation_of_the_source_is_refused_until_it_is_known(make_instance) -> None:
    source, receiver = make_instance("source"), make_instance("receiver")
    source.fill()
    receiver.transfer.add_peer(TorchPeer("source", 2, NUM_BLOCKS))
    later = msgspec.structs.replace(source.addresses([0]), incarnation=2)
    refused = receiver.finish(receiver.pull(later, [0]))
    assert refused.failure == (
        "no link to source: source source is of incarnation 1, receiver receiver means 2"
    )
    receiver.transfer.add_peer(TorchPeer("source", 1, NUM_BLOCKS))
    assert receiver.finish(receiver.pull(source.addresses([0]), [0])).num_blocks == 1


def test_receivers_beyond_the_bound_are_refused(make_instance) -> None:
    source = make_instance("source", max_senders=1)
    first, second = make_instance("first"), make_instance("second")
    source.fill()
    assert first.finish(first.pull(source.addresses([0]), [0])).num_blocks == 1
    refused = second.finish(second.pull(source.addresses([0]), [0]))
    assert (
        refused.failure
        == "no link to source: source source has 1 links already, receiver second is one too many"
    )
    # a place is free again once the other has gone
    first.transfer.close()
    deadline_s = time.monotonic() + 10
    while second.finish(second.pull(source.addresses([0]), [0])).num_blocks == 0:
        assert time.monotonic() < deadline_s


def test_stale_messages_change_nothing(pair, router: Router) -> None:
    source, receiver = pair
    assert receiver.finish(receiver.pull(source.addresses([1]), [1])).num_blocks == 1
    connect, accept = router.sent
    assert isinstance(connect, Connect) and isinstance(accept, Accept)
    source.transfer.on_control(connect)
    receiver.transfer.on_control(Refuse("receiver", 1, "source", 1, 0, "late"))
    receiver.transfer.on_control(Refuse("receiver", 1, "nobody", 1, 1, "strange"))
    assert receiver.finish(receiver.pull(source.addresses([2]), [2])).num_blocks == 1
    assert router.attempts == [1]


def test_nothing_is_said_to_who_does_not_know_the_token(pair, router: Router, caplog) -> None:
    source, receiver = pair
    # 1. whoever came to the address in the source's place would know another one
    stolen: list[Connect] = []

    def strip(message: LinkMessage) -> bool:
        if isinstance(message, Connect):
            stolen.append(message)
            source.transfer.on_control(msgspec.structs.replace(message, token=bytes(32)))
        return isinstance(message, Connect)

    router.lose = strip
    result = receiver.finish(receiver.pull(source.addresses([1]), [1]))
    assert (result.num_blocks, result.num_bytes) == (0, 0)
    assert result.failure == "no link to source: the other end does not know the token of this pair"
    # 2. nothing was asked and nothing sent, and each attempt has a token of its own
    assert source.fault.chunks == []
    receiver.finish(receiver.pull(source.addresses([1]), [1]))
    assert len({connect.token for connect in stolen}) == 2
    # 3. by the token itself it works
    router.lose = lambda message: False
    assert receiver.finish(receiver.pull(source.addresses([1]), [1])).num_blocks == 1


def test_strangers_who_connect_first_hear_nothing_and_are_not_believed(make_instance, router) -> None:
    """gloo takes whoever names the number of a pair, which is easily guessed."""
    source, receiver = (make_instance(name, connect_s=0.3, stall_s=0.3) for name in ("source", "receiver"))
    source.fill()
    strangers: list[socket.socket] = []
    tokens: list[bytes] = []
    others = listeners()

    def intrude(message: LinkMessage) -> bool:
        if isinstance(message, Connect):
            tokens.append(message.token)
        for address in (listeners() - others) if len(tokens) == 1 else ():
            port = int(address.partition(":")[2], 16)
            for number in range(4):
                strangers.append(socket.create_connection(("127.0.0.1", port)))
                strangers[-1].sendall(struct.pack("<Q", number))
        return False

    # 1. what they get at costs a deadline
    router.lose = intrude
    refs, deadline_s = source.addresses([1, 2]), time.monotonic() + 20
    result = receiver.finish(receiver.pull(refs, [1, 2]))
    assert (result.num_blocks, result.num_bytes) == (0, 0) and source.fault.chunks == []
    # 2. they have heard no more than the proof of one end, which proves nothing from another's mouth
    heard = b""
    for stranger in strangers:
        stranger.settimeout(0.1)
        with contextlib.suppress(TimeoutError, ConnectionResetError):
            heard += stranger.recv(1 << 20)
        stranger.close()
    assert 32 <= len(heard) < 1024 and all(token not in heard for token in tokens)
    # 3. when they have gone, pulls come again
    while receiver.finish(receiver.pull(refs, [1, 2])).num_blocks < 2:
        assert time.monotonic() < deadline_s
    assert receiver.content([1, 2]) == [2, 3]


def test_links_run_where_their_maker_might_not_where_the_loop_does(make_instance, router: Router) -> None:
    cpus = os.sched_getaffinity(0)
    seen: list[set[int]] = []
    note = lambda chunk=None: seen.append(os.sched_getaffinity(0))  # noqa: E731
    source, receiver = make_instance("source", on_chunk=note), make_instance("receiver", on_pull=note)
    held: list[LinkMessage] = []
    router.lose = lambda message: isinstance(message, Connect) and held.append(message) is None
    os.sched_setaffinity(0, {min(cpus)})
    try:  # both threads are started from here
        pull = receiver.pull(source.addresses([1]), [1])
        deadline_s = time.monotonic() + 30
        while not held:
            assert time.monotonic() < deadline_s
            time.sleep(0.001)
        source.transfer.on_control(held[0])
        assert receiver.finish(pull).num_blocks == 1
    finally:
        os.sched_setaffinity(0, cpus)
    assert seen == [cpus, cpus]


def test_late_answers_do_not_count_for_a_new_attempt(make_instance, router: Router) -> None:
    source, receiver = make_instance("source"), make_instance("receiver")
    source.fill()
    asked = threading.Event()
    router.lose = lambda message: asked.set() is None
    pull = receiver.pull(source.addresses([1]), [1])
    assert asked.wait(30)
    # 1. of an attempt before, of another life of the source, for another life of ours
    for receiver_life, source_life, attempt in ((1, 1, 0), (1, 9, 1), (9, 1, 1)):
        ends = ("receiver", receiver_life, "source", source_life, attempt)
        receiver.transfer.on_control(Refuse(*ends, "late"))
        receiver.transfer.on_control(Accept(*ends, b"nowhere"))
    assert pull.poll() is None
    # 2. the source comes after all
    router.lose = lambda message: False
    (connect,) = router.sent
    source.transfer.on_control(connect)
    assert receiver.finish(pull).failure is None


def test_a_link_that_is_being_formed_ends_at_once(make_instance, router: Router) -> None:
    source, receiver = make_instance("source"), make_instance("receiver", connect_s=60.0)
    told = threading.Event()
    router.lose = lambda message: told.set() is None
    pull = receiver.pull(source.addresses([1]), [1])
    assert told.wait(30)
    receiver.transfer.remove_peer("source")
    assert receiver.finish(pull).failure == "source was removed"


def test_addresses_of_another_life_are_a_miss(pair) -> None:
    source, receiver = pair
    refs = msgspec.structs.replace(source.addresses([1]), incarnation=0)
    result = receiver.pull(refs, [1]).poll()
    assert result is not None and result.failure == "source is of incarnation 1, not 0"


def test_removing_a_peer_ends_its_pulls(pair) -> None:
    source, receiver = pair
    source.fault.act = hold = Hold()
    pulls = [receiver.pull(source.addresses([k]), [k]) for k in range(3)]
    assert hold.reached.wait(30)
    receiver.transfer.remove_peer("source")
    assert {receiver.finish(pull).failure for pull in pulls} == {"source was removed"}
    hold.go_on.set()
    refused = receiver.pull(source.addresses([0]), [0]).poll()
    assert refused is not None and refused.failure == "unknown peer source"


@pytest.mark.parametrize("who", ["receiver", "source"])
def test_close_ends_every_pull(pair, who: str) -> None:
    source, receiver = pair
    source.fault.act = hold = Hold()
    pulls = [receiver.pull(source.addresses([k]), [k]) for k in range(3)]
    assert hold.reached.wait(30)
    if who == "receiver":
        receiver.transfer.close()
        assert [pull.poll().failure for pull in pulls] == ["cancelled"] * 3
        after = receiver.pull(source.addresses([0]), [0]).poll()
        assert after is not None and after.failure == "the pool is closed"
        hold.go_on.set()
    else:
        hold.go_on.set()
        source.transfer.close()
        for pull in pulls:  # those before it come, those after fail
            receiver.transfer.remove_peer("source")
            assert receiver.finish(pull).num_blocks in (0, 1)


def test_everything_listens_on_loopback_alone(pair) -> None:
    source, receiver = pair
    source.fault.act = hold = Hold()
    before = listeners()
    pull = receiver.pull(source.addresses([1]), [1])
    assert hold.reached.wait(30)
    ours = listeners() - before
    assert ours and all(address.startswith("0100007F:") for address in ours)
    hold.go_on.set()
    assert receiver.finish(pull).num_blocks == 1


def listeners() -> set[str]:
    """Addresses on which this process accepts TCP connections, as the kernel writes them."""
    own = {
        os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.is_symlink() and link.exists()
    }
    found = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in own:
                found.add(fields[1])
    return found
