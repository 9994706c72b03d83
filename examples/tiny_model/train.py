"""Train the bundled tiny Llama model from the standard library of the running interpreter.

    python examples/tiny_model/train.py --out DIR --minutes 18

The time given is a wall-clock budget: learning rate and sequence length follow the share of it that has
passed, so the schedule completes on a fast machine and on a busy one alike. The output folder is a
complete Hugging Face checkpoint from the first minute on. Every two minutes it is rewritten, together
with ``state.pt``, from which the same command continues after a kill. The model card is written by hand
from ``training.json``, the figures this script leaves behind.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import corpus as corpus_module
import torch
from corpus import END_OF_TEXT, TURN_END, Corpus
from safetensors.torch import save_file
from tokenizer import MAX_POSITIONS, VOCABULARY, save_tokenizer, train_tokenizer
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

log = logging.getLogger("train")

ROWS = 8
SHORT, LONG = 512, 1024
LONG_FROM = 0.85
"""The last part of the budget runs on sequences of ``LONG`` tokens."""

MIXTURE = {"chat": 0.45, "reference": 0.35, "source": 0.20}
"""Share of the rows drawn from each kind of text: prose first, so that samples read as English."""
REFERENCE_UNTIL = 0.75
"""From then on conversations take the place of reference prose, because a chat is what the demo shows."""

MATRIX_RATE = 3e-3
VECTOR_RATE = 4e-3
WARMUP = 0.02
FINAL_RATE = 0.02

CONFIG = {
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "intermediate_size": 704,
    "max_position_embeddings": MAX_POSITIONS,
    "tie_word_embeddings": True,
}


# ------------------------------------------------------------------------------------ data


class Rows:
    """An endless supply of token rows of one kind of text.

    Documents are shuffled each epoch. A conversation starts a row and is cut at its end, because it is
    asked at position 0 when served; other documents run on from row to row.
    """

    def __init__(self, documents: list[list[int]], aligned: bool, seed: int) -> None:
        self.documents = documents
        self.aligned = aligned
        self.random = random.Random(seed)
        self.stream = self._endless()
        self.rest: list[int] = []

    def _endless(self) -> Iterator[list[int]]:
        while True:
            yield from self.random.sample(self.documents, len(self.documents))

    def row(self, length: int) -> list[int]:
        tokens = self.rest
        while len(tokens) < length + 1:
            tokens = tokens + next(self.stream)
        self.rest = [] if self.aligned else tokens[length:]
        return tokens[: length + 1]


def encode(tokenizer: Tokenizer, corpus: Corpus) -> dict[str, list[list[int]]]:
    end = tokenizer.token_to_id(END_OF_TEXT)
    return {
        kind: [encoding.ids + [end] for encoding in tokenizer.encode_batch(texts)]
        for kind, texts in vars(corpus).items()
    }


# ------------------------------------------------------------------------------------ loss


class HeadLoss(torch.autograd.Function):
    """Summed cross-entropy of the tied output head, in chunks whose logits stay in the cache.

    The gradients are made during the forward pass, so no logits are kept for the backward one.
    """

    CHUNK = 512

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        hidden, compute_weight = hidden.bfloat16(), weight.bfloat16()
        hidden_gradient = torch.empty_like(hidden)
        weight_gradient = torch.zeros_like(weight)
        total = hidden.new_zeros((), dtype=torch.float32)
        for start in range(0, len(targets), HeadLoss.CHUNK):
            part = slice(start, start + HeadLoss.CHUNK)
            x, y = hidden[part], targets[part, None]
            logits = (x @ compute_weight.T).float()
            log_probabilities = logits.log_softmax(-1)
            total -= log_probabilities.gather(1, y).sum()
            gradient = log_probabilities.exp_().scatter_add_(1, y, torch.full(y.shape, -1.0)).bfloat16()
            hidden_gradient[part] = gradient @ compute_weight
            weight_gradient += gradient.T @ x
        ctx.save_for_backward(hidden_gradient, weight_gradient)
        return total

    @staticmethod
    def backward(ctx, scale: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[no-untyped-def,override]
        hidden_gradient, weight_gradient = ctx.saved_tensors
        return hidden_gradient * scale, weight_gradient * scale, None


def loss_of(model: LlamaForCausalLM, batch: Tensor) -> Tensor:
    """Mean loss per token, in nats, of predicting each row's tokens from those before."""
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model.model(input_ids=batch[:, :-1]).last_hidden_state
    targets = batch[:, 1:].reshape(-1)
    return HeadLoss.apply(hidden.flatten(0, 1), model.lm_head.weight, targets) / len(targets)


@torch.no_grad()
def validate(
    model: LlamaForCausalLM,
    tokenizer: Tokenizer,
    documents: dict[str, list[list[int]]],
    rows: int | None = None,
) -> dict[str, dict[str, float]]:
    """Loss per token and bits per byte of the validation split, by kind of text.

    Documents are laid end to end in windows of ``SHORT`` tokens; ``rows`` bounds the windows of each kind.
    """
    model.eval()
    figures = {}
    for kind, texts in documents.items():
        stream = [token for text in texts for token in text]
        windows = torch.tensor(stream[: len(stream) // (SHORT + 1) * (SHORT + 1)]).view(-1, SHORT + 1)[:rows]
        losses = [loss_of(model, part).item() * len(part) for part in windows.split(8)]
        loss = sum(losses) / len(windows)
        size = sum(len(tokenizer.decode(row, skip_special_tokens=True).encode()) for row in windows.tolist())
        bits = loss * len(windows) * SHORT / math.log(2)
        figures[kind] = {
            "loss": round(loss, 4),
            "bits_per_byte": round(bits / size, 4),
            "tokens": len(windows) * SHORT,
        }
    model.train()
    return figures


# ------------------------------------------------------------------------------------ model and optimiser


def new_model() -> LlamaForCausalLM:
    config = LlamaConfig(**CONFIG, attn_implementation="sdpa", use_cache=False)
    model = LlamaForCausalLM(config)
    # Residual outputs start at zero, so that every layer begins as the identity.
    for layer in model.model.layers:
        nn.init.zeros_(layer.self_attn.o_proj.weight)
        nn.init.zeros_(layer.mlp.down_proj.weight)
    return model


def optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, which learns more from few tokens, and AdamW for the rest."""
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    norms = [p for p in model.parameters() if p.ndim == 1]
    return [
        torch.optim.Muon(matrices, lr=MATRIX_RATE, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(
            [{"params": [model.lm_head.weight]}, {"params": norms, "weight_decay": 0.0}],
            lr=VECTOR_RATE,
            betas=(0.9, 0.95),
            weight_decay=0.01,
            fused=True,
        ),
    ]


def rate_at(progress: float) -> float:
    """Share of the peak learning rate: a linear warm-up, then a cosine down to ``FINAL_RATE``."""
    if progress < WARMUP:
        return max(progress / WARMUP, 0.02)
    fallen = (progress - WARMUP) / (1 - WARMUP)
    return FINAL_RATE + (1 - FINAL_RATE) * 0.5 * (1 + math.cos(math.pi * min(fallen, 1.0)))


# ------------------------------------------------------------------------------------ output


def write_atomically(path: Path, save: Callable[[str], object]) -> None:
    """Save beside ``path`` and rename, so that a reader never sees half a file."""
    handle, name = tempfile.mkstemp(dir=path.parent, suffix=".partial")
    os.close(handle)
    save(name)
    os.chmod(name, 0o644)
    os.replace(name, path)


def save_checkpoint(model: LlamaForCausalLM, folder: Path) -> None:
    tensors = {
        name: tensor.detach().bfloat16().contiguous()
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"  # tied to the embeddings
    }
    write_atomically(folder / "model.safetensors", partial(save_file, tensors, metadata={"format": "pt"}))


def save_configs(tokenizer: Tokenizer, folder: Path) -> None:
    start, stop = tokenizer.token_to_id(END_OF_TEXT), tokenizer.token_to_id(TURN_END)
    ids = {"bos_token_id": start, "eos_token_id": [stop, start], "pad_token_id": start}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **CONFIG,
        **ids,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "attention_bias": False,
        "mlp_bias": False,
        "torch_dtype": "bfloat16",
    }
    generation = {**ids, "do_sample": True, "temperature": 0.6, "top_p": 0.9}
    for name, content in (("config.json", config), ("generation_config.json", generation)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


# ------------------------------------------------------------------------------------ training


def train(folder: Path, minutes: float, threads: int, seed: int) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    folder.mkdir(parents=True, exist_ok=True)

    training, validation = corpus_module.build(seed)
    tokenizer = train_tokenizer(training)
    save_tokenizer(tokenizer, folder)
    save_configs(tokenizer, folder)
    model = new_model()

    documents, held_out = encode(tokenizer, training), encode(tokenizer, validation)
    unique = {kind: sum(map(len, texts)) for kind, texts in documents.items()}
    log.info("parameters %d, training tokens %s", sum(p.numel() for p in model.parameters()), unique)
    optimisers = optimizers(model)
    peaks = [[group["lr"] for group in optimiser.param_groups] for optimiser in optimisers]

    budget = minutes * 60
    seen, step, recent = 0, 0, []
    drawn = dict.fromkeys(documents, 0)
    started = time.monotonic()
    state = folder / "state.pt"
    if state.exists():
        kept = torch.load(state)
        model.load_state_dict(kept["model"])
        for optimiser, values in zip(optimisers, kept["optimisers"], strict=True):
            optimiser.load_state_dict(values)
        seen, step, drawn = kept["seen"], kept["step"], kept["drawn"]
        started -= kept["elapsed"]
        log.info("continuing at step %d", step)
    else:
        save_checkpoint(model, folder)
    # Seeded by the step too, so that a continued training does not read its first minutes again.
    chance = random.Random(seed + step)
    supply = {kind: Rows(texts, kind == "chat", seed + step) for kind, texts in documents.items()}
    saved = logged = time.monotonic()
    while (elapsed := time.monotonic() - started) < budget:
        progress = elapsed / budget
        length, rows = (LONG, ROWS // 2) if progress >= LONG_FROM else (SHORT, ROWS)
        shares = dict(MIXTURE)
        if progress >= REFERENCE_UNTIL:
            shares["chat"] += shares.pop("reference")
        kinds = chance.choices(list(shares), list(shares.values()), k=rows)
        loss = loss_of(model, torch.tensor([supply[kind].row(length) for kind in kinds]))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimiser, rates in zip(optimisers, peaks, strict=True):
            for group, peak in zip(optimiser.param_groups, rates, strict=True):
                group["lr"] = peak * rate_at(progress)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        step += 1
        seen += rows * length
        for kind in kinds:
            drawn[kind] += length
        recent = [*recent[-49:], loss.item()]
        now = time.monotonic()
        if now - logged > 15:
            logged = now
            log.info(
                "%5.1f min  step %4d  tokens %8d  loss %.3f  (%.0f tokens/s)",
                (now - started) / 60, step, seen, sum(recent) / len(recent), seen / (now - started),
            )  # fmt: skip
        if now - saved > 120:
            saved = now
            save_checkpoint(model, folder)
            kept = {"model": model.state_dict(), "optimisers": [o.state_dict() for o in optimisers]}
            kept |= {"seen": seen, "step": step, "drawn": drawn, "elapsed": now - started}
            write_atomically(state, partial(torch.save, kept))
            log.info("validation %s", validate(model, tokenizer, held_out, rows=16))

    wall = time.monotonic() - started
    save_checkpoint(model, folder)
    state.unlink(missing_ok=True)
    figures = {
        "minutes": round(wall / 60, 1),
        "steps": step,
        "tokens": seen,
        "tokens_by_kind": drawn,
        "unique_tokens": unique,
        "training_loss": round(sum(recent) / len(recent), 4),
        "validation": validate(model, tokenizer, held_out),
    }
    log.info("%s", figures)
    (folder / "training.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the tiny bundled model on the standard library.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write the checkpoint to")
    parser.add_argument("--minutes", type=float, default=18.0, help="wall-clock budget of the training loop")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    train(options.out, options.minutes, options.threads, options.seed)


if __name__ == "__main__":
    main()
