"""A work place with a tiny model, texts and a recipe of all stages."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml
from helpers_recovery import chat_tokenizer, small_llama
from helpers_run import write_text

RECIPE = {
    "model": "model",
    "output_dir": "work",
    "prune": {"ratio": 0.2, "criterion": "l2"},
    "recover": {
        "data": "train.txt", "cutoff": 64, "lora_r": 2, "val_tokens": 256, "epochs": 0.2, "train_batch_size": 4,
        "bf16": False,
    },
    "eval": {"eval_text": "test.txt", "eval_length": 64, "eval_windows": 2},
    "export": {"profile": "uniform", "dtype": "float16"},
    "report": None,
}  # fmt: skip


class Place:
    """A folder with ``model``, ``train.txt``, ``test.txt`` and ``run.yaml``; it is the working directory."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.recipe = {k: dict(v) if isinstance(v, dict) else v for k, v in RECIPE.items()}
        self.write()

    def write(self) -> Path:
        (self.root / "run.yaml").write_text(yaml.safe_dump(self.recipe, sort_keys=False))
        return self.root / "run.yaml"

    def __truediv__(self, name: str) -> Path:
        return self.root / name

    def times(self) -> dict[str, int]:
        """Every file of the work folder that a stage made, with its time of modification."""
        files = (p for p in (self.root / "work").rglob("*") if p.is_file() and not p.name.startswith("."))
        return {str(p.relative_to(self.root)): p.stat().st_mtime_ns for p in files}

    def go(self, **options):
        """Run the recipe; stage -> what was done ("run", "go on", "up to date", "left out")."""
        from pyprune import run_recipe

        self.write()
        done = run_recipe("run.yaml", **options)
        return {s.name: s.action for s in done.stages}

    def would(self, **options) -> list[str]:
        """Stages that would run."""
        from pyprune import run_recipe

        self.write()
        return [s.name for s in run_recipe("run.yaml", dry_run=True, **options).stages if s.action in ("run", "go on")]

    def why(self, **options) -> dict[str, str]:
        """Stage -> reason, of a dry run."""
        from pyprune import run_recipe

        self.write()
        return {s.name: s.why for s in run_recipe("run.yaml", dry_run=True, **options).stages}


@pytest.fixture(scope="session")
def _original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("run")
    small_llama(max_position_embeddings=128).save_pretrained(root / "model")
    chat_tokenizer().save_pretrained(root / "model")
    write_text(root / "train.txt", 4000)
    write_text(root / "test.txt", 1000, skip=40_000)
    return root


@pytest.fixture(scope="session")
def _finished(_original: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The work place after one run of everything."""
    root = tmp_path_factory.mktemp("finished") / "place"
    shutil.copytree(_original, root)
    before = Path.cwd()
    try:
        import os

        os.chdir(root)
        assert set(Place(root).go().values()) == {"run"}
    finally:
        os.chdir(before)
    return root


@pytest.fixture
def place(_original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    shutil.copytree(_original, tmp_path / "place")
    monkeypatch.chdir(tmp_path / "place")
    return Place(tmp_path / "place")


@pytest.fixture
def finished(_finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    """A work place in which everything has run."""
    shutil.copytree(_finished, tmp_path / "place")
    monkeypatch.chdir(tmp_path / "place")
    return Place(tmp_path / "place")
