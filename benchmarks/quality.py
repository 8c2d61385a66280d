"""Perplexity of a pruned SmolLM2-135M-Instruct: which criterion, allocation and compensation.

    python benchmarks/quality.py MODEL --shared DIR --ratio 0.2 --criterion wanda --compensation least-squares

``DIR/data`` holds ``c4_sample.jsonl.gz`` (calibration) and ``wikitext2_test.txt.gz`` (evaluation). The protocol: percent
of the parameters that are not embeddings; calibration on web text, never on the evaluation's own domain; perplexity on
the first 8 windows of 1024 tokens of the WikiText-2 test text as it stands. One line of a table a run.
"""

from __future__ import annotations

import argparse
import datetime
from pathlib import Path

import torch
import transformers

import pyprune


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of SmolLM2-135M-Instruct (examples/smollm2.py makes it)")
    parser.add_argument("--shared", type=Path, required=True, help="folder whose data/ holds the two texts")
    parser.add_argument("--ratio", type=float, default=0.2, help="fraction of the non-embedding parameters that goes")
    parser.add_argument("--criterion", default="wanda")
    parser.add_argument("--allocation", default="uniform")
    parser.add_argument("--allocation_criterion", default=None)
    parser.add_argument("--compensation", default="least-squares")
    parser.add_argument("--compensation_target", default="own")
    parser.add_argument("--token_weights", default="inverse")
    parser.add_argument("--roles", default="ffn")
    parser.add_argument("--round_to", type=int, default=None)
    parser.add_argument("--samples", type=int, default=40, help="calibration samples; a fifth of them is held out")
    parser.add_argument("--length", type=int, default=512, help="tokens in each")
    parser.add_argument("--windows", type=int, default=8, help="windows of 1024 tokens that are scored")
    args = parser.parse_args()

    out = pyprune.prune(
        args.model, ratio=args.ratio, count_embeddings=False, criterion=args.criterion, allocation=args.allocation,
        allocation_criterion=args.allocation_criterion,
        compensation=args.compensation, compensation_target=args.compensation_target, roles=args.roles,
        token_weights=args.token_weights, round_to=args.round_to, samples=args.samples, length=args.length,
        calibration=args.shared / "data" / "c4_sample.jsonl.gz", batch_size=8,
    )  # fmt: skip
    tokenizer = out.tokenizer
    from pyprune.evaluation.perplexity import perplexity, read_windows

    windows, text = read_windows(
        str(args.shared / "data" / "wikitext2_test.txt.gz"), tokenizer, length=1024, windows=args.windows
    )
    found = perplexity(out.model, windows, text=text)
    removed = out.report.parameters["without_embeddings"]["ratio"]
    spent = {s["name"]: s["seconds"] for s in out.report.stages}
    widths = [c.width for c in out.plan.cuts if c.group.role == "ffn"]
    by = f" by {args.allocation_criterion}" if args.allocation_criterion else ""
    print("| criterion | allocation | compensation | calibration | non-embedding removed | perplexity | score, s "
          "| compensate, s | peak memory, MiB |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|---|")
    print(
        f"| {args.criterion} | {args.allocation}{by}, {args.roles} | {args.compensation}, {args.compensation_target} "
        f"| C4, {args.samples} x {args.length} | {removed:.2%} | {found.perplexity:.2f} | {spent['score']:.0f} "
        f"| {spent.get('compensate', 0):.0f} | {out.report.peak_memory / 2**20:.0f} |",
        flush=True,
    )
    print(f"\nFFN widths: {widths}\n{found.protocol}.")
    print(f"{datetime.date.today()}, CPU, torch {torch.__version__}, transformers {transformers.__version__}.")
    for step in out.report.compensation or []:
        for m in step["matrices"]:
            print(f"{m['tensor']}: {m['kept']} of {m['of']}, lam {m['penalty']}, blend {m['blend']}, held-out error "
                  f"{m['before']:.4f} -> {m['after']:.4f}")  # fmt: skip


if __name__ == "__main__":
    main()
