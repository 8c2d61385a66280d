"""Open a pruned folder with plain transformers, in a process that knows nothing of pyprune, and let it speak.

python examples/open_with_transformers.py FOLDER
"""

from __future__ import annotations

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer


def main(folder: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)  # for folders whose layers differ
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert not any(name.startswith("pyprune") for name in sys.modules)
    inputs = tokenizer("The capital of France is", return_tensors="pt")
    out = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    print(f"{type(model).__name__} with {model.num_parameters():,} parameters, opened by transformers alone:")
    print(repr(tokenizer.decode(out[0], skip_special_tokens=True)))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    main(sys.argv[1])
