"""Context caching in one worker and between two: what is computed, what is shared, what comes back.

`batches` of the hash runner are what was really computed, so that "cached" can be checked against it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import msgspec
import numpy as np
import pytest
import torch

from memserve.messages import (
    BlockRefs,
    Cancel,
    Decode,
    Offer,
    Prefilled,
    PullBack,
    PulledBack,
    Release,
    StepOutputs,
    Stored,
    Tier,
    pack_tokens,
)
from memserve.workers.following import MIN_FOLLOWED_TOKENS

BLOCK_SIZES = [1, 4, 16]


@pytest.fixture
def make_caching(make_rig: Callable) -> Callable:
    def make(block_size: int = 4, num_tokens: int = 512, **changes):
        return make_rig(
            **{"block_size": block_size, "num_blocks": num_tokens // block_size, "caches": True, **changes}
        )

    return make


def computed(rig, request_id: str) -> int:
    """Tokens that the runner really computed for a request."""
    return sum(n for batch in rig.runner.batches for rid, n in batch if rid == request_id)


def run_one(rig, tools, request_id: str, prompt: Sequence[int], max_tokens: int = 6, **fields):
    """A colocated run; its tokens, and the cached tokens it reported."""
    message = tools.decode(request_id, list(prompt), max_tokens=max_tokens)
    rig.send(msgspec.structs.replace(message, **fields))
    rig.run()
    heard = tools.Transcript.of(rig.take(), request_id)
    assert heard.failed is None
    return heard.token_ids, heard.outputs[0].cached.total


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_every_cached_length_around_block_boundaries(make_caching, tools, block_size):
    first = tools.prompt(40)
    for length in (1, 2, 15, 16, 17, 31, 32, 33, 39, 40):
        rig = make_caching(block_size)
        # 1. cold
        tokens, cached = run_one(rig, tools, "cold", first, 4)
        assert tokens == tools.expected(first, 4) and cached == 0
        assert computed(rig, "cold") == 40 + 3
        # 2. a prompt that shares `length` tokens with it
        prompt = first[:length] + tools.prompt(9, seed=1)
        tokens, cached = run_one(rig, tools, "warm", prompt, 4)
        assert tokens == tools.expected(prompt, 4)
        assert cached == length // block_size * block_size
        assert computed(rig, "warm") == len(prompt) - cached + 3
        # 3. the same again: at least one token is always computed
        tokens, cached = run_one(rig, tools, "again", prompt, 4)
        assert tokens == tools.expected(prompt, 4)
        assert cached == min(len(prompt) // block_size * block_size, len(prompt) - 1)
        assert computed(rig, "again") == len(prompt) - cached + 3
        rig.assert_idle()


@pytest.mark.parametrize("block_size", (4, 16))
def test_a_prompt_that_is_cached_whole_computes_one_token_in_a_block_of_its_own(
    make_caching, tools, block_size
):
    rig = make_caching(block_size)
    prompt = tools.prompt(3 * block_size)
    # 1. cold, and all of it is kept
    assert run_one(rig, tools, "cold", prompt, 1) == (tools.expected(prompt, 1), 0)
    tokens = pack_tokens(prompt)
    before = rig.pool.match(tokens)
    kept = rig.pool.kv[before.device_blocks].clone()
    # 2. all but the last token count as cached
    drawn, cached = run_one(rig, tools, "again", prompt, 1)
    assert drawn == tools.expected(prompt, 1)
    assert cached == len(prompt) - 1 and computed(rig, "again") == 1
    # 3. what is shared was not written to, and the copy is merged with it
    after = rig.pool.match(tokens)
    assert np.array_equal(after.device_blocks, before.device_blocks)
    assert torch.equal(rig.pool.kv[after.device_blocks], kept)
    # 4. without its last block in the pool there is nothing to copy
    rig.pool.delete(tokens)
    run_one(rig, tools, "shorter", prompt[:-1], 1)
    assert run_one(rig, tools, "longer", prompt, 1) == (tools.expected(prompt, 1), 2 * block_size)
    rig.assert_idle()


@pytest.mark.parametrize("num_blocks", (1, 3))
def test_what_a_failed_request_has_read_is_not_read_again(make_caching, tools, num_blocks):
    """Not even where all it had of the cache is the copy of its only block."""
    rig = make_caching()
    prompt = tools.prompt(num_blocks * 4)
    run_one(rig, tools, "cold", prompt, 1)
    rig.pool.kv[rig.pool.match(pack_tokens(prompt)).device_blocks] = torch.nan
    rig.send(tools.decode("broken", prompt, max_tokens=1))
    rig.run()
    assert tools.Transcript.of(rig.take(), "broken").failed is not None
    assert run_one(rig, tools, "again", prompt, 1) == (tools.expected(prompt, 1), 0)
    rig.assert_idle()


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_a_conversation_computes_only_what_is_new(make_caching, tools, block_size):
    rig = make_caching(block_size)
    history: list[int] = []
    for turn in range(5):
        prompt = history + tools.prompt(11, seed=turn)
        tokens, cached = run_one(rig, tools, f"turn-{turn}", prompt, 8)
        assert tokens == tools.expected(prompt, 8)
        # the last drawn token has no KV
        assert cached == max(0, len(history) - 1) // block_size * block_size
        assert computed(rig, f"turn-{turn}") == len(prompt) - cached + 7
        history = prompt + tokens
    rig.assert_idle()


def test_another_salt_shares_nothing(make_caching, tools):
    rig = make_caching()
    prompt = tools.prompt(30)
    for salt in ("", "a", "b"):
        assert run_one(rig, tools, f"cold-{salt}", prompt, cache_salt=salt)[1] == 0
    for salt in ("", "a", "b"):
        tokens, cached = run_one(rig, tools, f"warm-{salt}", prompt, cache_salt=salt)
        assert tokens == tools.expected(prompt, 6) and cached == 28
    rig.assert_idle()


def test_prompts_with_logprobs_are_computed_whole(make_caching, tools):
    rig = make_caching()
    prompt = tools.prompt(30)
    run_one(rig, tools, "first", prompt)
    message = tools.decode("second", prompt, max_tokens=6, prompt_logprobs=0)
    rig.send(message)
    rig.run()
    heard = tools.Transcript.of(rig.take(), "second")
    assert heard.token_ids == tools.expected(prompt, 6)
    assert heard.outputs[0].cached.total == 0 and computed(rig, "second") == 35
    rig.assert_idle()


def test_what_a_failed_request_computed_is_shown_to_nobody(make_caching, tools):
    rig = make_caching()
    prompt = tools.prompt(30)
    rig.runner.bad_requests.add("bad")
    rig.send(tools.decode("bad", prompt))
    rig.run()
    assert tools.Transcript.of(rig.take(), "bad").failed is not None
    assert run_one(rig, tools, "good", prompt)[1] == 0
    rig.assert_idle()


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_a_pool_too_small_for_its_history_evicts(make_caching, tools, block_size):
    rig = make_caching(block_size, num_tokens=96)
    for turn in range(3):
        for seed in range(8):
            prompt = tools.prompt(30 + seed, seed=seed)
            tokens, _ = run_one(rig, tools, f"{turn}-{seed}", prompt, 10)
            assert tokens == tools.expected(prompt, 10)
            rig.assert_idle()
    assert rig.pool.stats().historical > 0


def test_preempted_requests_find_what_they_had_computed(make_caching, tools):
    rig = make_caching(num_tokens=96, max_batch_tokens=32)
    prompts = {f"r{i}": tools.prompt(20 + i, seed=i) for i in range(4)}
    for request_id, prompt in prompts.items():
        rig.send(tools.decode(request_id, prompt, max_tokens=30))
    rig.run()
    said = rig.take()
    for request_id, prompt in prompts.items():
        heard = tools.Transcript.of(said, request_id)
        assert heard.token_ids == tools.expected(prompt, 30)
        assert heard.outputs[0].cached.total == 0, "its own work is no cache hit"
    assert rig.worker.gauges.load().num_preemptions > 0
    rig.assert_idle()


# --- one prefix, many askers --------------------------------------------------------------------------------


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_a_burst_on_a_cold_prefix_computes_it_once(make_caching, tools, block_size):
    rig = make_caching(block_size, num_tokens=4096, max_batch_tokens=50, max_model_len=1000)
    shared = tools.prompt(320)
    prompts = {f"r{i}": shared + tools.prompt(5 + i, seed=i + 1) for i in range(6)}
    for request_id, prompt in prompts.items():
        rig.send(tools.decode(request_id, prompt, max_tokens=4))
    rig.run()
    said = rig.take()
    for request_id, prompt in prompts.items():
        assert tools.Transcript.of(said, request_id).token_ids == tools.expected(prompt, 4)
    total = sum(computed(rig, request_id) for request_id in prompts)
    rest = sum(len(prompt) - 320 + 3 for prompt in prompts.values())
    assert 320 <= total - rest < 320 + MIN_FOLLOWED_TOKENS  # a short remainder is not waited for
    rig.assert_idle()


def test_followers_go_on_where_their_leader_left(make_caching, tools):
    rig = make_caching(num_tokens=4096, max_batch_tokens=40, max_model_len=1000)
    shared = tools.prompt(400)
    # 1. b would need what a computes
    rig.send(tools.decode("a", shared, max_tokens=4), tools.decode("b", [*shared, 5], max_tokens=4))
    for _ in range(4):
        rig.worker.step()
    assert computed(rig, "a") == 160 and computed(rig, "b") == 0
    # 2. a goes: b takes over
    rig.send(Cancel("a", 0))
    rig.run()
    said = rig.take()
    assert tools.Transcript.of(said, "b").token_ids == tools.expected([*shared, 5], 4)
    assert computed(rig, "b") == 401 - 160 + 3
    rig.assert_idle()


def test_the_same_prompt_computed_twice_at_once_is_kept_once(make_caching, tools):
    """Too short to be waited for: the second copy is merged into the first."""
    rig = make_caching()
    prompt = tools.prompt(30)
    rig.send(tools.decode("a", prompt, max_tokens=12), tools.decode("b", prompt, max_tokens=12))
    rig.run()
    said = rig.take()
    for request_id in ("a", "b"):
        assert tools.Transcript.of(said, request_id).token_ids == tools.expected(prompt, 12)
        assert computed(rig, request_id) == 30 + 11
    assert rig.pool.stats().historical == 41 // 4
    rig.assert_idle()


# --- prefill → decode → prefill -----------------------------------------------------------------------------


class Pair:
    """A prefill and a decode worker that pull from each other, and the router's part in between."""

    def __init__(self, make_caching, tools, block_size: int, *, p_caches=True, d_caches=True, **d) -> None:
        self.tools, self.block_size = tools, block_size
        self.p = make_caching(block_size, instance="prefill-0", caches=p_caches, max_model_len=1000)
        self.d = make_caching(block_size, instance="decode-0", caches=d_caches, max_model_len=1000, **d)
        self.p.grant_to(self.d)
        self.d.grant_to(self.p)

    def turn(self, request_id: str, prompt: list[int], max_tokens: int, *, back: bool):
        """One request; (tokens, tokens cached at P, Pulled, tokens that went back)."""
        self.p.send(self.tools.prefill(request_id, prompt, max_tokens=max_tokens))
        self.p.run()
        (done,) = [said for said in self.p.take() if isinstance(said, Prefilled)]
        assert done.offer is not None
        decode = self.tools.decode(
            request_id,
            [*prompt, done.token_id],
            num_prompt=len(prompt),
            max_tokens=max_tokens,
            offer=done.offer,
        )
        self.d.send(msgspec.structs.replace(decode, tell_blocks=True))
        self.d.run()
        said = self.d.take()
        heard = self.tools.Transcript.of(said, request_id)
        (pulled,) = heard.pulled
        self.p.send(Release(request_id, 0))
        tokens = [done.token_id, *heard.token_ids]
        assert tokens == self.tools.expected(prompt, max_tokens)
        answer = self._pull_back(request_id, prompt + tokens, done.offer.num_tokens, said) if back else None
        self.p.run()
        self.p.assert_idle()
        self.d.assert_idle()
        return tokens, done.cached.total, pulled, answer

    def _pull_back(self, request_id: str, tokens: list[int], num_offered: int, said: list) -> PulledBack:
        stored = [item for item in said if isinstance(item, Stored)]
        blocks = [block for item in stored for block in item.refs.blocks]
        generations = [value for item in stored for value in item.refs.generations]
        first = num_offered // self.block_size
        refs = BlockRefs("decode-0", 0, Tier.DEVICE, tuple(blocks[first:]), tuple(generations[first:]))
        known = pack_tokens(tokens[: len(blocks) * self.block_size])
        self.p.send(PullBack(request_id, known, "", first, refs))
        self.p.run()
        (answer,) = [item for item in self.p.take() if isinstance(item, PulledBack)]
        return answer


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("setting", ["off", "prefill", "both", "full"])
def test_the_four_milestones_turn_by_turn(make_caching, tools, block_size, setting):
    """Cached, computed and moved tokens of each turn are those of the paper's table."""
    p_caches, d_caches = setting != "off", setting in ("both", "full")
    pair = Pair(make_caching, tools, block_size, p_caches=p_caches, d_caches=d_caches)

    def whole(num_tokens: int) -> int:
        return num_tokens // block_size * block_size

    history: list[int] = []
    num_prompt_before = 0
    for turn in range(4):
        prompt = history + tools.prompt(13, seed=turn)
        request_id = f"turn-{turn}"
        tokens, cached, pulled, answer = pair.turn(request_id, prompt, 9, back=setting == "full")
        # what the prefill side finds: nothing, the last prompt, or with it what was generated after it
        known = {"off": 0, "prefill": num_prompt_before, "both": num_prompt_before}.get(
            setting, max(0, len(history) - 1)
        )
        assert cached == whole(known)
        assert computed(pair.p, request_id) == len(prompt) - cached
        # what moves: everything, or what the decode side does not have from the turn before
        at_decode = whole(max(0, len(history) - 1)) if d_caches else 0
        assert (pulled.num_tokens, pulled.num_cached_tokens) == (len(prompt), at_decode)
        assert computed(pair.d, request_id) == 8
        if answer is not None:
            assert answer.failure is None
            assert answer.num_tokens == whole(len(prompt) + 8) - whole(len(prompt))
        history, num_prompt_before = prompt + tokens, len(prompt)


def test_back_transfer_of_what_is_gone_is_a_miss(make_caching, tools):
    pair = Pair(make_caching, tools, 4)
    prompt = tools.prompt(20)
    tokens, *_ = pair.turn("a", prompt, 13, back=False)
    known = pack_tokens((prompt + tokens)[:32])
    # 1. generations that were never given
    refs = BlockRefs("decode-0", 0, Tier.DEVICE, (0, 1, 2), (99, 99, 99))
    pair.p.send(PullBack("a", known, "", 5, refs))
    # 2. a prefix that is not here
    pair.p.send(PullBack("a", known, "salt", 5, refs))
    # 3. an unknown peer, and numbers that do not fit
    pair.p.send(PullBack("a", known, "", 5, msgspec.structs.replace(refs, instance="nobody")))
    pair.p.send(PullBack("a", known, "", 1, refs))
    pair.p.run()
    answers = [item for item in pair.p.take() if isinstance(item, PulledBack)]
    assert len(answers) == 4
    assert all(answer.num_tokens == 0 and answer.failure for answer in answers)
    pair.p.assert_idle()


def test_back_transfer_gives_way_to_requests(make_caching, tools):
    """In a full pool nothing is pulled back."""
    pair = Pair(make_caching, tools, 4)
    prompt = tools.prompt(20)
    tokens, *_ = pair.turn("a", prompt, 13, back=False)
    taken = pair.p.pool.alloc_mem(pair.p.pool.stats().free)
    refs = pair.d.pool.addresses(np.arange(3))
    pair.p.send(PullBack("a", pack_tokens((prompt + tokens)[:32]), "", 5, refs))
    pair.p.run()
    (answer,) = [item for item in pair.p.take() if isinstance(item, PulledBack)]
    assert answer.failure == "no room"
    pair.p.pool.free_mem(taken)
    pair.p.assert_idle()


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_a_replay_pulls_what_a_dead_worker_has_left(make_caching, tools, block_size):
    """The decode worker dies; prompt and tokens so far are prefilled, its memory read as long as it is
    there.
    """
    pair = Pair(make_caching, tools, block_size)
    prompt = tools.prompt(50)
    message = tools.decode("a", prompt, max_tokens=40)
    pair.d.send(msgspec.structs.replace(message, tell_blocks=True))
    said = []
    while sum(len(m.outputs) for m in said if isinstance(m, StepOutputs)) < 20:
        pair.d.worker.step()
        said += pair.d.take()
    # 1. it is never heard again
    tokens = prompt + tools.Transcript.of(said, "a").token_ids
    stored = [item for item in said if isinstance(item, Stored)]
    blocks = tuple(block for item in stored for block in item.refs.blocks)
    generations = tuple(value for item in stored for value in item.refs.generations)
    assert len(blocks) == (len(tokens) - 1) // block_size
    offer = Offer(BlockRefs("decode-0", 0, Tier.DEVICE, blocks, generations), len(blocks) * block_size)
    # 2. the replay computes only what it had not told of
    replay = msgspec.structs.replace(
        tools.prefill("a", tokens, attempt=1, max_tokens=40), num_prompt_tokens=50, offer=offer
    )
    pair.p.send(replay)
    pair.p.run()
    (done,) = [item for item in pair.p.take() if isinstance(item, Prefilled)]
    assert done.token_id == tools.expected(prompt, 40)[20]
    assert computed(pair.p, "a") == len(tokens) - len(blocks) * block_size
    pair.p.send(Release("a", 1))
    pair.p.run()
    pair.p.assert_idle()
    pair.d.send(Cancel("a", 0))
    pair.d.run()
    pair.d.assert_idle()


def test_decodes_of_one_prefix_pull_it_once(make_caching, tools):
    may_copy = threading.Event()

    def copy(target: np.ndarray, source: np.ndarray) -> int:
        assert may_copy.wait(10)
        np.copyto(target, source)
        return int(source.nbytes)

    pair = Pair(make_caching, tools, 4, copy=copy)
    prompt = tools.prompt(200)
    pair.p.send(tools.prefill("a", prompt, max_tokens=4), tools.prefill("b", prompt, max_tokens=4))
    pair.p.run()
    done = {item.request_id: item for item in pair.p.take() if isinstance(item, Prefilled)}
    for request_id in ("a", "b"):
        tokens = [*prompt, done[request_id].token_id]
        offer = done[request_id].offer
        decode: Decode = tools.decode(request_id, tokens, num_prompt=200, max_tokens=4, offer=offer)
        pair.d.send(decode)
    pair.d.send(tools.decode("c", tools.prompt(20, seed=3), max_tokens=4))
    # 1. while a pulls, b waits for it, and c passes
    for _ in range(6):
        pair.d.worker.step()
    assert [r.request_id for r in pair.d.worker._scheduler.waiting] == ["b"]
    assert computed(pair.d, "c") == 23
    # 2. then b finds everything
    may_copy.set()
    pair.d.run()
    said = pair.d.take()
    pulled = {rid: tools.Transcript.of(said, rid).pulled[0] for rid in ("a", "b")}
    assert pulled["a"].num_cached_tokens == 0 and pulled["b"].num_cached_tokens == 200
    assert pulled["b"].num_bytes == 0 and pulled["b"].num_tokens == 200
    for request_id in ("a", "b"):
        heard = tools.Transcript.of(said, request_id)
        assert [done[request_id].token_id, *heard.token_ids] == tools.expected(prompt, 4)
        pair.p.send(Release(request_id, 0))
    pair.p.run()
    pair.p.assert_idle()
    pair.d.assert_idle()
