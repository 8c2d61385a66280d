"""The folder beside the output in which a streamed run keeps what it has finished, so that a killed one goes on."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from pyprune.errors import PyPruneError
from pyprune.files import PARTIAL, lock, sync_file

SETTINGS = "settings.json"
_LOCK = "lock"


class Workspace:
    """Files of one run, each written complete or not at all, and on the disk when :meth:`save` returns.

    A folder that another run left is taken up where it stopped when ``settings`` are the same.

    Args:
        output: the folder that the run writes in the end; the workspace lies beside it.
        settings: all that the results depend on, as JSON holds it.
        overwrite: begin anew over a run with other settings.

    Attributes:
        path: of the folder.
        resumed: whether an earlier run's work was found.

    Raises:
        PyPruneError: another process is at it, or an earlier run had other settings and ``overwrite`` is off.
    """

    def __init__(self, output: Path, settings: Mapping[str, Any], overwrite: bool = False) -> None:
        self.path = workspace_path(output)
        plain = json.loads(json.dumps(settings))
        self._made = [p for p in self.path.parents if not p.exists()]
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = (self.path / _LOCK).open("a")
        if not lock(self._lock) or not self._locked():
            self._lock.close()
            raise PyPruneError("output_dir", str(output), f"is being made by another process ({self.path})", "Wait.")
        try:
            before = self._settings()
            changed = [] if before is None else _changed(before, plain)
            if changed and not overwrite:
                raise PyPruneError(
                    "output_dir", str(output),
                    f"an unfinished run with other settings lies in {self.path} ({', '.join(changed[:3])} differ)",
                    "Give the same settings to go on, or overwrite to begin anew.",
                )  # fmt: skip
        except PyPruneError:
            self._lock.close()
            raise
        self.resumed = before is not None and not changed
        if not self.resumed:
            self._clear()
            self._write_text(SETTINGS, json.dumps(plain, indent=2))

    def save(self, name: str, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
        """Write ``name`` (a path below the folder, without extension) as safetensors."""
        target = self.file(name)
        target.parent.mkdir(parents=True, exist_ok=True)
        work = target.with_suffix(PARTIAL)
        save_file({k: t.detach().contiguous() for k, t in tensors.items()}, work, metadata=metadata)
        put(work, target)

    def load(self, name: str) -> dict[str, Tensor]:
        """What :meth:`save` wrote; copies, so that nothing keeps the file mapped."""
        return {k: t.clone() for k, t in load_file(self.file(name)).items()}

    def has(self, name: str) -> bool:
        """Whether :meth:`save` finished it."""
        return self.file(name).is_file()

    def file(self, name: str) -> Path:
        """Where ``name`` lies."""
        return self.path / f"{name}.safetensors"

    def drop(self, *folders: str) -> None:
        """Remove folders that are not needed any more, if they are there."""
        for folder in folders:
            shutil.rmtree(self.path / folder, ignore_errors=True)

    def note(self, name: str) -> None:
        """Remember that something is done."""
        self._write_text(f"{name}.done", "")

    def noted(self, name: str) -> bool:
        """Whether it was done, by this run or the one that it goes on from."""
        return (self.path / f"{name}.done").is_file()

    def forget(self, *names: str) -> None:
        """Take notes back."""
        for name in names:
            (self.path / f"{name}.done").unlink(missing_ok=True)

    def close(self) -> None:
        """Let other processes have it."""
        self._lock.close()

    def remove(self) -> None:
        """Remove all of it, parents included that were made for it and hold nothing else."""
        gone = self.path.with_name(f"{self.path.name}.{os.getpid()}.old")
        with suppress(OSError):  # all of it at once: another process must not take up what is on its way out
            os.rename(self.path, gone)
        shutil.rmtree(gone if gone.exists() else self.path, ignore_errors=True)
        self._lock.close()
        for parent in self._made:
            with suppress(OSError):
                parent.rmdir()

    def _locked(self) -> bool:
        """Whether the lock is still in the folder, which another process may have removed before it let go of it."""
        with suppress(OSError):
            return os.path.samestat(os.fstat(self._lock.fileno()), (self.path / _LOCK).stat())
        return False

    def _settings(self) -> dict[str, Any] | None:
        try:
            found = json.loads((self.path / SETTINGS).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return found if isinstance(found, dict) else None

    def _clear(self) -> None:
        for entry in self.path.iterdir():
            if entry.is_dir():
                shutil.rmtree(entry)
            elif entry.name != _LOCK:
                entry.unlink()

    def _write_text(self, name: str, text: str) -> None:
        target = self.path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        work = target.with_name(target.name + PARTIAL)
        work.write_text(text, encoding="utf-8")
        put(work, target)


def workspace_path(output: Path) -> Path:
    """The workspace of an output folder."""
    return output.parent / f".{output.name}.streaming"


def put(work: Path, target: Path) -> None:
    """Give a finished file its name, once its bytes are on the disk."""
    sync_file(work)
    os.replace(work, target)


def _changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Names of the settings that differ."""
    return [name for name in {**before, **now} if before.get(name) != now.get(name)]
