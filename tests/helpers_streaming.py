"""What a pruned folder holds, without what tells one run from another."""

from __future__ import annotations

from pathlib import Path

# They say which way was taken, and how long it took; scores agree to rounding.
OWN = {"pyprune_report.json", "pyprune_recipe.yaml", "README.md", "report.html", "pyprune_importance.json"}


def contents(folder: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in folder.iterdir() if f.name not in OWN}
