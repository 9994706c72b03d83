"""Real processes for the tests beside this file."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.e2e.server_process import REPOSITORY, Server, launch, wait_ready


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Server]]:
    """`start(*options)` gives a ready server; all are stopped when the module is done.

    Unless a test says otherwise every prompt goes to a prefill worker, however short it is: most look at what
    is between the two.
    """
    servers: list[Server] = []

    def start_one(*options: str) -> Server:
        policy = () if "--policy" in options else ("--policy", "least-load")
        server = launch(tmp_path_factory.mktemp("serve") / "log", *policy, *options)
        wait_ready(server)
        servers.append(server)
        return server

    yield start_one
    for server in servers:
        assert server.stop() == 0, server.log.read_text(errors="replace")


@pytest.fixture(scope="session")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random float32 Llama with the bundled tokenizer: sharp enough that tokens differ."""
    folder = tmp_path_factory.mktemp("model") / "random-llama"
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=24,
        max_position_embeddings=1024,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(REPOSITORY / "memserve" / "tiny_model" / name, folder / name)
    return folder
