"""Requests that stand in one another's way: nobody waits for ever, nothing is kept by mistake."""

from __future__ import annotations

import time
from collections.abc import Callable

import msgspec
import numpy as np
import pytest

from memserve.messages import (
    BlockRefs,
    Offer,
    PullAhead,
    Pulled,
    Release,
    Reserve,
    StepOutputs,
    Stored,
    Tier,
    TokenLogprobs,
)
from memserve.pool.arena import Progress


class Two:
    """A prefill and a decode worker; the decode worker reads the other's memory."""

    def __init__(self, make_rig: Callable, tools, d: dict | None = None, **common) -> None:
        self.tools = tools
        common = {"num_blocks": 512, "max_model_len": 400, "max_batch_tokens": 400, "caches": True, **common}
        self.p = make_rig(instance="prefill-0", **common)
        self.d = make_rig(instance="decode-0", **{**common, **(d or {})})
        self.p.grant_to(self.d)

    def prefilled(self, request_id: str, prompt: list[int], max_tokens: int, **fields):
        """The Prefill that P has done, and the Decode that follows it."""
        message = self.tools.prefill(request_id, prompt, max_tokens=max_tokens)
        message = msgspec.structs.replace(message, **fields)
        self.p.send(message)
        self.p.run()
        heard = self.tools.Transcript.of(self.p.take(), request_id)
        decode = self.tools.decode(
            request_id,
            prompt + heard.token_ids,
            num_prompt=len(prompt),
            max_tokens=max_tokens,
            offer=heard.offer,
        )
        return message, msgspec.structs.replace(decode, cache_salt=message.cache_salt)

    def end(self, *request_ids: str) -> None:
        """Everything is released and idle."""
        self.d.run()
        self.p.send(*[Release(request_id, 0) for request_id in request_ids])
        self.p.run()
        self.p.assert_idle()
        self.d.assert_idle()


@pytest.mark.parametrize("caches", [False, True])
def test_blocks_pulled_ahead_give_way_to_a_decode_that_must_grow(make_rig, tools, caches):
    two = Two(make_rig, tools, d={"num_blocks": 16}, caches=caches)
    first, second = tools.prompt(20, seed=1), tools.prompt(36, seed=2)
    # 1. a runs alone and will need 15 of 16 blocks
    two.d.send(tools.decode("a", first, max_tokens=40))
    for _ in range(3):
        two.d.worker.step()
    # 2. 9 blocks are pulled ahead for b, whose Decode then lacks one
    message, decode = two.prefilled("b", second, 8)
    two.d.send(Reserve("b", 0, message.token_ids))
    two.d.send(PullAhead("b", 0, 0, decode.offer.refs))
    for _ in range(10):
        two.d.worker.step()
    two.d.send(decode)
    # 3. both end
    two.d.run()
    said = two.d.take()
    assert tools.Transcript.of(said, "a").token_ids == tools.expected(first, 40)
    assert tools.Transcript.of(said, "b").token_ids == tools.expected(second, 8)[1:]
    two.end("b")


def test_decodes_that_share_a_cached_prefix_pull_side_by_side(make_rig, tools):
    two = Two(make_rig, tools)
    common = tools.prompt(128, seed=9)
    two.d.send(tools.decode("warm", [*common, 1], max_tokens=1))
    two.d.run()
    decodes = [two.prefilled(f"r{i}", common + tools.prompt(20, seed=i), 40)[1] for i in range(6)]
    two.d.send(*decodes)
    two.d.worker.step()
    assert not two.d.worker._scheduler.waiting
    two.end(*[f"r{i}" for i in range(6)])


def test_a_follower_does_not_wait_for_all_who_come_later(make_rig, tools):
    def slow(target: np.ndarray, source: np.ndarray) -> int:
        time.sleep(0.01)
        np.copyto(target, source)
        return int(source.nbytes)

    two = Two(make_rig, tools, d={"copy": slow, "max_running": 64})
    common = tools.prompt(128, seed=9)
    pairs = [two.prefilled(f"r{i}", common + tools.prompt(20, seed=i), 3) for i in range(12)]
    # 1. f needs what r0 pulls, and later ones pull too, having claimed what was reserved for them
    for message, decode in pairs:
        two.d.send(Reserve(decode.request_id, 0, message.token_ids), decode)
        if decode.request_id == "r0":
            two.d.send(tools.decode("f", [*common, 5, 6, 7], max_tokens=2))
        for _ in range(3):
            two.d.worker.step()
            time.sleep(0.002)
    two.d.run()
    # 2. it is not the last
    ended = [o.request_id for m in two.d.take() if isinstance(m, StepOutputs) for o in m.outputs]
    assert ended.index("f") < ended.index("r11")
    two.end(*[f"r{i}" for i in range(12)])


def test_a_reservation_that_found_nothing_leaves_nothing(make_rig, tools):
    """Salts come from clients: a namespace that stays locked would stay for ever."""
    two = Two(make_rig, tools)
    for i in range(5):
        prompt, salt = tools.prompt(30, seed=i), f"salt-{i}"
        message, decode = two.prefilled(f"r{i}", prompt, 4, cache_salt=salt)
        two.d.send(Reserve(f"r{i}", 0, message.token_ids, salt))
        two.d.run()
        two.d.send(decode)
        two.end(f"r{i}")
    for pool in (two.p.pool, two.d.pool):
        pool.flush()
        assert not list(pool._index._tree.roots())


def test_a_part_pulled_ahead_that_fails_is_pulled_again_from_the_offer(make_rig, tools):
    """Two prompts of one step share a block: the second's own is freed for the first's after it was told."""
    two = Two(make_rig, tools)
    common = tools.prompt(16, seed=9)
    prompts = {f"r{i}": common + tools.prompt(100, seed=i) for i in (1, 2)}
    for request_id, prompt in prompts.items():
        message = tools.prefill(request_id, prompt, max_tokens=3)
        two.d.send(Reserve(request_id, 0, message.token_ids))
        two.p.send(msgspec.structs.replace(message, tell_blocks=True, tell_layers=True))
    two.p.worker.step()
    said = two.p.take()
    for stored in [item for item in said if isinstance(item, Stored)]:
        refs, count = stored.refs, stored.layers_from
        two.d.send(PullAhead(stored.request_id, 0, stored.first_block, refs, count))
    two.d.run()
    for request_id, prompt in prompts.items():
        heard = tools.Transcript.of(said, request_id)
        tokens = prompt + heard.token_ids
        two.d.send(tools.decode(request_id, tokens, num_prompt=len(prompt), offer=heard.offer, max_tokens=3))
    two.d.run()
    answers = [item for item in two.d.take() if isinstance(item, Pulled)]
    assert [(item.num_tokens, item.failure) for item in answers] == [(116, None)] * 2
    two.end(*prompts)


def test_a_pull_by_layer_ends_with_the_life_of_its_source(make_rig, tools):
    two = Two(make_rig, tools)
    two.d.worker._peer_grants.receive()
    theirs, ours = two.p.pool.alloc_mem(2), two.d.pool.alloc_mem(2)
    pull = two.d.pool.fetch(two.p.pool.addresses(theirs), ours, two.p.pool.progress.count)
    Progress(two.p.pool._arena.progress, 1)  # the replacement's
    for _ in range(1000):
        if (result := pull.poll()) is not None:
            break
        time.sleep(0.005)
    assert result is not None and result.failure == "the source has restarted"
    two.p.pool.free_mem(theirs)
    two.d.pool.free_mem(ours)


def test_kv_of_a_request_that_fails_in_its_last_chunk_is_forgotten(make_rig, tools):
    rig = make_rig(caches=True, num_blocks=128, max_batch_tokens=24)
    prompt = tools.prompt(60)
    rig.runner.bad_requests.add("bad")
    rig.send(tools.decode("bad", prompt))
    rig.run()
    assert tools.Transcript.of(rig.take(), "bad").failed is not None
    rig.send(tools.decode("good", prompt, max_tokens=3))
    rig.run()
    heard = tools.Transcript.of(rig.take(), "good")
    assert heard.token_ids == tools.expected(prompt, 3) and heard.outputs[0].cached.total == 0
    rig.assert_idle()


def test_prompt_logprobs_are_computed_whatever_could_be_pulled(make_rig, tools):
    class WithLogprobs(tools.HashRunner):
        def _run(self, chunk):
            drawn, (request, num_new) = super()._run(chunk), chunk
            first = request.num_computed_tokens + 1
            count = max(0, min(first + num_new, request.num_prompt_tokens) - first)
            return drawn._replace(prompt_logprobs=[TokenLogprobs(0.0, 1)] * count)

    two = Two(make_rig, tools, runner_of=WithLogprobs, max_batch_tokens=24)
    prompt = tools.prompt(60, seed=1)
    told = msgspec.structs.replace(
        tools.decode("a", prompt, max_tokens=4, prompt_logprobs=0), tell_blocks=True
    )
    two.p.send(told)
    two.p.worker.step()
    two.p.worker.step()
    stored = [item for item in two.p.take() if isinstance(item, Stored)]
    blocks = tuple(block for item in stored for block in item.refs.blocks)
    generations = tuple(value for item in stored for value in item.refs.generations)
    offer = Offer(BlockRefs("prefill-0", 0, Tier.DEVICE, blocks, generations), len(blocks) * 4)
    replay = tools.decode("a", prompt, attempt=1, offer=offer, max_tokens=4, prompt_logprobs=0)
    two.d.send(replay)
    two.d.run()
    heard = tools.Transcript.of(two.d.take(), "a")
    assert len(heard.outputs[0].prompt_logprobs) == 60 and heard.token_ids == tools.expected(prompt, 4)
    two.p.run()


def test_a_burst_by_layer_is_pulled_ahead_once(make_rig, tools):
    two = Two(make_rig, tools, num_blocks=1024, max_batch_tokens=64)
    common = tools.prompt(200, seed=9)
    prompts = {f"r{i}": common + tools.prompt(10, seed=i) for i in range(6)}
    # 1. all are dispatched at once; P computes the common part for the first alone
    for request_id, prompt in prompts.items():
        message = tools.prefill(request_id, prompt, max_tokens=3)
        two.d.send(Reserve(request_id, 0, message.token_ids))
        two.p.send(msgspec.structs.replace(message, tell_blocks=True, tell_layers=True))
    said = []
    while two.p.worker.step():
        for item in two.p.take():
            said.append(item)
            if isinstance(item, Stored):
                ahead = PullAhead(item.request_id, 0, item.first_block, item.refs, item.layers_from)
                two.d.send(ahead)
                two.d.worker.step()
    for request_id, prompt in prompts.items():
        heard = tools.Transcript.of(said, request_id)
        tokens = prompt + heard.token_ids
        two.d.send(tools.decode(request_id, tokens, num_prompt=len(prompt), offer=heard.offer, max_tokens=3))
    # 2. so D pulls it once
    two.d.run()
    answers = [item for item in two.d.take() if isinstance(item, Pulled)]
    assert len(answers) == 6 and all(item.failure is None for item in answers)
    assert sum(item.num_tokens - item.num_cached_tokens for item in answers) <= 200 + 6 * 14
    two.end(*prompts)
