"""What scoring costs on the CPU: time and memory beside a bare forward and backward pass and LLM-Pruner's procedure.

    python benchmarks/scoring.py MODEL --tokens calibration.npy [--threads 1] [--rounds 3]

``calibration.npy`` holds int64 token ids [samples, length]. The bare pass keeps no gradient longer than one batch of
one sample. LLM-Pruner's procedure is in stock PyTorch (``pyprune.bench.whole.llm_pruner``): for ``param_second`` a
backward pass for each sample with every squared gradient kept, and one over the whole batch. Times are CPU seconds of
one process, in turn, medians; peak memory is that of a fresh process that only loads the model and scores.
"""

from __future__ import annotations

import argparse
import datetime
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import transformers
from torch.nn.functional import cross_entropy

from pyprune import discover, load, score
from pyprune.bench.whole import llm_pruner
from pyprune.importance.calibration import load_calibration

CRITERIA = ("param_first", "param_second", "param_mix", "vectorize", "group_fisher")
THEIRS = ("param_first", "param_second")


def bare(model: torch.nn.Module, ids: torch.Tensor) -> None:
    """Forward and backward over all samples, gradients of all parameters, freed after each sample."""
    model.requires_grad_(True)
    for sample in ids.split(1):
        logits = model(input_ids=sample, use_cache=False).logits
        cross_entropy(logits[:, :-1].flatten(0, 1).float(), sample[:, 1:].flatten()).backward()
        model.zero_grad(set_to_none=True)
    model.requires_grad_(False)


def contenders(model: torch.nn.Module, ids: torch.Tensor) -> dict[str, Callable[[], object]]:
    groups, batches = discover(model), load_calibration(ids, samples=len(ids), length=ids.shape[1])
    roles = ["kv_heads", "ffn"]
    out: dict[str, Callable[[], object]] = {"bare": lambda: bare(model, ids)}
    for name in THEIRS:
        out[f"LLM-Pruner {name}"] = lambda name=name: llm_pruner(model, ids, name)
    for name in CRITERIA:
        for route in ("activations", "gradients") if name in THEIRS else ("activations",):
            out[f"{name}, {route}"] = lambda n=name, r=route: score(model, groups, batches, n, roles=roles, route=r)
    return out


def own_peak() -> int:
    """The most MiB that this program had resident; ``ru_maxrss`` would begin at the size of what started it."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) // 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--tokens", required=True)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", help="run this contender once and print the peak memory in MiB")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    model, ids = load(args.model), torch.from_numpy(np.load(args.tokens))
    runs = contenders(model, ids)
    if args.only:
        runs[args.only]()
        print(own_peak())
        return
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(args.rounds):
        for name, run in runs.items():
            start = time.process_time()
            run()
            seconds[name].append(time.process_time() - start)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    peak = {}
    for name in runs:
        command = [sys.executable, __file__, args.model, "--tokens", args.tokens, "--only", name]
        out = subprocess.run([*command, "--threads", str(args.threads)], check=True, capture_output=True, text=True)
        peak[name] = int(out.stdout)
    print(f"# Scoring {list(ids.shape)} tokens, float32, {args.threads} thread(s), median of {args.rounds} rounds\n")
    print("| what | CPU seconds | of a bare pass | LLM-Pruner / this | peak memory, MiB | of LLM-Pruner's |")
    print("|---|---|---|---|---|---|")
    for name, taken in median.items():
        rival = f"LLM-Pruner {name.split(',')[0]}"
        beside = f"{median[rival] / taken:.2f} | {peak[name]} | {peak[name] / peak[rival]:.0%}" if rival in peak else (
            f"- | {peak[name]} | -")  # fmt: skip
        print(f"| {name} | {taken:.2f} | {taken / median['bare']:.2f} | {beside} |", flush=True)
    print(f"\n{datetime.date.today()}, CPU, torch {torch.__version__}, transformers {transformers.__version__}.")


if __name__ == "__main__":
    main()
