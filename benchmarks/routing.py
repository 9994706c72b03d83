"""The router's decision at size: 64 instances, 100,000 cached prefixes, a prompt of 4,096 tokens.

    python benchmarks/routing.py [decisions|memory|inserts]

* decisions: microseconds (p50 and p99 of single decisions: the matches in both trees and the choice), for
  prompts that nobody, one or every prefill worker has a part of, against 200 us. Processor time, without full
  garbage collections, as a server has it that freezes what it holds. Others on the machine still count where
  they take the caches: the last column is the p99 of each prompt's best of three times.
* memory: bytes of a tree for each block and holder beside the token ids, against 100: of documents, of
  documents with questions of one to three blocks each, of conversations, and of such short ends alone, where
  a node's own size counts most.
* inserts: a million random prefixes into a tree that may hold fewer, and what it takes meanwhile.
"""

from __future__ import annotations

import gc
import itertools
import random
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator
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
NUM_CALLS, NUM_ROUNDS = 1000, 3


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
        self.prefill_tree = self.fill(self.names)
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
            tell(tree, taken, name, prompt)
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
    """Time each call, in rounds over all, and print a line."""
    times_us: list[list[float]] = []
    for _ in range(NUM_ROUNDS):
        times_us.append([])
        for prompt in prompts:
            started = time.thread_time()
            call(prompt)
            times_us[-1].append((time.thread_time() - started) * 1e6)
    every = sorted(itertools.chain.from_iterable(times_us))
    best = sorted(map(min, zip(*times_us, strict=True)))
    p50, p99, best_p99 = every[len(every) // 2], every[int(len(every) * 0.99)], best[int(len(best) * 0.99)]
    print(f"{name:<58}{p50:8.1f}{p99:8.1f}{best_p99:12.1f}", flush=True)


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


def random_tokens(rng: np.random.Generator, num_blocks: int) -> bytes:
    """Whole blocks that nothing else begins with."""
    return rng.integers(0, 32_000, num_blocks * BLOCK_SIZE).astype("<i4").tobytes()


def documents(rng: np.random.Generator) -> Iterator[tuple[str, bytes]]:
    """Who holds what: 64 to 256 blocks each."""
    for number in range(500):
        yield f"w{number % 4}", random_tokens(rng, int(rng.integers(64, 257)))


def questions(rng: np.random.Generator) -> Iterator[tuple[str, bytes]]:
    """Each document with five questions of one to three blocks, some of them on another worker."""
    for number, (name, document) in enumerate(documents(rng)):
        for question in range(5):
            other = f"w{(number + 1) % 4}"
            asked = document + random_tokens(rng, int(rng.integers(1, 4)))
            yield other if question == 4 else name, asked


def conversations(rng: np.random.Generator) -> Iterator[tuple[str, bytes]]:
    """A system prompt of four blocks for all; turns of 2 to 20 blocks, of which one in five is asked anew."""
    system = random_tokens(rng, 4)
    for number in range(2000):
        history = system
        for _ in range(6):
            if rng.random() < 0.2:
                yield f"w{number % 4}", history + random_tokens(rng, int(rng.integers(1, 4)))
            history += random_tokens(rng, int(rng.integers(2, 21)))
            yield f"w{number % 4}", history


def short_ends(rng: np.random.Generator) -> Iterator[tuple[str, bytes]]:
    """One to three blocks that share nothing: what no use of a cache looks like."""
    for number in range(50_000):
        yield f"w{number % 4}", random_tokens(rng, int(rng.integers(1, 4)))


def memory() -> None:
    """Bytes for each block and holder."""
    print(
        f"{'bytes for each block and holder beside token ids':<58}{'bytes':>8}{'floor':>8}{'blocks/node':>13}"
    )
    for mix in (documents, questions, conversations, short_ends):
        tracemalloc.start()
        tree = PromptTree(BLOCK_SIZE, max_blocks=10**9)
        for number in range(4):
            tree.join(f"w{number}", 1)
        taken = dict.fromkeys(("w0", "w1", "w2", "w3"), 0)
        for name, tokens in mix(np.random.default_rng(0)):
            tell(tree, taken, name, tokens)
        held = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        sizes = [len(node.key) for node in tree.nodes]
        each = (held - sum(sizes)) / tree.num_blocks
        per_node = sum(sizes) / (len(sizes) * 4 * BLOCK_SIZE)
        print(f"{mix.__name__:<58}{each:>8.0f}{'<= 100':>8}{per_node:>13.1f}")


def tell(tree: PromptTree, taken: dict[str, int], name: str, tokens: bytes) -> None:
    """A worker stores what it does not hold yet, in blocks that it has not used before."""
    holding = tree.match("", tokens, 0.0).live.get(name)
    first = holding.num_tokens // BLOCK_SIZE if holding else 0
    count = len(tokens) // (4 * BLOCK_SIZE) - first
    blocks = np.arange(taken[name], taken[name] + count)
    taken[name] += count
    told = Addresses.at(blocks, np.zeros(count, np.uint8), np.ones(count, np.int64))
    tree.hold(name, 1, "", tokens, 0.0, first_block=first, addresses=told)


def inserts(num_inserts: int = 1_000_000, max_blocks: int = 50_000) -> None:
    """Random prefixes, a quarter of which go on from others; workers whose pools are reused in a ring."""
    rng, tree = np.random.default_rng(0), PromptTree(BLOCK_SIZE, max_blocks)
    stems = [random_tokens(rng, 8) for _ in range(100)]
    for number in range(4):
        tree.join(f"w{number}", 1)
    at, started = dict.fromkeys(range(4), 0), time.perf_counter()
    tracemalloc.start()
    for number in range(1, num_inserts + 1):
        stem = stems[int(rng.integers(100))] if number % 4 == 0 else b""
        tokens = stem + random_tokens(rng, int(rng.integers(1, 6)))
        worker, count = number % 4, len(tokens) // (4 * BLOCK_SIZE)
        blocks = (at[worker] + np.arange(count)) % max_blocks
        at[worker] += count
        told = Addresses.at(blocks, np.zeros(count, np.uint8), np.full(count, number))
        tree.hold(f"w{worker}", 1, "", tokens, float(number), addresses=told)
        if number % (num_inserts // 10) == 0:
            held = tracemalloc.get_traced_memory()[0] / 2**20
            took_s = time.perf_counter() - started
            print(f"{number} inserts: {tree.num_blocks} blocks, {held:.1f} MiB, {took_s:.0f} s", flush=True)
    tracemalloc.stop()


def decisions() -> None:
    """How long a decision takes."""
    for num_prefill, num_decode in ((48, 16), (32, 32)):
        rig = Rig(num_prefill, num_decode)
        gc.collect()
        gc.freeze()
        title = f"us, {num_prefill} prefill + {num_decode} decode workers"
        print(f"{title:<58}{'p50':>8}{'p99':>8}{'best, p99':>12}")
        measure(rig)


def main() -> None:
    """Run what is named, or everything."""
    parts = {"decisions": decisions, "memory": memory, "inserts": inserts}
    for name in sys.argv[1:] or parts:
        parts[name]()


if __name__ == "__main__":
    main()
