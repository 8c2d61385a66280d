"""Log-likelihoods in a file, so that a run that was cut short goes on where it stopped.

A JSONL file: one line that says what it is, then one line for each request. A request's key is a hash of the model's
configuration and weights, of the tokens read and of the tokens asked about. A line is therefore used again exactly when
nothing that decides its value has changed, and one file serves any number of models, tasks and limits.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from pyprune.errors import PyPruneError
from pyprune.files import lock
from pyprune.importance.fingerprint import fingerprint_of_weights

OPTION = "resume_file"
HEADER = {"format": "pyprune-loglikelihoods", "version": 1}


class Store:
    """What a file knows about one model. Use as a context manager; lines are on the disk after :meth:`flush`.

    Raises:
        PyPruneError: the file is something else, is damaged other than at its end, or cannot be written.
    """

    def __init__(self, file: str | Path, model: Any) -> None:
        self._path = Path(file)
        check_file(self._path)
        self._model = fingerprint_of_weights(model)
        self._known: dict[str, tuple[float, bool]] = {}
        self._out: IO[str] | None = None
        self.reused = 0

    def __enter__(self) -> Store:
        self._out = open(self._path, "a", encoding="utf-8")
        try:
            if not lock(self._out):
                problem = "is being written by another process"
                raise PyPruneError(OPTION, str(self._path), problem, "Wait, or name another file.")
            self._known = _read(self._path)
            if self._path.stat().st_size == 0:
                self._out.write(json.dumps(HEADER) + "\n")
                self.flush()
        except BaseException:
            self._out.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        if self._out is not None:
            self._out.close()
            self._out = None

    def get(self, inputs: Sequence[int], continuation: Sequence[int]) -> tuple[float, bool] | None:
        """(log-likelihood, greedy) of an earlier run, or None."""
        found = self._known.get(self._key(inputs, continuation))
        self.reused += found is not None
        return found

    def add(self, inputs: Sequence[int], continuation: Sequence[int], total: float, greedy: bool) -> None:
        """Append one result."""
        assert self._out is not None, "the store is not open"
        line = {"key": self._key(inputs, continuation), "loglikelihood": total, "greedy": greedy}
        self._out.write(json.dumps(line) + "\n")

    def flush(self) -> None:
        assert self._out is not None, "the store is not open"
        self._out.flush()
        os.fsync(self._out.fileno())

    def _key(self, inputs: Sequence[int], continuation: Sequence[int]) -> str:
        text = f"{self._model} {list(inputs)} {list(continuation)}"
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def check_file(path: Path) -> None:
    """The file is one of ours or can be made.

    Raises:
        PyPruneError: it is something else, or lies where nothing can be written.
    """
    if path.is_dir():
        raise PyPruneError(OPTION, str(path), "is a folder", "Name a file, such as results.jsonl.")
    if not path.parent.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise PyPruneError(OPTION, str(path), "cannot be written", "Name a file in a folder that is there.")
    if not path.exists():
        return
    with open(path, "rb") as stream:
        first = stream.readline()
    try:
        ours = not first or json.loads(first) == HEADER
    except ValueError:
        ours = False
    if not ours:
        raise PyPruneError(OPTION, str(path), "is no file of log-likelihoods", "Name another file.")


def _read(path: Path) -> dict[str, tuple[float, bool]]:
    """Key -> (log-likelihood, greedy). A last line that was cut off is removed from the file."""
    if not path.exists():
        return {}
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        os.truncate(path, whole)
    known = {}
    for number, line in enumerate(data[:whole].splitlines()[1:], 2):
        try:
            record = json.loads(line)
            known[str(record["key"])] = (float(record["loglikelihood"]), bool(record["greedy"]))
        except (ValueError, KeyError, TypeError):
            raise PyPruneError(OPTION, str(path), f"line {number} is damaged", "Remove that line.") from None
    return known
