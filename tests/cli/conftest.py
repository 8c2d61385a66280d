"""A tiny model and two texts in a folder, and the command line called in this process."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
from helpers_run import write_model, write_text


@dataclass
class Place:
    """A working folder with ``model``, ``train.txt`` and ``test.txt``."""

    root: Path

    def __truediv__(self, name: str) -> Path:
        return self.root / name

    def files(self) -> dict[str, int]:
        """Every path below, hidden ones included, with its size."""
        return {str(p.relative_to(self.root)): p.stat().st_size for p in self.root.rglob("*")}


@pytest.fixture(scope="session")
def _original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("place")
    write_model(root / "model")
    write_text(root / "train.txt")
    write_text(root / "test.txt", 4000, skip=40_000)
    return root


@pytest.fixture
def place(_original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    shutil.copytree(_original, tmp_path / "place")
    monkeypatch.chdir(tmp_path / "place")
    return Place(tmp_path / "place")
