"""Changes to a saved ``config.json``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pyprune.checkpoint.files import read_config
from pyprune.checkpoint.load import BUILD


def edit_config(folder: Path, values: Mapping[str, Any]) -> None:
    """Sets these fields of ``config.json``; a field of None is removed."""
    config = read_config(folder)
    config.update(values)
    kept = {name: value for name, value in config.items() if value is not None or name not in values}
    (folder / "config.json").write_text(json.dumps(kept, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def forget_build(folder: Path) -> None:
    """Removes what an earlier export with profile ``hetero-hf`` left in the folder."""
    if BUILD in read_config(folder):
        edit_config(folder, {BUILD: None, "auto_map": None})
        (folder / "modeling_pyprune.py").unlink(missing_ok=True)
