"""What scoring costs on the CPU: time and memory beside a bare forward and backward pass and LLM-Pruner's procedure.

    python benchmarks/scoring.py MODEL --tokens calibration.npy [--threads 1] [--rounds 3]

``calibration.npy`` holds int64 token ids [samples, length]. The bare pass keeps no gradient longer than one batch of
one sample. LLM-Pruner's procedure is in stock PyTorch (``pyprune.bench.whole.llm_pruner``). For ``param_second`` it is
measured twice: by its description, a backward pass for each sample with every squared gradient kept, and as its code
runs it, with one more backward pass over the whole batch. Times are CPU seconds of one process (user and system), in
turn, medians; a ratio is the median of the rounds' ratios. Peak memory is that of a fresh process that only loads the
model and scores.
"""

from __future__ import annotations

import argparse
import datetime
import os
import statistics
import subprocess
import sys
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
    out: dict[str, Callable[[], object]] = {
        "bare": lambda: bare(model, ids),
        "LLM-Pruner param_first": lambda: llm_pruner(model, ids, "param_first"),
        "LLM-Pruner param_second": lambda: llm_pruner(model, ids, "param_second", batch_pass=False),
        "LLM-Pruner param_second, as its code runs": lambda: llm_pruner(model, ids, "param_second"),
    }
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
    parser.add_argument("--match", default="", help="only contenders whose name holds this")
    parser.add_argument("--only", help="run this contender once and print the peak memory in MiB")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    model, ids = load(args.model), torch.from_numpy(np.load(args.tokens))
    runs = contenders(model, ids)
    if args.only:
        runs[args.only]()
        print(own_peak())
        return
    chosen = {name: run for name, run in runs.items() if args.match in name}
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in chosen}
    for _ in range(args.rounds):
        for name, run in chosen.items():
            start = os.times()
            run()
            end = os.times()
            seconds[name].append((end.user - start.user, end.system - start.system))
    peak = {}
    for name in chosen:
        command = [sys.executable, __file__, args.model, "--tokens", args.tokens, "--only", name]
        out = subprocess.run([*command, "--threads", str(args.threads)], check=True, capture_output=True, text=True)
        peak[name] = int(out.stdout)
    print(f"# Scoring {list(ids.shape)} tokens, float32, {args.threads} thread(s), median of {args.rounds} rounds\n")
    print("| what | CPU seconds | user | system | peak memory, MiB | beside | its time / this | this memory / its |")
    print("|---|---|---|---|---|---|---|---|")
    for name, taken in seconds.items():
        own = f"{statistics.median(map(sum, taken)):.2f}"
        user, system = (statistics.median(column) for column in zip(*taken, strict=True))
        rivals = [r for r in chosen if r.startswith(f"LLM-Pruner {name.split(',')[0]}")]
        for rival in rivals or ["-"]:
            beside = "- | - | -"
            if rival in peak:
                ratio = statistics.median(sum(a) / sum(b) for a, b in zip(seconds[rival], taken, strict=True))
                beside = f"{rival} | {ratio:.2f} | {peak[name] / peak[rival]:.0%}"
            print(f"| {name} | {own} | {user:.2f} | {system:.2f} | {peak[name]} | {beside} |", flush=True)
    print(f"\n{datetime.date.today()}, CPU, torch {torch.__version__}, transformers {transformers.__version__}.")


if __name__ == "__main__":
    main()
