"""What scoring costs: CPU time beside a bare forward and backward pass, and the peak memory of the process.

    python benchmarks/scoring.py MODEL --tokens calibration.npy [--batch_size 1] [--rounds 3]

``calibration.npy`` holds int64 token ids [samples, length]. The bare pass keeps no gradient longer than one batch; both
run in this process, in turn, and the medians of their CPU times are compared. Peak memory is that of a process that
only loads the model and scores.
"""

from __future__ import annotations

import argparse
import datetime
import resource
import statistics
import subprocess
import sys
import time

import numpy as np
import torch
import transformers
from torch.nn.functional import cross_entropy

from pyprune import discover, load, score
from pyprune.importance.calibration import load_calibration

CRITERIA = ("vectorize", "param_first", "param_second", "param_mix")


def bare(model: torch.nn.Module, ids: torch.Tensor, batch_size: int) -> None:
    """Forward and backward over all batches, gradients of all parameters, freed after each batch."""
    model.requires_grad_(True)
    for batch in ids.split(batch_size):
        logits = model(input_ids=batch, use_cache=False).logits
        cross_entropy(logits[:, :-1].flatten(0, 1).float(), batch[:, 1:].flatten()).backward()
        model.zero_grad(set_to_none=True)
    model.requires_grad_(False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--tokens", required=True)
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", help="score with this criterion once and print the peak memory in MiB")
    args = parser.parse_args()

    model = load(args.model)
    groups = discover(model)
    batches = load_calibration(args.tokens, batch_size=args.batch_size)
    if args.only:
        score(model, groups, batches, args.only, roles=["kv_heads", "ffn"])
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
        return
    ids = torch.from_numpy(np.load(args.tokens))
    seconds: dict[str, list[float]] = {name: [] for name in ("bare", *CRITERIA)}
    for _ in range(args.rounds):
        for name, taken in seconds.items():
            start = time.process_time()
            if name == "bare":
                bare(model, ids, args.batch_size)
            else:
                score(model, groups, batches, name, roles=["kv_heads", "ffn"])
            taken.append(time.process_time() - start)
    floor = statistics.median(seconds["bare"])
    print(f"# Scoring {tuple(ids.shape)} tokens in batches of {args.batch_size}, {torch.get_num_threads()} threads\n")
    print("| criterion | CPU seconds / bare forward and backward | peak memory of the process, MiB |\n|---|---|---|")
    for name in CRITERIA:
        command = [sys.executable, __file__, args.model, "--tokens", args.tokens, "--only", name]
        peak = subprocess.run(
            [*command, "--batch_size", str(args.batch_size)], check=True, capture_output=True, text=True
        ).stdout.strip()
        print(f"| {name} | {statistics.median(seconds[name]) / floor:.2f} | {peak} |", flush=True)
    print(f"\n{datetime.date.today()}, CPU, torch {torch.__version__}, transformers {transformers.__version__}.")


if __name__ == "__main__":
    main()
