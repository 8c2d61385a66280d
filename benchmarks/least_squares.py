"""What a least-squares refit gains behind every selector, and how far selectors are apart with and without it.

    python benchmarks/least_squares.py MODEL --calibration c4_sample.jsonl.gz --eval_text wikitext2_test.txt.gz

One row a selector and ratio: the same widths in every layer, percent of the parameters that are not embeddings,
perplexity on the first windows of 1024 tokens without and with the refit, and the held-out error of the refitted
projections (calibration samples that no refit reads, fraction of the output's power): its mean, and in how many of
them it fell. ``--done FILE`` keeps finished rows, and a run that was stopped goes on behind them.
"""

from __future__ import annotations

import argparse
import copy
import datetime
from pathlib import Path

import torch
import transformers

import pyprune
from pyprune.compensation import compensate
from pyprune.evaluation.perplexity import perplexity, read_windows
from pyprune.importance.calibration import load_calibration

SELECTORS = "random,l1,l2,vectorize,param_first,param_second,param_mix,group_fisher,wanda,flap,obs"
SCORED = 128  # tokens a sample
HEADER = """\
| selector | removed | perplexity | refitted | mean held-out error | refitted | projections that it fell in |
|---|---|---|---|---|---|---|"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a Hugging Face model")
    parser.add_argument("--calibration", required=True, help="text, as for pyprune prune")
    parser.add_argument("--eval_text", required=True, help="text that perplexity is measured on")
    parser.add_argument("--ratios", default="0.2,0.5")
    parser.add_argument("--selectors", default=SELECTORS)
    parser.add_argument("--roles", default="kv_heads,ffn")
    parser.add_argument("--samples", type=int, default=32, help="calibration samples; some of them are held out")
    parser.add_argument("--length", type=int, default=512, help="tokens in each that refits read; scores read 128")
    parser.add_argument("--windows", type=int, default=8, help="windows of 1024 tokens")
    parser.add_argument("--done", type=Path, help="file with finished rows")
    args = parser.parse_args()

    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    batches = load_calibration(args.calibration, tokenizer, samples=args.samples, length=args.length)
    few = load_calibration(args.calibration, tokenizer, samples=args.samples, length=SCORED)
    windows, name = read_windows(args.eval_text, tokenizer, length=1024, windows=args.windows)
    dense = pyprune.load(args.model).eval()
    groups = pyprune.discover(dense)
    roles = args.roles.split(",")
    rows = [] if args.done is None or not args.done.exists() else args.done.read_text().splitlines()
    print(HEADER)
    print("".join(f"{row}\n" for row in rows), end="", flush=True)
    for selector in args.selectors.split(","):
        ratios = [float(r) for r in args.ratios.split(",")]
        left = [r for r in ratios if not any(row.startswith(f"| {selector} | {r:.0%} |") for row in rows)]
        if not left:
            continue
        scores = pyprune.score(dense, groups, few, selector, roles=roles)
        for ratio in left:
            plan = pyprune.select(groups, scores, ratio, allocation="uniform", roles=roles, count_embeddings=False)
            before = perplexity(pyprune.apply(copy.deepcopy(dense), plan), windows, text=name).perplexity
            model = copy.deepcopy(dense)
            done = compensate(model, plan, batches, "least-squares")
            after = perplexity(pyprune.apply(model, done.plan), windows, text=name).perplexity
            errors = [(m.before or 0.0, m.after or 0.0) for m in done.matrices]
            fell = sum(b > a for b, a in errors)
            means = [sum(e) / len(errors) for e in zip(*errors, strict=True)]
            rows.append(
                f"| {selector} | {ratio:.0%} | {before:.2f} | {after:.2f} | {means[0]:.3f} | {means[1]:.3f} "
                f"| {fell} of {len(errors)} |"
            )
            print(rows[-1], flush=True)
            if args.done is not None:
                args.done.write_text("".join(f"{row}\n" for row in rows))
    print(f"\n{datetime.date.today()}, torch {torch.__version__}, transformers {transformers.__version__}.")


if __name__ == "__main__":
    main()
