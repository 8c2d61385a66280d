"""What a pruned folder holds, without what tells one run from another."""

from __future__ import annotations

from pathlib import Path

OWN = {"pyprune_report.json", "pyprune_recipe.yaml", "README.md"}  # say which way was taken, and how long it took


def contents(folder: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in folder.iterdir() if f.name not in OWN}
