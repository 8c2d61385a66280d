"""Scores on the disk: what was measured once is not measured again.

A file's name is a fingerprint of all that its scores depend on: the weights, the configuration, the calibration's token
ids, the groups, the criterion and its options, and the versions that computed them. Another ratio, allocation or
rounding changes none of these.
"""

from __future__ import annotations

import hashlib
import logging
import os
import warnings
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pyprune.errors import PyPruneError
from pyprune.files import whole_file
from pyprune.importance.fingerprint import fingerprint, fingerprint_of_model
from pyprune.importance.scores import Scores

log = logging.getLogger(__name__)

_CODE = (".py", ".so", ".pyd", ".dylib")


def check_folder(folder: str) -> None:
    """The folder is there or can be made, and can be written to. Nothing is made yet.

    Raises:
        PyPruneError: it cannot.
    """
    path = Path(folder).absolute()
    while not path.exists() and path != path.parent:
        path = path.parent
    if not path.is_dir():
        raise PyPruneError("cache", folder, f"cannot be a folder: {path} is a file", "Name another folder.")
    if not os.access(path, os.W_OK):
        raise PyPruneError("cache", folder, f"cannot be written: {path} is read-only", "Name another folder.")


def cached(
    folder: str | None, model: nn.Module, batches: Any, settings: Mapping[str, Any], compute: Callable[[], Scores]
) -> Scores:
    """What ``compute`` gives, read from ``folder`` when it is there, and kept there otherwise.

    A file that is damaged is named in a warning and made anew. Files appear complete or not at all, so that several
    runs may share a folder.

    Args:
        folder: None computes and keeps nothing.
        model: that is scored.
        batches: the calibration, or None.
        settings: all else that the scores depend on.

    Returns:
        The scores; ``details["cached"]`` is the file that they were read from, and absent where they were computed.
    """
    if folder is None:
        return compute()
    calibration = None if batches is None else list(batches)
    key = fingerprint([fingerprint_of_model(model), calibration, dict(settings), running_versions()])
    path = Path(folder) / f"scores-{key[:40]}.safetensors"
    found = _read(path)
    if found is not None:
        log.info("scores read from %s", path)
        found.details["cached"] = str(path)
        return found
    scores = compute()
    _write(scores, path)
    return scores


def _read(path: Path) -> Scores | None:
    from safetensors import SafetensorError

    try:
        scores = Scores.load(path)
        if scores.details.pop("sum", None) == fingerprint(scores.by_group):
            return scores
    except FileNotFoundError:
        return None
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, AttributeError):
        pass
    warnings.warn(f"{path} is damaged; the scores are computed again.", stacklevel=4)
    return None


def _write(scores: Scores, path: Path) -> None:
    kept = Scores(scores.by_group, scores.criterion, {**scores.details, "sum": fingerprint(scores.by_group)})
    keep_file(path, kept.save, "the scores are not kept")


def keep_file(path: Path, save: Callable[[Path], Any], otherwise: str) -> None:
    """Let ``save`` write a file that appears at ``path`` complete or not at all.

    A full or vanished disk costs the cache and not the run: a warning says so, and ``otherwise``.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as work:
            save(work)
    except Exception as error:  # safetensors has errors of its own for a full disk
        warnings.warn(f"{path} cannot be written ({error}); {otherwise}.", stacklevel=5)


def running_versions() -> dict[str, str]:
    """Of what computes what is kept."""
    return {"torch": str(torch.__version__), "transformers": _version("transformers"), "pyprune": own_code()}


def _version(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return "source"


@cache
def own_code() -> str:
    """SHA-256 of this package's code: what a mistake in it made is not read once it is mended."""
    digest = hashlib.sha256()
    root = Path(__file__).resolve().parents[1]
    for file in sorted(p for p in root.rglob("*") if p.suffix in _CODE and p.is_file()):
        content = file.read_bytes()
        digest.update(f"{file.relative_to(root)} {len(content)};".encode())
        digest.update(content)
    return digest.hexdigest()
