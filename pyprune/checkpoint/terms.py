"""A model's terms: licence, notices and rules of use, which hold for what is made of it."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import yaml

FILES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")
KEYS = ("license", "license_name", "license_link", "language")
"""Of a card's header."""


def keep_terms(model: Any, folder: Path) -> dict[str, Any]:
    """Copies the terms' files from where a model was opened into ``folder``.

    Args:
        model: whose configuration names the folder or, on the hub, the model. Of the latter only what the hub's cache
            holds is read: nothing is asked when the work is done.

    Returns:
        What the header of the model's card says of them, by :data:`KEYS`.
    """
    source = _source(str(getattr(model.config, "_name_or_path", "") or ""))
    if source is None:
        return {}
    for pattern in FILES:
        for file in filter(Path.is_file, source.glob(pattern)):
            try:
                text = file.read_bytes()
            except OSError as error:  # no reason to lose the model that was made
                warnings.warn(f"{file} cannot be read ({error.strerror}) and does not go along.", stacklevel=3)
            else:
                (folder / file.name).write_bytes(text)
    try:
        card = (source / "README.md").read_text(encoding="utf-8")
        header = yaml.safe_load(found[1]) if (found := re.match(r"---\n(.*?\n)---\s*\n", card, re.DOTALL)) else None
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        header = None
    return {k: header[k] for k in KEYS if header.get(k)} if isinstance(header, dict) else {}


def _source(name: str) -> Path | None:
    """The folder that a model was opened from, where it is the model's own (a GGUF file's need not be)."""
    if not name:
        return None
    path = Path(name).expanduser()
    if path.exists():
        return path if (path / "config.json").is_file() else None
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=[*FILES, "README.md"], local_files_only=True))
    except (OSError, ValueError):  # it is not there, or the name is none of the hub's
        return None
