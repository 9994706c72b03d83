"""Small vocabularies for the tests of token history, each with a habit that real ones have."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from memserve.router.text.tokenizer import Tokenizer

END, TURN, THINK = "<|end|>", "<|turn|>", "<think>"
# Pairs in the order in which they are merged: "hello" is he|llo, never hel|lo.
MERGES = [
    ("h", "e"),
    ("l", "l"),
    ("ll", "o"),
    ("Ġ", "he"),
    ("Ġhe", "llo"),
    ("he", "l"),
    ("l", "o"),
    ("Ġ", "w"),
]
MERGES += [
    ("o", "r"),
    ("l", "d"),
    ("Ġw", "or"),
    ("Ġwor", "ld"),
    ("<", "|"),
    ("|", ">"),
    ("n", "d"),
    ("Ġ", "a"),
]
MERGES += [("Ã", "©"), ("Ġ", "Ġ"), ("w", "or"), ("Ċ", "Ċ")]


def byte_level(*, normalizer: object = None, prefix_space: bool = False) -> tokenizers.Tokenizer:
    """As GPT-2: every token is a run of bytes."""
    tokens = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens += [a + b for a, b in MERGES]
    backend = tokenizers.Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, MERGES))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    backend.decoder = decoders.ByteLevel()
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.add_special_tokens([END, TURN])
    backend.add_tokens([tokenizers.AddedToken(THINK, normalized=False)])
    return backend


def sentencepiece(kind: str, *, bos: bool = True) -> tokenizers.Tokenizer:
    """As Llama 2: ▁ for blanks. `kind` says where one is put: before the first text ("first"), before every
    one between special tokens ("always", and older: "prepend"), nowhere ("never").
    """
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += ["▁", *"abcdefghijklmnopqrstuvwxyzHW.,!?[]|<>/é"]
    merges = [
        ("l", "o"),
        ("h", "e"),
        ("▁", "he"),
        ("l", "lo"),
        ("he", "l"),
        ("▁", "w"),
        ("▁w", "o"),
        ("▁", "▁"),
        ("a", "n"),
    ]
    tokens += [a + b for a, b in merges]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>"))
    if kind == "prepend":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        steps = [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
        backend.decoder = decoders.Sequence(steps)
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=kind)
        backend.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    if bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return backend


def word_piece() -> tokenizers.Tokenizer:
    """As BERT: its decoder puts blanks between words, so that a token has no text of its own."""
    tokens = ["[UNK]", "hello", "world", "he", "##llo", "wor", "##ld"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    backend = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.WordPiece()
    return backend


def load(backend: tokenizers.Tokenizer, folder: Path) -> Tokenizer:
    """`backend` as a model folder would have it."""
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    return Tokenizer.load(folder)


def ids_of(tokenizer: Tokenizer, *spelled: str) -> list[int]:
    """Ids of tokens, as text for those of a byte-level vocabulary: " he" is Ġhe."""
    by_bytes = {tokenizer.token_bytes(i): i for i in reversed(range(tokenizer.vocab_size))}
    return [by_bytes[token.encode()] for token in spelled]


def said(tokenizer: Tokenizer, prompt: Sequence[int], token_ids: Sequence[int], *, skip: bool = True) -> str:
    """The text that a client gets for `token_ids`, drawn after `prompt`."""
    decoder = tokenizer.decoder(skip_special_tokens=skip, context=list(prompt)[-8:])
    return "".join(map(decoder.push, token_ids)) + decoder.flush()
