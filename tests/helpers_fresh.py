"""Opening exported folders in another process, in which pyprune cannot be imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

SCRIPT = """
import json, os, sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "pyprune":
            raise ModuleNotFoundError("pyprune is not installed here", name="pyprune")

sys.meta_path.insert(0, Blocker())
import torch
from transformers import AutoModelForCausalLM, logging
logging.set_verbosity_error()
logging.disable_progress_bar()
new, remote, again, *folders = json.loads(sys.argv[1])
for folder in folders:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=remote)
    tokens = torch.load(folder + ".pt")["tokens"]
    with torch.no_grad():
        logits = model(tokens).logits
    options = {"max_new_tokens": new, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    said = model.generate(tokens, attention_mask=torch.ones_like(tokens), **options)
    torch.save({"logits": logits, "said": said, "class": type(model).__name__}, folder + ".out")
    if again:
        model.save_pretrained(folder + "-again")
        model = AutoModelForCausalLM.from_pretrained(folder + "-again", trust_remote_code=remote)
        with torch.no_grad():
            assert torch.equal(model(tokens).logits, logits)
assert not any(name.split(".")[0] == "pyprune" for name in sys.modules)
"""


def ask(folder: Path, tokens: torch.Tensor) -> None:
    """Leaves int64 tokens [batch, length] for :func:`fresh_answers` beside a folder."""
    torch.save({"tokens": tokens}, f"{folder}.pt")


def fresh_answers(
    folders: list[Path], cache: Path, new: int = 32, remote: bool = True, again: bool = False
) -> list[dict]:
    """For every folder what plain transformers makes of the tokens: "logits", "said" (greedy, with a cache), "class".

    Args:
        cache: folder for the modelling code that transformers copies.
        again: check that transformers saves the model and opens what it saved.
    """
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"HF_MODULES_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    asked = json.dumps([new, remote, again, *map(str, folders)])
    ended = subprocess.run(
        [sys.executable, "-I", "-c", SCRIPT, asked], capture_output=True, text=True, env=environment, timeout=300
    )
    assert ended.returncode == 0, ended.stderr
    return [torch.load(f"{folder}.out") for folder in folders]


def own_answer(model, tokens: torch.Tensor, new: int = 32) -> dict:
    """The same of a model in memory."""
    with torch.no_grad():
        logits = model(tokens).logits
    options = {"max_new_tokens": new, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    said = model.generate(tokens, attention_mask=torch.ones_like(tokens), **options)
    return {"logits": logits, "said": said, "class": type(model).__name__}
