"""Tiny speakers, and folders to open them from."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from helpers_recovery import chat_tokenizer, small_llama
from helpers_run import byte_tokenizer


@pytest.fixture(scope="session")
def _models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("chat")
    for name, seed, tokenizer in (("dense", 0, chat_tokenizer()), ("other", 1, chat_tokenizer()),
                                  ("plain", 0, byte_tokenizer())):  # fmt: skip
        small_llama(seed).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return root


@pytest.fixture
def place(_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the models ``dense`` and ``other``, and ``plain`` without chat template; the working directory."""
    shutil.copytree(_models, tmp_path / "place")
    monkeypatch.chdir(tmp_path / "place")
    return tmp_path / "place"


@pytest.fixture
def speaker(place: Path):
    """``speaker("dense")``: an open one."""
    from pyprune.chat.speaker import open_speaker

    return open_speaker
