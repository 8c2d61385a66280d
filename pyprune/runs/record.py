"""``run.json``: what each stage was made from and what it left, so that the next run knows what still holds."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from pyprune.errors import PyPruneError
from pyprune.files import lock, write_text

FILE = "run.json"
LOCK = ".run.lock"
FORMAT = {"format": "pyprune-run", "version": 1}


@dataclass
class Entry:
    """A stage that began, and perhaps ended.

    Attributes:
        done: whether it ended.
        options: option -> plain value.
        version: of pyprune.
        inputs: name -> identity of the file or model; of an earlier stage, the ``id`` of its entry.
        outputs: path -> identity, of what it left.
        id: of this one execution.
        finished: when it ended, in seconds since 1970.
        seconds: wall-clock time that it took; of the last part where it was interrupted.
        result: what it found, for the table at the end.
    """

    options: dict[str, Any]
    version: str
    inputs: dict[str, dict[str, str]]
    done: bool = False
    outputs: dict[str, dict[str, str]] = field(default_factory=dict)
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    finished: float = 0.0
    seconds: float = 0.0
    result: str = ""


class Record:
    """The entries of a work folder, stage by stage.

    Raises:
        PyPruneError: ``run.json`` is damaged or of another program.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE
        self.entries = _read(self.path)

    def put(self, stage: str, entry: Entry, recipe: Mapping[str, Any]) -> None:
        """Note an entry; the file on disk is whole before and after."""
        self.entries[stage] = entry
        plain = {name: asdict(e) for name, e in self.entries.items()}
        write_json(self.path, {**FORMAT, "recipe": dict(recipe), "stages": plain})


def write_json(path: Path, data: Any) -> None:
    """A JSON file that appears complete or not at all, and is on the disk when this returns."""
    try:
        write_text(path, json.dumps(data, indent=1, allow_nan=False) + "\n")
    except OSError as error:
        raise PyPruneError(
            "output_dir", str(path), f"cannot be written: {error.strerror}", "Free some space."
        ) from error


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Makes the work folder and keeps other runs out of it; the system takes the lock back when the process ends.

    Raises:
        PyPruneError: the folder cannot be made, or another run works in it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / LOCK).open("a")
    except OSError as error:
        raise PyPruneError("output_dir", str(folder), f"cannot be made: {error.strerror}", "Name a folder.") from None
    with file:
        if not lock(file):
            raise PyPruneError("output_dir", str(folder), "another run works in it", "Wait, or name another folder.")
        yield


def _read(path: Path) -> dict[str, Entry]:
    if not path.exists():
        return {}
    names = {f.name for f in fields(Entry)}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if {k: data[k] for k in FORMAT} != FORMAT:
            raise ValueError
        return {s: Entry(**{k: v for k, v in e.items() if k in names}) for s, e in data["stages"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        hint = "Remove it to run everything again, or name another folder."
        raise PyPruneError("output_dir", str(path), "is no record of a run that can be read", hint) from None
