"""A folder that appears complete or not at all."""

from __future__ import annotations

import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pyprune.errors import PyPruneError
from pyprune.files import PARTIAL, sync_file

_NO_SPACE = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))


def check_target(folder: str | Path, overwrite: bool = False) -> Path:
    """The absolute path of a folder that may be written, links followed: a link stays, and what it names is written.

    Raises:
        PyPruneError: it exists, and ``overwrite`` is off, or it holds other things than a model or the folder that this
            runs in; it is a file; its parent cannot be written.
    """
    path = _settled(folder)
    if path.is_symlink():
        raise PyPruneError("folder", str(folder), "is a link that leads back to itself", "Name a folder.")
    if path.exists() and not path.is_dir():
        raise PyPruneError("folder", str(folder), "is a file", "Name a folder.")
    if path.exists() and not overwrite:
        raise PyPruneError("folder", str(folder), "exists already", "Set overwrite, or name another folder.")
    if path.exists():
        _check_replaceable(folder, path)
    parent = _existing(path.parent)
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise PyPruneError("folder", str(folder), f"cannot be made: {parent} is not a folder that can be written")
    return path


def _check_replaceable(folder: str | Path, path: Path) -> None:
    """Replacing a folder removes all that is in it, so it has to be one model's, not one of many or of other things."""
    hint = "Name another folder, or remove this one yourself."
    if Path.cwd().is_relative_to(path):
        raise PyPruneError("folder", str(folder), "holds the folder that this runs in", hint)
    if any(path.iterdir()) and not (path / "config.json").is_file():
        raise PyPruneError("folder", str(folder), "is not overwritten, for it holds other things than a model", hint)


def check_space(folder: Path, needed: int) -> None:
    """Raises PyPruneError when the disk of ``folder`` has fewer than ``needed`` bytes left."""
    free = shutil.disk_usage(_existing(_settled(folder).parent)).free
    if free < needed:
        raise PyPruneError(
            "folder",
            str(folder),
            f"the disk has {free / 1e6:,.0f} MB left and {needed / 1e6:,.0f} MB are needed",
            "Free some space, or name a folder on another disk.",
        )


@contextmanager
def complete_folder(folder: Path, overwrite: bool = False) -> Iterator[Path]:
    """Gives a temporary folder beside ``folder``, which takes its name when the block ends.

    Everything in it is on the disk (fsync) before it does. On any exception, interrupts included, the temporary folder
    is removed and what was at ``folder`` stays. With ``overwrite`` the old folder is moved aside first, and removed
    when the new one is in place.

    Raises:
        PyPruneError: ``folder`` exists and ``overwrite`` is off; the disk is full.
    """
    folder = check_target(folder, overwrite)
    made = [p for p in folder.parents if not p.exists()]
    work = folder.parent / f".{folder.name}.{uuid.uuid4().hex[:8]}{PARTIAL}"
    try:
        with full_disk_reported(folder):
            work.mkdir(parents=True)
            yield work
            sync(work)
            _swap(work, folder, overwrite)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        for parent in made:
            with suppress(OSError):
                parent.rmdir()
        raise


@contextmanager
def full_disk_reported(path: Path) -> Iterator[None]:
    """Turns errors that say that the disk is full into one PyPruneError about ``path``."""
    try:
        yield
    except BaseException as error:
        if disk_full(error):
            raise PyPruneError(
                "folder", str(path), "the disk is full; nothing was written", "Free some space and save again."
            ) from error
        raise


def sync(folder: Path) -> None:
    """Gives every file below ``folder`` the usual permissions, and waits until all of it is on the disk."""
    mask = os.umask(0)
    os.umask(mask)
    for root, _, files in os.walk(folder):
        for name in files:
            path = os.path.join(root, name)
            os.chmod(path, 0o666 & ~mask)
            sync_file(path)
        sync_file(root)


def _swap(work: Path, folder: Path, overwrite: bool) -> None:
    aside = folder.parent / f".{folder.name}.{uuid.uuid4().hex[:8]}.old"
    try:
        if folder.exists():
            check_target(folder, overwrite)
            os.rename(folder, aside)
        os.rename(work, folder)
        with suppress(OSError):
            sync_file(folder.parent)
    finally:
        if aside.exists() and folder.exists():
            shutil.rmtree(aside, ignore_errors=True)
        elif aside.exists():
            os.rename(aside, folder)


def _settled(folder: str | Path) -> Path:
    return Path(os.path.realpath(Path(folder).expanduser()))


def _existing(path: Path) -> Path:
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def disk_full(error: BaseException | None) -> bool:
    """Whether an exception says that the disk is full."""
    if isinstance(error, OSError) and error.errno in _NO_SPACE:
        return True
    return isinstance(error, Exception) and "no space left on device" in str(error).lower()
