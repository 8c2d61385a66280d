"""A whole prune of a random model that lies in memory: seconds and peak memory of each stage.

    python benchmarks/whole_prune.py --shapes llama-7b --device cuda --dtype bfloat16 [--ratio 0.2]

Nothing is read from disk or written to it. Ten samples of 128 random tokens calibrate. The first line is no stage: all
samples forward and backward in one batch, to which the others may be compared.
"""

from __future__ import annotations

import argparse
import datetime
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers

from pyprune import apply, discover, score, select
from pyprune.bench.shapes import SHAPES
from pyprune.bench.whole import make_model
from pyprune.importance.memory import peak_memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", choices=SHAPES, default="smollm2")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--ratio", type=float, default=0.2)
    parser.add_argument("--criterion", nargs="+", default=["param_first", "param_second"])
    args = parser.parse_args()
    device = torch.device(args.device)
    if device.type == "cuda":
        place = torch.cuda.get_device_name(device)
    else:
        place = f"CPU, {torch.get_num_threads()} threads"
    print(f"# A whole prune of {args.shapes}, {args.dtype}, on {place}\n")
    print("| criterion | stage | seconds | peak memory, GiB |\n|---|---|---|---|", flush=True)
    for criterion in args.criterion:
        stages: list[str] = []

        def stage(name: str, work: Callable[[], Any], criterion: str = criterion, stages: list[str] = stages) -> Any:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
                torch.cuda.reset_peak_memory_stats(device)
            start = time.perf_counter()
            result = work()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            taken = time.perf_counter() - start
            print(f"| {criterion} | {name} | {taken:.3f} | {peak_memory(device) / 2**30:.2f} |", flush=True)
            stages.append(name)
            return result

        # Streams, libraries and memory pools are made on first use, and belong to no stage.
        model, ids = make_model(args.shapes, getattr(torch, args.dtype), device)
        model.requires_grad_(False)
        forward_and_backward(model, ids)
        stage("forward and backward", lambda model=model, ids=ids: forward_and_backward(model, ids))
        before = sum(p.numel() for p in model.parameters())
        groups = stage("discover", lambda model=model: discover(model))
        batches = [{"input_ids": ids}]
        scores = stage("score", lambda m=model, g=groups, b=batches, c=criterion: score(m, g, b, c))
        plan = stage("select", lambda g=groups, s=scores: select(g, s, ratio=args.ratio))
        smaller = stage("apply", lambda m=model, p=plan: apply(m, p))
        after = sum(p.numel() for p in smaller.parameters())
        with torch.no_grad():
            finite = bool(smaller(input_ids=ids[:1]).logits.isfinite().all())
        print(f"\n{criterion}: {before:,} parameters before, {after:,} after, logits finite: {finite}.\n", flush=True)
        del model, smaller, scores
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    print(f"{datetime.date.today()}, {place}, {versions}.")


def forward_and_backward(model: Any, ids: torch.Tensor) -> None:
    """What scores from activations cannot do without, and a scale for what kernels add: no weight's gradient."""
    embedded = model.get_input_embeddings()(ids).requires_grad_()
    model(inputs_embeds=embedded, labels=ids, use_cache=False).loss.backward()


if __name__ == "__main__":
    main()
