"""A folder that appears complete or not at all."""

from __future__ import annotations

import errno
import glob
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pyprune.errors import PyPruneError
from pyprune.files import PARTIAL, lock, set_permissions, sync_file
from pyprune.units import size

OTHER_FILES = 32_000_000  # bytes left for tokenizer, plan and report
_NO_SPACE = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))
_ASIDE = ".old"
_ADDED = len(f"..{uuid.uuid4().hex[:8]}{PARTIAL}")  # to a name, while it is written


def check_target(folder: str | Path, overwrite: bool = False) -> Path:
    """The absolute path of a folder that may be written, links followed: a link stays, and what it names is written.

    Where a process was killed while it replaced the folder, the old one gets its name back.

    Raises:
        PyPruneError: it exists, and ``overwrite`` is off, or it holds other things than one model or the folder that
            this runs in; it is a file; its name is too long; its parent cannot be written.
    """
    path = _settled(folder)
    check_name("folder", folder, path)
    _restore(path)
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
    inner = next((p.parent for p in sorted(path.glob("*/**/config.json"))), None)
    if inner is not None:
        problem = f"is not overwritten, for it holds another model in {inner.relative_to(path)}"
        raise PyPruneError("folder", str(folder), problem, hint)


def check_name(option: str, given: str | Path, path: Path) -> None:
    """Raises PyPruneError when the file system takes no name as long as ``path`` has while it is written."""
    try:
        parent = _existing(path.parent)
        longest = os.pathconf(parent, "PC_NAME_MAX") if hasattr(os, "pathconf") else 255
        if longest < 0 or len(os.fsencode(path.name)) + _ADDED <= longest:
            return
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            return  # what comes next says so
    problem = f"is too long a name: {_ADDED} characters more are needed while it is written"
    raise PyPruneError(option, str(given), problem, "Choose a shorter one.")


def check_space(folder: Path, needed: int) -> None:
    """Raises PyPruneError when the disk of ``folder`` has fewer than ``needed`` bytes left."""
    free = shutil.disk_usage(_existing(_settled(folder).parent)).free
    if free < needed:
        raise PyPruneError(
            "folder",
            str(folder),
            f"the disk has {size(free)} left and {size(needed)} are needed",
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
    try:
        with full_disk_reported(folder), partial_folder(folder) as work:
            yield work
            sync(work)
            _swap(work, folder, overwrite)
    except BaseException:
        for parent in made:
            with suppress(OSError):
                parent.rmdir()
        raise


@contextmanager
def partial_folder(path: Path) -> Iterator[Path]:
    """Gives an empty folder beside ``path``, and removes it when the block ends, unless it has another name then.

    A lock tells the folders of living processes from those that killed ones left, which go first.
    """
    _sweep(path)
    named = uuid.uuid4().hex[:8]
    work, unlocked = (path.parent / f".{path.name}.{named}{end}" for end in (PARTIAL, ".new"))
    try:
        unlocked.mkdir(parents=True)
        with _locked(unlocked):
            unlocked.rename(work)  # under this name others may find it, and it is locked by now
            yield work
    finally:
        for folder in (unlocked, work):
            shutil.rmtree(folder, ignore_errors=True)


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
    for root, _, names in os.walk(folder):
        files = [os.path.join(root, name) for name in names]
        set_permissions(*files)
        for path in (*files, root):
            sync_file(path)


def _swap(work: Path, folder: Path, overwrite: bool) -> None:
    aside = folder.parent / f".{folder.name}.{uuid.uuid4().hex[:8]}{_ASIDE}"
    with _locked(folder):
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


@contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Within it the folder is this process's own, whatever its name is, if no other's: whether it is."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:  # it is not there; Windows opens no folders
        yield False
        return
    try:
        yield lock(descriptor)
    finally:
        os.close(descriptor)


def _left(path: Path, end: str) -> list[Path]:
    """The folders of this kind beside ``path``."""
    return sorted(path.parent.glob(f".{glob.escape(path.name)}.{'[0-9a-f]' * 8}{end}"))


def _sweep(path: Path) -> None:
    """Removes what killed processes left beside ``path``: folders that never took its name, and what they replaced."""
    for left in [*_left(path, PARTIAL), *(_left(path, _ASIDE) if path.exists() else [])]:
        with _locked(left) as free:
            if free:
                shutil.rmtree(left, ignore_errors=True)


def _restore(path: Path) -> None:
    """Gives back its name to the one folder that a killed process had moved aside."""
    aside = [] if os.path.lexists(path) else _left(path, _ASIDE)
    if len(aside) != 1:
        return
    with _locked(aside[0]) as free, suppress(OSError):
        if free:
            os.rename(aside[0], path)


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
    if isinstance(error, OSError) and re.search(r"\d+ requested and \d+ written", str(error)):  # NumPy's tofile
        return True
    return isinstance(error, Exception) and "no space left on device" in str(error).lower()
