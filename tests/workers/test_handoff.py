"""Prefill → decode between two workers over real arenas, in numbered steps; both pools end idle."""

from __future__ import annotations

import threading
import time

import msgspec
import numpy as np
import pytest

from memserve.messages import BlockRefs, Cancel, FinishReason, Offer, Prefilled, Pulled, Release, RevokeGrant
from memserve.workers.channel import ReceivedGrant
from memserve.workers.request import Request

BLOCK_SIZES = (1, 4, 16)


@pytest.fixture
def pair(make_rig):
    """A prefill and a decode worker that may read each other's arenas."""

    def make(copy=None, decode=None, **changes):
        p = make_rig(instance="prefill-0", **changes)
        d = make_rig(instance="decode-0", copy=copy, **{**changes, **(decode or {})})
        p.grant_to(d)
        d.grant_to(p)
        return p, d

    return make


def prefilled(rig, tools, prompt, **sampling) -> Prefilled:
    """Run a prefill of request "a"; its answer."""
    rig.send(tools.prefill("a", prompt, **sampling))
    rig.run()
    (message,) = rig.take()
    return message


def check_run(d, tools, prompt, max_tokens) -> Pulled:
    """Run the decode worker to the end of "a" and compare with a colocated run; its `Pulled`."""
    d.run()
    messages = d.take()
    heard = tools.Transcript.of(messages, "a")
    assert heard.token_ids == tools.expected(prompt, max_tokens)[1:]
    assert heard.finish_reason is FinishReason.LENGTH
    (pulled,) = heard.pulled
    assert messages[0] is pulled
    return pulled


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("length", [1, 4, 15, 16, 17, 90])
def test_life_of_a_handoff(pair, tools, block_size, length):
    p, d = pair(block_size=block_size, num_blocks=512 // block_size, max_batch_tokens=23)
    prompt = tools.prompt(length)

    # 1. The prefill worker draws the first token and keeps the blocks.
    answer = prefilled(p, tools, prompt, max_tokens=10)
    assert answer.token_id == tools.expected(prompt, 1)[0]
    assert answer.finish_reason is None and answer.offer.num_tokens == length
    assert len(answer.offer.refs.blocks) == -(-length // block_size)
    p.clock.now += 31
    load = p.worker.gauges.load()
    assert (load.num_offers, load.oldest_offer_s, load.num_running) == (1, 31, 0)

    # 2. The decode worker pulls all of it, and computes only the token that has no KV.
    d.send(
        tools.decode("a", [*prompt, answer.token_id], num_prompt=length, max_tokens=10, offer=answer.offer)
    )
    pulled = check_run(d, tools, prompt, 10)
    assert (pulled.num_tokens, pulled.failure) == (length, None)
    assert pulled.num_bytes == len(answer.offer.refs.blocks) * d.pool.kv[0].nbytes
    assert d.runner.batches == [[("a", 1)]] * 9
    d.assert_idle()

    # 3. The offer stands until the router releases it.
    assert p.worker.gauges.load().num_offers == 1
    p.send(Release("a", 0))
    p.run()
    p.assert_idle()
    assert p.worker.gauges.load().oldest_offer_s == 0


def test_a_prefill_that_ends_on_its_first_token_offers_nothing(pair, tools):
    p, _ = pair()
    prompt = tools.prompt(10)
    assert prefilled(p, tools, prompt, max_tokens=1).finish_reason is FinishReason.LENGTH
    first = tools.expected(prompt, 1)[0]
    answer = prefilled(p, tools, prompt, max_tokens=5, stop_token_ids=(first,))
    assert answer.finish_reason is FinishReason.STOP and answer.offer is None
    p.assert_idle()


def test_many_requests_at_once_through_small_pools(pair, tools):
    """Blocks are short on both sides: pulls wait for room, and decodes are preempted."""
    p, d = pair(num_blocks=24)
    prompts = {f"r{i}": tools.prompt(3 + 7 * i % 40, i) for i in range(12)}
    p.send(*(tools.prefill(name, prompt, max_tokens=20) for name, prompt in prompts.items()))
    tokens: dict[str, list[int]] = {}
    while len(tokens) < 12 or any(len(drawn) < 20 for drawn in tokens.values()):
        if not p.worker.step() and not d.worker.step():
            time.sleep(0.001)  # for a pull
        for message in p.take():
            prompt = prompts[message.request_id]
            tokens[message.request_id] = [message.token_id]
            d.send(
                tools.decode(
                    message.request_id,
                    [*prompt, message.token_id],
                    num_prompt=len(prompt),
                    max_tokens=20,
                    offer=message.offer,
                )
            )
        for message in d.take():
            if isinstance(message, Pulled):
                assert message.failure is None
                p.send(Release(message.request_id, message.attempt))
            else:
                for output in message.outputs:
                    tokens[output.request_id] += output.token_ids
    assert tokens == {name: tools.expected(prompt, 20) for name, prompt in prompts.items()}
    assert d.worker.gauges.load().num_preemptions > 0
    p.run()
    p.assert_idle()
    d.assert_idle()


# --- what can go wrong with a pull: less arrives, and the rest is recomputed ---


def handed_over(p, d, tools, prompt, offer=None):
    """Prefill on `p`, then send the decode to `d`."""
    answer = prefilled(p, tools, prompt, max_tokens=10)
    tokens = [*prompt, answer.token_id]
    d.send(tools.decode("a", tokens, num_prompt=len(prompt), max_tokens=10, offer=offer or answer.offer))
    return answer


def test_offer_taken_back_before_the_pull(pair, tools):
    p, d = pair(num_blocks=12)
    prompt = tools.prompt(30)
    handed_over(p, d, tools, prompt)
    p.send(Release("a", 0), tools.decode("other", tools.prompt(48, 5), max_tokens=1))
    p.run()
    pulled = check_run(d, tools, prompt, 10)
    assert pulled.num_tokens == 0 and "gone" in pulled.failure
    p.assert_idle()
    d.assert_idle()


@pytest.mark.parametrize("good_blocks", [0, 1, 3])
def test_copy_that_stops_short(pair, tools, good_blocks):
    def copy(destination, source):
        np.copyto(destination[:good_blocks], source[:good_blocks])
        destination[good_blocks:] = 0xFF
        return good_blocks * source.shape[1]

    p, d = pair(copy=copy)
    prompt = tools.prompt(30)
    handed_over(p, d, tools, prompt)
    pulled = check_run(d, tools, prompt, 10)
    assert pulled.num_tokens == 4 * good_blocks and pulled.failure is not None
    d.assert_idle()


def test_copy_that_raises(pair, tools):
    def copy(destination, source):
        raise OSError("bus error")

    p, d = pair(copy=copy)
    prompt = tools.prompt(30)
    handed_over(p, d, tools, prompt)
    assert "bus error" in check_run(d, tools, prompt, 10).failure
    d.assert_idle()


def test_blocks_reused_during_the_copy(pair, tools):
    """The source frees and reuses its blocks while they are read: what was copied counts for nothing."""
    p = d = None

    def copy(destination, source):
        p.send(Release("a", 0), tools.decode("other", tools.prompt(48, 5), max_tokens=1))
        p.run()
        np.copyto(destination, source)
        return source.nbytes

    p, d = pair(copy=copy, num_blocks=12)
    prompt = tools.prompt(30)
    handed_over(p, d, tools, prompt)
    pulled = check_run(d, tools, prompt, 10)
    assert pulled.num_tokens == 0 and "gone" in pulled.failure
    p.assert_idle()
    d.assert_idle()


def test_unknown_and_revoked_peer(pair, tools):
    p, d = pair()
    prompt = tools.prompt(30)
    d.grants.inbox.append(ReceivedGrant(RevokeGrant("prefill-0"), ()))
    handed_over(p, d, tools, prompt)
    pulled = check_run(d, tools, prompt, 10)
    assert pulled.num_tokens == 0 and "prefill-0" in pulled.failure
    d.assert_idle()


def test_malformed_offers(pair, tools):
    p, d = pair()
    prompt = tools.prompt(30)
    offer = prefilled(p, tools, prompt, max_tokens=10).offer
    first = tools.expected(prompt, 1)
    for bad in (
        msgspec.structs.replace(offer, num_tokens=31),
        msgspec.structs.replace(offer, num_tokens=0),
        msgspec.structs.replace(offer, num_tokens=20),
        Offer(msgspec.structs.replace(offer.refs, generations=offer.refs.generations[1:]), 30),
        Offer(msgspec.structs.replace(offer.refs, blocks=(10**9,) * 8), 30),
    ):
        d.send(tools.decode("a", prompt + first, num_prompt=30, max_tokens=10, offer=bad))
        pulled = check_run(d, tools, prompt, 10)
        assert pulled.num_tokens == 0 and pulled.failure is not None
        d.assert_idle()


# --- cancel in each phase ---


def test_cancel_while_the_pull_waits_for_room(pair, tools):
    p, d = pair(decode={"num_blocks": 8})
    d.send(tools.decode("big", tools.prompt(25, 9), max_tokens=100))
    d.worker.step()
    handed_over(p, d, tools, tools.prompt(20))
    d.worker.step()
    assert d.worker.gauges.load().num_waiting == 1
    d.send(Cancel("a", 0), Cancel("big", 0))
    d.run()
    d.assert_idle()


def test_cancel_during_the_copy_frees_the_blocks_only_when_it_has_stopped(pair, tools):
    copying, go_on = threading.Event(), threading.Event()

    def copy(destination, source):
        copying.set()
        assert go_on.wait(10)
        np.copyto(destination, source)
        return source.nbytes

    p, d = pair(copy=copy)
    prompt = tools.prompt(30)
    try:
        handed_over(p, d, tools, prompt)
        d.worker.step()
        assert copying.wait(10)
        # 1. The request is gone at once, its blocks are not: the copy writes to them.
        d.send(Cancel("a", 0))
        d.worker.step()
        assert d.worker.gauges.load().num_pulling == 0
        assert d.pool.num_available == 64 - 8
        # 2. The same request may come again meanwhile, and gets other blocks.
        tokens = prompt + tools.expected(prompt, 1)
        d.send(tools.decode("a", tokens, num_prompt=30, max_tokens=10, attempt=1))
        d.worker.step()
        assert d.pool.num_available == 64 - 16
    finally:
        go_on.set()
    # 3. The copy ends, and with the request everything is free.
    d.run()
    heard = tools.Transcript.of(d.take(), "a")
    assert heard.token_ids == tools.expected(prompt, 10)[1:] and heard.pulled == []
    d.assert_idle()


def test_cancel_after_the_pull(pair, tools):
    p, d = pair()
    handed_over(p, d, tools, tools.prompt(30))
    for _ in range(1000):
        d.worker.step()
        if d.runner.batches:
            break
    d.send(Cancel("a", 0))
    d.run()
    d.assert_idle()


def test_cancel_of_an_offer(pair, tools):
    p, _ = pair()
    prefilled(p, tools, tools.prompt(30), max_tokens=10)
    p.send(Cancel("a", 1))  # the router may know a later attempt than the one that offered
    p.run()
    p.assert_idle()


def test_late_release_does_not_end_a_newer_offer(pair, tools):
    p, _ = pair()
    prompt = tools.prompt(30)
    prefilled(p, tools, prompt, max_tokens=10)
    # 1. A duplicate is ignored; a newer attempt replaces the offer.
    p.send(tools.prefill("a", prompt))
    p.run()
    assert p.take() == [] and p.worker.gauges.load().num_offers == 1
    prefilled(p, tools, prompt, max_tokens=10, attempt=1)
    assert p.worker.gauges.load().num_offers == 1
    # 2. The release of the older does nothing.
    p.send(Release("a", 0))
    p.run()
    assert p.worker.gauges.load().num_offers == 1
    p.send(Release("a", 1))
    p.run()
    p.assert_idle()


# --- decode where the prefill was ---


def test_own_offer_changes_hands_even_if_the_pool_is_full(make_rig, tools):
    rig = make_rig(num_blocks=9)
    prompt = tools.prompt(32)
    answer = prefilled(rig, tools, prompt, max_tokens=4)
    tokens = [*prompt, answer.token_id]
    rig.send(tools.decode("a", tokens, num_prompt=32, max_tokens=4, attempt=1, offer=answer.offer))
    pulled = check_run(rig, tools, prompt, 4)
    assert (pulled.num_tokens, pulled.num_bytes, pulled.failure) == (32, 0, None)
    rig.send(Release("a", 0))  # late
    rig.run()
    rig.assert_idle()


def test_own_offer_that_does_not_stand_is_recomputed(make_rig, tools):
    rig = make_rig()
    prompt = tools.prompt(30)
    first = tools.expected(prompt, 1)
    refs = BlockRefs("worker-0", 0, 0, tuple(range(8)), (1,) * 8)
    rig.send(tools.decode("a", prompt + first, num_prompt=30, max_tokens=4, offer=Offer(refs, 30)))
    assert check_run(rig, tools, prompt, 4).failure is not None
    rig.assert_idle()


def test_request_takes_offer_only_of_a_decode(tools):
    assert Request.of(tools.prefill("a", [1]), 0).offer is None
