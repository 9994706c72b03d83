"""Logits and greedy tokens against Hugging Face transformers, whatever way the tokens are fed."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from memserve.models.step import LogitRows

NONE, LAST, ALL = LogitRows.NONE, LogitRows.LAST, LogitRows.ALL


def random_tokens(count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(3, 320, count).tolist()


def expected_logits(model, tokens: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.tensor([tokens])).logits[0]


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    assert ours.shape == theirs.shape and ours.dtype == torch.float32
    return (ours - theirs).abs().max().item()


@pytest.mark.parametrize("block_size", [1, 4, 16])
def test_logits_of_every_family(oracle, make_model, family: str, block_size: int) -> None:
    folder, theirs = oracle(family)
    tokens = random_tokens(75)
    model = make_model(folder, "float32", block_size)
    assert difference(model.step((model.start(), tokens, ALL)), expected_logits(theirs, tokens)) < 1e-4


@pytest.mark.parametrize("block_size", [1, 4, 16])
def test_chunks_of_any_size(oracle, make_model, family: str, block_size: int) -> None:
    folder, theirs = oracle(family)
    tokens = random_tokens(70, seed=1)
    expected = expected_logits(theirs, tokens)
    model = make_model(folder, "float32", block_size)
    for sizes in ([16, 16, 38], [1, 1, 2, 3, 5, 7, 51], [17, 1, 30, 1, 21], [69, 1]):
        run, logits = model.start(), []
        for size in sizes:
            new = tokens[len(run.tokens) :][:size]
            logits.append(model.step((run, new, ALL)))
        assert difference(torch.cat(logits), expected) < 1e-4, sizes


def test_mixed_batches(oracle, make_model, family: str) -> None:
    """Prefills, chunks and decodes of different lengths in one step, each with other logits wanted."""
    folder, theirs = oracle(family)
    model = make_model(folder, "float32", 4)
    long, short, fresh, silent = (random_tokens(60 + seed, seed) for seed in range(4))

    # 1. contexts of different lengths; nothing but KV is wanted of them
    runs = [model.start() for _ in range(4)]
    none = model.step((runs[0], long[:50], NONE), (runs[1], short[:3], NONE), (runs[3], silent[:20], NONE))
    assert none.shape == (0, 320)

    # 2. a decode, a fresh prefill with all its logits, a decode, a chunk without any, in this order
    logits = model.step(
        (runs[0], long[50:51], LAST),
        (runs[2], fresh[:9], ALL),
        (runs[1], short[3:4], LAST),
        (runs[3], silent[20:31], NONE),
    )
    expected = [
        expected_logits(theirs, long[:51])[-1:],
        expected_logits(theirs, fresh[:9]),
        expected_logits(theirs, short[:4])[-1:],
    ]
    assert difference(logits, torch.cat(expected)) < 1e-4

    # 3. only decodes
    pairs = ((0, long, 51), (1, short, 4), (2, fresh, 9), (3, silent, 31))
    logits = model.step(*((runs[run], tokens[end : end + 1], LAST) for run, tokens, end in pairs))
    expected = [expected_logits(theirs, tokens[: end + 1])[-1:] for _, tokens, end in pairs]
    assert difference(logits, torch.cat(expected)) < 1e-4

    # 4. two chunks' last rows
    logits = model.step((runs[3], silent[32:40], LAST), (runs[1], short[5:30], LAST))
    expected = [expected_logits(theirs, silent[:40])[-1:], expected_logits(theirs, short[:30])[-1:]]
    assert difference(logits, torch.cat(expected)) < 1e-4


def test_greedy_tokens(oracle, make_model, family: str) -> None:
    folder, theirs = oracle(family)
    prompts = [random_tokens(count, seed=count) for count in (5, 40)]
    expected = []
    for prompt in prompts:
        with torch.inference_mode():
            out = theirs.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
                max_new_tokens=64,
                do_sample=False,
                eos_token_id=-1,
                pad_token_id=0,
            )
        expected.append(out[0, len(prompt) :].tolist())

    model = make_model(folder, "float32", 16)
    runs = [model.start() for _ in prompts]
    logits = model.step(*((run, prompt, LAST) for run, prompt in zip(runs, prompts, strict=True)))
    drawn = [[token] for token in logits.argmax(-1).tolist()]
    for _ in range(63):
        logits = model.step(*((run, tokens[-1:], LAST) for run, tokens in zip(runs, drawn, strict=True)))
        for tokens, token in zip(drawn, logits.argmax(-1).tolist(), strict=True):
            tokens.append(token)
    assert drawn == expected


def test_bfloat16_is_close(oracle, make_model, family: str) -> None:
    """As close to the float32 truth as transformers' own bfloat16, give or take."""
    folder, theirs = oracle(family)
    tokens = random_tokens(60, seed=2)
    truth = expected_logits(theirs, tokens)
    model = make_model(folder, "bfloat16", 16)
    run = model.start()
    logits = torch.cat([model.step((run, tokens[:41], ALL)), model.step((run, tokens[41:], ALL))])
    error = (logits - truth).square().mean().sqrt() / truth.std()
    assert error < 0.05


def test_long_contexts_beside_short_ones(oracle, make_model) -> None:
    """Decodes that fall into groups of different padding, with rows that do not follow one another."""
    folder, theirs = oracle("llama")
    model = make_model(folder, "float32", 16)
    lengths = [500, 3, 300, 16, 1]
    texts = [random_tokens(length + 1, seed=length) for length in lengths]
    runs = [model.start(512) for _ in lengths]
    for run, text in zip(runs, texts, strict=True):
        model.step((run, text[:-1], NONE))
    logits = model.step(*((run, text[-1:], LAST) for run, text in zip(runs, texts, strict=True)))
    expected = torch.cat([expected_logits(theirs, text)[-1:] for text in texts])
    assert difference(logits, expected) < 1e-4
