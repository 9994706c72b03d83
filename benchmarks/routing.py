"""The router's decision at size: 64 instances, 100,000 cached prefixes, a prompt of 4,096 tokens.

    python benchmarks/routing.py

Prints microseconds (p50 and p99 of single decisions: the matches in both trees and the choice together), for
prompts that nobody, one or every prefill worker has a part of; and the memory of a tree. Processor time,
so that others on the machine do not count; without full garbage collections, as a server has it that freezes
what it holds.
"""

from __future__ import annotations

import gc
import random
import time
import tracemalloc
from collections.abc import Callable
from functools import partial

import numpy as np

from memserve.config import Role
from memserve.router.scheduling.cost_model import Budget, CostModel, Link, Links, Operators, Ramp
from memserve.router.scheduling.hardware import h200_llama_3_8b
from memserve.router.scheduling.holders import Addresses
from memserve.router.scheduling.policies.decision import Ask, Candidate
from memserve.router.scheduling.policies.policies import POLICIES
from memserve.router.scheduling.policies.pricing import source_of
from memserve.router.scheduling.policy import WorkerView
from memserve.router.scheduling.predictor import Predictor
from memserve.router.scheduling.prompt_tree import PromptTree

BLOCK_SIZE, NUM_PREFIXES, NUM_STEMS, STEM_TOKENS, PROMPT_TOKENS = 16, 100_000, 100, 1024, 4096
NUM_CALLS = 2000


def cpu_model() -> CostModel:
    """Something like a small model on two cores: a prompt takes dozens of chunks."""
    link = Link(0.3, 5e6)
    return CostModel(
        name="cpu",
        operators=Operators(rows=Ramp((0,), (0.25,)), fixed_ms=3.0, pair_ms=2e-5, square_ms=1e-5),
        budget=Budget(512, 200.0),
        kv_token_bytes=25_000,
        links=Links(from_device=link, from_host=link, swap_in=link),
    )


class Rig:
    """A tree for the prefill role and one for decoding, filled with the same prefixes."""

    def __init__(self, num_prefill: int, num_decode: int) -> None:
        self.rng = np.random.default_rng(0)
        self.names = [f"prefill-{i}" for i in range(num_prefill)]
        self.decode_names = [f"decode-{i}" for i in range(num_decode)]
        self.stems = [self.tokens(STEM_TOKENS) for _ in range(NUM_STEMS)]
        self.prompts = [
            self.stems[i % NUM_STEMS] + self.tokens(int(self.rng.integers(2, 40)) * BLOCK_SIZE)
            for i in range(NUM_PREFIXES)
        ]
        tracemalloc.start()
        self.prefill_tree = self.fill(self.names)
        held = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        ids = sum(len(node.key) for node in self.prefill_tree.nodes)
        each = (held - ids) / self.prefill_tree.num_blocks
        print(f"{self.prefill_tree.num_blocks} blocks held, {each:.0f} bytes for each beside token ids")
        self.decode_tree = self.fill(self.decode_names)

    def tokens(self, count: int) -> bytes:
        return self.rng.integers(0, 32_000, count).astype("<i4").tobytes()

    def fill(self, names: list[str]) -> PromptTree:
        """Each prefix on one instance."""
        tree = PromptTree(BLOCK_SIZE, max_blocks=10**9)
        for name in names:
            tree.join(name, 1)
        taken = dict.fromkeys(names, 0)
        for prompt in self.prompts:
            name = names[int(self.rng.integers(len(names)))]
            holding = tree.match("", prompt, 0.0).live.get(name)
            first = holding.num_tokens // BLOCK_SIZE if holding else 0
            count = len(prompt) // (4 * BLOCK_SIZE) - first
            blocks = np.arange(taken[name], taken[name] + count)
            taken[name] += count
            told = Addresses(blocks, np.zeros(count, np.uint8), np.ones(count, np.int64))
            tree.hold(name, 1, "", prompt, 0.0, first_block=first, addresses=told)
        return tree

    def candidates(self, model: CostModel) -> list[Candidate]:
        """Workers at work: queues and batches of all sizes."""
        predictor, found = Predictor(model), []
        for role, names in ((Role.PREFILL, self.names), (Role.DECODE, self.decode_names)):
            for name in names:
                view = WorkerView(name, role, 1, 100_000, BLOCK_SIZE, 256)
                if role is Role.DECODE:
                    view.num_decoding = int(self.rng.integers(1, 60))
                    view.num_context = view.num_decoding * 2000
                view.queue_ms = float(self.rng.exponential(50.0))
                view.recent_ms = float(self.rng.uniform(80, 120))
                found.append(Candidate(view, predictor))
        return found


def timed(name: str, call: Callable[[bytes], object], prompts: list[bytes]) -> None:
    """Time each call and print a line."""
    times_us = []
    for prompt in prompts:
        started = time.thread_time()
        call(prompt)
        times_us.append((time.thread_time() - started) * 1e6)
    times_us.sort()
    print(f"{name:<58}{times_us[len(times_us) // 2]:8.1f}{times_us[int(len(times_us) * 0.99)]:8.1f}")


def decide(rig: Rig, policy: str, candidates: list[Candidate], rng: random.Random, prompt: bytes) -> object:
    """One decision from tokens to table."""
    found = rig.prefill_tree.match("", prompt, 0.0)
    ask = Ask(
        num_tokens=PROMPT_TOKENS,
        num_new_tokens=256,
        rng=rng,
        session="one",
        prefill_found=found,
        decode_found=rig.decode_tree.match("", prompt, 0.0),
        source=source_of(rig.prefill_tree, found),
    )
    return POLICIES[policy](candidates, ask)


def measure(rig: Rig) -> None:
    """All kinds of prompts, on two kinds of machine."""
    rest = PROMPT_TOKENS - STEM_TOKENS
    some = random.Random(0).sample(rig.prompts, NUM_CALLS)
    kinds = {
        "cold": [rig.tokens(PROMPT_TOKENS) for _ in range(NUM_CALLS)],
        "1,024 on every worker": [rig.stems[i % NUM_STEMS] + rig.tokens(rest) for i in range(NUM_CALLS)],
        "more of it on one": [p + rig.tokens(PROMPT_TOKENS - len(p) // 4) for p in some],
    }
    for kind, prompts in kinds.items():
        timed(f"match, {kind}", lambda p: rig.prefill_tree.match("", p, 0.0), prompts)
    for model in (h200_llama_3_8b(), cpu_model()):
        candidates, rng = rig.candidates(model), random.Random(0)
        for policy in ("prompt-tree", "session"):
            call = partial(decide, rig, policy, candidates, rng)
            for kind, prompts in kinds.items():
                timed(f"{policy}, {model.name}, {kind}", call, prompts)


def main() -> None:
    """Run everything."""
    for num_prefill, num_decode in ((48, 16), (32, 32)):
        rig = Rig(num_prefill, num_decode)
        gc.collect()
        gc.freeze()
        print(f"{f'us, {num_prefill} prefill + {num_decode} decode workers':<58}{'p50':>8}{'p99':>8}")
        measure(rig)


if __name__ == "__main__":
    main()
