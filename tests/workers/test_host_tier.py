"""The host tier under the workers: output is the same whatever went out and came in, small pools go on, and
the commands on the cache are obeyed.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import msgspec
import pytest

from memserve.messages import (
    CacheCommand,
    CachedTokens,
    CacheReport,
    CacheVerb,
    Offer,
    Prefilled,
    Release,
    Removed,
    Tier,
    pack_tokens,
)
from tests.workers.test_caching import Pair, computed

BLOCK_SIZES = [1, 4, 16]


@pytest.fixture
def make_tiered(make_rig: Callable) -> Callable:
    def make(block_size: int = 4, num_tokens: int = 512, host_tokens: int = 1024, **changes):
        host_blocks = host_tokens // block_size
        fields = {
            "block_size": block_size,
            "num_blocks": num_tokens // block_size,
            "caches": True,
            "host_blocks": host_blocks,
            "max_host_blocks": 2 * host_blocks,
        }
        return make_rig(**{**fields, **changes})

    return make


def run(rig, tools, request_id: str, prompt: list[int], max_tokens: int = 4, **fields):
    """A colocated run: its tokens and what it reports as cached."""
    rig.send(msgspec.structs.replace(tools.decode(request_id, prompt, max_tokens=max_tokens), **fields))
    rig.run()
    heard = tools.Transcript.of(rig.take(), request_id)
    assert heard.failed is None
    assert [output.cached for output in heard.outputs[1:]] == [None] * (len(heard.outputs) - 1)
    return heard.token_ids, heard.outputs[0].cached


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_every_length_around_block_boundaries_out_and_in_again(make_tiered, tools, block_size):
    first = tools.prompt(40)
    for length in (1, 15, 16, 17, 31, 32, 33, 39, 40):
        for num_out in (1, 2, 1000):
            rig = make_tiered(block_size)
            tokens, cached = run(rig, tools, "cold", first)
            assert tokens == tools.expected(first, 4) and cached == CachedTokens()
            rig.pool.swap_out(num_out)
            num_device = rig.pool.stats().historical
            prompt = first[:length] + tools.prompt(9, seed=1)
            tokens, cached = run(rig, tools, "warm", prompt)
            assert tokens == tools.expected(prompt, 4)
            num_cached = length // block_size
            assert cached.device == min(num_cached, num_device) * block_size
            assert cached.total == num_cached * block_size and cached.pulled == 0
            assert computed(rig, "warm") == len(prompt) - cached.total + 3
            rig.assert_idle()


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_a_conversation_through_both_sides_swapped_out_after_every_turn(make_tiered, tools, block_size):
    pair = Pair(make_tiered, tools, block_size)
    history: list[int] = []
    for turn in range(4):
        prompt = history + tools.prompt(13, seed=turn)
        tokens, cached, pulled, answer = pair.turn(f"turn-{turn}", prompt, 9, back=True)
        known = max(0, len(history) - 1) // block_size * block_size
        assert cached == pulled.num_cached_tokens == known
        assert computed(pair.p, f"turn-{turn}") == len(prompt) - cached
        assert answer is not None and answer.failure is None
        for rig in (pair.p, pair.d):
            rig.pool.swap_out(1000)
            assert rig.pool.stats().historical == 0
        history = prompt + tokens


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_a_pool_twenty_times_too_small_finishes_everything(make_tiered, tools, block_size):
    """Both tiers together are too small too."""
    rig = make_tiered(block_size, num_tokens=96, host_tokens=128, max_running=6)
    shared = tools.prompt(32)
    prompts = [shared[: 16 * (n % 3)] + tools.prompt(30, seed=n) for n in range(40)]
    for n, prompt in enumerate(prompts):
        rig.send(tools.decode(f"r-{n}", prompt, max_tokens=24))
    rig.run(max_steps=20_000)
    said = rig.take()
    for n, prompt in enumerate(prompts):
        heard = tools.Transcript.of(said, f"r-{n}")
        assert heard.failed is None and heard.token_ids == tools.expected(prompt, 24)
    removed = [item for item in said if isinstance(item, Removed)]
    moves = {(item.refs.tier, item.moved_to and item.moved_to.tier) for item in removed}
    assert moves == {(Tier.DEVICE, Tier.HOST), (Tier.HOST, Tier.DEVICE), (Tier.HOST, None)} | (
        moves & {(Tier.DEVICE, None)}
    )
    assert rig.worker.gauges.load().num_preemptions > 0
    rig.assert_idle()


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("fault", ["", "host", "device"])
def test_a_prefix_in_both_tiers_of_a_source_is_pulled_whole(make_tiered, tools, block_size, fault):
    source = make_tiered(block_size, instance="a")
    target = make_tiered(block_size, instance="b")
    source.grant_to(target)
    prompt = tools.prompt(81)
    run(source, tools, "first", prompt, max_tokens=1)
    # 1. the first 48 tokens are in the device tier of the source, the next 32 in its host tier
    source.pool.swap_out(32 // block_size + (block_size == 1))  # with one a token the last is cached too
    tokens = pack_tokens(prompt[:80])
    here = source.pool.match(tokens)
    assert (len(here.device_blocks), len(here.host_blocks)) == (48 // block_size, 32 // block_size)
    refs = source.pool.addresses(here.device_blocks)
    more = source.pool.addresses(here.host_blocks, Tier.HOST)
    # 2. what does not verify any more ends the prefix, wherever it is
    bad = msgspec.structs.replace
    if fault == "host":
        more = bad(more, generations=(*more.generations[:-1], more.generations[-1] + 2))
    if fault == "device":
        refs = bad(refs, generations=(*refs.generations[:-1], refs.generations[-1] + 2))
    drawn, cached = run(target, tools, "second", prompt, offer=Offer(refs, 80, more=(more,)))
    # 3. the output is the same, and what counts is what came
    assert drawn == tools.expected(prompt, 4)
    expected = {"": 80, "host": 80 - block_size, "device": 48 - block_size}[fault]
    assert cached == CachedTokens(pulled=expected, pulled_from="a")
    for rig in (source, target):
        rig.run()
        rig.assert_idle()


def test_the_tiers_of_an_offer_may_come_in_any_order(make_tiered, tools):
    source, target = make_tiered(instance="a"), make_tiered(instance="b")
    source.grant_to(target)
    prompt = tools.prompt(33)
    run(source, tools, "first", prompt, max_tokens=1)
    tokens = pack_tokens(prompt)
    in_device = source.pool.match(tokens).device_blocks
    # a copy of the first and the last two blocks is in the host tier
    copied = source.pool.alloc_mem(3, Tier.HOST)
    source.pool._host.arena.blocks[copied] = source.pool._arena.blocks[in_device[[0, 6, 7]]]
    first, last = (source.pool.addresses(ids, Tier.HOST) for ids in (copied[:1], copied[1:]))
    between = source.pool.addresses(in_device[1:6])
    offer = Offer(first, 32, more=(between, last))
    drawn, cached = run(target, tools, "second", prompt, offer=offer)
    assert drawn == tools.expected(prompt, 4) and cached.pulled == 32
    # what is of several instances is refused, and computed
    other = msgspec.structs.replace(last, instance="c")
    drawn, cached = run(
        target, tools, "salted", prompt, offer=Offer(first, 32, more=(between, other)), cache_salt="x"
    )
    assert drawn == tools.expected(prompt, 4) and cached.pulled == 0
    source.pool.free_mem(copied, Tier.HOST)
    for rig in (source, target):
        rig.run()
        rig.assert_idle()


def test_pulled_tokens_are_a_source_of_their_own(make_tiered, tools):
    source, target = make_tiered(instance="a"), make_tiered(instance="b")
    source.grant_to(target)
    prompt = tools.prompt(41)
    source.send(tools.prefill("first", prompt))
    source.run()
    (done,) = [item for item in source.take() if isinstance(item, Prefilled)]
    assert done.cached == CachedTokens()
    run(target, tools, "part", prompt[:21])
    target.pool.swap_out(2)
    offer = msgspec.structs.replace(done.offer, num_tokens=40)
    offer = msgspec.structs.replace(
        offer, refs=source.pool.addresses(source.pool.match(pack_tokens(prompt)).device_blocks)
    )
    tokens, cached = run(target, tools, "second", prompt, offer=offer)
    assert tokens == tools.expected(prompt, 4)
    # 20 tokens and the first 3 of the answer, of which the last block holds none of this prompt
    assert cached.pulled == 20 and cached.pulled_from == "a"
    assert cached.device + cached.host == 20 and cached.host > 0
    source.send(Release("first", 0))
    for rig in (source, target):
        rig.run()
        rig.assert_idle()


def test_commands(make_tiered, tools):
    rig = make_tiered(block_size=4, num_tokens=64, host_tokens=64)
    prompt = tools.prompt(33)
    run(rig, tools, "r", prompt)
    rig.pool.swap_out(2)
    num_cached = rig.pool.stats().historical + 2

    def ask(verb: CacheVerb, **fields) -> CacheReport:
        rig.send(CacheCommand(7, verb, **fields))
        rig.run()
        (report,) = [item for item in rig.take() if isinstance(item, CacheReport)]
        return report

    tokens = pack_tokens(prompt[:-1])
    assert ask(CacheVerb.LOOKUP, token_ids=tokens) == CacheReport(7, num_device_tokens=28, num_host_tokens=4)
    assert ask(CacheVerb.LOOKUP, token_ids=tokens, cache_salt="other") == CacheReport(7)
    assert ask(CacheVerb.RESIZE, num_host_blocks=1) == CacheReport(7, num_blocks=1, num_blocks_most=32)
    refused = ask(CacheVerb.RESIZE, num_host_blocks=33)
    assert (refused.num_blocks, refused.num_blocks_most) == (1, 32) and "from 0 to 32" in refused.error
    assert ask(CacheVerb.FLUSH).num_blocks == num_cached - 1
    assert ask(CacheVerb.LOOKUP, token_ids=tokens) == CacheReport(7)
    rig.assert_idle()


def test_time_to_live(make_tiered, tools):
    rig = make_tiered(cache_ttl_s=60.0)
    prompt, other = tools.prompt(33), tools.prompt(33, seed=1)
    run(rig, tools, "r", prompt)
    rig.clock.now += 40
    assert run(rig, tools, "s", prompt)[1].total == 32
    run(rig, tools, "t", other)
    rig.clock.now += 50  # over a minute since the first, but not since the second
    assert run(rig, tools, "u", prompt)[1].total == 32
    rig.clock.now += 59
    rig.run()
    assert run(rig, tools, "v", other)[1].total == 0
    assert run(rig, tools, "w", prompt)[1].total == 32


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_cached_tokens_are_those_not_computed_on_every_answer_of_a_random_load(
    make_tiered, tools, block_size
):
    """Prompts that begin alike in all ways, answers that become prompts; more than both tiers hold."""
    rig = make_tiered(block_size, num_tokens=432, host_tokens=512, max_running=4)
    rng = random.Random(block_size)
    known = [tools.prompt(60, seed=n) for n in range(4)]
    answered: dict[str, CachedTokens] = {}
    prompts: dict[str, list[int]] = {}
    for wave in range(16):
        rig.clock.now += 1
        for n in range(rng.randint(1, 5)):
            base = rng.choice(known)
            prompt = base[: rng.randint(1, len(base))] + tools.prompt(rng.randint(0, 20), seed=100 * wave + n)
            prompts[f"{wave}-{n}"] = prompt
            rig.send(tools.decode(f"{wave}-{n}", prompt, max_tokens=8))
        rig.run()
        said = rig.take()
        for request_id in [each for each in prompts if each.startswith(f"{wave}-")]:
            heard = tools.Transcript.of(said, request_id)
            assert heard.token_ids == tools.expected(prompts[request_id], 8)
            answered[request_id] = heard.outputs[0].cached
            known.append((prompts[request_id] + heard.token_ids)[:90])
    assert rig.worker.gauges.load().num_preemptions == 0
    for request_id, prompt in prompts.items():
        cached = answered[request_id]
        assert cached.total <= len(prompt) - 1
        assert computed(rig, request_id) == len(prompt) - cached.total + 7
    assert sum(cached.device for cached in answered.values()) > 0
    assert sum(cached.host for cached in answered.values()) > 0
    rig.assert_idle()
