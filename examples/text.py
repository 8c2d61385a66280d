"""Write English text that needs no download, from the standard library's help topics.

One part is to calibrate on, the other to evaluate on; they share no topic.

python examples/text.py OUTPUT_DIR
"""

from __future__ import annotations

import sys
from pathlib import Path
from pydoc_data.topics import topics


def write(folder: Path) -> None:
    """Write ``calibration.txt`` and ``evaluation.txt``: every other topic goes to each, so that they share none."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = [topics[name].strip() for name in sorted(topics)]
    (folder / "calibration.txt").write_text("\n\n".join(texts[0::2]), encoding="utf-8")
    (folder / "evaluation.txt").write_text("\n\n".join(texts[1::2]), encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    write(Path(sys.argv[1]))
