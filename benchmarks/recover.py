"""Recovery of SmolLM2-135M-Instruct after pruning: prune, recover, WikiText-2 perplexity before and after.

    python benchmarks/recover.py MODEL --texts DIR [--minutes 60] [--ratios 0.2 0.5] [--distill] [--work DIR]

``DIR`` holds ``c4_sample.jsonl.gz`` (web text: calibration and training), ``dolly_3k.jsonl.gz`` (instructions) and
``wikitext2_test.txt.gz`` (WikiText-2 test, tokenised form). A ratio is of the parameters that are not embeddings, as
papers count. With ``--work`` the folders stay, and a run that was interrupted goes on. Prints Markdown.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import peft
import torch
import transformers

from pyprune import load, prune, recover
from pyprune.evaluation.perplexity import Perplexity, perplexity, read_windows

TARGETS = {0.2: 0.15, 0.5: 0.50}  # ratio -> the fall of perplexity that is hoped for


def pruned(args: argparse.Namespace, ratio: float, work: Path) -> Path:
    """The pruned model's folder, made when it is not there."""
    folder = work / f"pruned{round(100 * ratio)}"
    if not folder.exists():
        prune(
            args.model, ratio=ratio, count_embeddings=False, criterion=args.criterion,
            calibration=str(args.texts / "c4_sample.jsonl.gz"), samples=32, length=128, output_dir=folder,
        )  # fmt: skip
    return folder


def recovered(args: argparse.Namespace, folder: Path) -> tuple[Any, float]:
    """The result and the minutes it took, loading and saving included."""
    out = folder.with_name(folder.name + "_recovered")
    more = {} if args.learning_rate is None else {"learning_rate": args.learning_rate}
    if args.distill:
        more |= {"teacher": args.model, "distill_cache": str(folder.parent / "teacher")}
    start = time.monotonic()
    result = recover(
        folder, data={str(args.texts / "c4_sample.jsonl.gz"): 4, str(args.texts / "dolly_3k.jsonl.gz"): 1}, epochs=4,
        max_minutes=args.minutes, lora_r=args.lora_r, output_dir=out, resume=True, overwrite=True, **more,
    )  # fmt: skip
    return result, (time.monotonic() - start) / 60


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of SmolLM2-135M-Instruct (examples/smollm2.py makes it)")
    parser.add_argument(
        "--texts", type=Path, required=True,
        help="folder with c4_sample.jsonl.gz, dolly_3k.jsonl.gz and wikitext2_test.txt.gz",
    )  # fmt: skip
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.2, 0.5])
    parser.add_argument("--minutes", type=float, default=60.0, help="of training, for each ratio")
    parser.add_argument("--criterion", default="param_second")
    parser.add_argument("--lora_r", type=int, default=32)
    parser.add_argument("--learning_rate", type=float, help="else pyprune's own")
    parser.add_argument("--distill", action="store_true", help="learn from the dense model too")
    parser.add_argument("--windows", type=int, default=8, help="windows of 1024 tokens that are scored")
    parser.add_argument("--work", type=Path, help="folder for the models; else a temporary one")
    args = parser.parse_args()

    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    text = str(args.texts / "wikitext2_test.txt.gz")
    windows, name = read_windows(text, tokenizer, length=1024, windows=args.windows)

    def measured(folder: Any) -> Perplexity:
        return perplexity(load(folder), windows, text=name, batch_size=2)

    dense = measured(args.model)
    lines = []
    with TemporaryDirectory() as temporary:
        work = args.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        for ratio in args.ratios:
            folder = pruned(args, ratio, work)
            before = measured(folder).perplexity
            result, minutes = recovered(args, folder)
            after = measured(result.report["output_dir"]).perplexity
            report = result.report
            held = [report["validation"][k]["perplexity"] for k in ("before", "after")]
            target = f"{TARGETS[ratio]:.0%}" if ratio in TARGETS else "-"
            lines.append(
                f"| {ratio:.0%} | {before:.2f} | {after:.2f} | {1 - after / before:.1%} | {target} "
                f"| {held[0]:.2f} -> {held[1]:.2f} | {minutes:.1f} | {report['steps']} | {report['tokens']:,} "
                f"| {report['tokens'] / report['seconds']:.0f} |"
            )
    taught = " and the dense model's answers" if args.distill else ""
    print(f"# Recovery\n\nPerplexity on {dense.protocol}. Dense: {dense.perplexity:.2f}.")
    print(f"Pruned by {args.criterion} on 32 x 128 tokens of C4; trained on C4 and Dolly, 4 tokens to 1{taught}:")
    print(f"LoRA of rank {args.lora_r}, at most {args.minutes:g} minutes.\n")
    print(
        "| removed | pruned | recovered | fall | hoped for | validation (held-out C4 and Dolly) | minutes | steps "
        "| learned tokens | a second |"
    )
    print("|---" * 10 + "|")
    print("\n".join(lines))
    machine = f"{torch.get_num_threads()} threads of {platform.processor() or platform.machine()}"
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}"
    print(f"\n{datetime.date.today()}, {machine}, {versions}.")


if __name__ == "__main__":
    main()
