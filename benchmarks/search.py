"""Allocation search on SmolLM2-135M-Instruct: divergence from the dense model, of the found widths and of plain ones.

    python benchmarks/search.py MODEL --texts DIR --ratio 0.5 --minutes 30 --state search.json

``DIR`` holds ``c4_sample.jsonl.gz`` (calibration) and ``wikitext2_valid.txt.gz``. The protocol: percent of the
parameters that are not embeddings; scores, refits and search read the same calibration; every plan is then compensated
and measured by the Kullback-Leibler divergence over the whole vocabulary, in nats a token, on other documents of C4 and
on WikiText-2 validation text, which none of them has read.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import time
from pathlib import Path

import torch
import transformers

import pyprune
from pyprune.compensation import compensate
from pyprune.importance.calibration import Calibration, load_calibration


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of SmolLM2-135M-Instruct (examples/smollm2.py makes it)")
    parser.add_argument(
        "--texts", type=Path, required=True, help="folder with c4_sample.jsonl.gz and wikitext2_valid.txt.gz"
    )
    parser.add_argument("--ratio", type=float, default=0.5, help="fraction of the non-embedding parameters that goes")
    parser.add_argument("--roles", default="ffn")
    parser.add_argument("--criterion", default="wanda")
    parser.add_argument("--compensation", default="least-squares", choices=("none", "least-squares"))
    parser.add_argument("--samples", type=int, default=16, help="calibration samples")
    parser.add_argument("--length", type=int, default=512, help="tokens in each")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--steps", type=int, default=None)
    parser.add_argument("--state", default=None, help="file with the search's state")
    parser.add_argument("--against", default="uniform,log_depth,knapsack", help="allocations to compare with")
    args = parser.parse_args()

    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    web = str(args.texts / "c4_sample.jsonl.gz")
    crops = list(load_calibration(web, tokenizer, samples=args.samples + 4, length=args.length))  # evenly over the text
    batches = load_calibration(crops[:-4])
    fresh = {
        "C4, other documents": load_calibration(crops[-4:]),
        "WikiText-2 valid": load_calibration(
            str(args.texts / "wikitext2_valid.txt.gz"), tokenizer, samples=4, length=args.length
        ),
    }
    model = pyprune.load(args.model).eval()
    groups, roles = pyprune.discover(model), args.roles.split(",")
    scores = pyprune.score(model, groups, batches, args.criterion, roles=roles)
    request = {"roles": roles, "count_embeddings": False}
    start = time.perf_counter()
    found = pyprune.search_plan(
        model, groups, scores, batches, args.ratio, **request, compensation=args.compensation, minutes=args.minutes,
        steps=args.steps, file=args.state,
    )  # fmt: skip
    print(f"search: {time.perf_counter() - start:.0f} s", flush=True)
    plans = {name: pyprune.select(groups, scores, args.ratio, allocation=name, **request)
             for name in args.against.split(",")}  # fmt: skip
    plans["search"] = found
    print(f"| allocation | non-embedding removed | {' | '.join(fresh)} |\n|---|---|{'---|' * len(fresh)}", flush=True)
    for name, plan in plans.items():
        cut = copy.deepcopy(model)
        if args.compensation != "none":
            compensate(cut, plan, batches, args.compensation)
        cut = pyprune.apply(cut, plan)
        values = " | ".join(f"{divergence(model, cut, text):.4f}" for text in fresh.values())
        print(f"| {name} | {plan.details['achieved']['without_embeddings']['ratio']:.2%} | {values} |", flush=True)
    report = found.details["search"]
    print(f"\nWidths: {found.details['widths']}")
    print({k: v for k, v in report.items() if k not in ("starts", "history")})
    for start in report["starts"]:
        print(f"{start['name']}: screening {start['screening']}, all {start['divergence']}")
    for entry in report["history"]:
        print(entry)
    print(f"{datetime.date.today()}, CPU, torch {torch.__version__}, transformers {transformers.__version__}.")


@torch.no_grad()
def divergence(dense: torch.nn.Module, cut: torch.nn.Module, text: Calibration) -> float:
    """Mean KL(dense || cut), nats a token."""
    total = 0.0
    for batch in text:
        p, q = (m(**batch).logits.float().log_softmax(-1) for m in (dense, cut))
        total += float((p.exp() * (p - q)).sum(-1).double().sum())
    return total / text.tokens


if __name__ == "__main__":
    main()
