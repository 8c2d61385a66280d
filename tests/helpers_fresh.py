"""Processes in which nothing of pyprune has been imported, quickly: forks of one that has torch and transformers.

Importing those two takes some five seconds, which a test that opens a folder in another process need not wait for.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from helpers_run import Ended

import pyprune

PACKAGE = Path(pyprune.__file__).parents[1]  # where it is imported from, also when that is not this repository

SERVER = """
import json, os, signal, sys, traceback
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

print("ready", flush=True)
for line in sys.stdin:
    task = json.loads(line)
    child = os.fork()
    if child == 0:
        status = 1
        signal.alarm(300)
        try:
            for number, name in enumerate(task["files"]):
                os.dup2(os.open(name, os.O_RDWR | os.O_CREAT), number)
            os.chdir(task["cwd"])
            os.environ.update(task["environment"])
            sys.path[:0] = task["path"]
            sys.argv[1:] = task["arguments"]
            exec(compile(task["script"], "script", "exec"), {"__name__": "__main__"})
            status = 0
        except SystemExit as end:
            status = end.code or 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""

SCRIPT = """
import json, sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "pyprune":
            raise ModuleNotFoundError("pyprune is not installed here", name="pyprune")

sys.meta_path.insert(0, Blocker())
import torch
from transformers import AutoModelForCausalLM, dynamic_module_utils, logging
logging.set_verbosity_error()
logging.disable_progress_bar()
dynamic_module_utils.HF_MODULES_CACHE, new, remote, again, *folders = json.loads(sys.argv[1])
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


@functools.cache
def _server() -> subprocess.Popen[str]:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-I", "-c", SERVER]
    server = subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=tempfile.gettempdir()
    )
    atexit.register(server.kill)
    assert server.stdout is not None and server.stdout.readline() == "ready\n"
    return server


def run_fresh(
    script: str, *arguments: str, cwd: Path, text: str = "", path: tuple[Path, ...] = (), **environment: str
) -> Ended:
    """Run ``script`` with torch and transformers, in ``cwd``, with ``text`` as its input; at most five minutes.

    Args:
        path: folders to import from, before all others.
        environment: variables to set.
    """
    server = _server()
    assert server.stdin is not None and server.stdout is not None
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, name) for name in ("in", "out", "err")]
        files[0].write_text(text)
        task = {
            "script": script, "arguments": arguments, "cwd": str(cwd), "files": list(map(str, files)),
            "path": list(map(str, path)), "environment": environment,
        }  # fmt: skip
        server.stdin.write(json.dumps(task) + "\n")
        server.stdin.flush()
        status = int(server.stdout.readline())
        return Ended(status, files[1].read_text(), files[2].read_text())


def pyprune_fresh(*arguments: str, cwd: Path, text: str = "") -> Ended:
    """``pyprune ...`` in such a process."""
    script = "from pyprune.cli.main import main; raise SystemExit(main())"
    return run_fresh(script, *arguments, cwd=cwd, text=text, path=(PACKAGE,))


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
    asked = json.dumps([str(cache), new, remote, again, *map(str, folders)])
    ended = run_fresh(SCRIPT, asked, cwd=folders[0].parent)
    assert ended.status == 0, ended.err
    return [torch.load(f"{folder}.out") for folder in folders]


def own_answer(model, tokens: torch.Tensor, new: int = 32) -> dict:
    """The same of a model in memory."""
    with torch.no_grad():
        logits = model(tokens).logits
    options = {"max_new_tokens": new, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    said = model.generate(tokens, attention_mask=torch.ones_like(tokens), **options)
    return {"logits": logits, "said": said, "class": type(model).__name__}
