"""What an interrupted training goes on from: adapter, optimizer and history, in safetensors and JSON.

Each checkpoint is a folder ``step-NNNNNN`` that appears whole or not at all; the one before it goes when it is there.
Beside them ``log.jsonl`` gets a line for every step.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict, dataclass, field
from errno import ENOSPC
from pathlib import Path
from typing import Any

from torch import Tensor

from pyprune.errors import PyPruneError

Tensors = Mapping[str, Tensor]
CompleteFolder = Callable[[Path], AbstractContextManager[Path]]

LOG = "log.jsonl"
STATE = "state.json"


@dataclass
class History:
    """What happened so far.

    Attributes:
        step: optimizer steps done.
        seconds: time spent training and validating, over all runs.
        tokens: tokens that carried loss so far.
        losses: mean loss of a learned token at each step, in nats.
        rates: learning rate of each step.
        validations: {"step", "nll", "perplexity", "seconds", "progress"} in order, the first at step 0.
        best_step: where validation was best; 0 is the model as it came.
        best_nll: mean negative log-likelihood there.
        validation_rows: rows that are validated on when the time does not allow all of them; None is all.
        notes: what the user should know.
    """

    step: int = 0
    seconds: float = 0.0
    tokens: int = 0
    losses: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    validations: list[dict[str, Any]] = field(default_factory=list)
    best_step: int = 0
    best_nll: float = float("inf")
    validation_rows: int | None = None
    notes: list[str] = field(default_factory=list)


@dataclass
class Checkpoint:
    """A moment of a training.

    Attributes:
        adapter: its matrices.
        optimizer: Adam's ``step.NAME``, ``exp_avg.NAME`` and ``exp_avg_sq.NAME``, of those that a gradient has reached.
        best: the best adapter so far.
    """

    history: History
    adapter: Tensors
    optimizer: Tensors
    best: Tensors


class Unfinished:
    """The folder of an unfinished run.

    Args:
        folder: where checkpoints lie.
        settings: what the run depends on, JSON-serialisable; a run goes on only under the same.
        complete_folder: makes a folder that appears whole or not at all (given from above: the layer of checkpoints).
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], complete_folder: CompleteFolder) -> None:
        self.folder, self.settings, self._complete = folder, dict(settings), complete_folder

    def exists(self) -> bool:
        return self._last() is not None

    def log(self, entry: Mapping[str, Any]) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(self.folder / LOG, "a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
        except OSError as error:
            raise self._unwritable(error) from error

    def save(self, moment: Checkpoint) -> None:
        """Writes a checkpoint and then removes the older ones.

        Raises:
            PyPruneError: it cannot be written; the one before it is still there.
        """
        from safetensors.torch import save_file

        older = self._all()
        target = self.folder / f"step-{moment.history.step:06d}"
        if target in older:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._complete(target) as work:
                for name in ("adapter", "optimizer", "best"):
                    tensors = getattr(moment, name)
                    if tensors:
                        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, work / _file(name))
                text = json.dumps({"settings": self.settings, "history": asdict(moment.history)})
                (work / STATE).write_text(text, encoding="utf-8")
        except OSError as error:
            raise self._unwritable(error) from error
        except PyPruneError as error:
            raise PyPruneError("checkpoint_dir", str(self.folder), error.problem, error.hint) from error
        self._sweep(older)

    def load(self) -> Checkpoint | None:
        """The last checkpoint; None without one.

        Raises:
            PyPruneError: it was made under other settings, or cannot be read.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        last = self._last()
        if last is None:
            return None
        try:
            data = json.loads((last / STATE).read_text(encoding="utf-8"))
            parts = {n: load_file(last / _file(n)) if (last / _file(n)).exists() else {} for n in _PARTS}
            history = History(**data["history"])
            before = data["settings"]
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise PyPruneError("resume", str(last), f"cannot be read: {error}", "Remove that folder.") from None
        now = json.loads(json.dumps(self.settings))
        changed = [k for k in {**before, **now} if before.get(k) != now.get(k)]
        if changed:
            told = ", ".join(f"{k} was {before.get(k)} and is {now.get(k)}" for k in changed)
            hint = "Give the same options and data, or remove that folder to begin anew."
            raise PyPruneError("resume", str(self.folder), f"was begun otherwise: {told}", hint)
        return Checkpoint(history, **parts)

    def remove(self) -> None:
        """The run is finished, or begins anew."""
        self._sweep(self._all())
        with suppress(OSError):  # another process was quicker, or the teacher's answers stay
            (self.folder / LOG).unlink()
            self.folder.rmdir()

    def _all(self) -> list[Path]:
        return sorted(p for p in self.folder.glob("step-*") if p.is_dir())

    def _sweep(self, folders: Iterable[Path]) -> None:
        """Removes checkpoints, and what a killed process left of one that it was writing or removing."""
        for folder in folders:
            with suppress(OSError):  # under its own name half of it would pass for a checkpoint
                folder.rename(folder.with_name(f".{folder.name}.{os.getpid()}.old"))
        for folder in self.folder.glob(".step-*"):
            shutil.rmtree(folder, ignore_errors=True)

    def _last(self) -> Path | None:
        return next(reversed(self._all()), None)

    def _unwritable(self, error: OSError) -> PyPruneError:
        reason = error.strerror or str(error)
        hint = "Free some space." if error.errno == ENOSPC else "Name another folder."
        return PyPruneError("checkpoint_dir", str(self.folder), f"cannot be written: {reason}", hint)


_PARTS = ("adapter", "optimizer", "best")


def _file(name: str) -> str:
    return f"{name}.safetensors"
