"""stories260K, a trained Llama of 260 thousand parameters in llama2.c's format, as a Hugging Face folder.

    find() → the source folder or None        convert(source, folder) → config.json, model.safetensors,
    tokenizer.json

llama2.c rotates adjacent pairs, Hugging Face the two halves of a head, so the rows of q and k change
places. Its tokenizer is sentencepiece's BPE by scores: the merge that makes the token of the highest score
goes first, the leftmost of equals. Here each way to split a token into two becomes a merge, in the order of
the scores.
"""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

_SPACE = "▁"


def find() -> Path | None:
    """The folder of stories260K beside the repository, if it is there."""
    folder = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "stories260K"
    return folder if (folder / "stories260K.bin").is_file() else None


def greedy_text(source: Path) -> str:
    """What llama2.c prints at temperature 0, as the model's own page shows it: 256 tokens after bos."""
    page = (source / "stories260K.md").read_text(encoding="utf-8")
    shown = re.search(r"-t 0\.0\n(.*?)\n```", page, re.DOTALL)
    assert shown is not None
    return shown.group(1)


def convert(source: Path, folder: Path) -> None:
    """Write the Hugging Face form of `source` into `folder`."""
    data = (source / "stories260K.bin").read_bytes()
    hidden, inner, layers, heads, kv_heads, vocab, positions = struct.unpack_from("<7i", data)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": positions,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    numbers = np.frombuffer(data, dtype="<f4", offset=28)
    save_file(_tensors(numbers, hidden, inner, layers, heads, kv_heads, vocab), folder / "model.safetensors")
    _tokenizer(source / "tok512.bin", vocab).save(str(folder / "tokenizer.json"))
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "model_max_length": positions}
    tokenizer_config = {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": True, **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=1))


def _tensors(
    numbers: NDArray[np.float32], hidden: int, inner: int, layers: int, heads: int, kv_heads: int, vocab: int
) -> dict[str, NDArray[np.float32]]:
    offset = 0

    def take(*shape: int) -> NDArray[np.float32]:
        nonlocal offset
        count = int(np.prod(shape))
        offset += count
        return numbers[offset - count : offset].reshape(shape)

    def halves(rows: NDArray[np.float32], count: int) -> NDArray[np.float32]:
        """Heads whose pairs are adjacent → heads whose pairs are head_dim/2 apart."""
        return rows.reshape(count, -1, 2, hidden).swapaxes(1, 2).reshape(rows.shape)

    kv = kv_heads * (hidden // heads)
    embedding = take(vocab, hidden)
    input_norm = take(layers, hidden)
    q, k, v = take(layers, hidden, hidden), take(layers, kv, hidden), take(layers, kv, hidden)
    o = take(layers, hidden, hidden)
    post_norm = take(layers, hidden)
    gate, down, up = take(layers, inner, hidden), take(layers, hidden, inner), take(layers, inner, hidden)
    tensors = {"model.embed_tokens.weight": embedding, "model.norm.weight": take(hidden)}
    for index in range(layers):
        layer = f"model.layers.{index}."
        tensors |= {
            f"{layer}input_layernorm.weight": input_norm[index],
            f"{layer}self_attn.q_proj.weight": halves(q[index], heads),
            f"{layer}self_attn.k_proj.weight": halves(k[index], kv_heads),
            f"{layer}self_attn.v_proj.weight": v[index],
            f"{layer}self_attn.o_proj.weight": o[index],
            f"{layer}post_attention_layernorm.weight": post_norm[index],
            f"{layer}mlp.gate_proj.weight": gate[index],
            f"{layer}mlp.up_proj.weight": up[index],
            f"{layer}mlp.down_proj.weight": down[index],
        }
    return {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}


def read_vocabulary(path: Path, vocab: int) -> list[tuple[bytes, float]]:
    """(bytes, score) of each token, from llama2.c's tokenizer file."""
    data, offset, pieces = path.read_bytes(), 4, []
    for _ in range(vocab):
        score, length = struct.unpack_from("<fi", data, offset)
        offset += 8 + length
        pieces.append((data[offset - length : offset], score))
    return pieces


def _tokenizer(path: Path, vocab: int) -> Tokenizer:
    pieces = read_vocabulary(path, vocab)
    names = ["<unk>", "<s>", "</s>"]
    names += [piece.decode().replace(" ", _SPACE) for piece, _ in pieces[3:]]
    ids = {name: token_id for token_id, name in enumerate(names)}
    assert len(ids) == vocab
    first_text = 3 + 256
    merges = [
        (-score, name[:cut], name[cut:])
        for name, (_, score) in zip(names[first_text:], pieces[first_text:], strict=True)
        for cut in range(1, len(name))
        if name[:cut] in ids and name[cut:] in ids
    ]
    ordered = [(left, right) for _, left, right in sorted(merges, key=lambda merge: merge[0])]
    tokenizer = Tokenizer(
        models.BPE(vocab=ids, merges=ordered, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend(_SPACE), normalizers.Replace(" ", _SPACE)]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace(_SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1, right=0),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in names[:3]])
    return tokenizer
