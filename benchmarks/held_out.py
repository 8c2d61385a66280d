"""The documents of a text that calibration does not read, for measuring perplexity on text of the same kind.

    python benchmarks/held_out.py MODEL c4_sample.jsonl.gz held_out.jsonl
    pyprune eval smaller --eval_text held_out.jsonl --protocol 1024 --eval_windows 8

Options that the calibration was given (samples, length, seed) are to be given here too.
"""

from __future__ import annotations

import argparse
import json

import transformers

from pyprune.importance.calibration import BETWEEN, LENGTH, SAMPLES, SPREAD
from pyprune.importance.sources import encode, read_documents


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder whose tokenizer counts")
    parser.add_argument("text", help=".jsonl or .jsonl.gz, as for --calibration")
    parser.add_argument("output", help="a .jsonl file")
    parser.add_argument("--samples", type=int, default=SAMPLES, help="of the calibration")
    parser.add_argument("--length", type=int, default=LENGTH, help="of the calibration")
    parser.add_argument("--seed", type=int, default=0, help="of the calibration")
    args = parser.parse_args()

    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    need, have, kept = SPREAD * args.samples * args.length, 0, 0
    with open(args.output, "w", encoding="utf-8") as file:
        for document in read_documents(args.text, seed=args.seed):
            if have < need:
                have += encode(tokenizer, document + BETWEEN, args.text).numel()
                continue
            file.write(json.dumps({"text": document}) + "\n")
            kept += 1
    print(f"{kept} documents behind the first {have} tokens: {args.output}")


if __name__ == "__main__":
    main()
