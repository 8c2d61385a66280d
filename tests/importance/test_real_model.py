"""Scoring a real model: memory, in a process of its own, and the same scores however it is batched."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

LLM_PRUNER_MIB = 3463  # peak memory of LLM-Pruner's process on this model with the same 10 x 128 tokens

SCRIPT = """
import json, sys, torch
from transformers import AutoModelForCausalLM
from helpers_llama import llama_groups
from pyprune.importance import load_calibration, score

torch.set_num_threads(1)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
groups = llama_groups(model.config, model)
ids = torch.randint(0, model.config.vocab_size, (10, 128), generator=torch.Generator().manual_seed(0))
calibration = load_calibration(ids, batch_size=int(sys.argv[3]))
scores = score(model, groups, calibration, sys.argv[2], roles=["kv_heads", "ffn"])
print(json.dumps(scores.details))
"""


@pytest.mark.real_model
@pytest.mark.slow
@pytest.mark.parametrize(("criterion", "batch_size"), [("param_first", 1), ("param_second", 10)])
def test_scoring_takes_at_most_60_percent_of_llm_pruners_memory(
    smollm2_path: Path, criterion: str, batch_size: int
) -> None:
    root = Path(__file__).parents[2]
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(smollm2_path), criterion, str(batch_size)],
        capture_output=True, text=True, check=False, cwd=root, env={"PYTHONPATH": f"{root}:{root / 'tests'}"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    details = json.loads(run.stdout.splitlines()[-1])
    assert details["engine"] == "block sweep"
    assert details["peak_memory"] / 2**20 <= 0.6 * LLM_PRUNER_MIB
