"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

PARTIAL = ".partial"
"""How the names of files end that are being written."""


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Gives a name beside ``path`` to write under; what is there then takes the name ``path``, once it is on the disk.

    On any exception, interrupts included, it is removed and what was at ``path`` stays.

    Raises:
        OSError: it cannot be written.
    """
    work = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}{PARTIAL}")
    try:
        yield work
        set_permissions(work)
        sync_file(work)
        os.replace(work, path)
    finally:
        with suppress(OSError):
            work.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a whole file in UTF-8. Raises OSError when it cannot be written."""
    with whole_file(path) as work:
        work.write_text(text, encoding="utf-8")


def set_permissions(*files: str | Path) -> None:
    """The usual ones, for files of libraries that write for their user alone."""
    mask = os.umask(0)
    os.umask(mask)
    for file in files:
        os.chmod(file, 0o666 & ~mask)


def sync_file(path: str | Path) -> None:
    """Waits until a file, or a folder's list of files, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def lock(file: Any) -> bool:
    """Whether this process now has an open file to itself; the system takes the lock back when the process ends."""
    try:
        import fcntl
    except ImportError:  # Windows: two runs into one folder are not told apart
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
