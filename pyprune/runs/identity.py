"""What a file or folder holds, as hashes: two that are equal hold the same bytes.

A hash is kept under the file's size, its times of modification and of change, and its inode, so that a folder of
weights is read once. Times have a coarse clock, so a file that was touched in the last two seconds is not remembered.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping
from contextlib import nullcontext
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from pyprune import progress
from pyprune.checkpoint import terms
from pyprune.runs.record import write_json

Identity = dict[str, str]
"""Path within a folder -> SHA-256 of the file; {"": ...} for a single file or a name."""

NOT_READ = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx")  # weights that are never opened here
NOTES = ("README.md", *terms.FILES, "report.html", "pyprune_eval*.json")
"""For people, or laid there by them: no stage reads these."""
_SETTLED = 2_000_000_000  # ns after which a file that changes has another time for sure
_BLOCK = 1 << 22
_LARGE = 1 << 27  # bytes of a file that takes a while


class Hashes:
    """SHA-256 of files, each read again only when it changed.

    Args:
        cache: JSON file that remembers them; None remembers only while the object lives.
    """

    def __init__(self, cache: Path | None = None) -> None:
        self._cache, self._changed = cache, False
        self._known: dict[str, list[Any]] = _read(cache) if cache is not None else {}
        self.read = 0  # files whose bytes were read

    def file(self, path: Path) -> str:
        """In hexadecimal."""
        absolute, stat = os.path.abspath(path), path.stat()
        key = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
        found = self._known.get(absolute)
        if found is not None and found[:4] == key:
            return str(found[4])
        self.read += 1
        with progress.bar(f"fingerprint {path.name}") if stat.st_size >= _LARGE else nullcontext():
            value = _sha256(path)
        if time.time_ns() - max(stat.st_mtime_ns, stat.st_ctime_ns) > _SETTLED:
            self._known[absolute] = [*key, value]
            self._changed = True
        return value

    def of(self, path: Path) -> Identity:
        """The files of a folder that count (hidden ones, notes and pickles do not), or a single file."""
        if not path.is_dir():
            return {"": self.file(path)}
        out = {}
        for file in sorted(path.rglob("*")):
            inner = file.relative_to(path)
            hidden = any(part.startswith(".") for part in inner.parts)
            noted = any(fnmatch(file.name, pattern) for pattern in NOTES)
            if not hidden and not noted and file.suffix not in NOT_READ and file.is_file():
                out[inner.as_posix()] = self.file(file)
        return out

    def save(self) -> None:
        """Write what was learned; without the files that are gone."""
        if self._cache is not None and self._changed:
            write_json(self._cache, {p: k for p, k in self._known.items() if os.path.exists(p)})
            self._changed = False


def of_name(name: str) -> Identity:
    """A model on the hub: the commit in the local cache, which is what opening it there would give; else its name."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, "config.json")
    return {"": f"{name}@{Path(found).parent.name}" if isinstance(found, str) else name}


def difference(before: Mapping[str, str], now: Mapping[str, str]) -> str:
    """The first file that differs, in words; "" where none does."""
    for name in (*before, *now):
        if name not in now:
            return f"{name} is gone" if name else "is gone"
        if name not in before:
            return f"{name} is new" if name else "is new"
        if before[name] != now[name]:
            return f"{name} changed" if name else "changed"
    return ""


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _read(cache: Path) -> dict[str, list[Any]]:
    try:
        data = json.loads(cache.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(data, dict):
        return {}
    return {p: k for p, k in data.items() if isinstance(k, list) and len(k) == 5}
