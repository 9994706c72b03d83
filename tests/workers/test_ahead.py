"""Chunks pulled ahead of their request: the hash model shows any block that is wrong, the pools any that is
lost.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import msgspec
import numpy as np
import pytest

from memserve.messages import Cancel, Prefill, PullAhead, Release, Reserve, Stored

BLOCK_SIZES = (1, 4, 16)


class Pair:
    """A prefill and a decode worker with a router between them that is this object."""

    def __init__(
        self,
        make_rig,
        tools,
        block_size: int = 4,
        decode_blocks: int | None = None,
        by_layer: bool = False,
        **decode,
    ) -> None:
        self.tools = tools
        num_blocks = 512 // block_size
        common = {"block_size": block_size, "max_batch_tokens": 24}
        self.p = make_rig(instance="prefill-0", num_blocks=num_blocks, **common)
        blocks = decode_blocks or num_blocks
        self.d = make_rig(instance="decode-0", num_blocks=blocks, **common, **decode)
        self.p.grant_to(self.d)
        self.num_ahead = 0
        self.by_layer = by_layer

    def prefill(
        self, request_id: str, prompt: list[int], on_chunk: Callable[[], object] | None = None, **sampling
    ):
        """Run the prefill step by step, handing every finished chunk on; what was heard."""
        message = self.tools.prefill(request_id, prompt, **sampling)
        self.p.send(msgspec.structs.replace(message, tell_blocks=True, tell_layers=self.by_layer))
        self.d.send(Reserve(request_id, message.attempt, message.token_ids))
        heard = []
        while self.p.worker.step():
            for said in self.p.take():
                heard.append(said)
                if isinstance(said, Stored):
                    self.num_ahead += len(said.refs.blocks)
                    self.d.send(
                        PullAhead(
                            said.request_id, said.attempt, said.first_block, said.refs, said.layers_from
                        )
                    )
                    self.d.worker.step()
                    if on_chunk is not None:
                        on_chunk()
        return self.tools.Transcript.of(heard, request_id)

    def decode(self, request_id: str, prompt: list[int], first, max_tokens: int):
        """The Decode that follows; what was heard of it."""
        tokens = prompt + first.token_ids
        self.d.send(
            self.tools.decode(
                request_id, tokens, num_prompt=len(prompt), max_tokens=max_tokens, offer=first.offer
            )
        )
        self.d.run()
        heard = self.tools.Transcript.of(self.d.take(), request_id)
        self.p.send(Release(request_id, 0))
        self.p.run()
        return heard

    def assert_idle(self) -> None:
        self.p.assert_idle()
        self.d.run()
        self.d.assert_idle()
        assert not self.d.worker._pulls._ahead and not self.d.worker._pulls._claimed


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("length", [15, 16, 17, 47, 48, 49, 100])
def test_life_of_a_handoff_in_chunks(make_rig, tools, block_size, length):
    pair = Pair(make_rig, tools, block_size)
    prompt = tools.prompt(length)
    # 1. every finished chunk is pulled while the next is computed
    first = pair.prefill("a", prompt, max_tokens=12)
    assert pair.num_ahead == (length - 1) // 24 * 24 // block_size
    # 2. the Decode claims them and pulls the rest
    heard = pair.decode("a", prompt, first, 12)
    assert first.token_ids + heard.token_ids == tools.expected(prompt, 12)
    (pulled,) = heard.pulled
    assert pulled.failure is None and pulled.num_tokens == length
    # 3. D computed the last token alone, and nothing is held any more
    assert pair.d.runner.batches[0] == [("a", 1)]
    pair.assert_idle()


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("length", [15, 16, 17, 47, 48, 49, 100])
def test_life_of_a_handoff_by_layer(make_rig, tools, block_size, length):
    pair = Pair(make_rig, tools, block_size, by_layer=True)
    prompt = tools.prompt(length)
    # 1. every block is told of before the step that completes it, the partial one too
    first = pair.prefill("a", prompt, max_tokens=12)
    assert pair.num_ahead == -(-length // block_size)
    # 2. nothing is left for the Decode but to wait for the last layer
    heard = pair.decode("a", prompt, first, 12)
    assert first.token_ids + heard.token_ids == tools.expected(prompt, 12)
    (pulled,) = heard.pulled
    assert pulled.failure is None and pulled.num_tokens == length
    # 3. D computed the last token alone, and nothing is held any more
    assert pair.d.runner.batches[0] == [("a", 1)]
    pair.assert_idle()


def test_layers_of_a_step_that_failed_are_never_taken_for_those_of_another(make_rig, tools):
    """Another request breaks the step: what was told of it is a miss, the offer made later stands."""
    pair = Pair(make_rig, tools, by_layer=True)
    prompt = tools.prompt(20)
    pair.p.runner.poisonous.add("bad")
    pair.p.send(tools.decode("bad", tools.prompt(3)))
    first = pair.prefill("a", prompt, max_tokens=8)
    heard = pair.decode("a", prompt, first, 8)
    assert first.token_ids + heard.token_ids == tools.expected(prompt, 8)
    assert heard.pulled[0].failure is None and heard.pulled[0].num_tokens == 20
    assert len(pair.d.worker._pulls._running) == 0
    pair.assert_idle()


def test_a_source_that_never_gets_on_can_be_cancelled(make_rig, tools):
    pair = Pair(make_rig, tools)
    # 1. told of a step that is not run
    refs = pair.p.pool.addresses(pair.p.pool.alloc_mem(3))
    pair.d.send(Reserve("a", 0, tools.prefill("a", tools.prompt(13)).token_ids))
    pair.d.send(PullAhead("a", 0, 0, refs, pair.p.pool.progress.count + 1_000_000))
    pair.d.worker.step()
    (part,) = pair.d.worker._pulls._ahead["a"].parts
    time.sleep(0.02)
    assert part.pull.poll() is None
    # 2. other pulls pass
    prompt = tools.prompt(40, seed=2)
    first = pair.prefill("b", prompt, max_tokens=4)
    heard = pair.decode("b", prompt, first, 4)
    assert heard.pulled[0].num_tokens == 40
    assert pair.p.pool.progress.count > 0
    time.sleep(0.02)
    assert part.pull.poll() is None
    # 3. cancelled
    pair.d.send(Cancel("a", 0))
    pair.p.pool.free_mem(refs.blocks)
    pair.assert_idle()


def test_prefill_without_overlap_tells_nothing(make_rig, tools):
    rig = make_rig(max_batch_tokens=24)
    rig.send(tools.prefill("a", tools.prompt(60)))
    rig.run()
    assert not [said for said in rig.take() if isinstance(said, Stored)]
    rig.send(Release("a", 0))
    rig.run()
    rig.assert_idle()


def test_cancel_between_chunks_gives_all_back(make_rig, tools):
    pair = Pair(make_rig, tools)
    prompt = tools.prompt(100)

    def cancel() -> None:
        if pair.num_ahead >= 12:
            pair.p.send(Cancel("a", 0))
            pair.d.send(Cancel("a", 0))

    pair.prefill("a", prompt, on_chunk=cancel)
    pair.p.run()
    pair.assert_idle()


def test_a_source_that_takes_blocks_back_is_a_miss(make_rig, tools):
    """The prefill is cancelled and its blocks are reused; a Decode with the old offer comes all the same."""
    pair = Pair(make_rig, tools)
    prompt = tools.prompt(60)
    first = pair.prefill("a", prompt, max_tokens=8)
    # what was pulled ahead stands; the last chunk's blocks are gone
    while any(part.pull.poll() is None for part in pair.d.worker._pulls._ahead["a"].parts):
        time.sleep(0.001)
    pair.p.send(Release("a", 0))
    pair.p.run()
    heard = pair.decode("a", prompt, first, 8)
    assert first.token_ids + heard.token_ids == tools.expected(prompt, 8)
    assert heard.pulled[0].failure is not None
    assert heard.pulled[0].num_tokens == 48
    pair.assert_idle()


@pytest.mark.parametrize("good_blocks", [0, 3])
def test_a_chunk_that_fails_ends_what_counts(make_rig, tools, good_blocks):
    def short_copy(target: np.ndarray, source: np.ndarray) -> None:
        num_bytes = good_blocks * target.nbytes // 6
        target.reshape(-1)[:num_bytes] = source.reshape(-1)[:num_bytes]
        raise OSError("torn")

    pair = Pair(make_rig, tools, copy=short_copy)
    prompt = tools.prompt(100)
    first = pair.prefill("a", prompt, max_tokens=8)
    heard = pair.decode("a", prompt, first, 8)
    assert first.token_ids + heard.token_ids == tools.expected(prompt, 8)
    assert heard.pulled[0].failure is not None
    pair.assert_idle()


def test_chunks_that_do_not_follow_are_left_to_the_decode(make_rig, tools):
    pair = Pair(make_rig, tools)
    prompt = tools.prompt(100)
    message = msgspec.structs.replace(tools.prefill("a", prompt, max_tokens=6), tell_blocks=True)
    assert isinstance(message, Prefill)
    pair.p.send(message)
    pair.p.run()
    said = pair.p.take()
    # the second chunk first: it is not taken, nor is what comes after it
    stored = [item for item in said if isinstance(item, Stored)]
    pair.d.send(Reserve("a", 0, message.token_ids))
    for item in stored[1:]:
        pair.d.send(PullAhead("a", 0, item.first_block, item.refs))
    pair.d.run()
    assert pair.d.pool.num_available == pair.d.pool.num_blocks
    first = tools.Transcript.of(said, "a")
    heard = pair.decode("a", prompt, first, 6)
    assert first.token_ids + heard.token_ids == tools.expected(prompt, 6)
    assert heard.pulled[0].num_tokens == 100
    pair.assert_idle()


def test_a_newer_attempt_replaces_what_was_pulled(make_rig, tools):
    pair = Pair(make_rig, tools)
    prompt = tools.prompt(60)
    pair.prefill("a", prompt)
    old = pair.d.worker._pulls._ahead["a"].table.num_blocks
    assert old == 12
    refs = pair.p.pool.addresses(np.arange(2))
    tokens = tools.prefill("a", prompt).token_ids
    pair.d.send(Reserve("a", 1, tokens), Reserve("a", 0, tokens))
    pair.d.send(PullAhead("a", 1, 0, refs), PullAhead("a", 0, old, refs))
    pair.d.run()
    assert pair.d.worker._pulls._ahead["a"].table.num_blocks == 2
    pair.d.send(Cancel("a", 1))
    pair.p.send(Release("a", 0))
    pair.p.run()
    pair.assert_idle()


def test_blocks_pulled_ahead_give_way(make_rig, tools):
    """They are a hint: an earlier request that waits for room gets theirs."""
    pair = Pair(make_rig, tools, decode_blocks=20)
    prompt = tools.prompt(60, 1)
    # 1. 12 of D's 20 blocks are taken ahead of b
    first = pair.prefill("b", prompt, max_tokens=8)
    assert pair.d.pool.num_available == 8
    # 2. a needs 13
    other = tools.prompt(50, 2)
    pair.d.send(tools.decode("a", other, max_tokens=4))
    pair.d.run()
    assert tools.Transcript.of(pair.d.take(), "a").token_ids == tools.expected(other, 4)
    # 3. b comes and pulls everything
    heard = pair.decode("b", prompt, first, 8)
    assert first.token_ids + heard.token_ids == tools.expected(prompt, 8)
    assert heard.pulled[0].num_tokens == 60
    pair.assert_idle()


def test_a_decode_that_cannot_be_run_leaves_nothing_that_was_pulled_ahead(make_rig, tools):
    pair = Pair(make_rig, tools)
    prompt = tools.prompt(60)
    first = pair.prefill("a", prompt)
    assert pair.d.worker._pulls._ahead["a"].table.num_blocks == 12
    heard = pair.decode("a", [-1, *prompt[1:]], first, 8)
    assert heard.failed is not None and heard.token_ids == []
    pair.assert_idle()
