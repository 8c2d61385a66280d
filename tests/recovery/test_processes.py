"""Two processes give what one gives."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers_run import ROOT, write_model, write_text
from safetensors.torch import load_file

LAUNCHERS = {
    "one": ("-m",),
    "torchrun": ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"),
    "accelerate": ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
                   "--mixed_precision", "no", "--dynamo_backend", "no", "--module"),
}  # fmt: skip


def run(launcher: str, place: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    """The report that is printed, and the weights."""
    command = [
        sys.executable, *LAUNCHERS[launcher], "pyprune", "recover", "model", "--data", "train.txt", "--cutoff", "64",
        "--train_batch_size", "5", "--micro_batch_size", "2", "--lora_r", "4", "--val_tokens", "512", "--no_bf16",
        "--epochs", "0.5", "--device", "cpu", "--json", "--output_dir", launcher,
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MASTER_PORT": "29613"}
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), load_file(place / launcher / "model.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_two_processes_give_the_losses_and_weights_of_one_and_speak_once(tmp_path, launcher: str) -> None:
    write_model(tmp_path / "model", hidden_size=32, intermediate_size=48, num_hidden_layers=2)
    write_text(tmp_path / "train.txt", 6000)
    one, alone = run("one", tmp_path)
    two, together = run(launcher, tmp_path)
    assert (one["processes"], two["processes"]) == (1, 2)
    assert two["steps"] == one["steps"] > 5
    torch.testing.assert_close(torch.tensor(two["losses"]), torch.tensor(one["losses"]), rtol=1e-4, atol=1e-4)
    for name, weights in alone.items():
        torch.testing.assert_close(together[name], weights, rtol=1e-3, atol=1e-4)
    assert {p.name for p in tmp_path.iterdir()} == {"model", "train.txt", "one", launcher}
