"""pyprune beside LLM-Pruner on SmolLM2-135M-Instruct: the same calibration tokens, layers and widths.

    python benchmarks/llm_pruner.py MODEL --baselines DIR --eval_text wikitext2_test.txt.gz

``DIR`` holds what LLM-Pruner's own code was measured at: the calibration tokens (``calib_10x128.npy``, int64 [10, 128])
and the rows it removed (``llmpruner_removed_units.json.gz``: run -> module -> row indices). Its perplexities stand in
``RIVAL``, on the first 8 windows of 1024 tokens.
"""

from __future__ import annotations

import argparse
import datetime
import gzip
import json
from pathlib import Path
from typing import Any

import torch
import transformers

from pyprune import apply, discover, load, score, select
from pyprune.evaluation.perplexity import perplexity, read_windows
from pyprune.importance.calibration import load_calibration

# name -> (layers, widths). A cuts FFN channels only, B one of three KV heads too; 20 and 50 % of what is not embedding.
RUNS: dict[str, tuple[str, dict[str, int]]] = {
    "A20": ("4-27", {"ffn": 1024}),
    "B20": ("6-23", {"kv_heads": 2, "ffn": 1022}),
    "A50": ("3-28", {"ffn": 353}),
    "B50": ("3-28", {"kv_heads": 2, "ffn": 522}),
}
# (run, criterion) -> (LLM-Pruner's perplexity, the same with query heads credited to the KV head that they read)
RIVAL: dict[tuple[str, str], tuple[float, float | None]] = {
    ("A20", "param_first"): (36.81, None), ("A20", "param_second"): (35.88, None),
    ("B20", "param_first"): (53.47, 68.34), ("B20", "param_second"): (48.37, None), ("B20", "vectorize"): (57.23, None),
    ("A50", "param_first"): (231.7, None),
    ("B50", "param_first"): (173.3, 170.3), ("B50", "param_second"): (125.96, None),
    ("B50", "vectorize"): (318.4, None),
}  # fmt: skip
# (run, criterion) -> the run's name in the file of removed rows
REMOVED = {
    ("A20", "param_first"): "A20_first", ("A20", "param_second"): "A20_second",
    ("B20", "param_first"): "B20_first_fixgqa", ("B20", "param_second"): "B20_second",
    ("B20", "vectorize"): "B20_vectorize", ("B50", "param_first"): "B50_first",
    ("B50", "param_second"): "B50_second",
}  # fmt: skip


def agreement(plan: Any, removed: dict[str, list[int]]) -> tuple[int, int]:
    """(FFN channels that both keep, FFN channels that are kept) over all layers."""
    same = total = 0
    for cut in plan.cuts:
        if cut.group.role == "ffn":
            theirs = set(range(cut.group.units)) - set(removed[f"{cut.group.module}.gate_proj"])
            same += len(theirs & set(cut.kept[0]))
            total += cut.width
    return same, total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of SmolLM2-135M-Instruct (examples/smollm2.py makes it)")
    parser.add_argument("--baselines", type=Path, required=True, help="folder with LLM-Pruner's calibration and result")
    parser.add_argument("--eval_text", required=True, help="WikiText-2 test, tokenised form")
    parser.add_argument("--windows", type=int, default=8, help="windows of 1024 tokens that are scored")
    args = parser.parse_args()

    removed = json.loads(gzip.decompress((args.baselines / "llmpruner_removed_units.json.gz").read_bytes()))
    batches = load_calibration(str(args.baselines / "calib_10x128.npy"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    windows, text = read_windows(args.eval_text, tokenizer, length=1024, windows=args.windows)
    model = load(args.model)
    groups = discover(model)
    scored = {c: score(model, groups, batches, c, roles=["kv_heads", "ffn"]) for c in sorted({c for _, c in RIVAL})}
    found = perplexity(model, windows, text=text)

    print(f"# Beside LLM-Pruner, at its own widths\n\nPerplexity on {found.protocol}. Dense: {found.perplexity:.2f}.")
    print("Calibration: 10 samples of 128 tokens of WikiText-2 valid, the very tokens that LLM-Pruner had.\n")
    print(
        "| layers, widths | criterion | removed | LLM-Pruner | LLM-Pruner, heads credited rightly | pyprune "
        "| kept FFN channels in common |"
    )
    print("|---|---|---|---|---|---|---|")
    for (run, criterion), (theirs, mended) in RIVAL.items():
        layers, widths = RUNS[run]
        plan = select(groups, scored[criterion], widths=widths, layers=layers)
        smaller = apply(load(args.model), plan)
        ours = perplexity(smaller, windows, text=text).perplexity
        share = plan.details["achieved"]["without_embeddings"]["ratio"]
        alike = "-"
        if (run, criterion) in REMOVED:
            same, total = agreement(plan, removed[REMOVED[run, criterion]])
            alike = f"{same / total:.2%}"
        print(
            f"| {run}: {layers}, {', '.join(f'{k} {v}' for k, v in widths.items())} | {criterion} | {share:.2%} "
            f"| {theirs} | {mended or '-'} | {ours:.2f} | {alike} |",
            flush=True,
        )
    print(f"\n{datetime.date.today()}, CPU, torch {torch.__version__}, transformers {transformers.__version__}.")


if __name__ == "__main__":
    main()
