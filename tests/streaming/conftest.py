"""A tiny model in three shards, with a text, shared by the tests of streaming."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers_run import byte_tokenizer, tiny_llama, write_text


@pytest.fixture(scope="session")
def sharded(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("streaming") / "model"
    tiny_llama().save_pretrained(folder, max_shard_size="500KB")
    byte_tokenizer().save_pretrained(folder)
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


@pytest.fixture(scope="session")
def text(tmp_path_factory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "train.txt")
