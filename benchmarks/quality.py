"""Perplexity of a pruned SmolLM2-135M-Instruct: which criterion, allocation and compensation.

    python benchmarks/quality.py MODEL --shared DIR --ratio 0.2 --criterion wanda --compensation least-squares

``DIR/data`` holds ``c4_sample.jsonl.gz`` (calibration) and ``wikitext2_test.txt.gz`` (evaluation). The protocol:
percent of the parameters that are not embeddings; calibration on web text, never on the evaluation's own domain;
perplexity on the first 8 windows of 1024 tokens of the WikiText-2 test text as it stands. One run is one row.
"""

from __future__ import annotations

import argparse
import datetime
import resource
import sys
import time
from pathlib import Path

import torch
import transformers

import pyprune
from pyprune.compensation import compensate
from pyprune.evaluation.perplexity import perplexity, read_windows
from pyprune.importance.calibration import load_calibration


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of SmolLM2-135M-Instruct (examples/smollm2.py makes it)")
    parser.add_argument("--shared", type=Path, required=True, help="folder whose data/ holds the two texts")
    parser.add_argument("--ratio", type=float, default=0.2, help="fraction of the non-embedding parameters that goes")
    parser.add_argument("--criterion", default="wanda")
    parser.add_argument("--allocation", default="uniform")
    parser.add_argument("--allocation_criterion", default=None)
    parser.add_argument("--allocation_samples", type=int, default=16, help="samples of 128 tokens for the line above")
    parser.add_argument("--compensation", default="least-squares")
    parser.add_argument("--compensation_target", default="own")
    parser.add_argument("--token_weights", default="inverse")
    parser.add_argument("--roles", default="ffn")
    parser.add_argument("--round_to", type=int, default=None)
    parser.add_argument("--samples", type=int, default=40, help="calibration samples; a fifth of them is held out")
    parser.add_argument("--length", type=int, default=512, help="tokens in each")
    parser.add_argument("--windows", type=int, default=8, help="windows of 1024 tokens that are scored")
    args = parser.parse_args()

    data, seconds, start = args.shared / "data", {}, time.perf_counter()

    def spent(name: str) -> None:
        nonlocal start
        seconds[name], start = time.perf_counter() - start, time.perf_counter()
        print(f"{name}: {seconds[name]:.0f} s", file=sys.stderr, flush=True)

    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    text = str(data / "c4_sample.jsonl.gz")
    batches = load_calibration(text, tokenizer, samples=args.samples, length=args.length, batch_size=8)
    windows, name = read_windows(
        str(data / "wikitext2_test.txt.gz"), tokenizer, length=1024, windows=args.windows
    )  # fmt: skip
    model = pyprune.load(args.model)
    groups = pyprune.discover(model)
    roles = args.roles.split(",")
    spent("load, read, discover")
    scores = pyprune.score(model, groups, batches, args.criterion, roles=roles, token_weights=args.token_weights)
    spent("score")
    shares = None
    if args.allocation_criterion is not None:
        few = load_calibration(text, tokenizer, samples=args.allocation_samples, length=128, seed=1)
        shares = pyprune.score(model, groups, few, args.allocation_criterion, roles=roles)
        spent("score for allocation")
    plan = pyprune.select(
        groups, scores, args.ratio, allocation=args.allocation, roles=roles, round_to=args.round_to,
        count_embeddings=False, allocation_scores=shares,
    )  # fmt: skip
    done = None
    if args.compensation != "none":
        done = compensate(
            model, plan, batches, args.compensation, token_weighting=args.token_weights,
            target=args.compensation_target,
        )  # fmt: skip
        plan = done.plan
        spent("compensate")
    model = pyprune.apply(model, plan)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    found = perplexity(model, windows, text=name)
    by = f" by {args.allocation_criterion}" if args.allocation_criterion else ""
    print("| criterion | allocation | compensation | calibration | non-embedding removed | perplexity | score, s "
          "| compensate, s | peak memory before the evaluation, MiB |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|---|")
    print(
        f"| {args.criterion}, {args.token_weights} | {args.allocation}{by}, {args.roles} "
        f"| {args.compensation}, {args.compensation_target} | C4, {args.samples} x {args.length} "
        f"| {plan.details['achieved']['without_embeddings']['ratio']:.2%} | {found.perplexity:.2f} "
        f"| {seconds['score']:.0f} | {seconds.get('compensate', 0):.0f} | {peak:.0f} |",
        flush=True,
    )
    print(f"\nWidths: {plan.details['widths']}\n{found.protocol}.")
    print(f"{datetime.date.today()}, CPU, torch {torch.__version__}, transformers {transformers.__version__}.")
    for m in done.matrices if done is not None else []:
        held = "" if m.before is None else f", held-out error {m.before:.4f} -> {m.after:.4f}"
        print(f"{m.tensor}: {m.kept} of {m.of}, lam {m.penalty}, blend {m.blend}{held}")


if __name__ == "__main__":
    main()
