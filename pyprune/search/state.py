"""What a search has found so far, in a JSON file that is always whole, so that a killed search goes on."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from pyprune.errors import PyPruneError
from pyprune.files import write_text
from pyprune.importance.cache import running_versions
from pyprune.importance.fingerprint import fingerprint, fingerprint_of_model

FORMAT = "pyprune-search"
VERSION = 1


@dataclass
class State:
    """Everything that the next generation depends on.

    Attributes:
        fingerprint: of model, calibration, order of removal, limits, target and options.
        starts: name, widths and divergence on the screening tokens and on all (None where screening sufficed), in the
            order in which they were tried.
        best: widths of the best genome, in the order of the groups.
        anchor: widths at which the inputs of refits were collected.
        verified: the best genome that was measured with refits of its own: widths, divergence, screening.
        kl: divergence of the best on all held-out tokens, nats a token.
        screened: the same on the screening tokens.
        scale: size of the next moves.
        generation: generations that are over.
        points, kls: every genome that was tried, with its divergence on the screening tokens, brought to the scale of
            the best genome's last measure.
        evaluations: of candidates, on whatever tokens.
        seconds: spent, in all runs.
        history: generation, evaluations, divergence of the best, whether it was measured with refits of its own, and
            seconds, where the best changed or was measured anew.
    """

    fingerprint: str
    starts: list[dict[str, Any]] = field(default_factory=list)
    best: list[int] = field(default_factory=list)
    anchor: list[int] = field(default_factory=list)
    verified: dict[str, Any] | None = None
    kl: float = float("inf")
    screened: float = float("inf")
    scale: float = 1.0
    generation: int = 0
    points: list[list[int]] = field(default_factory=list)
    kls: list[float] = field(default_factory=list)
    evaluations: int = 0
    seconds: float = 0.0
    history: list[dict[str, Any]] = field(default_factory=list)

    def save(self, file: Path | None) -> None:
        """Write it; nothing without a file.

        Raises:
            PyPruneError: it cannot be written.
        """
        if file is None:
            return
        try:
            write_text(file, json.dumps({"format": FORMAT, "version": VERSION, **asdict(self)}))
        except OSError as error:
            hint = "Name a file in a folder that can be written, on a disk with room."
            raise PyPruneError("search_file", str(file), f"cannot be written: {error.strerror}", hint) from error


def load_state(file: Path | None, fingerprint: str, overwrite: bool = False) -> State:
    """The state in ``file``, or a new one where there is none.

    Raises:
        PyPruneError: the file holds something else, or another search and ``overwrite`` is off.
    """
    if file is None or not file.exists():
        return State(fingerprint)
    hint = "Remove it, name another file, or set overwrite to begin anew."
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(data, dict) or data.pop("format", None) != FORMAT or data.pop("version", None) != VERSION:
            raise ValueError
        found = State(**data)
    except (OSError, ValueError, TypeError):
        if overwrite and file.is_file():
            return State(fingerprint)
        raise PyPruneError("search_file", str(file), "does not hold the state of a search", hint) from None
    if found.fingerprint == fingerprint:
        return found
    if overwrite:
        return State(fingerprint)
    problem = "holds a search of another model, calibration or request, or is of other versions of the packages"
    raise PyPruneError("search_file", str(file), problem, hint)


def fingerprint_of_search(model: nn.Module, values: Any) -> str:
    """SHA-256 over the model, the versions that run, and nested plain values and tensors."""
    return fingerprint([fingerprint_of_model(model), running_versions(), values])
